// First phase: every product with x. Blocks of the FFN's activations,
//     hidden = act(x G^T + b_G) * (x K^T + b_K), or act(x K^T + b_K),
// then blocks of the memory's scores: x W^T and x p^k^T where it is factored; x f^T and x p^k^T where the
// pipelines read the images' rows f; else visual = s vact(x Kv^T).
#pragma once
#include "common/activations.cuh"
#include "decode/block_product.cuh"
#include "decode/pipeline.cuh"
#include "decode/token_memory.cuh"

namespace memvp::decode {

// Stores what the sums of row pair `pair` mean for `token`. Gated: the gate's and the key's sum of hidden unit `pair`;
// plain: the sums of units 2 pair and 2 pair + 1. Units past F are zero: they pad the second product's k.
template <class T>
MEMVP_DEVICE void store_hidden(const DecodeArgs& args, int token, int pair, float low, float high) {
  const FfnDecodeParams& p = args.p;
  T* hidden = in_workspace<T>(args, args.plan.at.hidden) + static_cast<int64_t>(token) * args.plan.hidden_stride;
  if (p.gate.data != nullptr) {
    float h = 0.0f;
    if (pair < p.pairs)
      h = activate(p.activation, low + element_or_zero<T>(p.gate_bias, pair)) *
          (high + element_or_zero<T>(p.key_bias, pair));
    hidden[pair] = round_to<T>(h);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int unit = 2 * pair + half;
    const float sum = half == 0 ? low : high;
    hidden[unit] =
        round_to<T>(unit < p.pairs ? activate(p.activation, sum + element_or_zero<T>(p.key_bias, unit)) : 0.0f);
  }
}

// Factored memory: x with rows 2 pair and 2 pair + 1 of the basis, zero past the last one: they pad the core step's k.
template <class T>
MEMVP_DEVICE void store_basis_scores(const DecodeArgs& args, int64_t token, int pair, float low, float high) {
  if (2 * pair >= args.plan.rank_stride) return;
  T* scores = in_workspace<T>(args, args.plan.at.basis_scores) + token * args.plan.rank_stride + 2 * pair;
  scores[0] = round_to<T>(2 * pair < args.p.rank ? low : 0.0f);
  scores[1] = round_to<T>(2 * pair + 1 < args.p.rank ? high : 0.0f);
}
// And of the key's positions; the scores past the last slot are never read.
MEMVP_DEVICE void store_slot_scores(const DecodeArgs& args, int64_t token, int pair, float low, float high) {
  if (2 * pair >= args.p.slots) return;
  float* scores = in_workspace<float>(args, args.plan.at.slot_scores) + token * args.plan.slot_stride + 2 * pair;
  scores[0] = low;
  scores[1] = high;
}

// A block has rows of gate and key, or of the basis, or of the key's positions.
template <class T, int kTokenTiles>
MEMVP_DEVICE void hidden_by_pipeline(const DecodeArgs& args, int block) {
  const FfnDecodeParams& p = args.p;
  const DecodePlan& plan = args.plan;
  const bool of_ffn = block < plan.ffn_blocks, of_basis = !of_ffn && block < plan.ffn_blocks + plan.basis_blocks;
  const int before = of_ffn ? 0 : of_basis ? plan.ffn_blocks : plan.ffn_blocks + plan.basis_blocks;
  RowPairs<T> rows;
  if (of_ffn && p.gate.data != nullptr)
    rows = {{static_cast<const T*>(p.gate.data), static_cast<const T*>(p.key.data)},
            {p.gate.strides[0], p.key.strides[0]},
            {p.pairs, p.pairs}};
  else if (of_ffn)
    rows = neighbours<T>(p.key.data, p.key.strides[0], p.pairs);
  else if (of_basis)
    rows = neighbours<T>(p.visual_basis.data, p.visual_basis.strides[0], p.rank);
  else
    rows = neighbours<T>(p.key_position.data, p.key_position.strides[0], p.slots);
  Pipeline<T, kTokenTiles, RowPairs<T>, TokenRows<T>> pipeline(
      plan.hidden, rows, {static_cast<const T*>(p.x.data), p.x.strides[0], p.tokens},
      (block - before) * plan.hidden.pairs_per_block, 0, p.width);
  PipelineSums<kTokenTiles> sums;
  pipeline.run(sums);
  const int hidden_pairs = p.gate.data != nullptr ? plan.hidden_stride : plan.hidden_stride / 2;
  pipeline.store(sums, [&](int pair, int token, float low, float high) {
    if (!of_ffn)
      of_basis ? store_basis_scores<T>(args, token, pair, low, high) : store_slot_scores(args, token, pair, low, high);
    else if (pair < hidden_pairs)
      store_hidden<T>(args, token, pair, low, high);
  });
}

// Everything below reads an operand's row past the last one as zeros (`end` 0), and for a token past the last one that
// of another token: an mma keeps rows and tokens apart, and nothing of those is stored.

// One weight row pair tile of eight against eight tokens, element by element.
template <class T>
MEMVP_DEVICE void hidden_by_block(const DecodeArgs& args, int block) {
  constexpr Reading kReading = Reading::kElements;
  const FfnDecodeParams& p = args.p;
  const bool gated = p.gate.data != nullptr;
  const int tiles = ceil_div(gated ? args.plan.hidden_stride : args.plan.hidden_stride / 2, kPairTile);
  const int first_pair = block % tiles * kPairTile, first_token = block / tiles * kTokenTile;
  const int pair = first_pair + group_of_lane(), low = gated ? pair : 2 * pair, high = gated ? pair : 2 * pair + 1;
  const Row row = row_of(gated ? p.gate : p.key, low), row8 = row_of(p.key, high);
  const Row x = row_of(p.x, least(first_token + group_of_lane(), p.tokens - 1));
  block_rows<T, kStepsAhead<kReading>>(
      p.width,
      [&](int64_t k) -> RowOperands {
        return {load8<T, kReading>(row, k, low < p.pairs ? p.width : 0),
                load8<T, kReading>(row8, k, high < p.pairs ? p.width : 0), load8<T, kReading>(x, k, p.width)};
      },
      [&](int g, int t, float sum, float sum8) {
        if (first_token + t < p.tokens) store_hidden<T>(args, first_token + t, first_pair + g, sum, sum8);
      });
}

// Factored memory that the pipeline cannot take: 16 rows of [W; p^k], shared by all images, against eight tokens.
template <class T, Reading kReading>
MEMVP_DEVICE void shared_scores(const DecodeArgs& args, int block) {
  const FfnDecodeParams& p = args.p;
  const int rank_tiles = args.plan.rank_stride / kRowTile, tiles = args.plan.score_blocks / args.plan.token_groups;
  const int tile = block % tiles, first_token = block / tiles * kTokenTile;
  const bool of_basis = tile < rank_tiles;
  const int first_row = (of_basis ? tile : tile - rank_tiles) * kRowTile;
  const DecodeTensor& source = of_basis ? p.visual_basis : p.key_position;
  const int rows = of_basis ? p.rank : p.slots;
  const int low = first_row + group_of_lane(), high = low + 8;
  const Row row = row_of(source, low), row8 = row_of(source, high);
  const Row x = row_of(p.x, least(first_token + group_of_lane(), p.tokens - 1));
  T* basis_scores = in_workspace<T>(args, args.plan.at.basis_scores);
  float* slot_scores = in_workspace<float>(args, args.plan.at.slot_scores);
  block_rows<T, kStepsAhead<kReading>>(
      first_row < rows ? p.width : 0,
      [&](int64_t k) -> RowOperands {
        return {load8<T, kReading>(row, k, low < rows ? p.width : 0),
                load8<T, kReading>(row8, k, high < rows ? p.width : 0), load8<T, kReading>(x, k, p.width)};
      },
      [&](int g, int t, float sum, float sum8) {
        const int64_t n = first_token + t;
        if (n >= p.tokens) return;
        if (of_basis) {
          basis_scores[n * args.plan.rank_stride + first_row + g] = round_to<T>(sum);
          basis_scores[n * args.plan.rank_stride + first_row + g + 8] = round_to<T>(sum8);
        } else {
          slot_scores[n * args.plan.slot_stride + first_row + g] = sum;
          slot_scores[n * args.plan.slot_stride + first_row + g + 8] = sum8;
        }
      });
}

MEMVP_DEVICE float visual_of_score(const FfnDecodeParams& p, float score) {
  return p.visual_scale * activate(p.visual_activation, score);
}

// Memory of width d: some slots of one image's f against the tokens that read it. The positions
// add the same product for all images, so the first pipeline computes it.
template <class T>
MEMVP_DEVICE void image_scores(const DecodeArgs& args, int block) {
  const FfnDecodeParams& p = args.p;
  const DecodePlan& plan = args.plan;
  const int32_t* members;
  const TokenGroup group = find_group(p, block % plan.memory_groups, pipeline_bytes(plan.scores, 1), members);
  const int first_pair = block / plan.memory_groups * plan.scores.pairs_per_block;
  if (2 * first_pair >= group.slots) return;
  const RowPairs<T> rows =
      neighbours<T>(slot_of(p.visual_key, group.memory, 0).data, p.visual_key.strides[1], group.slots);
  Pipeline<T, 1, RowPairs<T>, TokenRows<T>> pipeline(
      plan.scores, rows, {static_cast<const T*>(p.x.data), p.x.strides[0], group.count, members}, first_pair, 0,
      p.width);
  PipelineSums<1> sums;
  pipeline.run(sums);
  float* scores = in_workspace<float>(args, plan.at.image_scores);
  pipeline.store(sums, [&](int pair, int t, float low, float high) {
    if (2 * pair < plan.slot_stride)
      *reinterpret_cast<float2*>(scores + static_cast<int64_t>(members[t]) * plan.slot_stride + 2 * pair) =
          float2{low, high};
  });
}

// Memory of width d that the pipelines cannot take: 16 slots of one memory row, Kv summed on the way.
template <class T, Reading kReading>
MEMVP_DEVICE void memory_scores(const DecodeArgs& args, int block) {
  const FfnDecodeParams& p = args.p;
  const int32_t* members;
  const TokenGroup group = find_group(p, block % args.plan.memory_groups, kRowSumsBytes, members);
  if (group.count == 0) return;
  const int first_slot = block / args.plan.memory_groups * kRowTile, low = first_slot + group_of_lane(), high = low + 8;
  const Row row = slot_of(p.visual_key, group.memory, low), row8 = slot_of(p.visual_key, group.memory, high);
  const Row position = row_of(p.key_position, low), position8 = row_of(p.key_position, high);
  const Row x = row_of(p.x, members[group_of_lane()]);
  T* visual = in_workspace<T>(args, args.plan.at.visual);
  block_rows<T, ceil_div(kStepsAhead<kReading>, 2)>(
      first_slot < group.slots ? p.width : 0,
      [&](int64_t k) -> RowOperands {
        return {load8<T, kReading>(row, position, k, low < group.slots ? p.width : 0),
                load8<T, kReading>(row8, position8, k, high < group.slots ? p.width : 0),
                load8<T, kReading>(x, k, p.width)};
      },
      [&](int g, int t, float score, float score8) {
        if (t >= group.count) return;
        T* out = visual + static_cast<int64_t>(members[t]) * args.plan.visual_stride + first_slot + g;
        out[0] = round_to<T>(visual_of_score(p, score));  // past the memory's end 0, as of every activation at 0
        out[8] = round_to<T>(visual_of_score(p, score8));
      });
}

// kTokenTiles 0: nothing can be read by 16 bytes.
template <class T, int kTokenTiles>
MEMVP_DEVICE void hidden_phase(const DecodeArgs& args, int block) {
  constexpr bool kBy16 = kTokenTiles > 0;
  const FfnDecodeParams& p = args.p;
  const int memory_block = block - args.plan.hidden_blocks;
  if (memory_block < 0) {
    if constexpr (kBy16)
      hidden_by_pipeline<T, kTokenTiles>(args, block);
    else
      hidden_by_block<T>(args, block);
    return;
  }
  if constexpr (kBy16) {
    if (args.plan.memory_pipelined) return image_scores<T>(args, memory_block);
  }
  pdl_launch_dependents();
  constexpr Reading kReading = kBy16 ? Reading::kChunks : Reading::kElements;  // narrow memory went by the pipelines
  if (p.visual_basis.data != nullptr)
    shared_scores<T, kReading>(args, memory_block);
  else
    memory_scores<T, kReading>(args, memory_block);
}

template <class T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kTokenTiles > 0 ? 2 : 1)
    hidden_kernel(const __grid_constant__ DecodeArgs args) {
  hidden_phase<T, kTokenTiles>(args, blockIdx.x);
}

}  // namespace memvp::decode
