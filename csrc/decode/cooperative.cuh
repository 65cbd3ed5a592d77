// All phases of few tokens in one cooperative launch, for chips without programmatic dependent launch: the weights of
// the next phase are in flight while the blocks wait for one another.
#pragma once
#include "decode/finish.cuh"

namespace memvp::decode {

// One block on each multiprocessor, as its pipeline fills the smaller chips: all registers are its own.
template <class T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1) cooperative_kernel(const __grid_constant__ DecodeArgs args) {
  const DecodePlan& plan = args.plan;
  const int block = blockIdx.x;
  GridSync sync;
  for (int work = block; work < plan.first_blocks(); work += plan.cooperative_blocks) {
    hidden_phase<T, kTokenTiles>(args, work);
    reuse_shared_memory();
  }
  const Share second = second_share(plan, block);
  for (int work = second.first; work < second.end; work += second.step) {
    values_phase<T, kTokenTiles, false>(args, work, sync);
    reuse_shared_memory();
  }
  sync.end_phase();
  for (int work = block; work < plan.finish_blocks; work += plan.cooperative_blocks) {
    finish_phase<T, true>(args, work, sync);
    reuse_shared_memory();
  }
  sync.end_phase();
}

}  // namespace memvp::decode
