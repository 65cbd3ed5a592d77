// The Hopper kernels for bfloat16: a file of its own, so that the two number types compile side by side.
#include "hopper/kernels.cuh"

namespace memvp::hopper {

template GemmKernel gemm_kernel_of<BFloat16>(GemmKind, bool);

}  // namespace memvp::hopper
