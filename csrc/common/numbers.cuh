// The two 16-bit number types as raw bits; arithmetic is float32. A `word` is 32 bits that hold two of them, the first
// in the low half.
#pragma once
#include "common/platform.cuh"

namespace memvp {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MEMVP_DEVICE float float_of_bits(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  return host_run::bit_cast<float>(bits);
#endif
}

MEMVP_DEVICE float to_float(BFloat16 h) {
  return float_of_bits(static_cast<uint32_t>(h.bits) << 16);
}

MEMVP_DEVICE float to_float(Float16 h) {
#ifdef __CUDACC__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
#else
  return host_run::float_of_half(h.bits);
#endif
}

// Both round to the nearest, ties to even.
MEMVP_DEVICE uint32_t pack(BFloat16, float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return host_run::bfloat_of_float(low) | static_cast<uint32_t>(host_run::bfloat_of_float(high)) << 16;
#endif
}

MEMVP_DEVICE uint32_t pack(Float16, float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return host_run::half_of_float(low) | static_cast<uint32_t>(host_run::half_of_float(high)) << 16;
#endif
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

// The low (high) halves of two words as one word: what turns two rows into pairs along the rows' own axis.
MEMVP_DEVICE uint32_t low_halves(uint32_t first, uint32_t second) {
#ifdef __CUDACC__
  return __byte_perm(first, second, 0x5410);
#else
  return (first & 0xFFFFu) | second << 16;
#endif
}
MEMVP_DEVICE uint32_t high_halves(uint32_t first, uint32_t second) {
#ifdef __CUDACC__
  return __byte_perm(first, second, 0x7632);
#else
  return first >> 16 | (second & 0xFFFF0000u);
#endif
}

MEMVP_DEVICE uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

}  // namespace memvp
