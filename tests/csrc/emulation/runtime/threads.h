// Where threads meet: those of a block, those of a warp, launches and grids.
#pragma once
#include "runtime/schedule.h"

// A primitive's last parameters: where it was called, for the messages.
#define MEMVP_SITE [[maybe_unused]] const char *file = __builtin_FILE(), [[maybe_unused]] int line = __builtin_LINE()
#define MEMVP_HERE(what)   \
  memvp::emulation::Site { \
    file, line, what       \
  }

namespace memvp::emulation {

inline void sync_block(const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Block& block = *me.block;
  if (block.done > 0)
    fail(name_of(site) + text(" after %u thread(s) of the block returned", block.done) + state_table());
  const auto& waiting = block.barrier.arrived;
  if (!waiting.empty() && !(waiting[0]->site == site))
    fail("divergent __syncthreads: " + name_of(me) + " in " + name_of(site) + " while others wait in " +
         name_of(waiting[0]->site) + state_table());
  me.site = site;
  meet(block.barrier, block.threads.size(), State::kBarrier);
}

// All 32 lanes meet; the last one does `complete(warp)` for all, with what each brought and where each wants its
// result.
template <class Complete>
void meet_warp(const void* in, void* out, const Site& site, Complete complete) {
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Warp& warp = *me.warp;
  if (warp.arrived != 0 && !(warp.site == site))
    fail("warp divergence: " + name_of(me) + " in " + name_of(site) + " while its warp waits in " + name_of(warp.site));
  me.site = warp.site = site;
  warp.in[me.lane] = in;
  warp.out[me.lane] = out;
  warp.thread[me.lane] = &me;
  warp.arrived |= 1u << me.lane;
  if (warp.arrived != ~0u) {
    if (warp.lanes != ~0u) fail(name_of(me) + " in " + site.what + " after a lane of its warp returned");
    sleep(State::kWarp);
    return;
  }
  complete(warp);
  for (Thread* t : warp.thread) make_ready(t);
  warp.arrived = 0;
  sleep(State::kReady);
}

}  // namespace memvp::emulation
