// TMA: a load lands at any time between its start and the end of the phase that counts its bytes, a store reads at any
// time between its start and the wait for it. A tile that is being loaded is NaN.
#pragma once
#include <array>
#include <deque>

#include "common/cluster.cuh"

namespace memvp {

constexpr int kTileColumns = 64;

struct alignas(128) TensorMap {
  char* base = nullptr;
  int64_t sizes[3] = {1, 1, 1}, strides[3] = {2, 0, 0};  // in elements; in bytes
  int box[3] = {1, 1, 1}, rank = 0;                      // rank 0: nobody made it
};

namespace emulation {

constexpr int kRowBytes = 128;  // of a tile

using Coordinates = std::array<int, 3>;

inline unsigned tile_bytes(const TensorMap& map) {
  return static_cast<unsigned>(kRowBytes * map.box[1] * map.box[2]);
}

inline void check_copy(const TensorMap& map, int rank, const void* shared, const Site& site) {
  if (map.rank != rank) fail(name_of(site) + text(": %d coordinates of a tensor of %d dimensions", rank, map.rank));
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0)
    fail(name_of(site) + ": a tile begins at a multiple of 1024 bytes of shared memory");
  carve_of(*this_thread().block, shared, tile_bytes(map), site);
}

// Calls chunk(where it lies in shared memory, its tensor row or nullptr, its first column) for each 16 bytes of a tile.
template <class Shared, class Chunk>
void each_chunk(const TensorMap& map, const Coordinates& at, Shared* shared, Chunk chunk) {
  for (int page = 0; page < map.box[2]; ++page)
    for (int row = 0; row < map.box[1]; ++row) {
      const int64_t y = int64_t{at[1]} + row, z = int64_t{at[2]} + page;
      const bool inside = y >= 0 && y < map.sizes[1] && z >= 0 && z < map.sizes[2];
      Shared* const line = shared + (int64_t{page} * map.box[1] + row) * kRowBytes;
      const auto swizzle = static_cast<int>(reinterpret_cast<uintptr_t>(line) >> 7 & 7);
      for (int i = 0; i < 8; ++i)
        chunk(line + (i ^ swizzle) * 16, inside ? map.base + y * map.strides[1] + z * map.strides[2] : nullptr,
              int64_t{at[0]} + i * 8);
    }
}

// Calls element(i, byte in its row) for those of a chunk's eight elements that the row has.
template <class Element>
void each_inside(const TensorMap& map, int64_t x, Element element) {
  for (int i = 0; i < 8; ++i)
    if (x + i >= 0 && x + i < map.sizes[0]) element(i, (x + i) * 2);
}

struct TileStore {
  TensorMap map;
  const char* shared;
  Coordinates at;
  Site site;
  std::vector<char> tile = {};  // once it has been read: as it lies in shared memory
};

struct CopyUnit : BlockUnit {
  static constexpr UnitSlot kSlot = kCopyUnit;
  struct OfThread {
    std::vector<std::shared_ptr<TileStore>> open;
    std::deque<std::vector<std::shared_ptr<TileStore>>> groups;  // committed and not known to be written, oldest first
    size_t let_go = 0;                                           // of these, known to be read
  };
  Block& block;
  std::map<unsigned, OfThread> threads;

  explicit CopyUnit(Block& b) : block(b) {}

  void check(const TileStore& store) const {
    const unsigned bytes = tile_bytes(store.map);
    check_seen(carve_of(block, store.shared, bytes, store.site), store.shared, bytes, store.site);
  }
  static void write(const TileStore& store) {
    const TensorMap& map = store.map;
    each_chunk(map, store.at, store.shared, [&](const char* from, char* row, int64_t x) {
      const char* chunk = store.tile.data() + (from - store.shared);
      if (row != nullptr) each_inside(map, x, [&](int i, int64_t byte) { memcpy(row + byte, chunk + i * 2, 2); });
    });
  }

