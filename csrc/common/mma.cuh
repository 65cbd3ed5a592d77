// Tensor-core products of one warp, c[16 x 8] += a[16 x 16] b[16 x 8], with 16-bit operands and float32 sums, and the
// matrix loads that bring operands from shared memory.
//
// Lane l has group g = l / 4 and member t = l % 4. It holds c[g][2t], c[g][2t+1], c[g+8][2t], c[g+8][2t+1];
// of a the words a[g][2t..], a[g+8][2t..], a[g][2t+8..], a[g+8][2t+8..]; of b the words b[2t..][g], b[2t+8..][g].
#pragma once
#include "common/memory.cuh"
#include "common/numbers.cuh"

namespace memvp {

#define MEMVP_MMA(number, type)                                                                            \
  MEMVP_DEVICE void mma_16x8x16(number, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                                uint32_t b0, uint32_t b1) {                                                \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                             \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                                                     \
        "{%0,%1,%2,%3};"                                                                                   \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                           \
  }
MEMVP_MMA(BFloat16, "bf16")
MEMVP_MMA(Float16, "f16")
#undef MEMVP_MMA

// Four 8 x 8 matrices: lane l names row l % 8 (16 bytes) of matrix l / 8, and gets word t of row g of each, as an mma
// takes them.
MEMVP_DEVICE void ldmatrix(uint32_t (&words)[4], const uint4* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the matrices' transposes: words of column g, rows 2t and 2t + 1.
MEMVP_DEVICE void ldmatrix_transposed(uint32_t (&words)[4], const uint4* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace memvp
