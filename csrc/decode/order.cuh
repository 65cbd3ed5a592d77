// How a block of one phase waits for the phase ahead: called once by each piece of work, when it has begun all that it
// can without, and by all threads of the block.
#pragma once
#include "common/memory.cuh"

namespace memvp::decode {

// A launch for each phase.
struct Chained {
  __device__ void wait() const { wait_for_previous_grid(); }
};

// All phases in one launch, of which a block does several pieces of work, or none, in each phase.
class OneLaunch {
 public:
  __device__ void wait() {
    if (!met_) meet_all_blocks();
    met_ = true;
  }
  // The end of a phase; a block that had no work in it has not waited yet.
  __device__ void end_phase() {
    wait();
    met_ = false;
  }

 private:
  bool met_ = false;
};

}  // namespace memvp::decode
