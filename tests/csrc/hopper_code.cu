// Hopper's primitives for a look at what nvcc makes of them: the product that the host run carries out, and a kernel of
// those that it leaves out.
#include "hopper_product.h"

namespace memvp::hopper_test {

template <class T, int N, Major kB, int kGroups, int kStages>
__global__ void __launch_bounds__(128 * (kGroups + 1), 1) product_kernel(const __grid_constant__ Problem problem) {
#ifdef MEMVP_HOPPER
  TinyProduct<T, N, kB, kGroups, kStages>{problem}.run(1);
#endif
}

template __global__ void product_kernel<BFloat16, 64, Major::kK, 2, 2>(const __grid_constant__ Problem);
template __global__ void product_kernel<Float16, 128, Major::kMN, 1, 2>(const __grid_constant__ Problem);
template __global__ void product_kernel<BFloat16, 256, Major::kMN, 2, 2>(const __grid_constant__ Problem);
template __global__ void product_kernel<Float16, 256, Major::kK, 1, 2>(const __grid_constant__ Problem);

__global__ void __launch_bounds__(64, 1) other_kernel(const __grid_constant__ TensorMap map) {
#ifdef MEMVP_HOPPER
  if (threadIdx.x == 0) prefetch_map(map);
  uint4* rows = shared_at<uint4>(0, 64);  // eight rows of a tile
  const uint32_t words[4] = {threadIdx.x, 1, 2, 3};
  if (threadIdx.x >= 32) {
    store_matrices_transposed(rows + threadIdx.x % 32, words);
    fence_async_shared();
    arrive_some(1, 64);
    return;
  }
  sync_some(1, 64);
  if (threadIdx.x == 0) {
    store_tile(map, rows, 64, 8);
    commit_stores();
    wait_stores<0>();
  }
#endif
}

}  // namespace memvp::hopper_test
