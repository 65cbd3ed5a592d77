// How a run goes, as tests hand it over from another language.
#pragma once
#include "host_run/schedule.h"

namespace memvp::host_run {

struct Options {
  int32_t order;  // Order
  uint32_t resident;
  uint64_t seed;
  const Range* inputs;
  uint64_t input_count;

  Config config() const {
    Config config;
    config.order = static_cast<Order>(order);
    config.resident = resident;
    config.seed = seed;
    config.inputs.assign(inputs, inputs + input_count);
    return config;
  }
};

}  // namespace memvp::host_run
