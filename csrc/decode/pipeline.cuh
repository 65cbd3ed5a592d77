// Weight rows times tokens at the speed of memory: a multistage shared-memory pipeline, filled by asynchronous copies
// far ahead of the tensor cores. The weights are the tall operand and the tokens the narrow one, so that one token
// costs the same reads as eight.
#pragma once
#include "common/mma.cuh"
#include "decode/arguments.cuh"

namespace memvp::decode {

// The place of 16-byte chunk `chunk` of a row's 128-byte slice: the same chunk of eight rows lies in eight different
// groups of banks, so that a matrix is read at once. Chunk c ^ i lies at the place of c, exclusive-or i.
MEMVP_DEVICE int swizzled(int row, int chunk) {
  return row * 8 + (chunk ^ row % 8);
}

// The weight rows of a product, by two: pair u is row u of `base[0]` and of `base[1]`, `stride[h]` elements apart, and
// each runs along k.
template <class T>
struct RowPairs {
  const T* base[2];
  int64_t stride[2];
  int32_t count[2];  // rows that exist; the others are not read, and their results mean nothing
};

// Rows 2u and 2u + 1 of one matrix.
template <class T>
MEMVP_DEVICE RowPairs<T> neighbours(const void* data, int64_t stride, int rows) {
  const T* base = static_cast<const T*>(data);
  return {{base, base + stride}, {2 * stride, 2 * stride}, {(rows + 1) / 2, rows / 2}};
}

// A matrix (k, rows) that runs along its rows: element k of a weight row is `stride` elements past element k - 1. Its
// rows are paired as they lie in a row tile: pair u of a tile is rows u and u + 8 of it.
template <class T>
struct RowsAcross {
  const T* base;
  int64_t stride;
  int32_t count;

  __device__ static int64_t low_row(int pair) {
    return static_cast<int64_t>(pair / kPairTile) * kRowTile + pair % kPairTile;
  }
};

// The tokens' side of a product: rows of T that run along k, one per token, of all tokens or of `members`.
template <class T>
struct TokenRows {
  const T* base;
  int64_t stride;
  int32_t count;
  const int32_t* members = nullptr;

  // Starts the copies of one slice, elements k .. k + 63, zero from k_end on.
  __device__ void copy(uint4* slice, int64_t k, int64_t k_end) const {
    const int chunk = threadIdx.x % 8;
    const bool valid = k + chunk * 8 < k_end;
    for (int token = threadIdx.x / 8; token < count; token += kThreads / 8) {
      const int64_t row = members == nullptr ? token : members[token];
      cp_async16(slice + swizzled(token, chunk), base + row * stride + (valid ? k + chunk * 8 : 0), valid);
    }
  }
};

// A warp's share of the result: every row_warps()-th row tile, and token_tiles_per_warp() neighbouring token tiles.
template <int kTokenTiles>
struct PipelineSums {
  static constexpr PipelineShape kShape{kTokenTiles};
  float c[kShape.row_tiles_per_warp()][kShape.token_tiles_per_warp()][4];
};

// Rows: RowPairs or RowsAcross. Tokens: TokenRows, or what else fills a slice.
template <class T, int kTokenTiles, class Rows, class Tokens>
class Pipeline {
  static constexpr PipelineShape kShape{kTokenTiles};
  static constexpr int kRowTilesPerWarp = kShape.row_tiles_per_warp();
  static constexpr int kTokenTilesPerWarp = kShape.token_tiles_per_warp();

 public:
  // Pairs from `first_pair` on, as many as the plan gives a block, over split number `split` of k.
  __device__ Pipeline(const PipelinePlan& plan, const Rows& rows, const Tokens& tokens, int first_pair, int split,
                      int64_t k_end)
      : rows_(rows),
        tokens_(tokens),
        first_pair_(first_pair),
        pairs_(plan.pairs_per_block),
        row_tiles_(plan.row_tiles()),
        slices_(plan.slices_per_stage),
        stages_(plan.stages) {
    const int64_t depth = static_cast<int64_t>(plan.slices_per_split) * kSlice;
    k_begin_ = split * depth;
    k_end_ = least(k_end, k_begin_ + depth);
    steps_ = static_cast<int>(ceil_div<int64_t>(greatest<int64_t>(k_end_ - k_begin_, 0), slices_ * kSlice));
    row_chunks_ = row_tiles_ * kRowTile * 8;
    token_chunks_ = kTokenTiles * kTokenTile * 8;
    const size_t row_bytes = static_cast<size_t>(stages()) * slices_ * row_chunks_ * 16;
    shared_rows_ = shared_at<uint4>(0, row_bytes / 16);
    shared_tokens_ = shared_at<uint4>(row_bytes, static_cast<size_t>(stages()) * slices_ * token_chunks_);
  }

