// CUDA's own names, as far as the kernels use them, for a compiler that is not nvcc. Include before kernel source.
#pragma once
#ifdef __CUDACC__
#error "host_run is for compilers other than nvcc"
#endif
#include "host_run/chain.h"
#include "host_run/primitives.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (memvp::host_run::this_thread().index)
#define blockIdx (memvp::host_run::this_thread().block->index)

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
  memvp::host_run::sync_block({file, line, "__syncthreads"});
}
