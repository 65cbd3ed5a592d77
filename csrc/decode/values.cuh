// Second launch of a step: partial sums of hidden · V, and what an image adds,
//     factored: visual = s vact(x p^k^T + (x W^T) A_k^T) and u = visual A_v, from its core alone;
//     else:     visual · Vv, one more partial sum of y.
#pragma once
#include "decode/hidden.cuh"

namespace memvp::decode {

MEMVP_DEVICE float* part_of(const DecodeArgs& args, int part, int token) {
  return in_workspace<float>(args, args.plan.at.parts) +
         (static_cast<int64_t>(part) * args.p.tokens + token) * args.p.width;
}

template <class T, int kTokenTiles>
MEMVP_DEVICE void values_by_ring(const DecodeArgs& args, int block) {
  const FfnDecodeParams& p = args.p;
  const T* hidden = in_workspace<T>(args, args.plan.at.hidden);
  const RingPlan& plan = args.plan.value;
  const int first_pair = block % plan.row_blocks * plan.pairs_per_block, split = block / plan.row_blocks;
  Ring<T, kTokenTiles> ring(plan, neighbours<T>(p.value.data, p.value.strides[1], p.width),
                            {hidden, args.plan.hidden_stride, p.tokens}, first_pair, split, p.pairs);
  RingSums<kTokenTiles> sums;
  ring.start_rows();
  wait_for_previous_grid();
  ring.run(sums);
  ring.store(sums, [&](int pair, int token, float low, float high) {
    if (2 * pair < p.width) *reinterpret_cast<float2*>(part_of(args, split, token) + 2 * pair) = float2{low, high};
  });
}

// 64 columns, one part of k, eight tokens.
template <class T, Reading kReading>
MEMVP_DEVICE void values_by_block(const DecodeArgs& args, int block) {
  const FfnDecodeParams& p = args.p;
  const int width_blocks = ceil_div(p.width, kColumnTile), splits = args.plan.value.splits;
  const int64_t first_column = block % width_blocks * kColumnTile, column = first_column + group_of_lane() * 8;
  const int split = block / width_blocks % splits, first_token = block / width_blocks / splits * kTokenTile;
  const int64_t part = static_cast<int64_t>(args.plan.value.slices_per_split) * kSlice;
  const int64_t k_begin = split * part, k_end = least<int64_t>(k_begin + part, p.pairs);
  const int64_t token = least(first_token + group_of_lane(), p.tokens - 1);
  const T* hidden = in_workspace<T>(args, args.plan.at.hidden) + token * args.plan.hidden_stride;
  wait_for_previous_grid();
  float sum[4][4] = {};
  add_columns<T, ceil_div(kStepsAhead<kReading>, 2)>(sum, k_begin, k_end, hidden, [&](int64_t k) {
    return load8<T, kReading>(row_of(p.value, k), column, k < k_end ? p.width : 0);
  });
  store_columns(sum, [&](int c, int t, float v) {
    if (first_column + c < p.width && first_token + t < p.tokens)
      part_of(args, split, first_token + t)[first_column + c] = v;
  });
}

// Factored memory, the tokens of one image: everything that depends on its core. Writes [u | visual] of every token.
template <class T, Reading kReading>
MEMVP_DEVICE void core_step(const DecodeArgs& args, int block) {
  const FfnDecodeParams& p = args.p;
  const int64_t rank_stride = args.plan.rank_stride, slot_stride = args.plan.slot_stride,
                visual_stride = args.plan.visual_stride;
  int32_t* members;
  const TokenGroup group = find_group(p, block, kColumnSumsBytes, members);
  wait_for_previous_grid();
  if (group.count == 0) return;
  T* out = in_workspace<T>(args, args.plan.at.visual);
  if (group.memory == kNoMemory) {
    for (int i = threadIdx.x; i < visual_stride; i += kThreads) out[block * visual_stride + i] = round_to<T>(0.0f);
    return;
  }
  const float* slot_scores = in_workspace<float>(args, args.plan.at.slot_scores);
  const int64_t token = members[group_of_lane()];
  const T* basis_scores = in_workspace<T>(args, args.plan.at.basis_scores) + token * rank_stride;
  for (int tile = warp_of_thread(); tile * kRowTile < slot_stride; tile += kWarps) {
    const int low = tile * kRowTile + group_of_lane(), high = low + 8;
    const Row row = slot_of(p.visual_key, group.memory, low), row8 = slot_of(p.visual_key, group.memory, high);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    add_rows<T, kStepsAhead<kReading>>(
        sum, 0, 1, tile * kRowTile < group.slots ? p.rank : 0, [&](int64_t k) -> RowOperands {
          return {load8<T, kReading>(row, k, low < group.slots ? p.rank : 0),
                  load8<T, kReading>(row8, k, high < group.slots ? p.rank : 0), load_written<uint4>(basis_scores + k)};
        });
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int t = 2 * member_of_lane() + j % 2, slot = j < 2 ? low : high;
      if (t >= group.count) continue;
      const int64_t n = members[t];
      float visual = 0.0f;
      if (slot < group.slots) {
        float score = sum[j];
        if (p.key_position.data != nullptr) score += load_written<float>(slot_scores + n * slot_stride + slot);
        visual = visual_of_score(p, score);
      }
      out[n * visual_stride + rank_stride + slot] = round_to<T>(visual);
    }
  }
  __syncthreads();  // visual of all slots is there
  const T* visual = out + token * visual_stride + rank_stride;
  for (int64_t first_column = 0; first_column < rank_stride; first_column += kColumnTile) {
    const int64_t column = first_column + group_of_lane() * 8;
    float sum[4][4] = {};
    add_columns<T, ceil_div(kStepsAhead<kReading>, 2)>(sum, 0, group.slots, visual, [&](int64_t k) {
      return load8<T, kReading>(slot_of(p.visual_value, group.memory, k), column, k < group.slots ? p.rank : 0);
    });
    store_columns(sum, [&](int c, int t, float v) {
      if (t < group.count && first_column + c < rank_stride)
        out[members[t] * visual_stride + first_column + c] = round_to<T>(v);
    });
  }
}

