// Which instance a product takes. Compiled once for each number type: kernels_bfloat16.cu, kernels_float16.cu.
#pragma once
#include "hopper/gemm_kernel.cuh"

namespace memvp::hopper {

template <class T>
GemmKernel gemm_kernel_of(GemmKind kind, bool gated) {
  switch (kind) {
    case GemmKind::kHidden:
      return gated ? ffn_gemm_kernel<T, GemmKind::kHidden, true> : ffn_gemm_kernel<T, GemmKind::kHidden, false>;
    case GemmKind::kDHidden:
      return gated ? ffn_gemm_kernel<T, GemmKind::kDHidden, true> : ffn_gemm_kernel<T, GemmKind::kDHidden, false>;
    default:
      return ffn_gemm_kernel<T, GemmKind::kOutput, false>;
  }
}

}  // namespace memvp::hopper
