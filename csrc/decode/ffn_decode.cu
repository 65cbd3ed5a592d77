// The device side of the launcher: three kernels in the caller's stream, each begun early where the chip can.
#include <cuda_runtime.h>

#include "decode/launch.h"

namespace memvp {
namespace {

// Makes the params' device current, and the caller's again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

struct Launcher {
  cudaStream_t stream;
  bool early;  // programmatic dependent launch: sm_90 or newer

  int operator()(decode::DecodeKernel kernel, int blocks, size_t shared_bytes, const decode::DecodeArgs& args,
                 bool chained) const {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    // All three ask for the same division of L1 and shared memory: a multiprocessor changes it only when it is idle,
    // and then no launch could begin beside the one ahead of it.
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(decode::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    // The first launch of a step has no predecessor that it knows: it waits for the whole stream.
    config.numAttrs = early && chained ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
  }
};

}  // namespace

const char* ffn_decode_unsupported(const FfnDecodeParams& params) {
  return decode::why_unsupported(params);
}

bool ffn_decode_is_fast(const FfnDecodeParams& params) {
  return decode::is_fast(params);
}

size_t ffn_decode_workspace_bytes(const FfnDecodeParams& params) {
  return decode::make_plan(params).at.bytes;
}

int ffn_decode_launch(const FfnDecodeParams& params, void* stream) {
  const DeviceGuard guard(params.device);
  if (guard.error() != cudaSuccess) return guard.error();
  int major = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, params.device);
  if (error != cudaSuccess) return error;
  return decode::launch_step(params, Launcher{static_cast<cudaStream_t>(stream), major >= 9});
}

const char* ffn_decode_error_text(int code) {
  if (code == kDecodeUnsupported) return "the decode kernels do not take this input";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace memvp
