// Hopper's asynchronous products of a warpgroup (128 threads): c[64 x 256] += a[64 x 16] b[16 x 256] from shared
// memory, 16-bit operands and float32 sums; registers that move between warpgroups; results back to shared memory.
// sm_90a.
//
// Thread t of the warpgroup, of warp w = t / 32 and lane l = t % 32, holds of c in acc[4j + 2i + e] row 16w + l/4 + 8i,
// column 8j + 2(l%4) + e. (PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16".)
#pragma once
#include "common/memory.cuh"
#include "common/numbers.cuh"

namespace memvp {

// The dimension along which an operand's 128-byte rows run: k, or the rows of a and columns of b.
enum class Major { kK, kMN };

// Where an operand begins and how its groups of eight 128-byte rows follow, as TMA leaves them (tma.cuh). A group
// begins at a multiple of 1024 bytes; the operand may begin within it.
struct MatrixDescriptor {
  uint64_t bits;  // PTX ISA, "Matrix Descriptor Format"
};

// kK: row or column n at stride_bytes (n / 8) + 128 (n % 8); leading_bytes means nothing.
// kMN: row or column n, element k at leading_bytes (n / 64) + stride_bytes (k / 8) + 128 (k % 8) + 2 (n % 64).
// (PTX ISA, "Canonical Layouts", with the 128-byte swizzle.)
MEMVP_DEVICE MatrixDescriptor make_descriptor(const void* shared, Major major, unsigned leading_bytes,
                                              unsigned stride_bytes) {
  const uint64_t leading = major == Major::kK ? 1 : leading_bytes >> 4;
  return {(shared_address(shared) & 0x3FFFF) >> 4 | leading << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
          uint64_t{1} << 62};
}

// The operand `bytes` further on: 16 elements along k are 32 bytes where k runs along the rows.
MEMVP_DEVICE MatrixDescriptor advance(MatrixDescriptor operand, unsigned bytes) {
  return {operand.bits + (bytes >> 4)};
}

// Before the first product of a group: orders it after the threads' own accesses to the accumulators.
MEMVP_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// The products since the last time are a group.
MEMVP_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the last kPending groups are done: accumulators may be read, and operands overwritten.
template <int kPending>
MEMVP_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accumulators past this point: it does not know that products write them later.
MEMVP_DEVICE void pin_accumulators(float (&acc)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

#define MEMVP_NAMES                                                              \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                       \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"             \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"             \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"             \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"             \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"             \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MEMVP_ACC_8(i)                                                                                    \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define MEMVP_ACC_32(i) MEMVP_ACC_8(i), MEMVP_ACC_8(i + 8), MEMVP_ACC_8(i + 16), MEMVP_ACC_8(i + 24)
// a and b are taken as they are (scale 1), a along k.
#define MEMVP_WGMMA(number, type)                                                                        \
  template <int kTransposed>                                                                             \
  MEMVP_DEVICE void wgmma_64x256x16(number, float (&acc)[128], uint64_t a, uint64_t b, int accumulate) { \
    asm volatile(                                                                                        \
        "{\n .reg .pred accumulate;\n setp.ne.b32 accumulate, %130, 0;\n"                                \
        " wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" MEMVP_NAMES                   \
        "}, %128, %129, accumulate, 1, 1, 0, %131;\n}"                                                   \
        : MEMVP_ACC_32(0), MEMVP_ACC_32(32), MEMVP_ACC_32(64), MEMVP_ACC_32(96)                          \
        : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposed));                                            \
  }
MEMVP_WGMMA(BFloat16, "bf16")
MEMVP_WGMMA(Float16, "f16")
#undef MEMVP_WGMMA
#undef MEMVP_ACC_32
#undef MEMVP_ACC_8
#undef MEMVP_NAMES

// Begins c += a b, or c = a b where not `accumulate`. Until wgmma_wait no thread touches the accumulators.
template <class T, Major kMajor>
MEMVP_DEVICE void wgmma(float (&acc)[128], MatrixDescriptor a, MatrixDescriptor b, bool accumulate) {
  wgmma_64x256x16<kMajor == Major::kMN>(T{}, acc, a.bits, b.bits, accumulate);
}

// Sets the registers of each thread of the warpgroup, called by all of its warps: more, once others have given them up,
// or fewer. kCount: 24 .. 256 by 8.
template <int kCount>
MEMVP_DEVICE void raise_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "what setmaxnreg takes");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
MEMVP_DEVICE void lower_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "what setmaxnreg takes");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Four 8 x 8 matrices to shared memory: lane l names row l % 8 (16 bytes) of matrix l / 8, and brings word l % 4 of row
// l / 4 of each. So the four words of 16 columns of a product's rows, rounded to 16 bits: [row, row + 8] x [first,
// second eight columns].
MEMVP_DEVICE void stmatrix(void* row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace memvp
