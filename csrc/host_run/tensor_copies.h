// Copies of tiles between global and shared memory, which happen at any time that is allowed (begin_landing): a load
// between its start and the end of the phase that counts its bytes, a store's reads between its start and the wait for
// them. A tile that is being loaded is NaN.
#pragma once
#include <deque>

#include "host_run/barriers.h"

namespace memvp::host_run {

constexpr int kRowBytes = 128;  // of a tile

struct alignas(128) TensorMap {
  char* base = nullptr;
  int64_t sizes[3] = {1, 1, 1}, strides[3] = {2, 0, 0};  // in elements; in bytes
  int box[3] = {1, 1, 1}, rank = 0;                      // rank 0: nobody made it
};

using Coordinates = std::array<int, 3>;

inline TensorMap make_map(const void* base, int rank, const int64_t* sizes, const int64_t* strides, const int* box) {
  TensorMap map;
  map.base = const_cast<char*>(static_cast<const char*>(base));
  map.rank = rank;
  for (int i = 0; i < rank; ++i) {
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    if (i > 0) map.strides[i] = strides[i - 1];
  }
  return map;
}

inline unsigned tile_bytes(const TensorMap& map) {
  return static_cast<unsigned>(kRowBytes * map.box[1] * map.box[2]);
}

inline void check_map(const TensorMap& map, const Site& site) {
  if (map.rank == 0) fail(name_of(site) + ": a map that make_map has not made");
}

inline void check_copy(const TensorMap& map, int rank, const void* shared, const Site& site) {
  check_map(map, site);
  if (map.rank != rank) fail(name_of(site) + text(": %d coordinates of a tensor of %d dimensions", rank, map.rank));
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0)
    fail(name_of(site) + ": a tile begins at a multiple of 1024 bytes of shared memory");
  carve_of(*this_thread().block, shared, tile_bytes(map), site);
}

// Calls piece(shared, global, bytes) for each 16-byte piece of a tile: where it lies in shared memory, and the part of
// it that the tensor has (0 .. 16 bytes from its beginning on; or none at all, and nullptr).
template <class Shared, class Piece>
void each_piece(const TensorMap& map, const Coordinates& at, Shared* shared, Piece piece) {
  for (int page = 0; page < map.box[2]; ++page)
    for (int row = 0; row < map.box[1]; ++row) {
      const int64_t y = int64_t{at[1]} + row, z = int64_t{at[2]} + page;
      const bool inside = y >= 0 && y < map.sizes[1] && z >= 0 && z < map.sizes[2];
      Shared* const line = shared + (int64_t{page} * map.box[1] + row) * kRowBytes;
      const auto swizzle = static_cast<int>(reinterpret_cast<uintptr_t>(line) >> 7 & 7);
      for (int i = 0; i < 8; ++i)
        piece(line + (i ^ swizzle) * 16, inside ? map.base + y * map.strides[1] + z * map.strides[2] : nullptr,
              int64_t{at[0]} + i * 8);
    }
}

// Elements [0, 8) of a piece whose first is number x of its row, those outside of the row left out.
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
    each_piece(map, store.at, store.shared, [&](const char* from, char* row, int64_t x) {
      const char* piece = store.tile.data() + (from - store.shared);
      if (row != nullptr) each_inside(map, x, [&](int i, int64_t byte) { memcpy(row + byte, piece + i * 2, 2); });
    });
  }

  std::string left_behind(const Thread& thread) const override {
    const auto found = threads.find(thread.index.x);
    if (found == threads.end()) return "";
    const OfThread& mine = found->second;
    for (const auto& store : mine.open)
      return name_of(thread) + " returned without commit_stores of " + name_of(store->site);
    for (size_t i = mine.let_go; i < mine.groups.size(); ++i)
      for (const auto& store : mine.groups[i])
        return name_of(thread) + " returned without wait_stores_read of " + name_of(store->site) +
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
inline void begin_load(Block& to, void* shared, const TensorMap& map, uint64_t& word, const Coordinates& at,
                       const Site& site) {
  SharedBarrier& barrier = barrier_at(to, word, site);
  if (!barrier.published) fail(name_of(site) + ": a barrier without publish_barriers");
  const auto fill = [block = &to, shared, map, site](auto piece) {
    Carve& carve = carve_of(*block, shared, tile_bytes(map), site);
    piece(static_cast<char*>(shared));
    memcpy(seen_at(carve, shared), shared, tile_bytes(map));
  };
  fill([&map](char* tile) { memset(tile, 0xFF, tile_bytes(map)); });
  begin_landing({&to, &word, [fill, map, at, &barrier, site] {
                   fill([&map, &at](char* tile) {
                     each_piece(map, at, tile, [&map](char* to, const char* row, int64_t x) {
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

inline void load_tile(void* shared, const TensorMap& map, int rank, uint64_t& word, const Coordinates& at,
                      const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  check_copy(map, rank, shared, site);
  begin_load(*me.block, shared, map, word, at, site);
}

inline void store_tile(const TensorMap& map, int rank, const void* shared, const Coordinates& at, const Site& site) {
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

inline void commit_stores(const Site&) {
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  auto& mine = unit<CopyUnit>().threads[me.index.x];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
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
      while (store->tile.empty()) {
        me.site = site;
        me.waits_for = &mine;
        sleep(State::kEvent);
      }
  me.waits_for = nullptr;
  mine.let_go = std::max(mine.let_go, due);
  if (!written) return;
  for (size_t i = 0; i < due; ++i) {
    for (const auto& store : mine.groups[0]) CopyUnit::write(*store);
    mine.groups.pop_front();
    mine.let_go--;
  }
}

}  // namespace memvp::host_run