  std::string left_behind(const Thread& thread) const override {
    const auto found = threads.find(thread.index.x);
    if (found == threads.end()) return "";
    const OfThread& mine = found->second;
    for (const auto& store : mine.open)
      return name_of(thread) + " returned without tma_commit_stores of " + name_of(store->site);
    for (size_t i = mine.let_go; i < mine.groups.size(); ++i)
      for (const auto& store : mine.groups[i])
        return name_of(thread) + " returned without tma_wait_stores_read of " + name_of(store->site) +
               ", which may not have read shared memory yet";
    return "";
  }
  std::string end() override {
    for (const auto& [index, mine] : threads)
      for (const auto& group : mine.groups)
        for (const auto& store : group) write(*store);
    return "";
  }
};

// To the shared memory of one block, and with its barrier.
inline void begin_load(Block& to, void* shared, const TensorMap& map, Barrier& at_barrier, const Coordinates& at,
                       const Site& site) {
  SharedBarrier& barrier = barrier_at(to, at_barrier, site);
  if (!barrier.fenced) fail(name_of(site) + ": a barrier without fence_barrier_init");
  const auto fill = [block = &to, shared, map, site](auto write) {
    Carve& carve = carve_of(*block, shared, tile_bytes(map), site);
    write(static_cast<char*>(shared));
    memcpy(seen_at(carve, shared), shared, tile_bytes(map));
  };
  fill([&map](char* tile) { memset(tile, 0xFF, tile_bytes(map)); });
  begin_landing({&to, &at_barrier, [fill, map, at, &barrier, site] {
                   fill([&map, &at](char* tile) {
                     each_chunk(map, at, tile, [&map](char* to, const char* row, int64_t x) {
                       if (row != nullptr && x >= 0 && x + 8 <= map.sizes[0]) {
                         memcpy(to, row + x * 2, 16);
                         return;
                       }
                       memset(to, 0, 16);
                       if (row != nullptr)
                         each_inside(map, x, [&](int i, int64_t byte) { memcpy(to + i * 2, row + byte, 2); });
                     });
                   });
                   complete_bytes(barrier, tile_bytes(map), site);
                 }});
}

inline void load(void* shared, const TensorMap& map, int rank, Barrier& barrier, const Coordinates& at,
                 const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  check_copy(map, rank, shared, site);
  begin_load(*me.block, shared, map, barrier, at, site);
}

inline void store(const TensorMap& map, int rank, const void* shared, const Coordinates& at, const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  check_copy(map, rank, shared, site);
  CopyUnit& copies = unit<CopyUnit>();
  CopyUnit::OfThread& mine = copies.threads[me.index.x];
  const auto store = std::make_shared<TileStore>(TileStore{map, static_cast<const char*>(shared), at, site});
  mine.open.push_back(store);
  copies.check(*store);  // now and when it is read: a fence between the two is too late
  begin_landing({me.block, &mine, [&copies, &mine, &me, store] {
                   copies.check(*store);
                   store->tile.assign(store->shared, store->shared + tile_bytes(store->map));
                   if (me.state == State::kEvent && me.waits_for == &mine) make_ready(&me);
                 }});
}

// `written`: in global memory; else only read from shared memory.
inline void wait_stores(size_t pending, bool written, const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  CopyUnit::OfThread& mine = unit<CopyUnit>().threads[me.index.x];
  const size_t due = mine.groups.size() > pending ? mine.groups.size() - pending : 0;
  for (size_t i = 0; i < due; ++i)
    for (const auto& store : mine.groups[i])
      while (store->tile.empty()) sleep_for(&mine, site);
  mine.let_go = std::max(mine.let_go, due);
  if (!written) return;
  for (size_t i = 0; i < due; ++i) {
    for (const auto& store : mine.groups[0]) CopyUnit::write(*store);
    mine.groups.pop_front();
    mine.let_go--;
  }
}

}  // namespace emulation

inline void tma_load(void* shared, const TensorMap& map, Barrier& barrier, int column, int row, MEMVP_SITE) {
  emulation::load(shared, map, 2, barrier, {column, row, 0}, MEMVP_HERE("tma_load"));
}
inline void tma_load(void* shared, const TensorMap& map, Barrier& barrier, int column, int row, int page, MEMVP_SITE) {
  emulation::load(shared, map, 3, barrier, {column, row, page}, MEMVP_HERE("tma_load"));
}

inline void tma_load_multicast(unsigned mask, void* shared, const TensorMap& map, Barrier& barrier, int column, int row,
                               MEMVP_SITE) {
  using namespace emulation;
  yield_point();
  Quiet quiet(this_thread().fiber);
  const Site site = MEMVP_HERE("tma_load_multicast");
  check_copy(map, 2, shared, site);
  if (mask == 0 || mask >> cluster_blocks() != 0)
    fail(name_of(site) + text(": blocks %x of a cluster of %u", mask, cluster_blocks()));
  for (unsigned i = 0; mask >> i != 0; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Block& block = block_of_cluster(i, site);
    begin_load(block, place_in(block, static_cast<char*>(shared), site), map, *place_in(block, &barrier, site),
               {column, row, 0}, site);
  }
}

inline void tma_store(const TensorMap& map, const void* shared, int column, int row, MEMVP_SITE) {
  emulation::store(map, 2, shared, {column, row, 0}, MEMVP_HERE("tma_store"));
}
inline void tma_store(const TensorMap& map, const void* shared, int column, int row, int page, MEMVP_SITE) {
  emulation::store(map, 3, shared, {column, row, page}, MEMVP_HERE("tma_store"));
}

inline void tma_commit_stores() {
  using namespace emulation;
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  auto& mine = unit<CopyUnit>().threads[me.index.x];
  mine.groups.push_back(std::exchange(mine.open, {}));
}
template <int kPending>
void tma_wait_stores_read(MEMVP_SITE) {
  emulation::wait_stores(kPending, false, MEMVP_HERE("tma_wait_stores_read"));
}
template <int kPending>
void tma_wait_stores(MEMVP_SITE) {
  emulation::wait_stores(kPending, true, MEMVP_HERE("tma_wait_stores"));
}

}  // namespace memvp
