// TMA: copies of whole tiles between a tensor in global memory and shared memory, which one thread begins. sm_90a.
//
// A tile's rows are 64 elements of 16 bits: 128 bytes, of which 16-byte chunk i of row r lies in the place of chunk
// i ^ (r % 8). So eight rows at the same k fall into different banks, and products read it as it lies (wgmma.cuh).
// Its place in shared memory is a multiple of 1024 bytes. Elements outside of the tensor are zeros, and not stored.
#pragma once
#include "common/barriers.cuh"

namespace memvp {

constexpr int kTileColumns = 64;

// How a tensor of two or three dimensions lies and how large its tiles are: a kernel's parameter, `const
// __grid_constant__`. Made by common/tensor_map.h.
struct alignas(128) TensorMap {
  unsigned char opaque[128];  // a CUtensorMap
};

// The tile whose first element is (row, column) of a tensor of two dimensions, or (page, row, column) of three.
// `barrier` counts the bytes of the whole tile even where some are outside.
MEMVP_DEVICE void tma_load(void* shared, const TensorMap& map, Barrier& barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
      : "memory");
}
MEMVP_DEVICE void tma_load(void* shared, const TensorMap& map, Barrier& barrier, int column, int row, int page) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(page)
      : "memory");
}

// tma_load to the same place in each block of the cluster whose bit is in `mask`; each one's own barrier counts.
MEMVP_DEVICE void tma_load_multicast(unsigned mask, void* shared, const TensorMap& map, Barrier& barrier, int column,
                                     int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "h"(static_cast<unsigned short>(mask))
      : "memory");
}

// From shared memory, behind fence_async_proxy of the threads that wrote there.
MEMVP_DEVICE void tma_store(const TensorMap& map, const void* shared, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(column), "r"(row)
               : "memory");
}
MEMVP_DEVICE void tma_store(const TensorMap& map, const void* shared, int column, int row, int page) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(column), "r"(row), "r"(page)
               : "memory");
}

// The stores that this thread has begun since the last time are a group.
MEMVP_DEVICE void tma_commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all but this thread's last kPending groups have read shared memory, which may then be written again.
template <int kPending>
MEMVP_DEVICE void tma_wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until they are in global memory.
template <int kPending>
MEMVP_DEVICE void tma_wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace memvp
