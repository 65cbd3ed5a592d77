// The launches of a decode step in their order: which kernel, how many blocks, how much shared memory. The caller's
// `launch(kernel, blocks, shared bytes, args, kind)` launches on a device or in the emulation.
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
DecodeKernel cooperative_kernel_of(const DecodePlan& plan);

// kPdl: the launch ahead belongs to the step, and the kernel waits for it where it must. kCooperative: the blocks wait
// for one another, and so must all be resident.
enum class LaunchKind { kPlain, kPdl, kCooperative };

// The first error of `launch`, or 0.
template <class T, class Launch>
int launch_step(const DecodeArgs& args, Launch launch) {
  const DecodePlan& plan = args.plan;
  if (plan.cooperative_blocks > 0)
    return launch(cooperative_kernel_of<T>(plan), plan.cooperative_blocks, cooperative_shared_bytes(plan), args,
                  LaunchKind::kCooperative);
  LaunchKind kind = LaunchKind::kPlain;
  int error = 0;
  if (error == 0 && plan.first_blocks() > 0) {
    error = launch(hidden_kernel_of<T>(plan), plan.first_blocks(), hidden_shared_bytes(plan), args, kind);
    kind = LaunchKind::kPdl;
  }
  if (error == 0 && plan.second_blocks() > 0) {
    error = launch(values_kernel_of<T>(plan), plan.second_blocks(), values_shared_bytes(plan), args, kind);
    kind = LaunchKind::kPdl;
  }
  if (error == 0) error = launch(finish_kernel_of<T>(plan), plan.finish_blocks, finish_shared_bytes(), args, kind);
  return error;
}

// cooperative: one launch, where the shapes allow it.
template <class Launch>
int launch_step(const FfnDecodeParams& params, bool cooperative, Launch launch) {
  if (why_unsupported(params) != nullptr) return kDecodeUnsupported;
  if (params.tokens == 0 || params.width == 0) return 0;
  DecodeArgs args{params, make_plan(params, cooperative)};
  // Memory without slots or rows is no memory, and key without pairs no FFN.
  if (!has_memory(params)) args.p.visual_key = args.p.visual_value = args.p.visual_basis = DecodeTensor{};
  return params.type == DType::kBFloat16 ? launch_step<BFloat16>(args, launch) : launch_step<Float16>(args, launch);
}

}  // namespace memvp::decode
