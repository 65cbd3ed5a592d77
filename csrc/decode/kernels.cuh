// Which instance of each kernel a plan takes. Compiled once for each number type: kernels_bfloat16.cu,
// kernels_float16.cu.
#pragma once
#include "decode/finish.cuh"
#include "decode/launch.h"

namespace memvp::decode {

template <class T>
DecodeKernel hidden_kernel_of(const DecodePlan& plan) {
  if (!plan.fast) return hidden_kernel<T, 0>;
  switch (plan.token_tiles) {
    case 1:
      return hidden_kernel<T, 1>;
    case 2:
      return hidden_kernel<T, 2>;
    case 4:
      return hidden_kernel<T, 4>;
    default:
      return hidden_kernel<T, 8>;
  }
}

template <class T, bool kAcross>
DecodeKernel values_ring_of(const DecodePlan& plan) {
  switch (plan.token_tiles) {
    case 1:
      return values_kernel<T, 1, kAcross>;
    case 2:
      return values_kernel<T, 2, kAcross>;
    case 4:
      return values_kernel<T, 4, kAcross>;
    default:
      return values_kernel<T, 8, kAcross>;
  }
}
template <class T>
DecodeKernel values_kernel_of(const DecodePlan& plan) {
  if (!plan.fast) return values_kernel<T, 0, false>;
  return plan.value_across ? values_ring_of<T, true>(plan) : values_ring_of<T, false>(plan);
}

template <class T>
DecodeKernel finish_kernel_of(const DecodePlan& plan) {
  return plan.fast ? finish_kernel<T, true> : finish_kernel<T, false>;
}

}  // namespace memvp::decode
