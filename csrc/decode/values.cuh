// Second phase: partial sums of hidden · V, and what an image adds,
//     factored: visual = s vact(x p^k^T + (x W^T) A_k^T) and u = visual A_v, from its core alone;
//     else:     visual · f (read by the pipelines) or visual · Vv, one more partial sum of y.
#pragma once
#include "decode/hidden.cuh"
#include "decode/phase_sync.cuh"

namespace memvp::decode {

MEMVP_DEVICE float* partial_of(const DecodeArgs& args, int number, int token) {
  return in_workspace<float>(args, args.plan.at.partials) +
         (static_cast<int64_t>(number) * args.p.tokens + token) * args.p.width;
}

// The two columns of a pair of rows that run across.
template <class T>
MEMVP_DEVICE void store_across(const RowsAcross<T>& rows, float* sums, int pair, float low, float high) {
  const int64_t column = rows.low_row(pair);
  if (column < rows.count) sums[column] = low;
  if (column + 8 < rows.count) sums[column + 8] = high;
}

template <class T, int kTokenTiles, bool kAcross, class Sync>
MEMVP_DEVICE void values_by_pipeline(const DecodeArgs& args, int block, Sync& sync) {
  using Rows = std::conditional_t<kAcross, RowsAcross<T>, RowPairs<T>>;
  const FfnDecodeParams& p = args.p;
  const T* hidden = in_workspace<T>(args, args.plan.at.hidden);
  const PipelinePlan& plan = args.plan.value;
  const int first_pair = block % plan.row_blocks * plan.pairs_per_block, split = block / plan.row_blocks;
  Rows rows;
  if constexpr (kAcross)
    rows = {static_cast<const T*>(p.value.data), p.value.strides[0], p.width};
  else
    rows = neighbours<T>(p.value.data, p.value.strides[1], p.width);
  Pipeline<T, kTokenTiles, Rows, TokenRows<T>> pipeline(plan, rows, {hidden, args.plan.hidden_stride, p.tokens},
                                                        first_pair, split, p.pairs);
  PipelineSums<kTokenTiles> sums;
  pipeline.start_rows();
  sync.wait();
  pipeline.run(sums);
  pipeline.store(sums, [&](int pair, int token, float low, float high) {
    float* partial = partial_of(args, split, token);
    if constexpr (kAcross)
      store_across(rows, partial, pair, low, high);
    else if (2 * pair < p.width)
      *reinterpret_cast<float2*>(partial + 2 * pair) = float2{low, high};
  });
}

// 64 columns, one split of k, eight tokens, element by element.
template <class T, class Sync>
MEMVP_DEVICE void values_by_block(const DecodeArgs& args, int block, Sync& sync) {
  constexpr Reading kReading = Reading::kElements;
  const FfnDecodeParams& p = args.p;
  const int width_blocks = ceil_div(p.width, kColumnTile), splits = args.plan.value.splits;
  const int64_t first_column = block % width_blocks * kColumnTile, column = first_column + group_of_lane() * 8;
  const int split = block / width_blocks % splits, first_token = block / width_blocks / splits * kTokenTile;
  const int64_t depth = static_cast<int64_t>(args.plan.value.slices_per_split) * kSlice;
  const int64_t k_begin = split * depth, k_end = least<int64_t>(k_begin + depth, p.pairs);
  const int64_t token = least(first_token + group_of_lane(), p.tokens - 1);
  const T* hidden = in_workspace<T>(args, args.plan.at.hidden) + token * args.plan.hidden_stride;
  sync.wait();
  float sum[4][4] = {};
  add_columns<T, ceil_div(kStepsAhead<kReading>, 2)>(sum, k_begin, k_end, hidden, [&](int64_t k) {
    return load8<T, kReading>(row_of(p.value, k), column, k < k_end ? p.width : 0);
  });
  store_columns(sum, [&](int c, int t, float v) {
    if (first_column + c < p.width && first_token + t < p.tokens)
      partial_of(args, split, first_token + t)[first_column + c] = v;
  });
}

// Factored memory, the tokens of one image: everything that depends on its core. Writes [u | visual] of every token.
template <class T, Reading kReading, class Sync>
MEMVP_DEVICE void core_step(const DecodeArgs& args, int block, Sync& sync) {
  const FfnDecodeParams& p = args.p;
  const int64_t rank_stride = args.plan.rank_stride, slot_stride = args.plan.slot_stride,
                visual_stride = args.plan.visual_stride;
  const int32_t* members;
  const TokenGroup group = find_group(p, block, kColumnSumsBytes, members);
  sync.wait();
  if (group.count == 0) return;
  T* out = in_workspace<T>(args, args.plan.at.visual);
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

// The visual activations of a group's tokens as the token side of a pipeline: each block computes them from the two
// scores.
template <class T>
struct VisualTokens {
  const DecodeArgs& args;
  const int32_t* members;
  int32_t count, slots;
  bool keep;  // for the third phase

  // Of token t and slots k, k + 1 as two of T, zero past the last slot.
  __device__ uint32_t both(int t, int64_t k) const {
    const FfnDecodeParams& p = args.p;
    const int64_t n = members[t], at = n * args.plan.slot_stride + k;
    float visual[2] = {0.0f, 0.0f};
    if (k < slots) {
      const float2 image = load_written<float2>(in_workspace<float>(args, args.plan.at.image_scores) + at);
      float2 position{0.0f, 0.0f};
      if (p.key_position.data != nullptr)
        position = load_written<float2>(in_workspace<float>(args, args.plan.at.slot_scores) + at);
      visual[0] = visual_of_score(p, image.x + position.x);
      if (k + 1 < slots) visual[1] = visual_of_score(p, image.y + position.y);
    }
    const uint32_t word = pack(T{}, visual[0], visual[1]);
    if (keep && k < args.plan.slot_stride)
      *reinterpret_cast<uint32_t*>(in_workspace<T>(args, args.plan.at.visual) + n * args.plan.visual_stride + k) = word;
    return word;
  }

  __device__ void copy(uint4* slice, int64_t k, int64_t) const {
    const int word = threadIdx.x % (kSlice / 2);
    for (int t = threadIdx.x / (kSlice / 2); t < count; t += kThreads / (kSlice / 2))
      reinterpret_cast<uint32_t*>(slice + swizzled(t, word / 4))[word % 4] = both(t, k + 2 * word);
  }

  // The rest of the rows that the third phase reads, which no slice of the pipeline has.
  __device__ void keep_rest(int64_t k) const {
    const int words = greatest<int64_t>(args.plan.slot_stride - k, 0) / 2;
    for (int i = threadIdx.x; i < count * words; i += kThreads) both(i / words, k + 2 * (i % words));
  }
};

// Memory of width d: some columns of visual · f for the tokens of one image. The value's positions
// add the same product for all images, in the third phase.
template <class T, class Sync>
MEMVP_DEVICE void image_values(const DecodeArgs& args, int block, Sync& sync) {
  const FfnDecodeParams& p = args.p;
  const PipelinePlan& plan = args.plan.values;
  const int32_t* members;
  const TokenGroup group = find_group(p, block % args.plan.memory_groups, pipeline_bytes(plan, 1), members);
  const int strip = block / args.plan.memory_groups;
  const RowsAcross<T> rows{reinterpret_cast<const T*>(slot_of(p.visual_value, greatest(group.memory, 0), 0).data),
                           p.visual_value.strides[1], p.width};
  const VisualTokens<T> visual{args, members, group.count, group.slots, strip == 0 && p.value_position.data != nullptr};
  Pipeline<T, 1, RowsAcross<T>, VisualTokens<T>> pipeline(plan, rows, visual, strip * plan.pairs_per_block, 0,
                                                          group.slots);
  PipelineSums<1> sums;
  pipeline.start_rows();
  sync.wait();
  pipeline.run(sums);
  if (group.count == 0) return;
  if (visual.keep) visual.keep_rest(round_up<int64_t>(group.slots, plan.slices_per_stage * kSlice));
  pipeline.store(sums, [&](int pair, int t, float low, float high) {
    store_across(rows, partial_of(args, args.plan.partials - 1, members[t]), pair, low, high);
  });
}

// Memory of width d that the pipelines cannot take: 64 columns of visual · Vv, Vv summed on the way.
template <class T, Reading kReading, class Sync>
MEMVP_DEVICE void memory_values(const DecodeArgs& args, int block, Sync& sync) {
  const FfnDecodeParams& p = args.p;
  const int32_t* members;
  const TokenGroup group = find_group(p, block % args.plan.memory_groups, kColumnSumsBytes, members);
  sync.wait();
  if (group.count == 0) return;
  const int64_t first_column = block / args.plan.memory_groups * kColumnTile,
                column = first_column + group_of_lane() * 8;
  const int64_t token = members[group_of_lane()];
  const T* visual = in_workspace<T>(args, args.plan.at.visual) + token * args.plan.visual_stride;
  float sum[4][4] = {};
  add_columns<T, ceil_div(kStepsAhead<kReading>, 4)>(sum, 0, group.slots, visual, [&](int64_t k) {
    return load8<T, kReading>(slot_of(p.visual_value, group.memory, k), row_of(p.value_position, k), column,
                              k < group.slots ? p.width : 0);
  });
  store_columns(sum, [&](int c, int t, float v) {
    if (t < group.count && first_column + c < p.width)
      partial_of(args, args.plan.partials - 1, members[t])[first_column + c] = v;
  });
}

// kTokenTiles 0: nothing can be read by 16 bytes. kAcross: value runs along the width.
template <class T, int kTokenTiles, bool kAcross, class Sync>
MEMVP_DEVICE void values_phase(const DecodeArgs& args, int block, Sync& sync) {
  constexpr bool kBy16 = kTokenTiles > 0;
  const FfnDecodeParams& p = args.p;
  const int memory_block = block - args.plan.value_blocks;
  if (memory_block < 0) {
    if constexpr (kBy16)
      values_by_pipeline<T, kTokenTiles, kAcross>(args, block, sync);
    else
      values_by_block<T>(args, block, sync);
    return;
  }
  if constexpr (kBy16) {
    if (args.plan.memory_pipelined) return image_values<T>(args, memory_block, sync);
  }
  pdl_launch_dependents();
  if (p.visual_basis.data != nullptr)
    with_reading<kBy16>(p.visual_key, p.visual_value,
                        [&](auto reading) { core_step<T, reading.value>(args, memory_block, sync); });
  else
    memory_values<T, kBy16 ? Reading::kChunks : Reading::kElements>(args, memory_block, sync);
}

template <class T, int kTokenTiles, bool kAcross>
__global__ void __launch_bounds__(kThreads, kTokenTiles > 0 ? 2 : 1)
    values_kernel(const __grid_constant__ DecodeArgs args) {
  PdlSync sync;
  values_phase<T, kTokenTiles, kAcross>(args, blockIdx.x, sync);
}

}  // namespace memvp::decode
