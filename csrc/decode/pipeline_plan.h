// How the pipelines' products are divided into blocks: rows, splits of k (split-K), and stages of shared memory.
#pragma once
#include <array>
#include <map>

#include "common/arithmetic.h"

namespace memvp::decode {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokenTile = 8;    // tokens of one mma
constexpr int kRowTile = 16;     // weight rows of one mma
constexpr int kPairTile = 8;     // the same in pairs: rows g and g + 8 of an mma belong together (gate and key)
constexpr int kColumnTile = 64;  // columns of one block where the weight is contiguous along them
constexpr int kSlice = 64;       // elements of k in a slice of a stage: a 128-byte line of every row
constexpr int kSliceBytes = 2 * kSlice;
constexpr int kMaxSplits = 16;
// All stages, weights and tokens: within the 99 KB that every chip since sm_80 gives a block, and twice within an
// H100's multiprocessor, where the next launch fills its pipeline while this one drains.
constexpr int kPipelineBytes = 96 * 1024;

// How the warps of a block share its work, by the tiles of eight tokens. Few tokens: each warp has rows of its
// own, all tokens. Many: two warps have the same rows and half of the tokens each, so that rows and tokens are both
// read from shared memory as seldom as the registers allow; at 64 tokens that traffic is next to the weights' own.
struct PipelineShape {
  int token_tiles;

  MEMVP_HOST_DEVICE constexpr int min_stages() const { return token_tiles < 4 ? 4 : 3; }
  constexpr int stage_bytes() const { return kPipelineBytes / min_stages(); }
  MEMVP_HOST_DEVICE constexpr int token_warps() const { return token_tiles < 4 ? 1 : 2; }
  MEMVP_HOST_DEVICE constexpr int row_warps() const { return kWarps / token_warps(); }
  MEMVP_HOST_DEVICE constexpr int token_tiles_per_warp() const { return token_tiles / token_warps(); }
  MEMVP_HOST_DEVICE constexpr int row_tiles_per_warp() const { return token_tiles < 4 ? 2 : 3; }
  // The tallest block: what fits a stage of one slice, and the warps' registers.
  constexpr int max_row_tiles() const {
    return least((stage_bytes() / kSliceBytes - kTokenTile * token_tiles) / kRowTile,
                 row_warps() * row_tiles_per_warp());
  }
};

// A product of weight rows with all tokens: `row_blocks` blocks of rows for each of `splits` splits of k.
struct PipelinePlan {
  int32_t pairs_per_block = 0, row_blocks = 0, splits = 0;
  int32_t slices = 0, slices_per_split = 0, slices_per_stage = 0, stages = 0;

  MEMVP_HOST_DEVICE int row_tiles() const { return ceil_div(pairs_per_block, kPairTile); }
  MEMVP_HOST_DEVICE int blocks() const { return row_blocks * splits; }
};

MEMVP_HOST_DEVICE inline size_t pipeline_bytes(const PipelinePlan& plan, int token_tiles) {
  const size_t rows = plan.row_tiles() * kRowTile + token_tiles * kTokenTile;
  return plan.stages * rows * plan.slices_per_stage * kSliceBytes;
}

// Matrices whose rows one launch divides; a block takes rows of one of them.
struct RowCounts {
  int pairs[3];

  int blocks(int pairs_per_block) const {
    int blocks = 0;
    for (int count : pairs) blocks += ceil_div(count, pairs_per_block);
    return blocks;
  }
};

// As many slices in a stage as there is room for.
inline void fill_stages(PipelinePlan& plan, int token_tiles) {
  plan.stages = PipelineShape{token_tiles}.min_stages();
  const int slice_bytes = kSliceBytes * (plan.row_tiles() * kRowTile + token_tiles * kTokenTile);
  plan.slices_per_stage =
      least(greatest(PipelineShape{token_tiles}.stage_bytes() / slice_bytes, 1), greatest(plan.slices_per_split, 1));
}

// All that a plan depends on.
struct PipelineProblem {
  RowCounts rows;
  int k, tokens, token_tiles, multiprocessors, max_splits, unit;

