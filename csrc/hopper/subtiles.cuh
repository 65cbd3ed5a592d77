// Epilogue subtiles, 64 columns of a warpgroup's 64 rows, between registers, shared memory and global memory. A
// thread's words of a subtile are its accumulators, two to a word.
#pragma once
#include "common/mma.cuh"
#include "hopper/pipeline.cuh"

namespace memvp::hopper {

constexpr int kWords = kSubtileColumns / 4;  // of a thread, in one subtile

template <class T, int kFirst>
MEMVP_DEVICE void pack_subtile(uint32_t (&words)[kWords], const float (&acc)[kColumns / 2]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = pack(T{}, acc[kFirst + 2 * i], acc[kFirst + 2 * i + 1]);
}

// Where the lane's row of the four matrices of columns 16i .. 16i + 15 lies in a subtile, swizzled as TMA has it.
MEMVP_DEVICE int offset_in_subtile(int i) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32;
  return (thread / 32 * 16 + lane % 16) * 128 + ((2 * i + lane / 16) ^ lane % 8) * 16;
}

MEMVP_DEVICE void read_subtile(uint32_t (&words)[kWords], const unsigned char* subtile) {
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    uint32_t four[4];
    ldmatrix(four, reinterpret_cast<const uint4*>(subtile + offset_in_subtile(i)));
#pragma unroll
    for (int j = 0; j < 4; ++j) words[4 * i + j] = four[j];
  }
}

// A warpgroup's two store buffers. Its first thread begins the stores and waits for them.
class Staging {
 public:
  __device__ Staging(const SharedStorage& shared, int group)
      : buffers_(shared.staging + group * kBuffers * kBlockBytes), group_(group), row_(group * kGroupRows) {}

  // One subtile of the tile at `row`. In the last tiles this warpgroup may have no row.
  template <class... Page>
  __device__ void store(const uint32_t (&words)[kWords], const TensorMap& map, int rows, int row, int column,
                        Page... page) {
    unsigned char* const buffer = buffers_ + next_ * kBlockBytes;
    next_ ^= 1;
    const bool first = threadIdx.x % kGroupThreads == 0;
    if (first) tma_wait_stores_read<kBuffers - 1>();
    sync_named_barrier(1 + group_, kGroupThreads);  // the buffer's last store has read it
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint32_t four[4] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
      stmatrix(buffer + offset_in_subtile(i), four);
    }
    fence_async_proxy();
    sync_named_barrier(1 + group_, kGroupThreads);
    if (first) {
      if (row + row_ < rows) tma_store(map, buffer, column, row + row_, page...);
      tma_commit_stores();  // empty groups too: the next wait counts them
    }
  }

  // Before the block ends, and with it its shared memory.
  __device__ void end() {
    if (threadIdx.x % kGroupThreads == 0) tma_wait_stores<0>();
  }

 private:
  unsigned char* buffers_;
  int group_, row_, next_ = 0;
};

// Calls body(subtile number as a constant) for those of a tile's subtiles that begin inside.
template <int kCount, class Body>
MEMVP_DEVICE void for_subtiles(int column, int columns, Body body) {
  if constexpr (kCount > 0) {
    for_subtiles<kCount - 1>(column, columns, body);
    if (column + (kCount - 1) * kSubtileColumns < columns) body(std::integral_constant<int, kCount - 1>{});
  }
}

}  // namespace memvp::hopper
