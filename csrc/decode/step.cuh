// A whole step of few tokens in one cooperative launch, for chips that can't begin a launch before the one ahead has
// ended: the weights of the next phase are in flight while the blocks meet.
#pragma once
#include "decode/finish.cuh"

namespace memvp::decode {

// One block on each multiprocessor, as its ring fills the smaller chips: all registers are its own.
template <class T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(const __grid_constant__ DecodeArgs args) {
  const DecodePlan& plan = args.plan;
  const int block = blockIdx.x;
  OneLaunch order;
  for (int work = block; work < plan.first_blocks(); work += plan.step_blocks) {
    hidden_phase<T, kTokenTiles>(args, work);
    renew_shared();
  }
  const Share second = second_share(plan, block);
  for (int work = second.first; work < second.end; work += second.step) {
    values_phase<T, kTokenTiles, false>(args, work, order);
    renew_shared();
  }
  order.end_phase();
  for (int work = block; work < plan.finish_blocks; work += plan.step_blocks) {
    finish_phase<T, true>(args, work, order);
    renew_shared();
  }
  order.end_phase();
}

}  // namespace memvp::decode
