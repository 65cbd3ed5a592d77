// Loads by who may write what they read, asynchronous copies to shared memory, shared memory itself, and how launches
// and blocks wait for one another.
#pragma once
#include <cooperative_groups.h>

#include "common/platform.cuh"

namespace memvp {

MEMVP_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// 16 bytes of an input that no thread writes during the call and that is read once: past L1. Zeros, and no access,
// where not `valid`: a predicate instead of a branch lets all loads of a loop be in flight at once.
MEMVP_DEVICE uint4 load_input16(const void* p, bool valid) {
  uint4 v;
  asm("{\n"
      " .reg .pred valid;\n"
      " setp.ne.b32 valid, %5, 0;\n"
      " mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
      " @valid ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n"
      "}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(valid)));
  return v;
}

// One number of such an input.
template <class V>
MEMVP_DEVICE V load_input(const V* p) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4, "16 or 32 bits");
  V v;
  if constexpr (sizeof(V) == 2) {
    const unsigned short bits = __ldg(reinterpret_cast<const unsigned short*>(p));
    memcpy(&v, &bits, 2);
  } else {
    const unsigned bits = __ldg(reinterpret_cast<const unsigned*>(p));
    memcpy(&v, &bits, 4);
  }
  return v;
}

// What an earlier launch of the step, or this block before a barrier, wrote: never through the read-only path.
template <class V>
MEMVP_DEVICE V load_written(const void* p) {
  return *static_cast<const V*>(p);
}

// Brings a line of an input to L2, where another launch's write to it would still be seen.
MEMVP_DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Starts a copy of 16 bytes to shared memory, or of 16 zero bytes without touching `global` when not `valid`.
MEMVP_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
MEMVP_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most kPending of this thread's committed groups are in flight.
template <int kPending>
MEMVP_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// `count` elements of the dynamic shared memory from `offset` bytes on.
template <class V>
MEMVP_DEVICE V* shared_at(size_t offset, [[maybe_unused]] size_t count) {
  extern __shared__ __align__(1024) unsigned char memvp_shared[];  // as TMA tiles need it (tma.cuh)
  return reinterpret_cast<V*>(memvp_shared + offset);
}

// Programmatic dependent launch (PDL): a grid may begin before the one ahead of it has ended, and reads what that one
// writes only after pdl_wait. Code for chips before sm_90 has no early launch, and nothing to wait for.
MEMVP_DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
MEMVP_DEVICE void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A barrier of all blocks of a cooperative launch; asynchronous copies stay in flight across it.
MEMVP_DEVICE void sync_grid() {
  cooperative_groups::this_grid().sync();
}

// A barrier after which the block's shared memory may be divided anew.
MEMVP_DEVICE void reuse_shared_memory() {
  __syncthreads();
}

}  // namespace memvp
