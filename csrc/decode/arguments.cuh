// What the three kernels of a step are given, and the parts of it as device code reads them.
#pragma once
#include "common/memory.cuh"
#include "common/numbers.cuh"
#include "decode/plan.h"

namespace memvp::decode {

struct DecodeArgs {
  FfnDecodeParams p;
  DecodePlan plan;
};

template <class V>
MEMVP_DEVICE V* in_workspace(const DecodeArgs& args, size_t at) {
  return reinterpret_cast<V*>(static_cast<char*>(args.p.workspace) + at);
}

// Numbers of an input along one axis. No numbers: data is nullptr.
struct Row {
  const char* data;
  int64_t stride;  // elements
  bool wide;       // float32, else T
};

MEMVP_DEVICE Row row_of(const DecodeTensor& t, int64_t offset, int64_t stride) {
  const bool wide = t.type == DecodeType::kFloat32;
  return {t.data == nullptr ? nullptr : static_cast<const char*>(t.data) + offset * (wide ? 4 : 2), stride, wide};
}
// Row i of a matrix; slot m of memory i of a (memories, slots, ·) tensor.
MEMVP_DEVICE Row row_of(const DecodeTensor& t, int64_t i) { return row_of(t, i * t.strides[0], t.strides[1]); }
MEMVP_DEVICE Row slot_of(const DecodeTensor& t, int64_t i, int64_t m) {
  return row_of(t, i * t.strides[0] + m * t.strides[1], t.strides[2]);
}

template <class T>
MEMVP_DEVICE float element(const Row& row, int64_t k) {
  if (row.wide) return load_input(reinterpret_cast<const float*>(row.data) + k * row.stride);
  return to_float(load_input(reinterpret_cast<const T*>(row.data) + k * row.stride));
}
// Element k of a vector that may be absent, then 0.
template <class T>
MEMVP_DEVICE float element_or_zero(const DecodeTensor& t, int64_t k) {
  return t.data == nullptr ? 0.0f : element<T>(row_of(t, 0, t.strides[0]), k);
}

// Elements k .. k + 7 of a row as float32, zero from `end` on. kBy16: whole 16-byte pieces, `end` a multiple of 8.
template <class T, bool kBy16>
MEMVP_DEVICE void load_floats(float (&f)[8], const Row& row, int64_t k, int64_t end) {
  if (kBy16 && row.wide) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 v = k < end ? load_input16(row.data + 4 * (k + 4 * h)) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) f[4 * h + i] = float_of_bits(word_of(v, i));
    }
  } else if (kBy16) {
    const uint4 v = k < end ? load_input16(row.data + 2 * k) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[2 * i] = low_float<T>(word_of(v, i));
      f[2 * i + 1] = high_float<T>(word_of(v, i));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = k + i < end ? element<T>(row, k + i) : 0.0f;
  }
}

template <class T>
MEMVP_DEVICE uint4 pack8(const float (&f)[8]) {
  return make_uint4(pack(T{}, f[0], f[1]), pack(T{}, f[2], f[3]), pack(T{}, f[4], f[5]), pack(T{}, f[6], f[7]));
}

// The same eight as an operand of an mma.
template <class T, bool kBy16>
MEMVP_DEVICE uint4 load8(const Row& row, int64_t k, int64_t end) {
  if (kBy16 && !row.wide) return k < end ? load_input16(row.data + 2 * k) : make_uint4(0, 0, 0, 0);
  float f[8];
  load_floats<T, kBy16>(f, row, k, end);
  return pack8<T>(f);
}

// Eight elements of row + position, added in float32 and rounded once.
template <class T, bool kBy16>
MEMVP_DEVICE uint4 load8(const Row& row, const Row& position, int64_t k, int64_t end) {
  if (position.data == nullptr) return load8<T, kBy16>(row, k, end);
  float f[8], g[8];
  load_floats<T, kBy16>(f, row, k, end);
  load_floats<T, kBy16>(g, position, k, end);
#pragma unroll
  for (int i = 0; i < 8; ++i) f[i] += g[i];
  return pack8<T>(f);
}

}  // namespace memvp::decode
