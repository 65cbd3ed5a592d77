// The persistent kernel: one block on each multiprocessor, alone or in clusters of two, takes tile after tile. One
// warpgroup produces (copies operands), the other two consume (multiply and run the epilogue).
#pragma once
#include "hopper/epilogues.cuh"

namespace memvp::hopper {

// Of a multiprocessor's 65536 registers: 168 a thread at the launch, then fewer for the producer.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kGroupThreads * (kProducerRegisters + kGroups * kConsumerRegisters) <= 65536,
              "registers of a multiprocessor");

// The block's rank in its cluster, and the number of its cluster's first tile.
MEMVP_DEVICE int rank_of_block(const GemmPlan& plan) {
  return plan.cluster > 1 ? static_cast<int>(blockIdx.x) % 2 : 0;
}
MEMVP_DEVICE int first_of_block(const GemmPlan& plan) {
  return plan.cluster > 1 ? static_cast<int>(blockIdx.x) / 2 : static_cast<int>(blockIdx.x);
}

template <GemmKind kKind, bool kGated>
MEMVP_DEVICE void produce(const GemmArgs& args, const SharedStorage& shared) {
  PipelineState state;
  const int rank = rank_of_block(args.plan);
  for (int number = first_of_block(args.plan); number < args.plan.tiles; number += args.plan.clusters) {
    const Tile at = tile_of(args.plan, number, rank);
    for (int i = at.first_product; i < at.end_product; ++i) load_operands(args, shared, state, at, i, rank);
    if (kKind != GemmKind::kHidden && args.plan.reads && !at.shared)
      load_epilogue_inputs<kKind, kGated>(args, shared, state, at);
  }
}

template <class T, GemmKind kKind, bool kGated>
MEMVP_DEVICE void consume(const GemmArgs& args, const SharedStorage& shared, int group) {
  PipelineState state;
  Staging staging(shared, group);
  float acc[kColumns / 2];
  const int rank = rank_of_block(args.plan);
  for (int number = first_of_block(args.plan); number < args.plan.tiles; number += args.plan.clusters) {
    const Tile at = tile_of(args.plan, number, rank);
    accumulate_products<T, kKind>(acc, args.plan, shared, state, at, group);
    if constexpr (kKind == GemmKind::kOutput) {
      output_epilogue<T>(acc, args, shared, state, staging, at, group);
    } else if (at.shared) {
      shared_epilogue<T>(acc, args, staging, at);
    } else if constexpr (kKind == GemmKind::kHidden) {
      hidden_epilogue<T, kGated>(acc, args, staging, at);
    } else {
      dhidden_epilogue<T, kGated>(acc, args, shared, state, staging, at, group);
    }
  }
  staging.end();
}

template <class T, GemmKind kKind, bool kGated>
__global__ void __launch_bounds__(kThreads, 1) ffn_gemm_kernel(const __grid_constant__ GemmArgs args) {
  const SharedStorage shared = shared_storage();
  const bool together = args.plan.cluster > 1;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(shared.full[stage], 1);
      init_barrier(shared.empty[stage],
                   args.plan.cluster * args.plan.groups * kGroupThreads / 32);  // each consumer warp
    }
    fence_barrier_init();
  }
  // Before the first access to memory, as the launch ahead may not have ended. Blocks of the next one wait in turn.
  pdl_wait();
  pdl_launch_dependents();
  if (together)
    sync_cluster();
  else
    __syncthreads();
  const int group = warp_uniform(static_cast<int>(threadIdx.x) / kGroupThreads) - 1;
  if (group < 0) {
    lower_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kKind, kGated>(args, shared);
  } else {
    raise_registers<kConsumerRegisters>();
    if (group < args.plan.groups) consume<T, kKind, kGated>(args, shared, group);
  }
  if (together) sync_cluster();  // the other block may still release a stage of this one
}

}  // namespace memvp::hopper
