// A step for Hopper on the CPU: the device's own kernel, plan and launch, run by host_run.
#pragma once
#include "hopper/kernels.cuh"

namespace memvp::host_run {

// Throws what run_chain throws.
inline Stats run_step(const FfnStepParams& params, const Config& config) {
  if (const char* why = hopper::why_unsupported(params)) throw std::runtime_error(why);
  std::vector<Launch> launches;
  const int error =
      hopper::launch_step(params, [&](hopper::StepKernel kernel, int blocks, const hopper::StepArgs& args) {
        Launch launch{static_cast<unsigned>(blocks), hopper::kThreads, hopper::kSharedBytes,
                      [kernel, args] { kernel(args); }};
        launch.chained = true;
        launch.cluster = static_cast<unsigned>(args.plan.cluster);
        launches.push_back(std::move(launch));
        return 0;
      });
  if (error != 0) throw std::runtime_error("host run: an operand has no map");
  return launches.empty() ? Stats{} : run_chain(std::move(launches), config);
}

}  // namespace memvp::host_run
