// Hopper's barriers in shared memory (mbarrier), which asynchronous copies complete by their bytes, and numbered
// barriers of some of a block's warps.
#pragma once
#include "common/memory.cuh"

namespace memvp {

// A phase ends when as many threads have arrived as init_barrier said and all expected bytes have been copied; then the
// next one begins. Phases count 0, 1, 0, 1, ...
struct alignas(8) Barrier {
  uint64_t state;
};

MEMVP_DEVICE void init_barrier(Barrier& barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// By the thread that called init_barrier, after the last of them and before the __syncthreads behind which others use
// the barriers: makes them visible to copies.
MEMVP_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

MEMVP_DEVICE void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives; the phase does not end before `bytes` more have been copied.
MEMVP_DEVICE void arrive_expect_bytes(Barrier& barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended; returns at once where it is not the current one. The instruction itself
// suspends the thread for a while.
MEMVP_DEVICE void wait(Barrier& barrier, unsigned parity) {
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
}

// Barrier `number` (1 .. 15; 0 is __syncthreads) of `threads` threads, whole warps.
MEMVP_DEVICE void sync_named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Makes shared memory that this thread wrote, or saw written, visible to copies and products that begin after it.
// Before the barrier behind which one thread begins a store.
MEMVP_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace memvp
