#pragma once
#include "host_run/primitives.h"
namespace memvp::host_run {
void init_barrier(uint64_t& state, unsigned arrivals, const Site& site);
void publish_barriers(const Site& site);
void arrive(uint64_t& state, unsigned bytes, const Site& site);
void wait(uint64_t& state, unsigned parity, const Site& site);
void meet_some(int number, int threads, bool stay, const Site& site);
void fence_async_shared(const Site& site);
void change_registers(int registers, bool more, const Site& site);
}  // namespace memvp::host_run
