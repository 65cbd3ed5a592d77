// Products of at most eight tokens that one block computes straight from global memory: the memory's rows and columns,
// and every weight that the pipeline cannot take. Each warp has a share of k; their sums are added in the warps' order.
#pragma once
#include "common/mma.cuh"
#include "decode/arguments.cuh"

namespace memvp::decode {

// c[16 rows x 8 tokens] += rows · tokens over 32 elements of k, each operand contiguous along k. Every lane brings the
// 16 bytes at k = 8t of its two rows and of its token: the same order of k on both sides, so neither needs a shuffle.
template <class T>
MEMVP_DEVICE void mma_rows(float (&c)[4], const uint4& row, const uint4& row8, const uint4& token) {
  mma_16x8x16(T{}, c, row.x, row8.x, row.y, row8.y, token.x, token.y);
  mma_16x8x16(T{}, c, row.z, row8.z, row.w, row8.w, token.z, token.w);
}

// c[4][64 columns x 8 tokens] += the same over 16 elements of k for an operand contiguous along its columns. A lane
// brings the 16 bytes at column 8g of the rows k = 4t .. 4t+3, and of its token those four k. Then c[i][0], c[i][1]
// belong to column 8g + 2i and tokens 2t, 2t + 1, and c[i][2], c[i][3] to column 8g + 2i + 1.
template <class T>
MEMVP_DEVICE void mma_columns(float (&c)[4][4], const uint4 (&row)[4], const uint2& token) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t r0 = word_of(row[0], i), r1 = word_of(row[1], i), r2 = word_of(row[2], i), r3 = word_of(row[3], i);
    mma_16x8x16(T{}, c[i], low_halves(r0, r1), high_halves(r0, r1), low_halves(r2, r3), high_halves(r2, r3), token.x,
                token.y);
  }
}

// A lane's group g and member t: accumulators c[0], c[1] are of tokens 2t, 2t + 1, operands are of token g.
MEMVP_DEVICE int warp_of_thread() {
  return static_cast<int>(threadIdx.x) / 32;
}
MEMVP_DEVICE int group_of_lane() {
  return static_cast<int>(threadIdx.x) % 32 / 4;
}
MEMVP_DEVICE int member_of_lane() {
  return static_cast<int>(threadIdx.x) % 4;
}

// How many steps of k have their loads in flight at once. Of anything but plain 16-byte rows one step has enough loads.
template <Reading kReading>
constexpr int kStepsAhead = kReading == Reading::kNarrow ? 4 : 1;

// sum += 16 rows · 8 tokens over blocks of 32 elements of k from number `first` on, every `step`-th. load(k) gives a
// lane's eight elements from k of row g, of row g + 8 and of token g.
struct RowOperands {
  uint4 row, row8, token;
};
template <class T, int kAhead, class Load>
MEMVP_DEVICE void add_rows(float (&sum)[4], int first, int step, int64_t k_end, Load load) {
#pragma unroll kAhead
  for (int64_t k = static_cast<int64_t>(first) * 32 + member_of_lane() * 8; k - member_of_lane() * 8 < k_end;
       k += step * 32) {
    const RowOperands v = load(k);
    mma_rows<T>(sum, v.row, v.row8, v.token);
  }
}

// All warps: 16 rows · 8 tokens over all of k, then store(g, token, sum of row g, sum of row g + 8) once for each.
template <class T, int kAhead, class Load, class Store>
MEMVP_DEVICE void block_rows(int64_t k_end, Load load, Store store) {
  float* sums = shared_at<float>(0, kRowSumsBytes / sizeof(float));  // [warp][row][token]
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  add_rows<T, kAhead>(sum, warp_of_thread(), kWarps, k_end, load);
  float* mine = sums + warp_of_thread() * kRowTile * kTokenTile;
  const int g = group_of_lane(), t = member_of_lane();
  mine[g * kTokenTile + 2 * t] = sum[0];
  mine[g * kTokenTile + 2 * t + 1] = sum[1];
  mine[(g + 8) * kTokenTile + 2 * t] = sum[2];
  mine[(g + 8) * kTokenTile + 2 * t + 1] = sum[3];
  __syncthreads();
  for (int i = threadIdx.x; i < kPairTile * kTokenTile; i += kThreads) {
    float low = 0.0f, high = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      low += sums[warp * kRowTile * kTokenTile + i];
      high += sums[warp * kRowTile * kTokenTile + kPairTile * kTokenTile + i];
    }
    store(i / kTokenTile, i % kTokenTile, low, high);
  }
}

// sum += 64 columns · 8 tokens over the rows k_begin .. k_end in steps of 16, this warp's share. load(k) gives a lane's
// eight columns of row k; the four k of a lane's token start at token[k], zero past k_end up to a multiple of 16. No
// token: zeros.
template <class T, int kAhead, class Load>
MEMVP_DEVICE void add_columns(float (&sum)[4][4], int64_t k_begin, int64_t k_end, const T* token, Load load) {
#pragma unroll kAhead
  for (int64_t k0 = k_begin + warp_of_thread() * 16; k0 < k_end; k0 += kWarps * 16) {
    const int64_t k = k0 + member_of_lane() * 4;
    uint4 row[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = load(k + i);
    mma_columns<T>(sum, row, token == nullptr ? uint2{0, 0} : load_written<uint2>(token + k));
  }
}

// The sums of all warps, of element i = 64 token + column: share_columns, then column_sum. Begins and ends with a
// barrier's safety: the shared sums may be in use before, and again after.
MEMVP_DEVICE float* column_sums() {
  return shared_at<float>(0, kColumnSumsBytes / sizeof(float));  // [warp][token][column]
}
MEMVP_DEVICE void share_columns(const float (&sum)[4][4]) {
  float* mine = column_sums() + warp_of_thread() * kColumnTile * kTokenTile;
  const int g = group_of_lane(), t = member_of_lane();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mine[2 * t * kColumnTile + g * 8 + 2 * i] = sum[i][0];
    mine[(2 * t + 1) * kColumnTile + g * 8 + 2 * i] = sum[i][1];
    mine[2 * t * kColumnTile + g * 8 + 2 * i + 1] = sum[i][2];
    mine[(2 * t + 1) * kColumnTile + g * 8 + 2 * i + 1] = sum[i][3];
  }
  __syncthreads();
}
MEMVP_DEVICE float column_sum(int i) {
  float all = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) all += column_sums()[warp * kColumnTile * kTokenTile + i];
  return all;
}

// store(column of the 64, token of the 8, sum) once for each.
template <class Store>
MEMVP_DEVICE void store_columns(const float (&sum)[4][4], Store store) {
  share_columns(sum);
  for (int i = threadIdx.x; i < kColumnTile * kTokenTile; i += kThreads)
    store(i % kColumnTile, i / kColumnTile, column_sum(i));
}

}  // namespace memvp::decode
