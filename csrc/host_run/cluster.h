// Blocks that are resident together and reach each other's shared memory: at the same place of each.
#pragma once
#include "host_run/tensor_copies.h"

namespace memvp::host_run {

inline unsigned cluster_blocks() {
  return run().launches[this_thread().block->launch].cluster;
}

// Block `rank` of the running thread's cluster. It must not have ended.
inline Block& block_of_cluster(unsigned rank, const Site& site) {
  const Block& mine = *this_thread().block;
  const unsigned size = cluster_blocks(), wanted = mine.index.x / size * size + rank;
  if (rank >= size) fail(name_of(site) + text(": block %u of a cluster of %u", rank, size));
  for (const auto& block : run().blocks)
    if (block->launch == mine.launch && block->index.x == wanted && block->done < block->threads.size()) return *block;
  fail(name_of(site) + text(": block %u of the cluster has ended", rank));
}

// The place in that block's shared memory of what lies here in the running one's.
template <class V>
V* place_in(Block& block, V* shared, const Site& site) {
  const auto at = reinterpret_cast<uintptr_t>(shared);
  for (const auto& [offset, carve] : this_thread().block->shared) {
    const auto first = reinterpret_cast<uintptr_t>(carve.data);
    if (at < first || at >= first + carve.bytes) continue;
    const auto theirs = block.shared.find(offset);
    if (theirs == block.shared.end())
      fail(name_of(site) + ": shared memory that the other block has not divided yet: sync_cluster comes before");
    return reinterpret_cast<V*>(static_cast<char*>(theirs->second.data) + (at - first));
  }
  fail(name_of(site) + ": outside of shared memory");
}

inline void arrive_at(uint64_t& word, unsigned rank, const Site& site) {
  Block* block;
  uint64_t* theirs;
  {
    Quiet quiet(this_thread().fiber);
    block = &block_of_cluster(rank, site);
    theirs = place_in(*block, &word, site);
  }
  arrive(*block, *theirs, 0, site);
}

// One tile to the blocks of the cluster in `mask`, each of which it reaches for itself.
inline void load_tile_to(unsigned mask, void* shared, const TensorMap& map, int rank, uint64_t& word,
                         const Coordinates& at, const Site& site) {
  yield_point();
  Quiet quiet(this_thread().fiber);
  check_copy(map, rank, shared, site);
  if (mask == 0 || mask >> cluster_blocks() != 0)
    fail(name_of(site) + text(": blocks %x of a cluster of %u", mask, cluster_blocks()));
  for (unsigned i = 0; mask >> i != 0; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Block& block = block_of_cluster(i, site);
    begin_load(block, place_in(block, static_cast<char*>(shared), site), map, *place_in(block, &word, site), at, site);
  }
}

// All threads of all blocks of the cluster meet.
inline void sync_cluster(const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  const unsigned size = cluster_blocks();
  Block& first = block_of_cluster(0, site);
  for (unsigned i = 0; i < size; ++i)
    if (block_of_cluster(i, site).done > 0) fail(name_of(site) + ": after a thread of the cluster returned");
  me.site = site;
  release(&first.cluster_object);
  first.at_cluster.push_back(&me);
  if (first.at_cluster.size() == size * me.block->threads.size()) {
    for (Thread* t : first.at_cluster) make_ready(t);
    first.at_cluster.clear();
    sleep(State::kReady);
  } else {
    sleep(State::kBarrier);
  }
  acquire(&first.cluster_object);
}

}  // namespace memvp::host_run
