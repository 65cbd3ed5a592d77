// What kernels call: barriers, shared memory, loads that know who may write, asynchronous copies, the tensor-core
// product.
#pragma once
#include <array>

#include "host_run/numbers.h"
#include "host_run/schedule.h"

namespace memvp::host_run {

#define MEMVP_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- barriers -----------------------------------------------------------------------------------

inline void sync_block(const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Block& block = *me.block;
  if (block.done > 0)
    fail(text("%s at %s:%d after %u thread(s) of the block returned", site.what, site.file, site.line, block.done) +
         state_table());
  if (!block.at_barrier.empty()) {
    const Site& other = block.at_barrier[0]->site;
    if (other.line != site.line || strcmp(other.file, site.file) != 0)
      fail(text("divergent __syncthreads: %s at %s:%d while others wait at %s:%d", name_of(me).c_str(), site.file,
                site.line, other.file, other.line) +
           state_table());
  }
  me.site = site;
  void* object = &block.barrier_object[block.barriers % 2];
  release(object);
  block.at_barrier.push_back(&me);
  if (block.at_barrier.size() == block.threads.size()) {
    for (Thread* t : block.at_barrier) make_ready(t);
    block.at_barrier.clear();
    block.barriers++;
    run().stats.barriers++;
    sleep(State::kReady);
  } else {
    sleep(State::kBarrier);
  }
  acquire(object);
}

inline void wait_for_previous_grid(MEMVP_SITE) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Run& r = run();
  me.waited_for_grid = true;
  if (me.block->launch == 0) return;
  Progress& before = r.progress[me.block->launch - 1];
  if (before.done < r.launches[me.block->launch - 1].blocks) {
    me.site = {file, line, "wait_for_previous_grid"};
    before.waiting.push_back(&me);
    sleep(State::kGrid);
  }
  acquire(&before.object);
}

inline void meet_all_blocks(MEMVP_SITE) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  const Launch& launch = run().launches[me.block->launch];
  Progress& progress = run().progress[me.block->launch];
  if (!launch.cooperative)
    fail("meet_all_blocks in a launch whose blocks need not be resident together: it is not cooperative");
  me.site = {file, line, "meet_all_blocks"};
  void* object = &progress.meeting_object[progress.meetings % 2];
  release(object);
  progress.met.push_back(&me);
  if (progress.met.size() == static_cast<size_t>(launch.blocks) * launch.threads) {
    for (Thread* t : progress.met) make_ready(t);
    progress.met.clear();
    progress.meetings++;
    sleep(State::kReady);
  } else {
    sleep(State::kGrid);
  }
  acquire(object);
}

inline void let_next_grid_begin() {
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Run& r = run();
  if (me.block->let_next_begin) return;
  note_let(*me.block);
  const unsigned launch = me.block->launch;
  if (r.progress[launch].let < r.launches[launch].blocks) return;
  make_ready(&me);  // main may have blocks to admit
  switch_to(r.main);
}

// ---- warps --------------------------------------------------------------------------------------

// All 32 lanes meet; the last one does `complete(warp)` for all, with what each brought and where each wants its
// result.
template <class Complete>
void meet_warp(const void* in, void* out, const Site& site, Complete complete) {
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Warp& warp = *me.warp;
  if (warp.arrived != 0 && (warp.site.line != site.line || strcmp(warp.site.file, site.file) != 0))
    fail(text("warp divergence: %s in %s at %s:%d while its warp waits at %s:%d", name_of(me).c_str(), site.what,
              site.file, site.line, warp.site.file, warp.site.line));
  me.site = warp.site = site;
  warp.in[me.lane] = in;
  warp.out[me.lane] = out;
  warp.thread[me.lane] = &me;
  warp.arrived |= 1u << me.lane;
  if (warp.arrived != ~0u) {
    if (warp.lanes != ~0u) fail(name_of(me) + " in " + site.what + " after a lane of its warp returned");
    sleep(State::kWarp);
    return;
  }
  complete(warp);
  for (Thread* t : warp.thread) make_ready(t);
  warp.arrived = 0;
  run().stats.collectives++;
  sleep(State::kReady);
}

using Words4 = std::array<uint32_t, 4>;
using Words2 = std::array<uint32_t, 2>;

