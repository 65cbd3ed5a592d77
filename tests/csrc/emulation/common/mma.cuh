// The warp's tensor-core product and matrix loads, from what 32 lanes bring.
#pragma once
#include "common/memory.cuh"
#include "common/numbers.cuh"

namespace memvp {

namespace emulation {

inline void check_row(const void* row, const char* what) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail(text("misaligned row of %s", what));
}

}  // namespace emulation

template <class T>
void mma_16x8x16(T, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                 MEMVP_SITE) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands operands{{a0, a1, a2, a3}, {b0, b1}};
  emulation::meet_warp(&operands, c, MEMVP_HERE("mma.sync"), [](emulation::Warp& warp) {
    float A[16][16], B[16][8], C[16][8];
    const auto half = [](uint32_t word, int i) { return to_float(T{static_cast<uint16_t>(word >> 16 * i)}); };
    for (int lane = 0; lane < 32; ++lane) {
      const auto* in = static_cast<const Operands*>(warp.in[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) A[g + i / 2 % 2 * 8][t * 2 + i % 2 + i / 4 * 8] = half(in->a[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) B[t * 2 + i % 2 + i / 2 * 8][g] = half(in->b[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) C[g + i / 2 * 8][t * 2 + i % 2] = static_cast<const float*>(warp.out[lane])[i];
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) static_cast<float*>(warp.out[lane])[i] = C[g + i / 2 * 8][t * 2 + i % 2];
    }
  });
}

// Lane l names row l % 8 of matrix l / 8, and gets word l % 4 of row l / 4 of each.
inline void ldmatrix(uint32_t (&words)[4], const uint4* row, MEMVP_SITE) {
  emulation::check_row(row, "ldmatrix");
  const uint4 mine = *row;  // the lane's own access, which the sanitizers see
  emulation::meet_warp(&mine, words, MEMVP_HERE("ldmatrix"), [](emulation::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        static_cast<uint32_t*>(warp.out[lane])[matrix] =
            word_of(*static_cast<const uint4*>(warp.in[matrix * 8 + lane / 4]), lane % 4);
  });
}

// The same of the transposes: halves l / 4 of rows 2 (l % 4) and 2 (l % 4) + 1.
inline void ldmatrix_transposed(uint32_t (&words)[4], const uint4* row, MEMVP_SITE) {
  emulation::check_row(row, "ldmatrix");
  const uint4 mine = *row;
  emulation::meet_warp(&mine, words, MEMVP_HERE("ldmatrix.trans"), [](emulation::Warp& warp) {
    const auto half = [&](int matrix, int r, int column) {
      return word_of(*static_cast<const uint4*>(warp.in[matrix * 8 + r]), column / 2) >> column % 2 * 16 & 0xFFFFu;
    };
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        static_cast<uint32_t*>(warp.out[lane])[matrix] =
            half(matrix, lane % 4 * 2, lane / 4) | half(matrix, lane % 4 * 2 + 1, lane / 4) << 16;
  });
}

}  // namespace memvp
