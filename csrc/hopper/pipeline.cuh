// The multistage shared-memory pipeline: one producer thread begins TMA copies into the stages, beyond the end of a
// tile too; two consumer warpgroups wait for each stage, multiply and release it.
#pragma once
#include "common/cluster.cuh"
#include "common/wgmma.cuh"
#include "hopper/launch.h"

namespace memvp::hopper {

// A stage holds 64 of k of left's 128 rows and right's 256 columns, or one subtile of what an epilogue reads, twice
// where there are gate's and key's.
struct SharedStorage {
  unsigned char *stages, *staging;
  Barrier *full, *empty;
};

MEMVP_DEVICE SharedStorage shared_storage() {
  Barrier* const barriers = shared_at<Barrier>(kPipelineBytes + kStagingBytes, 2 * kStages);
  return {shared_at<unsigned char>(0, kPipelineBytes), shared_at<unsigned char>(kPipelineBytes, kStagingBytes),
          barriers, barriers + kStages};
}

// A stage, and the parity of the phase that its arrival ends.
struct PipelineState {
  int stage = 0;
  unsigned parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- producer -----------------------------------------------------------------------------------

MEMVP_DEVICE unsigned char* acquire_stage(const SharedStorage& shared, const PipelineState& state, unsigned bytes) {
  wait(shared.empty[state.stage], state.parity ^ 1);  // at once where nobody has used it yet
  arrive_expect_bytes(shared.full[state.stage], bytes);
  return shared.stages + state.stage * kStageBytes;
}

// Left's tile and right's; in a cluster of two each block copies one half of right's to both.
MEMVP_DEVICE void load_operands(const GemmArgs& args, const SharedStorage& shared, PipelineState& state, const Tile& at,
                                int product, int rank) {
  const GemmPlan& plan = args.plan;
  const TensorMap &left = args.maps[kLeft + product], &right = args.maps[kRight + product];
  const bool paired = !at.shared && plan.tile_columns < kColumns;  // gate's rows and key's, else one matrix's
  const bool together = plan.cluster > 1;
  const auto load = [&](unsigned char* to, const TensorMap& map, int column, int row) {
    if (together)
      tma_load_multicast(3, to, map, shared.full[state.stage], column, row);
    else
      tma_load(to, map, shared.full[state.stage], column, row);
  };
  for (int k = 0; k < plan.depth[product]; k += kDepth, state.next()) {
    unsigned char* const stage = acquire_stage(shared, state, plan.groups * kBlockBytes + kRightBytes);
    tma_load(stage, left, shared.full[state.stage], k, at.row);
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

// What the epilogue reads, subtile by subtile behind the operands, so that it is there when the sums are.
template <GemmKind kKind, bool kGated>
MEMVP_DEVICE void load_epilogue_inputs(const GemmArgs& args, const SharedStorage& shared, PipelineState& state,
                                       const Tile& at) {
  const int end = least(at.column + kColumns, args.plan.columns);
  for (int column = at.column; column < end; column += kSubtileColumns, state.next()) {
    unsigned char* stage = acquire_stage(shared, state, (1 + kGated) * args.plan.groups * kBlockBytes);
    Barrier& full = shared.full[state.stage];
    if constexpr (kKind == GemmKind::kOutput) {
      tma_load(stage, args.maps[kRead], full, column, at.row);
    } else {
      tma_load(stage, args.maps[kRead], full, column, at.row, 0);
      if (kGated) tma_load(stage + kLeftBytes, args.maps[kRead], full, column, at.row, 1);
    }
  }
}

// ---- consumers ----------------------------------------------------------------------------------

// Each warp releases the stage for itself, to every block that copies into it.
MEMVP_DEVICE void release_stage(const GemmPlan& plan, const SharedStorage& shared, int stage) {
  if (threadIdx.x % 32 == 0) arrive(shared.empty[stage]);
  if (threadIdx.x % 32 == 1 && plan.cluster > 1) arrive_remote(shared.empty[stage], 1 - blockIdx.x % 2);
}

// One group of products. Fenced and committed here, inside the choice of the major dimension: where paths meet the
// compiler would add fences and a group of its own.
template <class T, Major kMajor>
MEMVP_DEVICE void multiply_stage(float (&acc)[kColumns / 2], const unsigned char* stage, int group, bool accumulate) {
  const MatrixDescriptor left = make_descriptor(stage + group * kBlockBytes, Major::kK, 0, 1024);
  const MatrixDescriptor right =
      make_descriptor(stage + kLeftBytes, kMajor, kMajor == Major::kK ? 0 : kBlockBytes, 1024);
  pin_accumulators(acc);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16)
    wgmma<T, kMajor>(acc, advance(left, 2 * k), advance(right, kMajor == Major::kK ? 2 * k : 128 * k),
                     accumulate || k > 0);
  wgmma_commit();
}

// acc = the sum of the tile's products. A stage is released when the next one's products are in flight.
template <class T, GemmKind kKind>
MEMVP_DEVICE void accumulate_products(float (&acc)[kColumns / 2], const GemmPlan& plan, const SharedStorage& shared,
                                      PipelineState& state, const Tile& at, int group) {
  int before = -1;  // the stage whose products were committed last
  for (int i = at.first_product; i < at.end_product; ++i) {
    const bool across = kKind != GemmKind::kHidden && plan.across[i];
    for (int k = 0; k < plan.depth[i]; k += kDepth, state.next()) {
      wait(shared.full[state.stage], state.parity);
      const unsigned char* stage = shared.stages + state.stage * kStageBytes;
      if (across)
        multiply_stage<T, Major::kMN>(acc, stage, group, before >= 0);
      else
        multiply_stage<T, Major::kK>(acc, stage, group, before >= 0);
      wgmma_wait<1>();
      if (before >= 0) release_stage(plan, shared, before);
      before = state.stage;
    }
  }
  wgmma_wait<0>();
  pin_accumulators(acc);
  release_stage(plan, shared, before);
}

}  // namespace memvp::hopper
