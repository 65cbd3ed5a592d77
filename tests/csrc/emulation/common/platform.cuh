// CUDA's own names, as far as the kernels use them, for a compiler that is not nvcc.
#pragma once
#ifdef __CUDACC__
#error "the emulation is for compilers other than nvcc"
#endif
#include "runtime/launches.h"
#include "runtime/threads.h"

#define MEMVP_DEVICE static inline
#define MEMVP_HOST_DEVICE
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (memvp::emulation::this_thread().index)
#define blockIdx (memvp::emulation::this_thread().block->index)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

inline void __syncthreads(MEMVP_SITE) {
  memvp::emulation::sync_block(MEMVP_HERE("__syncthreads"));
}