  // Starts the copies of the first stages' weights, which are inputs of the call, before the launch ahead, which writes
  // the tokens, has ended. Then wait for it, and run.
  __device__ void start_rows() {
    rows_started_ = stages() - 1;
#pragma unroll 1
    for (int step = 0; step < least(rows_started_, steps_); ++step) copy_rows(rows_, step);
  }

  // sums = rows · tokens over this block's split of k.
  __device__ void run(PipelineSums<kTokenTiles>& sums) {
#pragma unroll
    for (int i = 0; i < kRowTilesPerWarp; ++i)
#pragma unroll
      for (int b = 0; b < kTokenTilesPerWarp; ++b)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums.c[i][b][j] = 0.0f;
#pragma unroll 1
    for (int step = 1 - stages(); step < steps_; ++step) {  // before step 0 all stages but one are filled
      if (step >= 0) {
        if (stages() == 4)
          cp_async_wait<2>();
        else
          cp_async_wait<1>();
        __syncthreads();  // all copies of this step have landed, and nobody reads the stage that is filled next
      }
      const int ahead = step + stages() - 1;
      if (ahead < steps_) {
        if (ahead >= rows_started_) copy_rows(rows_, ahead);
        copy_tokens(ahead);
      } else {
        pdl_launch_dependents();  // every read of this block is in flight: the next launch's may follow
      }
      cp_async_commit();
      if (step < 0) continue;
      for (int slice = 0; slice < slices_; ++slice) multiply(sums, (step % stages()) * slices_ + slice);
    }
    cp_async_wait<0>();
  }

  // store(pair, token, sum of its first row, sum of its second) once for each of the block, by way of shared memory:
  // one copy of `store` in the code, and neighbouring pairs in neighbouring threads.
  template <class Store>
  __device__ void store(const PipelineSums<kTokenTiles>& sums, Store store) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, padded_pairs = row_tiles_ * kPairTile;
    float2* all = reinterpret_cast<float2*>(shared_rows_);  // [token][pair]: 4 KB for a row tile at most, of 6 and more
    __syncthreads();                                        // nobody reads the stages any more
#pragma unroll
    for (int i = 0; i < kRowTilesPerWarp; ++i) {
      const int tile = row_tile(i);
      if (tile >= row_tiles_) continue;
#pragma unroll
      for (int b = 0; b < kTokenTilesPerWarp; ++b)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          all[((first_token_tile() + b) * kTokenTile + 2 * t + j) * padded_pairs + tile * kPairTile + g] =
              float2{sums.c[i][b][j], sums.c[i][b][2 + j]};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens_.count * pairs_; i += kThreads) {
      const int token = i / pairs_, pair = i % pairs_;
      const float2 both = all[token * padded_pairs + pair];
      store(first_pair_ + pair, token, both.x, both.y);
    }
  }

 private:
  static constexpr int kRowsAtOnce = kThreads / 8;
  static_assert(kRowsAtOnce % kPairTile == 0 && kPairTile % 8 == 0, "copy_rows steps by whole tiles");

  // Warps w, w + 4 (mod 8) run on one of the four schedulers: it gets all tokens of the same rows.
  __device__ static int row_tile(int i) {
    return static_cast<int>(threadIdx.x) / 32 % kShape.row_warps() + i * kShape.row_warps();
  }
  __device__ static int first_token_tile() {
    return static_cast<int>(threadIdx.x) / 32 / kShape.row_warps() * kTokenTilesPerWarp;
  }

  // With many tokens there are three, or four where the chip has room for them beside the next launch.
  __device__ int stages() const { return kShape.min_stages() == 4 ? 4 : stages_; }

  __device__ int64_t first_k(int step, int slice) const {
    return k_begin_ + (static_cast<int64_t>(step) * slices_ + slice) * kSlice;
  }

