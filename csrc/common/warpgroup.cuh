// What a warpgroup does together: 128 threads, four warps of which the first one's number is a multiple of 4. The
// products of Hopper, c[64 x N] += a[64 x 16] b[16 x N], 16-bit in and float32 out, whose operands lie in shared memory
// and which go on while the threads do something else; and the way of their results back to shared memory.
//
// Thread t of the warpgroup, of warp w = t / 32 and lane l = t % 32, holds of c in acc[4j + 2i + e] row 16w + l/4 + 8i,
// column 8j + 2(l%4) + e. (PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16".)
#pragma once
#include <type_traits>

#include "common/barriers.cuh"
#include "common/numbers.cuh"
#ifndef __CUDACC__
#include "host_run/warpgroup.h"
#endif

namespace memvp {

// A number that all lanes of a warp have, for the compiler to know that they do: where it decides a branch or an
// address, one for all.
MEMVP_DEVICE int uniform(int number) {
#ifdef __CUDACC__
  return __shfl_sync(0xFFFFFFFFu, number, 0);
#else
  return number;
#endif
}

// Along which dimension an operand's 128-byte rows run: k, or the rows of a and columns of b.
enum class Major { kK, kMN };

// Where an operand begins and how its pieces of eight 128-byte rows follow, as copies of tiles leave them
// (common/tensor_copies.cuh). The piece begins at a multiple of 1024 bytes; the operand may begin within it.
#ifdef __CUDACC__
struct Operand {
  uint64_t bits;  // PTX ISA, "Matrix Descriptor Format"
};
#else
using Operand = host_run::Operand;
#endif

// kK: row or column n at stride_bytes (n / 8) + 128 (n % 8); leading_bytes means nothing.
// kMN: row or column n, element k at leading_bytes (n / 64) + stride_bytes (k / 8) + 128 (k % 8) + 2 (n % 64).
// (PTX ISA, "Canonical Layouts", with the 128-byte swizzle.)
MEMVP_DEVICE Operand operand(const void* shared, Major major, unsigned leading_bytes,
                             unsigned stride_bytes MEMVP_AND_SITE) {
#ifdef __CUDACC__
  const uint64_t leading = major == Major::kK ? 1 : leading_bytes >> 4;
  return {(shared_address(shared) & 0x3FFFF) >> 4 | leading << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
          uint64_t{1} << 62};
#else
  return host_run::operand(shared, major == Major::kK, leading_bytes, stride_bytes, {file, line, "operand"});
#endif
}

// The operand that begins `bytes` further on: 16 elements along k are 32 bytes where k runs along the rows.
MEMVP_DEVICE Operand advance(Operand operand, unsigned bytes) {
#ifdef __CUDACC__
  return {operand.bits + (bytes >> 4)};
#else
  operand.start += bytes;
  return operand;
#endif
}

// Before the first product of a group, for what the threads have done to the accumulators.
MEMVP_DEVICE void begin_products(MEMVP_SITE) {
#ifndef __CUDACC__
  host_run::begin_products({file, line, "begin_products"});
#elif defined(MEMVP_HOPPER)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}
// The products since the last time are a group.
MEMVP_DEVICE void commit_products(MEMVP_SITE) {
#ifndef __CUDACC__
  host_run::commit_products({file, line, "commit_products"});
#elif defined(MEMVP_HOPPER)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}
// Until all but the last `pending` groups are done: accumulators may be read, and operands overwritten.
template <int pending>
MEMVP_DEVICE void wait_products(MEMVP_SITE) {
#ifndef __CUDACC__
  host_run::wait_products(pending, {file, line, "wait_products"});
#elif defined(MEMVP_HOPPER)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#else
  __trap();
#endif
}

// The compiler leaves accumulators alone here: it does not know that products write them later. Around what begins and
// what waits for products.
template <int count>
MEMVP_DEVICE void keep(float (&acc)[count]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(acc[i])::"memory");
#else
  (void)acc;
#endif
}

#if defined(__CUDACC__) && defined(MEMVP_HOPPER)
#define MEMVP_NAMES_0                                      \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MEMVP_NAMES_1                                                \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MEMVP_NAMES_2                                                \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define MEMVP_NAMES_3                                                            \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MEMVP_ACC_8(i)                                                                                    \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define MEMVP_ACC_32(i) MEMVP_ACC_8(i), MEMVP_ACC_8(i + 8), MEMVP_ACC_8(i + 16), MEMVP_ACC_8(i + 24)
// The operands' numbers follow those of the accumulators; a and b are taken as they are (scale 1), a along k.
#define MEMVP_WGMMA(n, type, names, a, b, accumulate, transposed, ...)                                     \
  asm volatile("{\n .reg .pred accumulate;\n setp.ne.b32 accumulate, %" accumulate                         \
               ", 0;\n"                                                                                    \
               " wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, %" a ", %" b \
               ", accumulate, 1, 1, 0, %" transposed ";\n}"                                                \
               : __VA_ARGS__                                                                               \
               : "l"(a_bits), "l"(b_bits), "r"(add), "n"(transpose))

#define MEMVP_MULTIPLY(number, type)                                                                                   \
  template <int transpose>                                                                                             \
  MEMVP_DEVICE void wgmma(number, float (&acc)[32], uint64_t a_bits, uint64_t b_bits, int add) {                       \
    MEMVP_WGMMA("64", type, MEMVP_NAMES_0, "32", "33", "34", "35", MEMVP_ACC_32(0));                                   \
  }                                                                                                                    \
  template <int transpose>                                                                                             \
  MEMVP_DEVICE void wgmma(number, float (&acc)[64], uint64_t a_bits, uint64_t b_bits, int add) {                       \
    MEMVP_WGMMA("128", type, MEMVP_NAMES_0 "," MEMVP_NAMES_1, "64", "65", "66", "67", MEMVP_ACC_32(0),                 \
                MEMVP_ACC_32(32));                                                                                     \
  }                                                                                                                    \
  template <int transpose>                                                                                             \
  MEMVP_DEVICE void wgmma(number, float (&acc)[128], uint64_t a_bits, uint64_t b_bits, int add) {                      \
    MEMVP_WGMMA("256", type, MEMVP_NAMES_0 "," MEMVP_NAMES_1 "," MEMVP_NAMES_2 "," MEMVP_NAMES_3, "128", "129", "130", \
                "131", MEMVP_ACC_32(0), MEMVP_ACC_32(32), MEMVP_ACC_32(64), MEMVP_ACC_32(96));                         \
  }
MEMVP_MULTIPLY(BFloat16, "bf16")
MEMVP_MULTIPLY(Float16, "f16")
#undef MEMVP_MULTIPLY
#undef MEMVP_WGMMA
#undef MEMVP_ACC_32
#undef MEMVP_ACC_8
#undef MEMVP_NAMES_0
#undef MEMVP_NAMES_1
#undef MEMVP_NAMES_2
#undef MEMVP_NAMES_3
#endif

// Begins c += a b, or c = a b where not `accumulate`. Until wait_products no thread touches the accumulators.
template <class T, int N, Major b_major>
MEMVP_DEVICE void multiply(float (&acc)[N / 2], Operand a, Operand b, bool accumulate MEMVP_AND_SITE) {
  static_assert(N == 64 || N == 128 || N == 256, "the widths that are written out");
#ifndef __CUDACC__
  host_run::multiply(acc, N, a, b, b_major == Major::kK, accumulate, std::is_same_v<T, BFloat16>,
                     {file, line, "multiply"});
#elif defined(MEMVP_HOPPER)
  wgmma<b_major == Major::kMN>(T{}, acc, a.bits, b.bits, accumulate);
#else
  __trap();
#endif
}

// Of a warpgroup's threads, each from here on: more registers than it began with, once others have given them up, or
// fewer. By all of its warps. `registers`: 24 .. 256 by 8.
template <int registers>
MEMVP_DEVICE void raise_registers(MEMVP_SITE) {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0, "what setmaxnreg takes");
#ifndef __CUDACC__
  host_run::change_registers(registers, true, {file, line, "raise_registers"});
#elif defined(MEMVP_HOPPER)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#else
  __trap();
#endif
}
template <int registers>
MEMVP_DEVICE void lower_registers(MEMVP_SITE) {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0, "what setmaxnreg takes");
#ifndef __CUDACC__
  host_run::change_registers(registers, false, {file, line, "lower_registers"});
#elif defined(MEMVP_HOPPER)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#else
  __trap();
#endif
}

// Four 8 x 8 matrices to shared memory: lane l names row l % 8 (16 bytes) of matrix l / 8, and brings of each the word
// l % 4 of row l / 4. So the four words of 16 columns of a product's rows, rounded to 16 bits: [row, row + 8] x [first,
// second eight columns].
MEMVP_DEVICE void store_matrices(void* row, const uint32_t (&words)[4] MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::store_matrices(row, words, {file, line, "store_matrices"});
#elif defined(MEMVP_HOPPER)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  __trap();
#endif
}

// The same of the matrices' transposes: what a lane brings of each goes to rows 2 (l % 4) and 2 (l % 4) + 1 of column
// l / 4.
MEMVP_DEVICE void store_matrices_transposed(void* row, const uint32_t (&words)[4] MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::store_matrices_transposed(row, words, {file, line, "store_matrices_transposed"});
#elif defined(MEMVP_HOPPER)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  __trap();
#endif
}

}  // namespace memvp
