// Runs kernel launches in their order: blocks come and go in any order, a few resident at a time; with programmatic
// dependent launch (PDL) one may begin before the one ahead of it has ended. The first mistake ends the run.
#pragma once
#include "runtime/schedule.h"

namespace memvp::emulation {

inline void thread_body();

inline bool may_begin(unsigned launch) {
  Run& r = run();
  if (launch == 0) return true;
  const Progress& before = r.progress[launch - 1];
  const unsigned all = r.launches[launch - 1].blocks;
  return r.launches[launch].pdl ? before.begun == all && before.let == all : before.done == all;
}

inline void begin_block(unsigned launch) {
  Run& r = run();
  Progress& progress = r.progress[launch];
  const Launch& shape = r.launches[launch];
  auto block = std::make_unique<Block>();
  block->index.x = progress.order[progress.begun++];
  block->launch = launch;
  block->threads.resize(shape.threads);
  block->warps.resize((shape.threads + 31) / 32);
  for (unsigned i = 0; i < shape.threads; ++i) {
    Thread& t = block->threads[i];
    t.index.x = i;
    t.lane = i % 32;
    t.block = block.get();
    t.warp = &block->warps[i / 32];
    t.warp->lanes |= 1u << t.lane;
    start_fiber(t.fiber, stack_pool().take(), i, thread_body);
    make_ready(&t);
  }
  release(&begin_object);
  r.alive++;
  if (launch > 0 && r.progress[launch - 1].done < r.launches[launch - 1].blocks) r.early_blocks++;
  r.blocks.push_back(std::move(block));
}

inline void begin_blocks() {
  Run& r = run();
  for (unsigned launch = 0; launch < r.launches.size(); ++launch)
    while ((r.alive < r.config.resident || r.launches[launch].cooperative) &&
           r.progress[launch].begun < r.launches[launch].blocks && may_begin(launch))
      for (unsigned i = 0; i < r.launches[launch].cluster; ++i) begin_block(launch);
}

inline void free_block(Block& block) {
  for (Thread& t : block.threads) stack_pool().give(t.fiber.stack);
  free_shared(block);
}

inline void thread_body() {
  acquire(&begin_object);
  Run& r = run();
  Thread& me = this_thread();
  arrived(me.fiber);
  try {
    r.launches[me.block->launch].kernel();
  } catch (const std::exception& e) {
    r.error = std::string("exception in kernel: ") + e.what();
  }
  Quiet quiet(me.fiber);
  Block& block = *me.block;
  Progress& progress = r.progress[block.launch];
  if (!r.error.empty()) {
    // The exception says more than what follows from it.
  } else if (!me.copies.empty() || !me.copy_groups.empty()) {
    r.error = name_of(me) + " returned with copies not waited for";
  } else if (r.launches[block.launch].pdl && !me.waited_for_grid) {
    r.error = name_of(me) + " returned without pdl_wait";
  } else if (!block.barrier.arrived.empty()) {
    r.error = name_of(me) + " returned while others of its block wait in __syncthreads" + state_table();
  } else {
    for (const auto& unit : block.units)
      if (unit != nullptr && r.error.empty()) r.error = unit->left_behind(me);
  }
  release(&progress.object);
  release(&block.end_object);
  release(&r.end_object);
  me.state = State::kDone;
  me.warp->lanes &= ~(1u << me.lane);
  if (++block.done == block.threads.size()) {
    for (const auto& unit : block.units)
      if (unit != nullptr && r.error.empty()) r.error = unit->end();
    for (const Landing& landing : r.landings)
      if (landing.block == &block && r.error.empty())
        r.error =
            text("launch %u block %u ended while copies to its shared memory went on", block.launch, block.index.x);
    note_let(block);
    r.alive--;
    if (++progress.done == r.launches[block.launch].blocks) {
      wake_all(progress.waiting);
    }
    switch_to(r.main, true);  // which fills the place
  }
  Thread* next = r.error.empty() ? next_ready_or_landed() : nullptr;
  switch_to(next == nullptr ? r.main : *next, true);
  abort();
}

// Returns how many blocks began before the launch ahead of theirs had ended. Throws std::runtime_error with the first
// mistake of the kernels.
inline uint64_t run_launches(std::vector<Launch> launches, const Config& config) {
  if (run_pointer() != nullptr) throw std::runtime_error("emulation: a run within a run");
  Run r;
  struct Clear {
    ~Clear() {
      for (auto& block : run().blocks) free_block(*block);
      run_pointer() = nullptr;
    }
  } clear;
  run_pointer() = &r;
  r.current = &r.main;
  r.config = config;
  r.launches = std::move(launches);
  r.progress.resize(r.launches.size());
  r.random_state = config.seed * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 4; ++i) r.random();
  constexpr double kChances[] = {0.0, 0.001, 0.01, 0.1};  // a block's threads come by at many primitives
  r.landing_chance = kChances[config.seed % 4];
  adopt_thread(r.main.fiber);
  std::vector<std::vector<char>> before;
  for (const Range& range : config.inputs)
    before.emplace_back(static_cast<const char*>(range.data), static_cast<const char*>(range.data) + range.bytes);
  for (unsigned launch = 0; launch < r.launches.size(); ++launch) {
    const Launch& shape = r.launches[launch];
    if (shape.blocks == 0 || shape.threads == 0 || shape.threads > 1024 || shape.shared_bytes > 227 * 1024 ||
        shape.cluster == 0 || shape.blocks % shape.cluster != 0)
      throw std::runtime_error(text(
          "emulation: launch %u of %u blocks in clusters of %u, %u threads, %zu bytes of shared memory is impossible",
          launch, shape.blocks, shape.cluster, shape.threads, shape.shared_bytes));
    const unsigned clusters = shape.blocks / shape.cluster;
    std::vector<unsigned> order;
    for (unsigned i = 0; i < clusters; ++i) order.push_back(config.order == Order::kReverse ? clusters - 1 - i : i);
    if (config.order == Order::kRandom)
      for (unsigned i = clusters; i > 1; --i) std::swap(order[i - 1], order[r.random() % i]);
    for (const unsigned cluster : order)
      for (unsigned i = 0; i < shape.cluster; ++i) r.progress[launch].order.push_back(cluster * shape.cluster + i);
  }
  {
    Quiet quiet(r.main.fiber);
    for (;;) {
      auto finished = [](const std::unique_ptr<Block>& b) { return b->done == b->threads.size(); };
      for (auto& block : r.blocks)
        if (finished(block)) {
          acquire(&block->end_object);
          free_block(*block);
        }
      r.blocks.erase(std::remove_if(r.blocks.begin(), r.blocks.end(), finished), r.blocks.end());
      begin_blocks();
      Thread* next = nullptr;
      try {
        next = next_ready_or_landed();
      } catch (const std::exception&) {  // the error is known
        break;
      }
      if (next == nullptr && r.alive > 0 && r.error.empty()) r.error = "deadlock: no thread can run" + state_table();
      if (next == nullptr || !r.error.empty()) break;
      switch_to(*next);
      if (!r.error.empty()) break;
    }
    acquire(&r.end_object);
  }
  for (size_t i = 0; i < before.size() && r.error.empty(); ++i)
    if (!before[i].empty() && memcmp(before[i].data(), config.inputs.first[i].data, before[i].size()) != 0)
      r.error = text("input %zu was written", i);
  if (!r.error.empty()) throw std::runtime_error("emulation: " + r.error);
  return r.early_blocks;
}

}  // namespace memvp::emulation