  // Thread i copies chunk i % 8 of every kRowsAtOnce-th row from i / 8 on: a warp reads four whole lines. Those rows
  // are a multiple of the tile apart, so their places in shared memory are at equal steps, swizzle included.
  __device__ void copy_rows(const RowPairs<T>& rows, int step) {
    uint4* stage = shared_rows_ + static_cast<size_t>(step % stages()) * slices_ * row_chunks_;
    const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
    for (int slice = 0; slice < slices_; ++slice, stage += row_chunks_) {
      const int64_t k = first_k(step, slice) + chunk * 8;
      const bool valid = k < k_end_;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4* to = stage + swizzled(first / kPairTile * kRowTile + half * kPairTile + first % kPairTile, chunk);
        const T* from = rows.base[half] + (first_pair_ + first) * rows.stride[half] + (valid ? k : 0);
        const int end = least(pairs_, rows.count[half] - first_pair_);
#pragma unroll 2
        for (int pair = first; pair < end; pair += kRowsAtOnce) {
          cp_async16(to, from, valid);
          to += kRowsAtOnce / kPairTile * kRowTile * 8;
          from += kRowsAtOnce * rows.stride[half];
        }
      }
    }
  }
  // The same of a matrix that runs along its rows: 64 of them at one k are a line, and a slice has 64 such lines of
  // every four row tiles.
  __device__ void copy_rows(const RowsAcross<T>& rows, int step) {
    uint4* stage = shared_rows_ + static_cast<size_t>(step % stages()) * slices_ * row_chunks_;
    const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
    for (int slice = 0; slice < slices_; ++slice, stage += row_chunks_) {
      const int64_t k = first_k(step, slice) + first;
      int64_t row = 2 * static_cast<int64_t>(first_pair_) + chunk * 8;
      for (uint4* to = stage + swizzled(first, chunk); to < stage + row_chunks_; to += kSlice * 8, row += kSlice) {
#pragma unroll
        for (int i = 0; i < kSlice; i += kRowsAtOnce) {
          const bool valid = k + i < k_end_ && row < rows.count;
          cp_async16(to + i * 8, valid ? rows.base + (k + i) * rows.stride + row : rows.base, valid);
        }
      }
    }
  }

  __device__ void copy_tokens(int step) {
    uint4* stage = shared_tokens_ + static_cast<size_t>(step % stages()) * slices_ * token_chunks_;
    for (int slice = 0; slice < slices_; ++slice, stage += token_chunks_)
      tokens_.copy(stage, first_k(step, slice), k_end_);
  }

  // The mma's words of the warp's row tile i at 16 of the slice's k: rows 0 to 7 and 8 to 15 of the first 8 k, then of
  // the other 8.
  __device__ static void load_row_tile(uint32_t (&words)[4], const RowPairs<T>&, const uint4* rows, int i, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix(words, rows + row_tile(0) * kRowTile * 8 + (swizzled(lane % 16, lane / 16) ^ k / 8) +
                        i * kShape.row_warps() * kRowTile * 8);
  }
  __device__ static void load_row_tile(uint32_t (&words)[4], const RowsAcross<T>&, const uint4* rows, int i, int k) {
    static_assert(kShape.row_warps() % 4 == 0, "a warp's tiles have one place in their 64 rows");
    const int lane = threadIdx.x % 32;
    ldmatrix_transposed(words, rows + row_tile(0) / 4 * kSlice * 8 +
                                   swizzled(lane / 16 * 8 + lane % 8, row_tile(0) % 4 * 2 + lane / 8 % 2) + k * 8 +
                                   i * kShape.row_warps() / 4 * kSlice * 8);
  }

  __device__ void multiply(PipelineSums<kTokenTiles>& sums, int slot) {
    constexpr int kTokenTileChunks = kTokenTile * 8;
    const int lane = threadIdx.x % 32;
    const uint4* rows = shared_rows_ + static_cast<size_t>(slot) * row_chunks_;
    const uint4* tokens =
        shared_tokens_ + static_cast<size_t>(slot) * token_chunks_ + first_token_tile() * kTokenTileChunks;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 of the slice's k
      uint32_t row[2][kRowTilesPerWarp][4];
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int i = 0; i < kRowTilesPerWarp; ++i)
          if (row_tile(i) < row_tiles_) load_row_tile(row[step][i], rows_, rows, i, half * 32 + step * 16);
      const int at = swizzled(lane % 8, lane / 8) ^ half * 4;  // 8 tokens, all 32 k
#pragma unroll
      for (int b = 0; b < kTokenTilesPerWarp; ++b) {
        uint32_t token[4];
        ldmatrix(token, tokens + b * kTokenTileChunks + at);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int i = 0; i < kRowTilesPerWarp; ++i)
            if (row_tile(i) < row_tiles_)
              mma_16x8x16(T{}, sums.c[i][b], row[step][i][0], row[step][i][1], row[step][i][2], row[step][i][3],
                          token[2 * step], token[2 * step + 1]);
      }
    }
  }

  Rows rows_;
  Tokens tokens_;
  int first_pair_, pairs_, row_tiles_, slices_, stages_, steps_, row_chunks_, token_chunks_;
  int rows_started_ = 0;  // steps
  int64_t k_begin_, k_end_;
  uint4 *shared_rows_, *shared_tokens_;
};

}  // namespace memvp::decode
