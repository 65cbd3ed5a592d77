// The two 16-bit number types; arithmetic is float32. A `word` is 32 bits that hold two of them, the first in the low
// half.
#pragma once
#include "common/intrinsics.cuh"

namespace memvp {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MEMVP_DEVICE float to_float(BFloat16 h) {
  return float_of_bits(static_cast<uint32_t>(h.bits) << 16);
}
MEMVP_DEVICE float to_float(Float16 h) {
  return float_of_half(h.bits);
}

MEMVP_DEVICE uint32_t pack(BFloat16, float low, float high) {
  return pack_bfloat(low, high);
}
MEMVP_DEVICE uint32_t pack(Float16, float low, float high) {
  return pack_half(low, high);
}

template <class T>
MEMVP_DEVICE T round_to(float f) {
  return T{static_cast<uint16_t>(pack(T{}, f, 0.0f))};
}

template <class T>
MEMVP_DEVICE float low_float(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <class T>
MEMVP_DEVICE float high_float(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

MEMVP_DEVICE uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

}  // namespace memvp
