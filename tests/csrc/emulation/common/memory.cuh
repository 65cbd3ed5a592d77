// Loads that know who may write, asynchronous copies, shared memory, and how launches and blocks wait for one another.
#pragma once
#include "common/platform.cuh"

namespace memvp {

namespace emulation {

// The read-only path: inside an input, which no thread writes.
inline void check_input(const void* p, size_t bytes) {
  Quiet quiet(this_thread().fiber);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(text("misaligned load of %zu bytes", bytes));
  const auto at = reinterpret_cast<uintptr_t>(p);
  for (const Range& range : run().config.inputs) {
    const auto first = reinterpret_cast<uintptr_t>(range.data);
    if (at >= first && at + bytes <= first + range.bytes) return;
  }
  if (!run().config.inputs.empty())
    fail(name_of(this_thread()) + text(" loads %zu bytes through the read-only path, outside of every input", bytes));
}

template <class V>
V load_read_only(const void* p) {
  check_input(p, sizeof(V));
  return *static_cast<const V*>(p);
}

// These are the kernel's own accesses, and the sanitizers see them.
inline void land(const PendingCopy& copy) {
  for (int i = 0; i < 16; ++i)
    static_cast<volatile char*>(copy.to)[i] = copy.valid ? static_cast<const volatile char*>(copy.from)[i] : 0;
}

}  // namespace emulation

inline uint4 load_input16(const void* p, bool valid) {
  return valid ? emulation::load_read_only<uint4>(p) : uint4{0, 0, 0, 0};
}
template <class V>
V load_input(const V* p) {
  return emulation::load_read_only<V>(p);
}

template <class V>
V load_written(const void* p) {
  emulation::yield_point();
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0)
    emulation::fail(emulation::text("misaligned load of %zu bytes", sizeof(V)));
  return *static_cast<const V*>(p);
}

inline void prefetch_l2(const void* p) {
  emulation::check_input(p, 1);
}

// A copy lands when it is waited for, or under Order::kRandom now and then at once: both are allowed, and each hides
// mistakes that the other shows.
inline void cp_async16(void* to, const void* from, bool valid) {
  using namespace emulation;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    fail("misaligned asynchronous copy");
  const PendingCopy copy{static_cast<char*>(to), static_cast<const char*>(from), valid};
  bool now;
  {
    Quiet quiet(this_thread().fiber);
    now = run().config.order == Order::kRandom && run().chance(0.25);
    if (!now) this_thread().copies.push_back(copy);
  }
  if (now) land(copy);
}
inline void cp_async_commit() {
  using namespace emulation;
  Quiet quiet(this_thread().fiber);
  this_thread().copy_groups.push_back(std::exchange(this_thread().copies, {}));
}
template <int kPending>
void cp_async_wait() {
  using namespace emulation;
  yield_point();
  std::vector<PendingCopy> due;
  {
    Quiet quiet(this_thread().fiber);
    auto& groups = this_thread().copy_groups;
    while (groups.size() > kPending) {
      due.insert(due.end(), groups[0].begin(), groups[0].end());
      groups.erase(groups.begin());
    }
  }
  for (const PendingCopy& copy : due) land(copy);
}

// Bytes [offset, offset + sizeof(V) count) of the block's shared memory, the same for all its threads.
template <class V>
V* shared_at(size_t offset, size_t count) {
  using namespace emulation;
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Block& block = *me.block;
  const size_t bytes = sizeof(V) * count, limit = run().launches[block.launch].shared_bytes;
  if (offset + bytes > limit)
    fail(text("shared memory %zu..%zu does not fit the launch's %zu bytes", offset, offset + bytes, limit));
  if (offset % alignof(V) != 0) fail(text("shared memory at %zu is misaligned", offset));
  const auto found = block.shared.find(offset);
  if (found != block.shared.end() && found->second.bytes == bytes) return static_cast<V*>(found->second.data);
  for (const auto& [at, carve] : block.shared)
    if (at < offset + bytes && offset < at + carve.bytes)
      fail(text("shared memory %zu..%zu overlaps %zu..%zu", offset, offset + bytes, at, at + carve.bytes));
  // Of exact size, for the address sanitizer, and with the low bits of its address that it has on the device.
  const size_t before = offset % 1024;
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, before + bytes == 0 ? 1 : before + bytes) != 0) abort();
#ifdef MEMVP_FIBER_ASAN
  __asan_poison_memory_region(memory, before);
#endif
  void* data = static_cast<char*>(memory) + before;
  memset(data, 0xFF, bytes);  // NaN: an unwritten read shows
  block.shared[offset] = {data, bytes, memory, {}};
  return static_cast<V*>(data);
}

// Ends what lies in the block's shared memory: the next use finds NaN, whatever its layout.
inline void reuse_shared_memory(MEMVP_SITE) {
  using namespace emulation;
  sync_block(MEMVP_HERE("reuse_shared_memory"));
  Thread& me = this_thread();
  if (me.index.x == 0) {
    Quiet quiet(me.fiber);
    free_shared(*me.block);
  }
  sync_block(MEMVP_HERE("reuse_shared_memory"));
}

inline void pdl_wait(MEMVP_SITE) {
  using namespace emulation;
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Run& r = run();
  me.waited_for_grid = true;
  if (me.block->launch == 0) return;
  Progress& before = r.progress[me.block->launch - 1];
  if (before.done < r.launches[me.block->launch - 1].blocks) {
    me.site = MEMVP_HERE("pdl_wait");
    before.waiting.push_back(&me);
    sleep(State::kGrid);
  }
  acquire(&before.object);
}

inline void pdl_launch_dependents() {
  using namespace emulation;
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Run& r = run();
  if (me.block->let_next_begin) return;
  note_let(*me.block);
  const unsigned launch = me.block->launch;
  if (r.progress[launch].let < r.launches[launch].blocks) return;
  make_ready(&me);  // main may have blocks to begin
  switch_to(r.main);
}

inline void sync_grid(MEMVP_SITE) {
  using namespace emulation;
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  const Launch& launch = run().launches[me.block->launch];
  if (!launch.cooperative)
    fail("sync_grid in a launch that is not cooperative: its blocks need not be resident together");
  me.site = MEMVP_HERE("sync_grid");
  meet(run().progress[me.block->launch].grid, static_cast<size_t>(launch.blocks) * launch.threads, State::kGrid);
}

}  // namespace memvp
