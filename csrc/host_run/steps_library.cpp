// The steps for Hopper on the CPU as a C library, for tests that hand over tensors' addresses.
#include "host_run/ffn_steps_host.h"
#include "host_run/options.h"

extern "C" {

// For the caller to compare with its own picture of the struct.
uint64_t memvp_host_step_params_bytes() {
  return sizeof(memvp::FfnStepParams);
}

// 0, or 1 with a message.
int memvp_host_step(const memvp::FfnStepParams* params, const memvp::host_run::Options* options, char* message,
                    size_t bytes) {
  try {
    memvp::host_run::run_step(*params, options->config());
    return 0;
  } catch (const std::exception& error) {
    snprintf(message, bytes, "%s", error.what());
    return 1;
  }
}

const char* memvp_host_step_unsupported(const memvp::FfnStepParams* params) {
  return memvp::hopper::why_unsupported(*params);
}

// How a step is shared out: blocks of a cluster, warpgroups that multiply.
void memvp_host_step_form(const memvp::FfnStepParams* params, int32_t out[2]) {
  const memvp::hopper::StepPlan plan = memvp::hopper::make_plan(*params);
  out[0] = plan.cluster;
  out[1] = plan.groups;
}
}
