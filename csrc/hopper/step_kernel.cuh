// A step's kernel: blocks that stay, alone or two together, which walk through the tiles; in each three warpgroups with
// a task of their own.
#pragma once
#include "hopper/epilogues.cuh"

namespace memvp::hopper {

// Of a multiprocessor's 65536 registers: 168 a thread at the launch, less for the warpgroup that multiplies nothing.
constexpr int kFewRegisters = 40, kManyRegisters = 232;
static_assert(kGroupThreads * (kFewRegisters + kGroups * kManyRegisters) <= 65536, "registers of a multiprocessor");

// Of its cluster, and which of the tiles is its cluster's first.
MEMVP_DEVICE int rank_of_block(const StepPlan& plan) {
  return plan.cluster > 1 ? static_cast<int>(blockIdx.x) % 2 : 0;
}
MEMVP_DEVICE int first_of_block(const StepPlan& plan) {
  return plan.cluster > 1 ? static_cast<int>(blockIdx.x) / 2 : static_cast<int>(blockIdx.x);
}

template <StepKind kKind, bool kGated>
MEMVP_DEVICE void produce(const StepArgs& args, const Shared& shared) {
  Turn turn;
  const int rank = rank_of_block(args.plan);
  for (int number = first_of_block(args.plan); number < args.plan.tiles; number += args.plan.clusters) {
    const Tile at = tile_of(args.plan, number, rank);
    for (int i = at.first_product; i < at.end_product; ++i) copy_product(args, shared, turn, at, i, rank);
    if (kKind != StepKind::kHidden && args.plan.reads && !at.shared) copy_read<kKind, kGated>(args, shared, turn, at);
  }
}

template <class T, StepKind kKind, bool kGated>
MEMVP_DEVICE void consume(const StepArgs& args, const Shared& shared, int group) {
  Turn turn;
  Staging staging(shared, group);
  float acc[kColumns / 2];
  const int rank = rank_of_block(args.plan);
  for (int number = first_of_block(args.plan); number < args.plan.tiles; number += args.plan.clusters) {
    const Tile at = tile_of(args.plan, number, rank);
    sum_products<T, kKind>(acc, args.plan, shared, turn, at, group);
    if constexpr (kKind == StepKind::kOutput) {
      end_output<T>(acc, args, shared, turn, staging, at, group);
    } else if (at.shared) {
      end_shared<T>(acc, args, staging, at);
    } else if constexpr (kKind == StepKind::kHidden) {
      end_hidden<T, kGated>(acc, args, staging, at);
    } else {
      end_dhidden<T, kGated>(acc, args, shared, turn, staging, at, group);
    }
  }
  staging.end();
}

template <class T, StepKind kKind, bool kGated>
__global__ void __launch_bounds__(kThreads, 1) ffn_step_kernel(const __grid_constant__ StepArgs args) {
  const Shared shared = shared_memory();
  const bool together = args.plan.cluster > 1;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(shared.full[stage], 1);
      init_barrier(shared.empty[stage],
                   args.plan.cluster * args.plan.groups * kGroupThreads / 32);  // each warp that multiplies
    }
    publish_barriers();
  }
  // Before the first access to memory: the launch ahead may not have ended. The next one's blocks wait in their turn.
  wait_for_previous_grid();
  let_next_grid_begin();
  if (together)
    sync_cluster();
  else
    __syncthreads();
  const int group = uniform(static_cast<int>(threadIdx.x) / kGroupThreads) - 1;
  if (group < 0) {
    lower_registers<kFewRegisters>();
    if (threadIdx.x == 0) produce<kKind, kGated>(args, shared);
  } else {
    raise_registers<kManyRegisters>();
    if (group < args.plan.groups) consume<T, kKind, kGated>(args, shared, group);
  }
  if (together) sync_cluster();  // the other block may still give a stage back here
}

}  // namespace memvp::hopper
