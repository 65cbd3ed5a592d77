// How a decode step is divided into blocks, and where its intermediate results lie in the workspace. It depends on the
// params alone, so results repeat and a step can be captured in a graph.
#pragma once
#include "decode/limits.h"
#include "decode/pipeline_plan.h"

namespace memvp::decode {

// Shared memory of a block without a pipeline: sums of its warps, and the tokens that read one memory row.
constexpr size_t kRowSumsBytes = kWarps * kRowTile * kTokenTile * sizeof(float);
constexpr size_t kColumnSumsBytes = kWarps * kColumnTile * kTokenTile * sizeof(float);
constexpr size_t kGroupBytes = (3 * kDecodeMaxTokens + kTokenTile) * sizeof(int32_t);
// Of any launch: with one stage of many tokens more than that.
constexpr int kMaxSharedBytes = kPipelineBytes / 3 * 4 + kGroupBytes;
constexpr int kReservedBytes = 1024;  // of each block, by the device itself
static_assert(kPipelineBytes >= kColumnSumsBytes, "a block that gathers its tokens needs no more without the pipeline");

// Bytes from the workspace's start.
struct Workspace {
  size_t hidden = 0;        // T [tokens][hidden_stride]: the activations, zero past `pairs`
  size_t visual = 0;        // T [tokens][visual_stride]: factored [visual A_v | visual], else visual; zero past its end
  size_t basis_scores = 0;  // T [tokens][rank_stride]: x W^T, zero past `rank`
  size_t slot_scores = 0;   // float [tokens][slot_stride]: x p^k^T
  size_t image_scores = 0;  // float [tokens][slot_stride]: x f^T, where the pipelines read f
  size_t partials = 0;      // float [partials][tokens][width]: what y is the sum of
  size_t bytes = 0;
};

struct DecodePlan {
  bool fast = false;              // 16-byte loads and pipelines; else element by element
  bool value_across = false;      // value runs along the width and not along the pairs
  bool memory_pipelined = false;  // memory of width d is read by pipelines, f apart from the shared positions
  int32_t token_tiles = 0;        // tiles of 8 tokens that a block of the first pipeline computes: 1, 2, 4 or 8
  int32_t value_tiles = 0;        // and of the second: across, 1 or 8, for fewer kernels
  int32_t token_groups = 0;
  PipelinePlan hidden, value;
  PipelinePlan scores, values;  // of one image's f
  int32_t ffn_blocks = 0;       // of the first pipeline: rows of gate and key,
  int32_t basis_blocks = 0;     // rows of the basis,
  int32_t position_blocks = 0;  // rows of the key's positions
  int32_t memory_groups = 0;    // at most so many groups of eight tokens that read one memory row
  int32_t partials = 0;         // the splits of hidden · value, and where memory is not factored one for visual · Vv
  int32_t hidden_stride = 0, rank_stride = 0, slot_stride = 0, visual_stride = 0;
  int32_t hidden_blocks = 0, score_blocks = 0;  // first launch
  int32_t value_blocks = 0, memory_blocks = 0;  // second
  int32_t finish_blocks = 0;                    // third
  int32_t cooperative_blocks = 0;  // of the one launch that does the work of all three; 0: there are three launches
  int32_t core_blocks = 0;         // of those, the last ones: they do the cores' work, and the others the value's
  Workspace at;

