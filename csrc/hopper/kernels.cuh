// Which instance a step takes. Compiled once for each number type: kernels_bfloat16.cu, kernels_float16.cu.
#pragma once
#include "hopper/step_kernel.cuh"

namespace memvp::hopper {

template <class T>
StepKernel step_kernel_of(StepKind kind, bool gated) {
  switch (kind) {
    case StepKind::kHidden:
      return gated ? ffn_step_kernel<T, StepKind::kHidden, true> : ffn_step_kernel<T, StepKind::kHidden, false>;
    case StepKind::kDHidden:
      return gated ? ffn_step_kernel<T, StepKind::kDHidden, true> : ffn_step_kernel<T, StepKind::kDHidden, false>;
    default:
      return ffn_step_kernel<T, StepKind::kOutput, false>;
  }
}

}  // namespace memvp::hopper
