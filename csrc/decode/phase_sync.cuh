// How a block of one phase waits for the phase ahead. Every thread of the block calls wait() once for each work item,
// as late as it can.
#pragma once
#include "common/memory.cuh"

namespace memvp::decode {

// A launch for each phase.
struct PdlSync {
  __device__ void wait() const { pdl_wait(); }
};

// All phases in one cooperative launch: a block has any number of work items in each phase.
class GridSync {
 public:
  __device__ void wait() {
    if (!waited_) sync_grid();
    waited_ = true;
  }
  // A block without work in the phase has not waited yet.
  __device__ void end_phase() {
    wait();
    waited_ = false;
  }

 private:
  bool waited_ = false;
};

}  // namespace memvp::decode
