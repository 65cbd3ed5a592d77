// The contract's activations in float32. NaN goes in and comes out.
#pragma once
#include "common/platform.cuh"
#include "decode/ffn_decode.h"

namespace memvp {

// v * sigmoid(w)
MEMVP_DEVICE float times_sigmoid(float v, float w) {
#ifdef __CUDACC__
  return __fdividef(v, 1.0f + __expf(-w));
#else
  return v / (1.0f + std::exp(-w));
#endif
}

MEMVP_DEVICE float activate(DecodeActivation activation, float v) {
  switch (activation) {
    case DecodeActivation::kRelu:
      return v < 0.0f ? 0.0f : v;
    case DecodeActivation::kGelu:
      return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case DecodeActivation::kGeluTanh:  // (1 + tanh(u)) / 2 = sigmoid(2 u)
      return times_sigmoid(v, 1.5957691216057308f * (v + 0.044715f * v * v * v));
    default:
      return times_sigmoid(v, v);
  }
}

}  // namespace memvp
