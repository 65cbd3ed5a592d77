// Number types and activations as callers name them. Needs neither CUDA nor Python.
#pragma once
#include <cstdint>

namespace memvp {

enum class DType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };
enum class Activation : int32_t { kRelu = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3 };

}  // namespace memvp
