// How device code reads the arguments: rows of any stride and type, element by element or 16 bytes at a time.
#pragma once
#include <type_traits>

#include "common/memory.cuh"
#include "common/numbers.cuh"
#include "decode/plan.h"

namespace memvp::decode {

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
  const bool wide = t.type == DType::kFloat32;
  return {t.data == nullptr ? nullptr : static_cast<const char*>(t.data) + offset * (wide ? 4 : 2), stride, wide};
}
// Row i of a matrix; slot m of memory i of a (memories, slots, ·) tensor.
MEMVP_DEVICE Row row_of(const DecodeTensor& t, int64_t i) {
  return row_of(t, i * t.strides[0], t.strides[1]);
}
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

// What the compiler knows of a matrix: kNarrow, rows of T read 16 bytes at a time; kChunks, rows of T or float32 read
// so; kElements, nothing.
enum class Reading { kNarrow, kChunks, kElements };

// Elements k .. k + 7 of a row as float32, zero from `end` on. By chunks `end` is a multiple of 8.
template <class T, Reading kReading>
MEMVP_DEVICE void load_floats(float (&f)[8], const Row& row, int64_t k, int64_t end) {
  if (kReading == Reading::kElements) {
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = k + i < end ? element<T>(row, k + i) : 0.0f;
  } else if (kReading == Reading::kChunks && row.wide) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 v = load_input16(row.data + 4 * (k + 4 * h), k < end);
#pragma unroll
      for (int i = 0; i < 4; ++i) f[4 * h + i] = float_of_bits(word_of(v, i));
    }
  } else {
    const uint4 v = load_input16(row.data + 2 * k, k < end);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[2 * i] = low_float<T>(word_of(v, i));
      f[2 * i + 1] = high_float<T>(word_of(v, i));
    }
  }
}

template <class T>
MEMVP_DEVICE uint4 pack8(const float (&f)[8]) {
  return make_uint4(pack(T{}, f[0], f[1]), pack(T{}, f[2], f[3]), pack(T{}, f[4], f[5]), pack(T{}, f[6], f[7]));
}

// The same eight as an operand of an mma.
template <class T, Reading kReading>
MEMVP_DEVICE uint4 load8(const Row& row, int64_t k, int64_t end) {
  if (kReading == Reading::kNarrow || (kReading == Reading::kChunks && !row.wide))
    return load_input16(row.data + 2 * k, k < end);
  float f[8];
  load_floats<T, kReading>(f, row, k, end);
  return pack8<T>(f);
}

// Eight elements of row + position, added in float32 and rounded once.
template <class T, Reading kReading>
MEMVP_DEVICE uint4 load8(const Row& row, const Row& position, int64_t k, int64_t end) {
  float f[8], g[8];
  load_floats<T, kReading>(f, row, k, end);
  load_floats<T, kReading>(g, position, k, position.data == nullptr ? 0 : end);
#pragma unroll
  for (int i = 0; i < 8; ++i) f[i] += g[i];
  return pack8<T>(f);
}

template <Reading kReading>
using ReadingIs = std::integral_constant<Reading, kReading>;

// body(how to read these matrices): one of the instances that kBy16 leaves.
template <bool kBy16, class Body>
MEMVP_DEVICE void with_reading(const DecodeTensor& first, const DecodeTensor& second, Body body) {
  if constexpr (!kBy16)
    body(ReadingIs<Reading::kElements>{});
  else if (first.type == DType::kFloat32 || second.type == DType::kFloat32)
    body(ReadingIs<Reading::kChunks>{});
  else
    body(ReadingIs<Reading::kNarrow>{});
}

}  // namespace memvp::decode
