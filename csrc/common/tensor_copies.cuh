// Copies of whole tiles between a tensor in global memory and shared memory, which one thread begins and no thread
// carries out.
//
// A tile's rows are 64 elements of 16 bits: 128 bytes, of which 16-byte piece i of row r lies where piece i ^ (r % 8)
// would. So eight rows at the same k fall into different banks, and products read it as it lies (common/warpgroup.cuh).
// Its place in shared memory is a multiple of 1024 bytes. Elements outside of the tensor are zeros, and not stored.
#pragma once
#include "common/barriers.cuh"
#ifndef __CUDACC__
#include "host_run/tensor_copies.h"
#endif

namespace memvp {

constexpr int kTileColumns = 64;
constexpr int kTileAlignment = 1024;

// How a tensor of two or three dimensions lies and how large its tiles are: a kernel's parameter, `const
// __grid_constant__`. Made by common/tensor_map.h.
#ifdef __CUDACC__
struct alignas(128) TensorMap {
  unsigned char opaque[128];  // a CUtensorMap
};
#else
using TensorMap = host_run::TensorMap;
#endif

MEMVP_DEVICE void prefetch_map(const TensorMap& map MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::check_map(map, {file, line, "prefetch_map"});
#elif defined(MEMVP_HOPPER)
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  __trap();
#endif
}

// The tile whose first element is (row, column), of a tensor of two dimensions; or (page, row, column), of three.
// `barrier` counts its bytes, all of a tile's even where some are outside.
MEMVP_DEVICE void load_tile(void* shared, const TensorMap& map, Barrier& barrier, int column, int row MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::load_tile(shared, map, 2, barrier.state, {column, row, 0}, {file, line, "load_tile"});
#elif defined(MEMVP_HOPPER)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
      : "memory");
#else
  __trap();
#endif
}
MEMVP_DEVICE void load_tile(void* shared, const TensorMap& map, Barrier& barrier, int column, int row,
                            int page MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::load_tile(shared, map, 3, barrier.state, {column, row, page}, {file, line, "load_tile"});
#elif defined(MEMVP_HOPPER)
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(page)
      : "memory");
#else
  __trap();
#endif
}

// From shared memory, behind fence_async_shared of those who wrote there.
MEMVP_DEVICE void store_tile(const TensorMap& map, const void* shared, int column, int row MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::store_tile(map, 2, shared, {column, row, 0}, {file, line, "store_tile"});
#elif defined(MEMVP_HOPPER)
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(column), "r"(row)
               : "memory");
#else
  __trap();
#endif
}
MEMVP_DEVICE void store_tile(const TensorMap& map, const void* shared, int column, int row, int page MEMVP_AND_SITE) {
#ifndef __CUDACC__
  host_run::store_tile(map, 3, shared, {column, row, page}, {file, line, "store_tile"});
#elif defined(MEMVP_HOPPER)
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(column), "r"(row), "r"(page)
               : "memory");
#else
  __trap();
#endif
}

// The stores that this thread has begun since the last time are a group.
MEMVP_DEVICE void commit_stores(MEMVP_SITE) {
#ifndef __CUDACC__
  host_run::commit_stores({file, line, "commit_stores"});
#elif defined(MEMVP_HOPPER)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  __trap();
#endif
}
// Until all but this thread's last `pending` groups have read shared memory, which may then be written again.
template <int pending>
MEMVP_DEVICE void wait_stores_read(MEMVP_SITE) {
#ifndef __CUDACC__
  host_run::wait_stores(pending, false, {file, line, "wait_stores_read"});
#elif defined(MEMVP_HOPPER)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
#else
  __trap();
#endif
}
// Until they are in global memory, for this thread to say so.
template <int pending>
MEMVP_DEVICE void wait_stores(MEMVP_SITE) {
#ifndef __CUDACC__
  host_run::wait_stores(pending, true, {file, line, "wait_stores"});
#elif defined(MEMVP_HOPPER)
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
#else
  __trap();
#endif
}

}  // namespace memvp
