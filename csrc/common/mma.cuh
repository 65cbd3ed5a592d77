// The tensor-core product that all of decode is made of: c[16 x 8] += a[16 x 16] b[16 x 8], 16-bit in, float32 out.
//
// Lane l has group g = l / 4 and member t = l % 4. It holds c[g][2t], c[g][2t+1], c[g+8][2t], c[g+8][2t+1];
// of a the words a[g][2t..], a[g+8][2t..], a[g][2t+8..], a[g+8][2t+8..]; of b the words b[2t..][g], b[2t+8..][g].
#pragma once
#include "common/numbers.cuh"

namespace memvp {

MEMVP_DEVICE void mma_16x8x16(BFloat16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                              uint32_t b1) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  host_run::mma_16x8x16(c, {a0, a1, a2, a3}, {b0, b1}, host_run::float_of_bfloat);
#endif
}

MEMVP_DEVICE void mma_16x8x16(Float16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                              uint32_t b1) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  host_run::mma_16x8x16(c, {a0, a1, a2, a3}, {b0, b1}, host_run::float_of_half);
#endif
}

// Four 8 x 8 matrices from shared memory: lane l names row l % 8 (16 bytes) of matrix l / 8, and gets of each the word
// t of row g. In the registers of an mma's operands, as they must lie.
MEMVP_DEVICE void load_matrices(uint32_t (&words)[4], const uint4* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  host_run::load_matrices(words, row);
#endif
}

// The same of the matrices' transposes: words of column g, rows 2t and 2t + 1.
MEMVP_DEVICE void load_matrices_transposed(uint32_t (&words)[4], const uint4* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  host_run::load_matrices_transposed(words, row);
#endif
}

// c[16 rows x 8 tokens] += rows · tokens over 32 elements of k, each operand contiguous along k. Every lane brings the
// 16 bytes at k = 8t of its two rows and of its token: the same order of k on both sides, so neither needs a shuffle.
template <class T>
MEMVP_DEVICE void mma_rows(float (&c)[4], const uint4& row, const uint4& row8, const uint4& token) {
  mma_16x8x16(T{}, c, row.x, row8.x, row.y, row8.y, token.x, token.y);
  mma_16x8x16(T{}, c, row.z, row8.z, row.w, row8.w, token.z, token.w);
}

// c[4][64 columns x 8 tokens] += the same over 16 elements of k for an operand contiguous along its columns. A lane
// brings the 16 bytes at column 8g of the rows k = 4t .. 4t+3, and of its token those four k. Then c[i][0], c[i][1]
// belong to column 8g + 2i and tokens 2t, 2t + 1, and c[i][2], c[i][3] to column 8g + 2i + 1.
template <class T>
MEMVP_DEVICE void mma_columns(float (&c)[4][4], const uint4 (&row)[4], const uint2& token) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t r0 = word_of(row[0], i), r1 = word_of(row[1], i), r2 = word_of(row[2], i), r3 = word_of(row[3], i);
    mma_16x8x16(T{}, c[i], low_halves(r0, r1), high_halves(r0, r1), low_halves(r2, r3), high_halves(r2, r3), token.x,
                token.y);
  }
}

}  // namespace memvp
