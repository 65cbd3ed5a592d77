// The launches of a step, in their order: which kernel, how many blocks, how much shared memory. The same for the
// device and for the host run; `launch(kernel, blocks, shared bytes, args, kind)` is theirs.
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
template <class T>
DecodeKernel step_kernel_of(const DecodePlan& plan);

// kChained: a launch before this one belongs to the step, and this one waits for it where it must. kCooperative: its
// blocks wait for one another, and so must all be resident.
enum class LaunchKind { kPlain, kChained, kCooperative };

// The first error of `launch`, or 0.
template <class T, class Launch>
int launch_step(const DecodeArgs& args, Launch launch) {
  const DecodePlan& plan = args.plan;
  if (plan.step_blocks > 0)
    return launch(step_kernel_of<T>(plan), plan.step_blocks, step_shared_bytes(plan), args, LaunchKind::kCooperative);
  LaunchKind kind = LaunchKind::kPlain;
  int error = 0;
  if (error == 0 && plan.first_blocks() > 0) {
    error = launch(hidden_kernel_of<T>(plan), plan.first_blocks(), hidden_shared_bytes(plan), args, kind);
    kind = LaunchKind::kChained;
  }
  if (error == 0 && plan.second_blocks() > 0) {
    error = launch(values_kernel_of<T>(plan), plan.second_blocks(), values_shared_bytes(plan), args, kind);
    kind = LaunchKind::kChained;
  }
  if (error == 0) error = launch(finish_kernel_of<T>(plan), plan.finish_blocks, finish_shared_bytes(), args, kind);
  return error;
}

// one_launch: where the shapes allow it.
template <class Launch>
int launch_step(const FfnDecodeParams& params, bool one_launch, Launch launch) {
  if (why_unsupported(params) != nullptr) return kDecodeUnsupported;
  if (params.tokens == 0 || params.width == 0) return 0;
  DecodeArgs args{params, make_plan(params, one_launch)};
  // Memory without slots or rows is no memory, and key without pairs no FFN.
  if (!has_memory(params)) args.p.visual_key = args.p.visual_value = args.p.visual_basis = DecodeTensor{};
  return params.type == DecodeType::kBFloat16 ? launch_step<BFloat16>(args, launch)
                                              : launch_step<Float16>(args, launch);
}

}  // namespace memvp::decode
