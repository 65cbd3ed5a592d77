// Barriers in shared memory with their phases, arrivals and bytes, and the numbered ones of some of a block's warps.
#pragma once
#include "common/memory.cuh"
#include "runtime/shared_memory.h"

namespace memvp {

struct alignas(8) Barrier {
  uint64_t state;
};

namespace emulation {

constexpr int64_t kMaxBytes = (1 << 20) - 1;  // that a barrier counts

struct SharedBarrier {
  const Thread* maker;
  unsigned arrivals, pending;  // of a phase; of this one, still to come
  int64_t bytes = 0;           // expected and not copied; negative where a copy was faster than its announcement
  unsigned phase = 0;
  bool fenced = false;
  std::vector<Thread*> waiting;
  char object[2];  // for the thread sanitizer: of this phase and the next
};

struct NumberedBarrier {
  int threads = 0, arrived = 0;
  uint64_t generation = 0;
  std::vector<Thread*> waiting;
  char object = 0;  // for the thread sanitizer
};

struct BarrierUnit : BlockUnit {
  static constexpr UnitSlot kSlot = kBarrierUnit;
  std::map<const void*, SharedBarrier> shared;
  NumberedBarrier numbered[16];

  explicit BarrierUnit(Block&) {}
  std::string awaited(const Thread& thread) const override {
    for (int i = 1; i < 16; ++i)
      if (thread.waits_for == &numbered[i])
        return text(" for barrier %d, which %d of %d threads have reached", i, numbered[i].arrived,
                    numbered[i].threads);
    const auto found = shared.find(thread.waits_for);
    if (found == shared.end()) return "";
    const SharedBarrier& barrier = found->second;
    return text(" for phase %u, which lacks %u of %u arrivals and %lld bytes", barrier.phase, barrier.pending,
                barrier.arrivals, static_cast<long long>(barrier.bytes));
  }
};

// What init_barrier leaves in the barrier's word: a thread that comes before it, or after something else was written
// there, does not find it.
inline uint64_t barrier_word(const Barrier& barrier) {
  return 0xBA221E2000000000ull ^ reinterpret_cast<uintptr_t>(&barrier);
}

inline SharedBarrier& barrier_at(Block& block, const Barrier& barrier, const Site& site) {
  const uint64_t found = *const_cast<const volatile uint64_t*>(&barrier.state);  // the thread's own access
  Quiet quiet(this_thread().fiber);
  auto& barriers = unit<BarrierUnit>(block).shared;
  const auto at = barriers.find(&barrier);
  if (found != barrier_word(barrier) || at == barriers.end())
    fail(name_of(site) + ": no barrier there, or not yet: init_barrier comes before, and a __syncthreads between");
  return at->second;
}

// Ends the phase where nothing is missing.
inline void settle(SharedBarrier& barrier, const Site& site) {
  if (barrier.bytes > kMaxBytes || barrier.bytes < -kMaxBytes)
    fail(name_of(site) + text(": a barrier cannot count %lld bytes", static_cast<long long>(barrier.bytes)));
  if (barrier.pending > 0) return;
  if (barrier.bytes < 0)
    fail(name_of(site) + text(": %lld bytes more are copied than all arrivals of the phase expect",
                              static_cast<long long>(-barrier.bytes)));
  if (barrier.bytes > 0) return;
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  wake_all(barrier.waiting);
}

inline void arrive(Block& block, Barrier& at, unsigned bytes, const Site& site) {
  yield_point();
  SharedBarrier& barrier = barrier_at(block, at, site);
  Quiet quiet(this_thread().fiber);
  release(&barrier.object[barrier.phase % 2]);
  if (barrier.pending == 0)
    fail(name_of(site) + text(": one more than the %u arrivals of a phase that waits for bytes", barrier.arrivals));
  barrier.pending--;
  barrier.bytes += bytes;
  settle(barrier, site);
}

// A copy's bytes are there.
inline void complete_bytes(SharedBarrier& barrier, unsigned bytes, const Site& site) {
  barrier.bytes -= bytes;
  settle(barrier, site);
}

}  // namespace emulation

inline void init_barrier(Barrier& at, unsigned arrivals, MEMVP_SITE) {
  using namespace emulation;
  yield_point();
  *const_cast<volatile uint64_t*>(&at.state) = barrier_word(at);
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  const Site site = MEMVP_HERE("init_barrier");
  carve_of(*me.block, &at, sizeof(at), site);
  if (arrivals < 1 || arrivals > kMaxBytes) fail(name_of(site) + text(": %u arrivals", arrivals));
  auto& barriers = unit<BarrierUnit>().shared;
  barriers.erase(&at);
  SharedBarrier& barrier = barriers[&at];
  barrier.maker = &me;
  barrier.arrivals = barrier.pending = arrivals;
}

inline void fence_barrier_init() {
  using namespace emulation;
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  for (auto& [at, barrier] : unit<BarrierUnit>().shared)
    if (barrier.maker == &me) barrier.fenced = true;
}

inline void arrive(Barrier& barrier, MEMVP_SITE) {
  emulation::arrive(*emulation::this_thread().block, barrier, 0, MEMVP_HERE("arrive"));
}
inline void arrive_expect_bytes(Barrier& barrier, unsigned bytes, MEMVP_SITE) {
  emulation::arrive(*emulation::this_thread().block, barrier, bytes, MEMVP_HERE("arrive_expect_bytes"));
}

inline void wait(Barrier& at, unsigned parity, MEMVP_SITE) {
  using namespace emulation;
  yield_point();
  Thread& me = this_thread();
  SharedBarrier& barrier = barrier_at(*me.block, at, MEMVP_HERE("wait"));
  Quiet quiet(me.fiber);
  if (parity > 1) fail(text("wait at %s:%d: parity %u", file, line, parity));
  // A thread that comes to run again finds whatever phase there is by then, as the polling one on the device.
  while (barrier.phase % 2 == parity) {
    barrier.waiting.push_back(&me);
    sleep_for(&at, MEMVP_HERE("wait"));
  }
  acquire(&barrier.object[parity]);
}

// All lanes of a warp arrive together.
inline void sync_named_barrier(int number, int threads, MEMVP_SITE) {
  using namespace emulation;
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  const Site site = MEMVP_HERE("sync_named_barrier");
  if (number < 1 || number > 15) fail(name_of(site) + text(": barrier %d; 1 to 15 are there", number));
  if (threads < 32 || threads % 32 != 0 || threads > static_cast<int>(me.block->threads.size()))
    fail(name_of(site) + text(": %d threads; whole warps of the block meet", threads));
  NumberedBarrier& barrier = unit<BarrierUnit>().numbered[number];
  const int key = number << 16 | threads;
  uint64_t generation = 0;  // in which this lane's warp arrived
  release(&barrier.object);
  meet_warp(&key, &generation, site, [&barrier, &site, threads](Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      if (*static_cast<const int*>(warp.in[lane]) != *static_cast<const int*>(warp.in[0]))
        fail(name_of(site) + ": the lanes of a warp name different barriers or numbers of threads");
      *static_cast<uint64_t*>(warp.out[lane]) = barrier.generation;
    }
    if (barrier.arrived > 0 && barrier.threads != threads)
      fail(name_of(site) + text(": of %d threads, where others meet as %d", threads, barrier.threads));
    barrier.threads = threads;
    barrier.arrived += 32;
    if (barrier.arrived < threads) return;
    barrier.arrived = 0;
    barrier.generation++;
    wake_all(barrier.waiting);
  });
  if (barrier.generation == generation) {
    barrier.waiting.push_back(&me);
    sleep_for(&barrier, site);
  }
  acquire(&barrier.object);
}

// All that stands in shared memory now, of all threads: which of them wrote it is not known.
inline void fence_async_proxy() {
  using namespace emulation;
  yield_point();
  Quiet quiet(this_thread().fiber);
  for (auto& [offset, carve] : this_thread().block->shared) {
    carve.seen.resize(carve.bytes);
    memcpy(carve.seen.data(), carve.data, carve.bytes);
  }
}

}  // namespace memvp
