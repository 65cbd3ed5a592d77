// The operator's activations in float32. NaN in gives NaN out.
#pragma once
#include "common/intrinsics.cuh"
#include "common/types.h"

namespace memvp {

constexpr float kSqrtHalf = 0.70710678118654752f, kInvSqrtTwoPi = 0.39894228040143268f;
constexpr float kGeluTanhScale = 1.5957691216057308f;  // 2 sqrt(2 / pi)

// v * sigmoid(w)
MEMVP_DEVICE float times_sigmoid(float v, float w) {
  return fast_divide(v, 1.0f + fast_exp(-w));
}

MEMVP_DEVICE float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kRelu:
      return v < 0.0f ? 0.0f : v;
    case Activation::kGelu:
      return 0.5f * v * (1.0f + erff(v * kSqrtHalf));
    case Activation::kGeluTanh:  // (1 + tanh(u)) / 2 = sigmoid(2 u)
      return times_sigmoid(v, kGeluTanhScale * (v + 0.044715f * v * v * v));
    default:
      return times_sigmoid(v, v);
  }
}

// act(v), and its derivative in `slope`: the two share most of their work. The slope of relu at 0 is 0, as PyTorch's.
MEMVP_DEVICE float activate_with_slope(Activation activation, float v, float& slope) {
  switch (activation) {
    case Activation::kRelu:
      slope = v <= 0.0f ? 0.0f : 1.0f;
      return v < 0.0f ? 0.0f : v;
    case Activation::kGelu: {
      const float below = 0.5f * (1.0f + erff(v * kSqrtHalf));
      slope = below + v * kInvSqrtTwoPi * fast_exp(-0.5f * v * v);
      return v * below;
    }
    case Activation::kGeluTanh: {
      const float s = times_sigmoid(1.0f, kGeluTanhScale * (v + 0.044715f * v * v * v)), active = v * s;
      slope = s + active * (1.0f - s) * kGeluTanhScale * (1.0f + 0.134145f * v * v);
      return active;
    }
    default: {
      const float s = times_sigmoid(1.0f, v), active = v * s;
      slope = s + active * (1.0f - s);
      return active;
    }
  }
}

}  // namespace memvp
