// The three launches of a step, in their order: which kernel, how many blocks, how much shared memory. The same for the
// device and for the host run; `launch(kernel, blocks, shared bytes, args, chained)` is theirs.
#pragma once
#include "decode/plan.h"

namespace memvp {
struct BFloat16;
struct Float16;
}  // namespace memvp

namespace memvp::decode {

// Of kernels.cuh.
template <class T>
DecodeKernel hidden_kernel_of(const DecodePlan& plan);
template <class T>
DecodeKernel values_kernel_of(const DecodePlan& plan);
template <class T>
DecodeKernel finish_kernel_of(const DecodePlan& plan);

// The first error of `launch`, or 0.
template <class T, class Launch>
int launch_step(const DecodeArgs& args, Launch launch) {
  const DecodePlan& plan = args.plan;
  const int first = plan.hidden_blocks + plan.score_blocks, second = plan.value_blocks + plan.memory_blocks;
  bool chained = false;  // a launch before this one belongs to the step
  int error = 0;
  if (error == 0 && first > 0) {
    error = launch(hidden_kernel_of<T>(plan), first, hidden_shared_bytes(plan), args, chained);
    chained = true;
  }
  if (error == 0 && second > 0) {
    error = launch(values_kernel_of<T>(plan), second, values_shared_bytes(plan), args, chained);
    chained = true;
  }
  if (error == 0) {
    error = launch(finish_kernel_of<T>(plan), plan.finish_blocks, finish_shared_bytes(), args, chained);
  }
  return error;
}

template <class Launch>
int launch_step(const FfnDecodeParams& params, Launch launch) {
  if (why_unsupported(params) != nullptr) return kDecodeUnsupported;
  if (params.tokens == 0 || params.width == 0) return 0;
  DecodeArgs args{params, make_plan(params)};
  // Memory without slots or rows is no memory, and key without pairs no FFN.
  if (!has_memory(params)) args.p.visual_key = args.p.visual_value = args.p.visual_basis = DecodeTensor{};
  return params.type == DecodeType::kBFloat16 ? launch_step<BFloat16>(args, launch)
                                              : launch_step<Float16>(args, launch);
}

}  // namespace memvp::decode
