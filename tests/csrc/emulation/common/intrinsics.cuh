// Conversions of the two 16-bit number types in plain C++: what the chip does in one instruction.
#pragma once
#include <cmath>

#include "common/platform.cuh"

namespace memvp {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float float_of_bits(uint32_t bits) {
  return bit_cast<float>(bits);
}

inline float float_of_bfloat(uint16_t bits) {
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t bfloat_of_float(float f) {
  const uint32_t u = bit_cast<uint32_t>(f);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1)) >> 16);
}

inline float float_of_half(uint16_t bits) {
  float f = float_of_bits((bits & 0x7FFFu) << 13) * 0x1p112f;  // the fraction in its place, the exponent's bias mended
  if ((bits & 0x7C00) == 0x7C00) f = (bits & 0x3FF) == 0 ? HUGE_VALF : NAN;
  return bits >> 15 ? -f : f;
}

inline uint16_t half_of_float(float f) {
  const uint16_t sign = static_cast<uint16_t>(bit_cast<uint32_t>(f) >> 16 & 0x8000u);
  const float a = std::fabs(f);
  if (std::isnan(f)) return 0x7FFF;
  if (a >= 65520.0f) return sign | 0x7C00;
  if (a == 0.0f) return sign;
  int exponent = 0;
  std::frexp(a, &exponent);                                    // a = m 2^exponent, m in [0.5, 1)
  const int step = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last bit that is kept
  const float units = std::nearbyint(std::ldexp(a, -step));    // exact scaling: rounds once
  // A carry out of the fraction lands in the exponent, which is where it belongs.
  const int bits = step == -24 ? static_cast<int>(units) : ((step + 25) << 10) + static_cast<int>(units) - 1024;
  return sign | static_cast<uint16_t>(bits);
}

inline uint32_t pack_bfloat(float low, float high) {
  return bfloat_of_float(low) | static_cast<uint32_t>(bfloat_of_float(high)) << 16;
}
inline uint32_t pack_half(float low, float high) {
  return half_of_float(low) | static_cast<uint32_t>(half_of_float(high)) << 16;
}

inline uint32_t low_halves(uint32_t first, uint32_t second) {
  return (first & 0xFFFFu) | second << 16;
}
inline uint32_t high_halves(uint32_t first, uint32_t second) {
  return first >> 16 | (second & 0xFFFF0000u);
}

inline float fast_exp(float v) {
  return std::exp(v);
}
inline float fast_divide(float a, float b) {
  return a / b;
}

inline int warp_uniform(int number) {
  return number;
}

}  // namespace memvp