  std::array<int, 9> key() const {
    return {rows.pairs[0], rows.pairs[1], rows.pairs[2], k, tokens, token_tiles, multiprocessors, max_splits, unit};
  }
};

// Divides rows (by two, in whole `units`) and k so that every multiprocessor has the same number of bytes to read. A
// split of k lets a block be taller, which reads the tokens fewer times, and costs partial sums: with 64 tokens both
// count.
inline PipelinePlan search_plan(const PipelineProblem& input) {
  const RowCounts& rows = input.rows;
  const int tokens = input.tokens, token_tiles = input.token_tiles, multiprocessors = input.multiprocessors;
  const int max_splits = input.max_splits, unit = input.unit;
  PipelinePlan best;
  double least_bytes = 0;
  const int slices = ceil_div(input.k, kSlice), all = round_up(rows.blocks(1), unit);
  const int tallest = PipelineShape{token_tiles}.max_row_tiles() * kPairTile / unit * unit;
  const auto consider = [&](int pairs, int splits) {
    const int pairs_per_block = round_up(pairs, unit);
    if (pairs_per_block < 1 || pairs_per_block > tallest) return;
    PipelinePlan plan;
    plan.pairs_per_block = pairs_per_block;
    plan.row_blocks = rows.blocks(pairs_per_block);
    plan.slices = slices;
    plan.slices_per_split = ceil_div(slices, splits);
    plan.splits = greatest(ceil_div(slices, greatest(plan.slices_per_split, 1)), 1);
    // Tokens and partial sums come from L2, at about twice the rate of the weights; a block costs about 16 KB of
    // waiting.
    const int rounds = ceil_div(plan.blocks(), multiprocessors);
    const double weights = 2.0 * pairs_per_block * kSliceBytes, from_l2 = 0.5 * tokens * kSliceBytes;
    const double sums = max_splits > 1 ? 0.5 * 2 * 4 * tokens * 2.0 * pairs_per_block : 0;
    const double bytes = rounds * ((weights + from_l2) * plan.slices_per_split + sums + 16384);
    if (best.row_blocks > 0 && bytes >= least_bytes) return;
    best = plan;
    least_bytes = bytes;
  };
  const int fewest_rounds = ceil_div(all, multiprocessors * tallest);
  for (int splits = 1; splits <= least(max_splits, greatest(slices, 1)); ++splits) {
    consider(least(tallest, all), splits);
    for (int rounds = fewest_rounds; rounds < fewest_rounds + 3; ++rounds) {
      const int even = ceil_div(all, greatest(multiprocessors * rounds / splits, 1));
      for (int more = 0; more < 4; ++more) consider(even + more, splits);  // a matrix's last block may be short
    }
  }
  fill_stages(best, token_tiles);
  return best;
}

// The search tries hundreds of plans, some microseconds of every step's host time: each thread remembers what it found.
inline PipelinePlan plan_pipeline(const PipelineProblem& input) {
  static thread_local std::map<std::array<int, 9>, PipelinePlan> known;
  const auto key = input.key();
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = search_plan(input);
}

// The rows of images, each `rows` by k, for groups of eight tokens: in blocks of at least `unit` row tiles, taller
// where there would be more blocks than multiprocessors.
inline PipelinePlan plan_images(int rows, int k, int groups, int unit, int multiprocessors) {
  PipelinePlan plan;
  const int tiles = ceil_div(rows, kRowTile), tallest = PipelineShape{1}.max_row_tiles() / unit * unit;
  const int even = least(round_up(ceil_div(tiles * groups, multiprocessors), unit), tallest);
  plan.row_blocks = ceil_div(tiles, even);
  plan.pairs_per_block = round_up(ceil_div(tiles, plan.row_blocks), unit) * kPairTile;
  plan.splits = 1;
  plan.slices = plan.slices_per_split = ceil_div(k, kSlice);
  fill_stages(plan, 1);
  return plan;
}

}  // namespace memvp::decode
