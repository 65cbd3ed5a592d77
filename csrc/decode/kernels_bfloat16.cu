// The decode kernels for bfloat16: a file of its own, so that the two number types compile side by side.
#include "decode/kernels.cuh"

namespace memvp::decode {

template DecodeKernel hidden_kernel_of<BFloat16>(const DecodePlan&);
template DecodeKernel values_kernel_of<BFloat16>(const DecodePlan&);
template DecodeKernel finish_kernel_of<BFloat16>(const DecodePlan&);
template DecodeKernel cooperative_kernel_of<BFloat16>(const DecodePlan&);

}  // namespace memvp::decode
