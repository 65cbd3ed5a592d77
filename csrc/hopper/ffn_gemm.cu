// The launcher on a device: one kernel in the caller's stream.
#include "common/launch.h"
#include "hopper/ffn_gemm.h"
#include "hopper/launch.h"

namespace memvp {

#ifdef MEMVP_HAS_SM90A  // else no kernel was compiled, see setup.py
int ffn_gemm_launch(const FfnGemmParams& params, void* stream) {
  const DeviceGuard guard(params.device);
  if (guard.error() != cudaSuccess) return guard.error();
  return hopper::launch_gemm(params, [&](hopper::GemmKernel kernel, int blocks, const hopper::GemmArgs& args) -> int {
    bool pdl = false;
    const cudaError_t error = prepare_kernel(kernel, params.device, hopper::kSharedBytes, pdl);
    if (error != cudaSuccess) return error;
    const LaunchShape shape{blocks, hopper::kThreads, hopper::kSharedBytes, pdl, false, args.plan.cluster};
    return launch_kernel(kernel, args, shape, static_cast<cudaStream_t>(stream));
  });
}
#else
int ffn_gemm_launch(const FfnGemmParams&, void*) {
  return kGemmNotBuilt;
}
#endif

const char* ffn_gemm_unsupported(const FfnGemmParams& params) {
  return hopper::why_unsupported(params);
}

const char* ffn_gemm_error_text(int code) {
  switch (code) {
    case kGemmUnsupported:
      return "the Hopper kernels do not take this input";
    case kGemmNotBuilt:
      return "the extension was built without 90a in MEMVP_CUDA_ARCHS";
    case kGemmNoMap:
      return "the driver makes no TMA descriptor of an operand";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}

}  // namespace memvp
