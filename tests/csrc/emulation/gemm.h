// A product for Hopper on the CPU: the device's own kernel, plan and launch.
#pragma once
#include "hopper/kernels.cuh"

namespace memvp::emulation {

// Throws what run_launches throws.
inline void run_gemm(const FfnGemmParams& params, const Config& config) {
  if (const char* why = hopper::why_unsupported(params)) throw std::runtime_error(why);
  const auto launch = [&](hopper::GemmKernel kernel, int blocks, const hopper::GemmArgs& args) {
    Launch one{static_cast<unsigned>(blocks), hopper::kThreads, hopper::kSharedBytes, [kernel, args] { kernel(args); }};
    one.pdl = true;
    one.cluster = static_cast<unsigned>(args.plan.cluster);
    run_launches({std::move(one)}, config);
    return 0;
  };
  if (hopper::launch_gemm(params, launch) != 0) throw std::runtime_error("emulation: an operand has no TMA descriptor");
}

}  // namespace memvp::emulation
