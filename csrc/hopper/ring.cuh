// The way of operands to the tensor cores: one thread asks for copies into a ring of stages, as many steps ahead as
// there are stages and beyond the end of a tile; two warpgroups wait for each, multiply and give it back.
#pragma once
#include "common/hopper.cuh"
#include "hopper/launch.h"

namespace memvp::hopper {

// A stage holds of a step's operands left's 128 rows and right's 256, or of what an epilogue reads 64 columns of all
// rows, twice where there are gate's and key's.
struct Shared {
  unsigned char *ring, *staging;
  Barrier *full, *empty;
};

MEMVP_DEVICE Shared shared_memory() {
  Barrier* const barriers = shared_at<Barrier>(kRingBytes + kStagingBytes, 2 * kStages);
  return {shared_at<unsigned char>(0, kRingBytes), shared_at<unsigned char>(kRingBytes, kStagingBytes), barriers,
          barriers + kStages};
}

// A step's turn in the ring: its stage, and the parity of the phase that its arrival ends.
struct Turn {
  int stage = 0;
  unsigned parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- the thread that asks for copies ------------------------------------------------------------

MEMVP_DEVICE unsigned char* begin_stage(const Shared& shared, const Turn& turn, unsigned bytes) {
  wait(shared.empty[turn.stage], turn.parity ^ 1);  // at once where nobody has used it yet
  arrive_expecting(shared.full[turn.stage], bytes);
  return shared.ring + turn.stage * kStageBytes;
}

// Left's tile, and right's; in a cluster of two each block asks for one half of right's for both.
MEMVP_DEVICE void copy_product(const StepArgs& args, const Shared& shared, Turn& turn, const Tile& at, int product,
                               int rank) {
  const StepPlan& plan = args.plan;
  const TensorMap &left = args.maps[kLeft + product], &right = args.maps[kRight + product];
  const bool paired = !at.shared && plan.tile_columns < kColumns;  // gate's rows and key's, else one matrix's
  const bool together = plan.cluster > 1;
  const auto load = [&](unsigned char* to, const TensorMap& map, int column, int row) {
    if (together)
      load_tile_to(3, to, map, shared.full[turn.stage], column, row);
    else
      load_tile(to, map, shared.full[turn.stage], column, row);
  };
  for (int k = 0; k < plan.depth[product]; k += kDepth, turn.next()) {
    unsigned char* const stage = begin_stage(shared, turn, plan.groups * kBlockBytes + kRightBytes);
    load_tile(stage, left, shared.full[turn.stage], k, at.row);
#pragma unroll 1
    for (int half = together ? rank : 0; half < (together ? rank + 1 : 2); ++half) {
      unsigned char* const to = stage + kLeftBytes + half * kRightBytes / 2;
      const int column = at.column + half * kColumns / 2;
      if (plan.across[product]) {
        load(to, right, column, k);
        load(to + kBlockBytes, right, column + 64, k);
      } else if (paired) {
        load(to, half == 0 ? args.maps[kGate] : right, k, at.column);
      } else {
        load(to, right, k, column);
      }
    }
  }
}

// What the epilogue reads, piece by piece behind the operands: so it is there when the sums are.
template <StepKind kKind, bool kGated>
MEMVP_DEVICE void copy_read(const StepArgs& args, const Shared& shared, Turn& turn, const Tile& at) {
  const int end = least(at.column + kColumns, args.plan.columns);
  for (int column = at.column; column < end; column += kPiece, turn.next()) {
    unsigned char* stage = begin_stage(shared, turn, (1 + kGated) * args.plan.groups * kBlockBytes);
    Barrier& full = shared.full[turn.stage];
    if constexpr (kKind == StepKind::kOutput) {
      load_tile(stage, args.maps[kRead], full, column, at.row);
    } else {
      load_tile(stage, args.maps[kRead], full, column, at.row, 0);
      if (kGated) load_tile(stage + kLeftBytes, args.maps[kRead], full, column, at.row, 1);
    }
  }
}

// ---- the warpgroups that multiply ---------------------------------------------------------------

// Each warp gives the stage back for itself, to all who copy into it: its part of the products, and its reads, are
// done.
MEMVP_DEVICE void end_stage(const StepPlan& plan, const Shared& shared, int stage) {
  if (threadIdx.x % 32 == 0) arrive(shared.empty[stage]);
  if (threadIdx.x % 32 == 1 && plan.cluster > 1) arrive_at(shared.empty[stage], 1 - blockIdx.x % 2);
}

// One group of products. Begun and committed here, not round a choice between two of these: where paths meet the
// compiler would put fences and a group of its own.
template <class T, Major kMajor>
MEMVP_DEVICE void multiply_stage(float (&acc)[kColumns / 2], const unsigned char* stage, int group, bool accumulate) {
  const Operand left = operand(stage + group * kBlockBytes, Major::kK, 0, 1024);
  const Operand right = operand(stage + kLeftBytes, kMajor, kMajor == Major::kK ? 0 : kBlockBytes, 1024);
  keep(acc);
  begin_products();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16)
    multiply<T, kColumns, kMajor>(acc, advance(left, 2 * k), advance(right, kMajor == Major::kK ? 2 * k : 128 * k),
                                  accumulate || k > 0);
  commit_products();
}

// acc = the sum of the tile's products. A step's stage is given back when the next one's products are under way.
template <class T, StepKind kKind>
MEMVP_DEVICE void sum_products(float (&acc)[kColumns / 2], const StepPlan& plan, const Shared& shared, Turn& turn,
                               const Tile& at, int group) {
  int before = -1;  // the stage of the step before
  for (int i = at.first_product; i < at.end_product; ++i) {
    const bool across = kKind != StepKind::kHidden && plan.across[i];
    for (int k = 0; k < plan.depth[i]; k += kDepth, turn.next()) {
      wait(shared.full[turn.stage], turn.parity);
      const unsigned char* stage = shared.ring + turn.stage * kStageBytes;
      if (across)
        multiply_stage<T, Major::kMN>(acc, stage, group, before >= 0);
      else
        multiply_stage<T, Major::kK>(acc, stage, group, before >= 0);
      wait_products<1>();
      if (before >= 0) end_stage(plan, shared, before);
      before = turn.stage;
    }
  }
  wait_products<0>();
  keep(acc);
  end_stage(plan, shared, before);
}

}  // namespace memvp::hopper
