// Which instance of each kernel a plan takes. Compiled once for each number type: kernels_bfloat16.cu,
// kernels_float16.cu.
#pragma once
#include "decode/cooperative.cuh"
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

template <class T>
DecodeKernel values_kernel_of(const DecodePlan& plan) {
  if (!plan.fast) return values_kernel<T, 0, false>;
  if (plan.value_across) return plan.value_tiles == 1 ? values_kernel<T, 1, true> : values_kernel<T, 8, true>;
  switch (plan.value_tiles) {
    case 1:
      return values_kernel<T, 1, false>;
    case 2:
      return values_kernel<T, 2, false>;
    case 4:
      return values_kernel<T, 4, false>;
    default:
      return values_kernel<T, 8, false>;
  }
}

template <class T>
DecodeKernel finish_kernel_of(const DecodePlan& plan) {
  return plan.fast ? finish_kernel<T, true> : finish_kernel<T, false>;
}

template <class T>
DecodeKernel cooperative_kernel_of(const DecodePlan& plan) {
  return plan.token_tiles == 1 ? cooperative_kernel<T, 1> : cooperative_kernel<T, 2>;
}

}  // namespace memvp::decode
