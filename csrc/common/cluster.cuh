// Clusters: blocks that are resident together and reach each other's shared memory. sm_90a.
#pragma once
#include "common/barriers.cuh"

namespace memvp {

// A barrier of all threads of the cluster, after which what they wrote to shared memory is visible to all of them.
MEMVP_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}

// `arrive` at the barrier that lies in the same place of block `rank` of the cluster. It says that this thread is done
// reading, and releases no write of its own to the other block: that would take a fence of the whole chip.
MEMVP_DEVICE void arrive_remote(Barrier& barrier, unsigned rank) {
  asm volatile(
      "{\n"
      " .reg .b32 remote;\n"
      " mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

}  // namespace memvp
