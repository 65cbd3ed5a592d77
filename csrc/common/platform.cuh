// The one switch between the two compilers. nvcc sees CUDA; any other compiler sees csrc/host_run, which runs the same
// kernels on a CPU. Files outside csrc/common name no PTX, no CUDA header and no compiler.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define MEMVP_DEVICE static __device__ __forceinline__
#define MEMVP_HOST_DEVICE __host__ __device__
#define MEMVP_SITE
#define MEMVP_AND_SITE
#else
#include "host_run/cuda_host_run.h"
#define MEMVP_DEVICE static inline
#define MEMVP_HOST_DEVICE
#define MEMVP_AND_SITE , MEMVP_SITE  // of a primitive's parameters: who called it, for the host run's messages
#endif

// Hopper's own units can be named here: a kernel made of them has its body only where this is defined, for the library
// has every kernel for every architecture.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MEMVP_HOPPER 1
#endif

namespace memvp {

template <class I>
MEMVP_HOST_DEVICE constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
template <class I>
MEMVP_HOST_DEVICE constexpr I round_up(I a, I b) {
  return ceil_div(a, b) * b;
}
template <class I>
MEMVP_HOST_DEVICE constexpr I least(I a, I b) {
  return a < b ? a : b;
}
template <class I>
MEMVP_HOST_DEVICE constexpr I greatest(I a, I b) {
  return a < b ? b : a;
}

}  // namespace memvp
