// Barriers of some of a block's threads, and of copies: those in shared memory ("mbarrier" in the PTX ISA) and the
// numbered ones.
#pragma once
#include "host_run/proxy.h"

namespace memvp::host_run {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a barrier counts

struct SharedBarrier {
  const Thread* maker;
  unsigned arrivals, pending;  // of a phase; of this one, still to come
  int64_t bytes = 0;           // expected and not copied; fewer than none where a copy was faster than its announcement
  unsigned phase = 0;
  bool published = false;
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
inline uint64_t barrier_word(const void* barrier) {
  return 0xBA221E2000000000ull ^ reinterpret_cast<uintptr_t>(barrier);
}

inline SharedBarrier& barrier_at(Block& block, const uint64_t& word, const Site& site) {
  const uint64_t found = *const_cast<const volatile uint64_t*>(&word);  // the thread's own access, for the sanitizers
  Quiet quiet(this_thread().fiber);
  auto& barriers = unit<BarrierUnit>(block).shared;
  const auto at = barriers.find(&word);
  if (found != barrier_word(&word) || at == barriers.end())
    fail(name_of(site) +
         ": no barrier there, or not yet: init_barrier comes before, and a barrier of the block between");
  return at->second;
}
inline SharedBarrier& barrier_at(const uint64_t& word, const Site& site) {
  return barrier_at(*this_thread().block, word, site);
}

inline void init_barrier(uint64_t& word, unsigned arrivals, const Site& site) {
  yield_point();
  *const_cast<volatile uint64_t*>(&word) = barrier_word(&word);
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  carve_of(*me.block, &word, sizeof(word), site);
  if (arrivals < 1 || arrivals > kMostBytes) fail(name_of(site) + text(": %u arrivals", arrivals));
  if (reinterpret_cast<uintptr_t>(&word) % 8 != 0) fail(name_of(site) + ": a misaligned barrier");
  auto& barriers = unit<BarrierUnit>().shared;
  barriers.erase(&word);
  SharedBarrier& barrier = barriers[&word];
  barrier.maker = &me;
  barrier.arrivals = barrier.pending = arrivals;
}

inline void publish_barriers(const Site&) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  for (auto& [word, barrier] : unit<BarrierUnit>().shared)
    if (barrier.maker == &me) barrier.published = true;
}

// Ends the phase where nothing is missing.
inline void settle(SharedBarrier& barrier, const Site& site) {
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes)
    fail(name_of(site) + text(": a barrier cannot count %lld bytes", static_cast<long long>(barrier.bytes)));
  if (barrier.pending > 0) return;
  if (barrier.bytes < 0)
    fail(name_of(site) + text(": %lld bytes more are copied than all arrivals of the phase expect",
                              static_cast<long long>(-barrier.bytes)));
  if (barrier.bytes > 0) return;
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  for (Thread* t : barrier.waiting) make_ready(t);
  barrier.waiting.clear();
}

inline void arrive(Block& block, uint64_t& word, unsigned bytes, const Site& site) {
  yield_point();
  SharedBarrier& barrier = barrier_at(block, word, site);
  Quiet quiet(this_thread().fiber);
  release(&barrier.object[barrier.phase % 2]);
  if (barrier.pending == 0)
    fail(name_of(site) + text(": one more than the %u arrivals of a phase that waits for bytes", barrier.arrivals));
  barrier.pending--;
  barrier.bytes += bytes;
  settle(barrier, site);
}
inline void arrive(uint64_t& word, unsigned bytes, const Site& site) {
  arrive(*this_thread().block, word, bytes, site);
}

inline void wait(uint64_t& word, unsigned parity, const Site& site) {
  yield_point();
  SharedBarrier& barrier = barrier_at(word, site);
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  if (parity > 1) fail(name_of(site) + text(": parity %u", parity));
  // A thread that comes to run again finds whatever phase there is by then, as the polling one on the device.
  while (barrier.phase % 2 == parity) {
    me.site = site;
    me.waits_for = &word;
    barrier.waiting.push_back(&me);
    sleep(State::kEvent);
  }
  me.waits_for = nullptr;
  acquire(&barrier.object[parity]);
}

// A copy's bytes are there.
inline void complete_bytes(SharedBarrier& barrier, unsigned bytes, const Site& site) {
  barrier.bytes -= bytes;
  settle(barrier, site);
}

// All lanes of a warp arrive together; `stay`: and wait for the others.
inline void meet_some(int number, int threads, bool stay, const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  if (number < 1 || number > 15) fail(name_of(site) + text(": barrier %d; 1 to 15 are there", number));
  if (threads < 32 || threads % 32 != 0 || threads > static_cast<int>(me.block->threads.size()))
    fail(name_of(site) + text(": %d threads; whole warps of the block meet", threads));
  NumberedBarrier& barrier = unit<BarrierUnit>().numbered[number];
  const int key = number << 16 | threads << 1 | static_cast<int>(stay);
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
    for (Thread* t : barrier.waiting) make_ready(t);
    barrier.waiting.clear();
  });
  if (!stay) return;
  if (barrier.generation == generation) {
    me.site = site;
    me.waits_for = &barrier;
    barrier.waiting.push_back(&me);
    sleep(State::kEvent);
    me.waits_for = nullptr;
  }
  acquire(&barrier.object);
}

}  // namespace memvp::host_run
