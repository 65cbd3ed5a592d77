// The contract's activations in float32. NaN goes in and comes out.
#pragma once
#include "common/platform.cuh"
#include "decode/ffn_decode.h"

namespace memvp {

MEMVP_DEVICE float exponential(float v) {
#ifdef __CUDACC__
  return __expf(v);
#else
  return std::exp(v);
#endif
}

// v * sigmoid(w)
MEMVP_DEVICE float times_sigmoid(float v, float w) {
#ifdef __CUDACC__
  return __fdividef(v, 1.0f + exponential(-w));
#else
  return v / (1.0f + exponential(-w));
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

// act(v), and its derivative in `slope`: the two share most of their work. Of relu at 0 the slope is 0, as PyTorch's.
MEMVP_DEVICE float activate_derivative(DecodeActivation activation, float v, float& slope) {
  float active;
  switch (activation) {
    case DecodeActivation::kRelu:
      slope = v <= 0.0f ? 0.0f : 1.0f;
      return v < 0.0f ? 0.0f : v;
    case DecodeActivation::kGelu: {
      const float below = 0.5f * (1.0f + erff(v * 0.70710678118654752f));
      slope = below + v * 0.39894228040143268f * exponential(-0.5f * v * v);
      return v * below;
    }
    case DecodeActivation::kGeluTanh: {
      const float s = times_sigmoid(1.0f, 1.5957691216057308f * (v + 0.044715f * v * v * v));
      active = v * s;
      slope = s + active * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * v * v);
      return active;
    }
    default: {
      const float s = times_sigmoid(1.0f, v);
      active = v * s;
      slope = s + active * (1.0f - s);
      return active;
    }
  }
}

}  // namespace memvp
