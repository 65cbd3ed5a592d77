// Conversions and approximations that are one or two instructions. A 16-bit number is its raw bits.
#pragma once
#include "common/platform.cuh"

namespace memvp {

MEMVP_DEVICE float float_of_bits(uint32_t bits) {
  return __uint_as_float(bits);
}

MEMVP_DEVICE float float_of_half(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

// Two numbers in one word, rounded to the nearest, ties to even.
MEMVP_DEVICE uint32_t pack_bfloat(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
MEMVP_DEVICE uint32_t pack_half(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The low (high) halves of two words as one word: turns two rows into pairs along the rows' own axis.
MEMVP_DEVICE uint32_t low_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
MEMVP_DEVICE uint32_t high_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

MEMVP_DEVICE float fast_exp(float v) {
  return __expf(v);
}
MEMVP_DEVICE float fast_divide(float a, float b) {
  return __fdividef(a, b);
}

// Lane 0's number in all lanes: tells the compiler that a branch or an address is the same for the whole warp.
MEMVP_DEVICE int warp_uniform(int number) {
  return __shfl_sync(0xFFFFFFFFu, number, 0);
}

}  // namespace memvp
