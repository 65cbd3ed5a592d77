// The steps' kernels for bfloat16: a file of its own, so that the two number types compile side by side.
#include "hopper/kernels.cuh"

namespace memvp::hopper {

template StepKernel step_kernel_of<BFloat16>(StepKind, bool);

}  // namespace memvp::hopper
