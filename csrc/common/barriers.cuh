// Barriers that are not the whole block's: in shared memory, which asynchronous copies complete by their bytes, and the
// numbered ones of some of the block's warps. sm_90a; a kernel that calls these does nothing on another chip but trap.
#pragma once
#include "common/platform.cuh"
#ifndef __CUDACC__
#include "host_run/barriers.h"
#endif

namespace memvp {

#ifdef __CUDACC__
MEMVP_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}
#endif

// In shared memory. A phase ends when as many have arrived as init_barrier said and all bytes that were expected have
// been copied; then the next one begins, which expects as many arrivals again. Phases count 0, 1, 0, 1, ...
struct alignas(8) Barrier {
  uint64_t state;
};

MEMVP_DEVICE void init_barrier(Barrier& barrier, unsigned arrivals MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::init_barrier(barrier.state, arrivals, {file, line, "init_barrier"});
#elif defined(MEMVP_HOPPER)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
#else
  __trap();
#endif
}

// By the thread that did init_barrier, after the last of them and before the __syncthreads behind which others use the
// barriers: copies see them, too.
MEMVP_DEVICE void publish_barriers(MEMVP_SITE) {
#ifndef __CUDACC__
  host_run::publish_barriers({file, line, "publish_barriers"});
#elif defined(MEMVP_HOPPER)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
#else
  __trap();
#endif
}

MEMVP_DEVICE void arrive(Barrier& barrier MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::arrive(barrier.state, 0, {file, line, "arrive"});
#elif defined(MEMVP_HOPPER)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
#else
  __trap();
#endif
}

// Arrives, and the phase does not end before `bytes` more have been copied.
MEMVP_DEVICE void arrive_expecting(Barrier& barrier, unsigned bytes MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::arrive(barrier.state, bytes, {file, line, "arrive_expecting"});
#elif defined(MEMVP_HOPPER)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Until the phase of this parity has ended: the current one, or at once where that was the one before. The instruction
// itself suspends the thread for a while.
MEMVP_DEVICE void wait(Barrier& barrier, unsigned parity MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::wait(barrier.state, parity, {file, line, "wait"});
#elif defined(MEMVP_HOPPER)
  unsigned ended;
  do {
    asm volatile(
        "{\n"
        " .reg .pred ended;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        " selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
#else
  __trap();
#endif
}

// Barrier `number` (1 .. 15; 0 is __syncthreads) of `threads` threads, whole warps: they meet there, or one part of
// them only says that it has come.
MEMVP_DEVICE void sync_some(int number, int threads MEMVP_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#else
  host_run::meet_some(number, threads, true, {file, line, "sync_some"});
#endif
}
MEMVP_DEVICE void arrive_some(int number, int threads MEMVP_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
#else
  host_run::meet_some(number, threads, false, {file, line, "arrive_some"});
#endif
}

// What this thread wrote to shared memory, and what it saw of others' writes, is there for copies and products that are
// begun after it. Before the barrier behind which one thread begins a store.
MEMVP_DEVICE void fence_async_shared(MEMVP_SITE) {
#ifndef __CUDACC__
  host_run::fence_async_shared({file, line, "fence_async_shared"});
#elif defined(MEMVP_HOPPER)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  __trap();
#endif
}

}  // namespace memvp
