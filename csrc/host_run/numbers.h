// The two 16-bit number types in plain C++: what the chip converts in one instruction.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace memvp::host_run {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float float_of_bfloat(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t bfloat_of_float(float f) {
  const uint32_t u = bit_cast<uint32_t>(f);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1)) >> 16);
}

inline float float_of_half(uint16_t bits) {
  float f =
      bit_cast<float>((bits & 0x7FFFu) << 13) * 0x1p112f;  // the fraction in its place, the exponent's bias mended
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

}  // namespace memvp::host_run
