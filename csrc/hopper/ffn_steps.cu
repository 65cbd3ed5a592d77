// The device side of the launcher: one kernel in the caller's stream, which begins while the launch ahead ends.
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#include "common/device_guard.h"
#include "hopper/ffn_steps.h"
#include "hopper/launch.h"

namespace memvp {

#ifdef MEMVP_HAS_SM90A  // else no kernel was compiled, see setup.py
namespace {

// Once for each kernel and device, whichever thread comes first.
cudaError_t allow_shared_memory(hopper::StepKernel kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<hopper::StepKernel, int>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.count({kernel, device}) > 0) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, hopper::kSharedBytes);
  if (error == cudaSuccess) known.insert({kernel, device});
  return error;
}

}  // namespace

int ffn_step_launch(const FfnStepParams& params, void* stream) {
  const DeviceGuard guard(params.device);
  if (guard.error() != cudaSuccess) return guard.error();
  return hopper::launch_step(params, [&](hopper::StepKernel kernel, int blocks, const hopper::StepArgs& args) -> int {
    const cudaError_t error = allow_shared_memory(kernel, params.device);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(hopper::kThreads);
    config.dynamicSmemBytes = hopper::kSharedBytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(args.plan.cluster);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.attrs = attributes;
    config.numAttrs = args.plan.cluster > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, args);
  });
}
#else
int ffn_step_launch(const FfnStepParams&, void*) {
  return kStepNotBuilt;
}
#endif

const char* ffn_step_unsupported(const FfnStepParams& params) {
  return hopper::why_unsupported(params);
}

const char* ffn_step_error_text(int code) {
  switch (code) {
    case kStepUnsupported:
      return "the steps' kernels do not take this input";
    case kStepNotBuilt:
      return "the extension was built without 90a in MEMVP_CUDA_ARCHS";
    case kStepNoMap:
      return "the driver does not describe an operand for copies by tiles";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}

}  // namespace memvp
