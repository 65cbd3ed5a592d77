// Clusters: blocks that are resident together and reach the same place of each other's shared memory.
#pragma once
#include "common/barriers.cuh"

namespace memvp {

namespace emulation {

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

}  // namespace emulation

inline void arrive_remote(Barrier& barrier, unsigned rank, MEMVP_SITE) {
  using namespace emulation;
  const Site site = MEMVP_HERE("arrive_remote");
  Block* block;
  Barrier* theirs;
  {
    Quiet quiet(this_thread().fiber);
    block = &block_of_cluster(rank, site);
    theirs = place_in(*block, &barrier, site);
  }
  arrive(*block, *theirs, 0, site);
}

inline void sync_cluster(MEMVP_SITE) {
  using namespace emulation;
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  me.site = MEMVP_HERE("sync_cluster");
  const unsigned size = cluster_blocks();
  Block& first = block_of_cluster(0, me.site);
  for (unsigned i = 0; i < size; ++i)
    if (block_of_cluster(i, me.site).done > 0) fail(name_of(me.site) + ": after a thread of the cluster returned");
  meet(first.cluster, size * me.block->threads.size(), State::kBarrier);
}

}  // namespace memvp
