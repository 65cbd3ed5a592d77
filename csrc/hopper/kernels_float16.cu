// The steps' kernels for float16: a file of its own, so that the two number types compile side by side.
#include "hopper/kernels.cuh"

namespace memvp::hopper {

template StepKernel step_kernel_of<Float16>(StepKind, bool);

}  // namespace memvp::hopper
