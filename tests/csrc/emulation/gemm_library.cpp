// The products for Hopper as a C library, for tests that hand over tensors' addresses.
#include "gemm.h"

using namespace memvp;

extern "C" {

// For the caller to compare with its own picture of the struct.
uint64_t emulation_gemm_params_bytes() {
  return sizeof(FfnGemmParams);
}

// 0, or 1 with a message.
int emulation_gemm(const FfnGemmParams* params, const emulation::Config* config, char* message, size_t bytes) {
  try {
    emulation::run_gemm(*params, *config);
    return 0;
  } catch (const std::exception& error) {
    snprintf(message, bytes, "%s", error.what());
    return 1;
  }
}

const char* emulation_gemm_unsupported(const FfnGemmParams* params) {
  return hopper::why_unsupported(*params);
}

// Blocks of a cluster, and warpgroups of a block that multiply.
void emulation_gemm_shape(const FfnGemmParams* params, int32_t out[2]) {
  const hopper::GemmPlan plan = hopper::make_plan(*params);
  out[0] = plan.cluster;
  out[1] = plan.groups;
}
}
