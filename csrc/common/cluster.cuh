// Blocks that the chip keeps together: their barriers, and tiles that one copy brings to the shared memory of several,
// at the same place of each. A launch without clusters is one of clusters of one block.
#pragma once
#include "common/tensor_copies.cuh"
#ifndef __CUDACC__
#include "host_run/cluster.h"
#endif

namespace memvp {

// All threads of all blocks of the cluster meet; what they wrote to shared memory before, all of them see.
MEMVP_DEVICE void sync_cluster(MEMVP_SITE) {
#ifdef __CUDACC__
#ifdef MEMVP_HOPPER
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
#else
  host_run::sync_cluster({file, line, "sync_cluster"});
#endif
}

// `arrive` at the barrier that lies in the same place of block `rank` of the cluster. It says that what this thread
// waited for is over, and releases no write of its own to the other block: that takes a fence of the whole chip.
MEMVP_DEVICE void arrive_at(Barrier& barrier, unsigned rank MEMVP_AND_SITE) {
#ifdef __CUDACC__
#ifdef MEMVP_HOPPER
  asm volatile(
      "{\n"
      " .reg .b32 there;\n"
      " mapa.shared::cluster.u32 there, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
#else
  __trap();
#endif
#else
  host_run::arrive_at(barrier.state, rank, {file, line, "arrive_at"});
#endif
}

// load_tile, of which each block of the cluster whose bit is in `mask` gets the tile and its own barrier the bytes.
MEMVP_DEVICE void load_tile_to(unsigned mask, void* shared, const TensorMap& map, Barrier& barrier, int column,
                               int row MEMVP_AND_SITE) {
#ifdef __CUDACC__
#ifdef MEMVP_HOPPER
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "h"(static_cast<unsigned short>(mask))
      : "memory");
#else
  __trap();
#endif
#else
  host_run::load_tile_to(mask, shared, map, 2, barrier.state, {column, row, 0}, {file, line, "load_tile_to"});
#endif
}

}  // namespace memvp
