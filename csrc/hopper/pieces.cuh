// 64 columns of a warpgroup's 64 rows at a time between registers and shared memory, and from there to global memory:
// what an epilogue reads and stores. A thread's words of a piece are its accumulators' columns, two to a word.
#pragma once
#include "common/mma.cuh"
#include "hopper/ring.cuh"

namespace memvp::hopper {

constexpr int kWords = kPiece / 4;  // of a thread, in one piece

template <class T, int kFirst>
MEMVP_DEVICE void pack_piece(uint32_t (&words)[kWords], const float (&acc)[kColumns / 2]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = pack(T{}, acc[kFirst + 2 * i], acc[kFirst + 2 * i + 1]);
}

// Where the lane's row of the four matrices of columns 16i .. 16i + 15 lies in a piece, swizzled as copies have it.
MEMVP_DEVICE int place_in_piece(int i) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32;
  return (thread / 32 * 16 + lane % 16) * 128 + ((2 * i + lane / 16) ^ lane % 8) * 16;
}

MEMVP_DEVICE void read_piece(uint32_t (&words)[kWords], const unsigned char* piece) {
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    uint32_t four[4];
    load_matrices(four, reinterpret_cast<const uint4*>(piece + place_in_piece(i)));
#pragma unroll
    for (int j = 0; j < 4; ++j) words[4 * i + j] = four[j];
  }
}

// A warpgroup's two buffers. Its first thread begins the stores and waits for them.
class Staging {
 public:
  __device__ Staging(const Shared& shared, int group)
      : buffers_(shared.staging + group * kBuffers * kBlockBytes), group_(group), row_(group * kGroupRows) {}

  // A piece of the tile at `row`, which has rows of this warpgroup or not.
  template <class... Page>
  __device__ void store(const uint32_t (&words)[kWords], const TensorMap& map, int rows, int row, int column,
                        Page... page) {
    unsigned char* const buffer = buffers_ + next_ * kBlockBytes;
    next_ ^= 1;
    const bool first = threadIdx.x % kGroupThreads == 0;
    if (first) wait_stores_read<kBuffers - 1>();
    sync_some(1 + group_, kGroupThreads);  // the buffer's last store has read it
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint32_t four[4] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
      store_matrices(buffer + place_in_piece(i), four);
    }
    fence_async_shared();
    sync_some(1 + group_, kGroupThreads);
    if (first) {
      if (row + row_ < rows) store_tile(map, buffer, column, row + row_, page...);
      commit_stores();  // of none, too: the next wait counts groups
    }
  }

  // Before the block ends, and with it its shared memory.
  __device__ void end() {
    if (threadIdx.x % kGroupThreads == 0) wait_stores<0>();
  }

 private:
  unsigned char* buffers_;
  int group_, row_, next_ = 0;
};

// Calls body(piece as a constant) for those of a tile's pieces that begin inside.
template <int kCount, class Body>
MEMVP_DEVICE void for_pieces(int column, int columns, Body body) {
  if constexpr (kCount > 0) {
    for_pieces<kCount - 1>(column, columns, body);
    if (column + (kCount - 1) * kPiece < columns) body(std::integral_constant<int, kCount - 1>{});
  }
}

}  // namespace memvp::hopper