  MEMVP_HOST_DEVICE int first_blocks() const { return hidden_blocks + score_blocks; }
  MEMVP_HOST_DEVICE int second_blocks() const { return value_blocks + memory_blocks; }
};

// What every kernel of a step is given.
struct DecodeArgs {
  FfnDecodeParams p;
  DecodePlan plan;
};
using DecodeKernel = void (*)(DecodeArgs);

// Dynamic shared memory of the three launches.
inline size_t hidden_shared_bytes(const DecodePlan& plan) {
  const size_t weights = plan.fast && plan.hidden_blocks > 0 ? pipeline_bytes(plan.hidden, plan.token_tiles) : 0;
  const size_t memory = plan.memory_pipelined ? pipeline_bytes(plan.scores, 1) : kRowSumsBytes;
  return greatest(weights, memory + kGroupBytes);
}
inline size_t values_shared_bytes(const DecodePlan& plan) {
  const size_t weights = plan.fast && plan.value_blocks > 0 ? pipeline_bytes(plan.value, plan.value_tiles) : 0;
  const size_t memory = plan.memory_pipelined ? pipeline_bytes(plan.values, 1) : kColumnSumsBytes;
  return greatest(weights, memory + kGroupBytes);
}
inline size_t finish_shared_bytes() {
  return kColumnSumsBytes;
}

// And of the one that does the work of all three.
inline size_t cooperative_shared_bytes(const DecodePlan& plan) {
  return greatest(greatest(hidden_shared_bytes(plan), values_shared_bytes(plan)), finish_shared_bytes());
}

inline size_t take(size_t& bytes, size_t wanted) {
  const size_t at = bytes;
  bytes = round_up<size_t>(bytes + wanted, 256);
  return at;
}

// Work items of a block of the one launch in the second phase: every `step`-th from `first` on.
struct Share {
  int first, end, step;
};
MEMVP_HOST_DEVICE inline Share second_share(const DecodePlan& plan, int block) {
  if (plan.core_blocks == 0) return {block, plan.second_blocks(), plan.cooperative_blocks};
  const int of_value = plan.cooperative_blocks - plan.core_blocks;
  if (block < of_value) return {block, plan.value_blocks, of_value};
  return {plan.value_blocks + block - of_value, plan.second_blocks(), plan.core_blocks};
}

// cooperative: one launch, for few tokens and where the shapes allow it. With many tokens the third phase is too much
// work for one block on each multiprocessor, and its latency shows.
inline DecodePlan make_plan(const FfnDecodeParams& p, bool cooperative) {
  DecodePlan plan;
  plan.fast = is_fast(p);
  plan.token_groups = ceil_div(p.tokens, kTokenTile);
  plan.token_tiles = plan.token_groups <= 2 ? plan.token_groups : plan.token_groups <= 4 ? 4 : 8;
  plan.hidden_stride = round_up(p.pairs, kRowTile);
  plan.rank_stride = is_factored(p) ? round_up(p.rank, 2 * kRowTile) : 0;  // read 32 at a time as k
  plan.slot_stride = has_memory(p) ? round_up(p.slots, kRowTile) : 0;
  plan.visual_stride = plan.rank_stride + plan.slot_stride;
  const int width_blocks = ceil_div(p.width, kColumnTile);

  const bool ffn = has_ffn(p) && p.pairs > 0;
  const int ffn_pairs = !ffn ? 0 : present(p.gate) ? plan.hidden_stride : plan.hidden_stride / 2;
  const auto narrow = [&](const DecodeTensor& t) { return !present(t) || t.type == p.type; };
  plan.memory_pipelined = plan.fast && has_memory(p) && !is_factored(p) && narrow(p.visual_key) &&
                          narrow(p.visual_value) && narrow(p.key_position) && narrow(p.value_position);
  // Rows that all images share go through the same pipeline as the FFN's, if they are as narrow.
  const bool shared_pipelined =
      plan.memory_pipelined || (plan.fast && is_factored(p) && narrow(p.visual_basis) && narrow(p.key_position));
  if (plan.fast && (ffn || shared_pipelined)) {
    const int position_pairs = shared_pipelined && present(p.key_position) ? ceil_div(p.slots, 2) : 0;
    const RowCounts rows{{ffn_pairs, shared_pipelined ? plan.rank_stride / 2 : 0, position_pairs}};
    if (rows.blocks(1) > 0) {
      plan.hidden = plan_pipeline({rows, p.width, p.tokens, plan.token_tiles, p.multiprocessors, 1, 1});
      plan.ffn_blocks = ceil_div(rows.pairs[0], plan.hidden.pairs_per_block);
      plan.basis_blocks = ceil_div(rows.pairs[1], plan.hidden.pairs_per_block);
      plan.position_blocks = ceil_div(rows.pairs[2], plan.hidden.pairs_per_block);
    }
    plan.hidden_blocks = plan.hidden.blocks();
  } else if (ffn) {
    plan.hidden_blocks = ceil_div(ffn_pairs, kPairTile) * plan.token_groups;
  }
  plan.value_tiles = plan.token_tiles;
  if (has_memory(p)) {
    const int images = p.shared_memory ? 1 : least(p.memories, p.sequences);
    plan.memory_groups = least(p.tokens, images + p.tokens / kTokenTile);
  }
  plan.value_across = ffn && !value_along_pairs(p);
  const bool together = cooperative && plan.fast && plan.token_tiles <= 2 && !plan.value_across;
  // In one launch the cores have blocks of their own: four of them take about as long as a block's share of the value.
  const int cores = together && ffn && is_factored(p) ? ceil_div(plan.memory_groups, 4) : 0;
  if (ffn) {
    if (plan.value_across && plan.token_tiles > 1) plan.value_tiles = 8;
    if (plan.fast) {
      const RowCounts rows{{ceil_div(p.width, 2), 0, 0}};
      plan.value = plan_pipeline({rows, p.pairs, p.tokens, plan.value_tiles, greatest(p.multiprocessors - cores, 1),
                                  kMaxSplits, plan.value_across ? kColumnTile / 2 : 1});
      plan.value_blocks = plan.value.blocks();
    } else {
      PipelinePlan& value = plan.value;  // only its split of k is used
      value.slices = ceil_div(p.pairs, kSlice);
      const int wanted = least(kMaxSplits, ceil_div(2 * p.multiprocessors, width_blocks * plan.token_groups));
      value.slices_per_split = ceil_div(value.slices, wanted);
      value.splits = ceil_div(value.slices, value.slices_per_split);
      plan.value_blocks = width_blocks * value.splits * plan.token_groups;
    }
    plan.partials = plan.value.splits;
  }
  if (is_factored(p)) {
    const int position_tiles = present(p.key_position) ? plan.slot_stride / kRowTile : 0;
    if (!shared_pipelined) plan.score_blocks = (plan.rank_stride / kRowTile + position_tiles) * plan.token_groups;
    plan.memory_blocks = plan.memory_groups;
  } else if (plan.memory_pipelined) {
    plan.scores = plan_images(p.slots, p.width, plan.memory_groups, 1, p.multiprocessors);
    plan.values = plan_images(p.width, p.slots, plan.memory_groups, kColumnTile / kRowTile, p.multiprocessors);
    plan.score_blocks = plan.scores.row_blocks * plan.memory_groups;
    plan.memory_blocks = plan.values.row_blocks * plan.memory_groups;
    plan.partials += 1;
  } else if (has_memory(p)) {
    plan.score_blocks = plan.memory_groups * (plan.slot_stride / kRowTile);
    plan.memory_blocks = plan.memory_groups * width_blocks;
    plan.partials += 1;
  }
  plan.finish_blocks = width_blocks * plan.token_groups;
  if (together) {
    const int most = greatest(greatest(plan.first_blocks(), plan.second_blocks()), plan.finish_blocks);
    plan.cooperative_blocks = least(most, p.multiprocessors);
    plan.core_blocks = least(cores, plan.cooperative_blocks - 1);
  }
  // A stage more for the first launch, if a block of the second fits beside it all the same.
  if (!together && plan.fast && plan.hidden_blocks > 0 && plan.score_blocks == 0 && plan.hidden.stages == 3) {
    plan.hidden.stages = 4;
    const size_t both = hidden_shared_bytes(plan) + values_shared_bytes(plan) + 2 * kReservedBytes;
    if (both > static_cast<size_t>(p.shared_bytes)) plan.hidden.stages = 3;
  }

  const size_t tokens = p.tokens;
  plan.at.hidden = take(plan.at.bytes, 2 * tokens * plan.hidden_stride);
  plan.at.visual = take(plan.at.bytes, 2 * tokens * plan.visual_stride);
  plan.at.basis_scores = take(plan.at.bytes, 2 * tokens * plan.rank_stride);
  plan.at.slot_scores =
      take(plan.at.bytes, is_factored(p) || plan.memory_pipelined ? 4 * tokens * plan.slot_stride : 0);
  plan.at.image_scores = take(plan.at.bytes, plan.memory_pipelined ? 4 * tokens * plan.slot_stride : 0);
  plan.at.partials = take(plan.at.bytes, 4 * tokens * p.width * plan.partials);
  return plan;
}

// Enough for either form.
inline size_t workspace_bytes(const FfnDecodeParams& p) {
  return greatest(make_plan(p, false).at.bytes, make_plan(p, true).at.bytes);
}

}  // namespace memvp::decode