// c[16 x 8] += a[16 x 16] b[16 x 8] from the fragments of 32 lanes; `value` turns 16 bits into a float.
inline void mma_16x8x16(float (&c)[4], const Words4& a, const Words2& b, float (*value)(uint16_t), MEMVP_SITE) {
  struct Operands {
    const Words4* a;
    const Words2* b;
  };
  const Operands operands{&a, &b};
  meet_warp(&operands, c, {file, line, "mma.sync"}, [value](Warp& warp) {
    float A[16][16], B[16][8], C[16][8];
    const auto half = [value](uint32_t word, int i) { return value(static_cast<uint16_t>(word >> 16 * i)); };
    for (int lane = 0; lane < 32; ++lane) {
      const auto* in = static_cast<const Operands*>(warp.in[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) A[g + i / 2 % 2 * 8][t * 2 + i % 2 + i / 4 * 8] = half((*in->a)[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) B[t * 2 + i % 2 + i / 2 * 8][g] = half((*in->b)[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) C[g + i / 2 * 8][t * 2 + i % 2] = static_cast<const float*>(warp.out[lane])[i];
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) static_cast<float*>(warp.out[lane])[i] = C[g + i / 2 * 8][t * 2 + i % 2];
    }
  });
}

// Four matrices of 8 rows of 16 bytes: lane l names row l % 8 of matrix l / 8, and gets word l % 4 of row l / 4 of
// each.
inline void load_matrices(uint32_t (&words)[4], const void* row, MEMVP_SITE) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("misaligned row of ldmatrix");
  Words4 mine;
  memcpy(&mine, row, sizeof(mine));  // the lane's own access, which the sanitizers see
  meet_warp(&mine, words, {file, line, "ldmatrix"}, [](Warp& warp) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        static_cast<uint32_t*>(warp.out[lane])[matrix] =
            (*static_cast<const Words4*>(warp.in[matrix * 8 + lane / 4]))[lane % 4];
  });
}

// The same of the transposes: halves l / 4 of rows 2 (l % 4) and 2 (l % 4) + 1.
inline void load_matrices_transposed(uint32_t (&words)[4], const void* row, MEMVP_SITE) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("misaligned row of ldmatrix");
  std::array<uint16_t, 8> mine;
  memcpy(&mine, row, sizeof(mine));
  meet_warp(&mine, words, {file, line, "ldmatrix.trans"}, [](Warp& warp) {
    const auto half = [&](int matrix, int r, int column) -> uint32_t {
      return (*static_cast<const std::array<uint16_t, 8>*>(warp.in[matrix * 8 + r]))[column];
    };
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        static_cast<uint32_t*>(warp.out[lane])[matrix] =
            half(matrix, lane % 4 * 2, lane / 4) | half(matrix, lane % 4 * 2 + 1, lane / 4) << 16;
  });
}

// ---- memory -------------------------------------------------------------------------------------

// Bytes [offset, offset + sizeof(V) count) of the block's shared memory, the same for all its threads.
template <class V>
V* shared_at(size_t offset, size_t count) {
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
inline void renew_shared(MEMVP_SITE) {
  sync_block({file, line, "renew_shared"});
  Thread& me = this_thread();
  if (me.index.x == 0) {
    Quiet quiet(me.fiber);
    free_shared(*me.block);
  }
  sync_block({file, line, "renew_shared"});
}

// The read-only path: inside an input, which no thread writes.
inline void check_input(const void* p, size_t bytes) {
  Quiet quiet(this_thread().fiber);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(text("misaligned load of %zu bytes", bytes));
  for (const Range& range : run().config.inputs) {
    const char *first = static_cast<const char*>(range.data), *at = static_cast<const char*>(p);
    if (at >= first && at + bytes <= first + range.bytes) return;
  }
  if (!run().config.inputs.empty())
    fail(text("%s loads %zu bytes through the read-only path, outside of every input", name_of(this_thread()).c_str(),
              bytes));
}

template <class V>
V load_input(const void* p) {
  check_input(p, sizeof(V));
  return *static_cast<const V*>(p);
}

template <class V>
V load_written(const void* p) {
  yield_point();
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) fail(text("misaligned load of %zu bytes", sizeof(V)));
  return *static_cast<const V*>(p);
}

// A copy lands when it is waited for, or under Order::kRandom now and then at once: both are allowed, and each hides
// mistakes that the other shows. These are the kernel's own accesses, and the sanitizers see them.
inline void land(const PendingCopy& copy) {
  for (int i = 0; i < copy.filled; ++i)
    static_cast<volatile char*>(copy.to)[i] = i < copy.bytes ? static_cast<const volatile char*>(copy.from)[i] : 0;
}
inline void copy_async(void* to, const void* from, int bytes, int filled) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    fail("misaligned asynchronous copy");
  const PendingCopy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, filled};
  bool now;
  {
    Quiet quiet(this_thread().fiber);
    now = run().config.order == Order::kRandom && run().chance(0.25);
    if (!now) this_thread().copies.push_back(copy);
  }
  if (now) land(copy);
}
inline void commit_copies() {
  Quiet quiet(this_thread().fiber);
  Thread& me = this_thread();
  me.copy_groups.push_back(std::move(me.copies));
  me.copies.clear();
}
inline void wait_copies(size_t pending) {
  yield_point();
  std::vector<PendingCopy> due;
  {
    Quiet quiet(this_thread().fiber);
    auto& groups = this_thread().copy_groups;
    while (groups.size() > pending) {
      due.insert(due.end(), groups[0].begin(), groups[0].end());
      groups.erase(groups.begin());
    }
  }
  for (const PendingCopy& copy : due) land(copy);
}

}  // namespace memvp::host_run