// Memory of width d: 64 columns of visual · Vv for the tokens of one image, Vv formed on the way.
template <class T, Reading kReading>
MEMVP_DEVICE void memory_values(const DecodeArgs& args, int block) {
  const FfnDecodeParams& p = args.p;
  int32_t* members;
  const TokenGroup group = find_group(p, block % p.tokens, kColumnSumsBytes, members);
  wait_for_previous_grid();
  if (group.count == 0 || group.memory == kNoMemory) return;
  const int64_t first_column = block / p.tokens * kColumnTile, column = first_column + group_of_lane() * 8;
  const int64_t token = members[group_of_lane()];
  const T* visual = in_workspace<T>(args, args.plan.at.visual) + token * args.plan.visual_stride;
  float sum[4][4] = {};
  add_columns<T, ceil_div(kStepsAhead<kReading>, 4)>(sum, 0, group.slots, visual, [&](int64_t k) {
    return load8<T, kReading>(slot_of(p.visual_value, group.memory, k), row_of(p.value_position, k), column,
                              k < group.slots ? p.width : 0);
  });
  store_columns(sum, [&](int c, int t, float v) {
    if (t < group.count && first_column + c < p.width)
      part_of(args, args.plan.parts - 1, members[t])[first_column + c] = v;
  });
}

// kTokenTiles 0: value is read by blocks of columns, by 16 bytes or (kBy16 false) element by element.
template <class T, int kTokenTiles, bool kBy16>
__global__ void __launch_bounds__(kThreads, kBy16 ? 2 : 1) values_kernel(const __grid_constant__ DecodeArgs args) {
  const FfnDecodeParams& p = args.p;
  const int block = blockIdx.x, memory_block = block - args.plan.value_blocks;
  if (memory_block < 0) {
    if constexpr (kTokenTiles > 0)
      values_by_ring<T, kTokenTiles>(args, block);
    else
      values_by_block<T, kBy16 ? Reading::kNarrow : Reading::kElements>(args, block);
    return;
  }
  let_next_grid_begin();
  if (p.visual_basis.data != nullptr)
    with_reading<kBy16>(p.visual_key, p.visual_value,
                        [&](auto reading) { core_step<T, reading.value>(args, memory_block); });
  else
    with_reading<kBy16>(p.visual_value, p.value_position,
                        [&](auto reading) { memory_values<T, reading.value>(args, memory_block); });
}

}  // namespace memvp::decode
