// Loads by who may write what they read, copies into shared memory, shared memory itself, and the order of chained
// launches.
#pragma once
#include "common/platform.cuh"
#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

namespace memvp {

// 16 bytes of an input that no thread writes during the call and that is read once: past L1. Zeros, and no access,
// where not `valid`: a predicate and not a branch, so that the loads of a loop can all be under way at once.
MEMVP_DEVICE uint4 load_input16(const void* p, bool valid) {
#ifdef __CUDACC__
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
#else
  return valid ? host_run::load_input<uint4>(p) : make_uint4(0, 0, 0, 0);
#endif
}

// One number of such an input.
template <class V>
MEMVP_DEVICE V load_input(const V* p) {
#ifdef __CUDACC__
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
#else
  return host_run::load_input<V>(p);
#endif
}

// What an earlier launch of the chain, or this block before a barrier, wrote: an ordinary load, never the read-only
// path.
template <class V>
MEMVP_DEVICE V load_written(const void* p) {
#ifdef __CUDACC__
  return *static_cast<const V*>(p);
#else
  return host_run::load_written<V>(p);
#endif
}

// Brings a line of an input to L2, where another launch's write to it would still be seen.
MEMVP_DEVICE void prefetch_line(const void* p) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  host_run::check_input(p, 1);
#endif
}

// Starts a copy of 16 bytes to shared memory, or of 16 zero bytes without touching `global` when not `valid`.
MEMVP_DEVICE void copy16_async(void* shared, const void* global, bool valid) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(valid ? 16 : 0)
      : "memory");
#else
  host_run::copy_async(shared, global, valid ? 16 : 0, 16);
#endif
}
MEMVP_DEVICE void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host_run::commit_copies();
#endif
}
// Until at most kPending of this thread's committed groups are in flight.
template <int kPending>
MEMVP_DEVICE void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  host_run::wait_copies(kPending);
#endif
}

// `count` elements of the dynamic shared memory from `offset` bytes on (on the host an allocation of its own, so that
// reading past its end is noticed).
template <class V>
MEMVP_DEVICE V* shared_at(size_t offset, size_t count) {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char memvp_shared[];  // as tiles need it (tensor_copies.cuh)
  return reinterpret_cast<V*>(memvp_shared + offset);
#else
  return host_run::shared_at<V>(offset, count);
#endif
}

// Programmatic dependent launch. A grid of the chain may begin before the one ahead of it has ended; what that one
// writes may be read only after wait_for_previous_grid. Without sm_90 the launches just follow one another.
MEMVP_DEVICE void wait_for_previous_grid() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
  host_run::wait_for_previous_grid();
#endif
}
MEMVP_DEVICE void let_next_grid_begin() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#else
  host_run::let_next_grid_begin();
#endif
}

// Every block of a cooperative launch arrives; what any of them wrote before, all of them read after it. Asynchronous
// copies stay in flight.
MEMVP_DEVICE void meet_all_blocks() {
#ifdef __CUDACC__
  cooperative_groups::this_grid().sync();
#else
  host_run::meet_all_blocks();
#endif
}

// From here on the block's shared memory may be put to another use: nobody reads what lies there.
MEMVP_DEVICE void renew_shared() {
#ifdef __CUDACC__
  __syncthreads();
#else
  host_run::renew_shared();
#endif
}

}  // namespace memvp
