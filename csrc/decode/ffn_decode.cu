// The device side of the launcher: three kernels in the caller's stream, each begun early where the chip can, or one.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "common/device_guard.h"
#include "decode/launch.h"

namespace memvp {
namespace {

// Once for each kernel and device, whichever thread comes first. `early`: the kernel was compiled for sm_90 or newer,
// and so waits for the launch ahead of it (common/memory.cuh); on a newer chip than it was compiled for it may not.
cudaError_t prepare(decode::DecodeKernel kernel, int device, bool& early) {
  static std::mutex mutex;
  static std::map<std::pair<decode::DecodeKernel, int>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) {
    early = found->second;
    return cudaSuccess;
  }
  cudaFuncAttributes code{};
  cudaError_t error = cudaFuncGetAttributes(&code, kernel);
  if (error != cudaSuccess) return error;
  int most = 0;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  most = least(most, decode::kMaxSharedBytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  // All three ask for the same division of L1 and shared memory: a multiprocessor changes it only when it is idle,
  // and then no launch could begin beside the one ahead of it.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  early = code.ptxVersion >= 90;
  known.emplace(std::make_pair(kernel, device), early);
  return cudaSuccess;
}

// A cooperative launch was refused: a share of the device alone is ours, or it has none.
bool no_room_for_all(int error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported;
}

struct Launcher {
  cudaStream_t stream;
  int device;

  int operator()(decode::DecodeKernel kernel, int blocks, size_t shared_bytes, const decode::DecodeArgs& args,
                 decode::LaunchKind kind) const {
    bool early = false;
    const cudaError_t error = prepare(kernel, device, early);
    if (error != cudaSuccess) return error;
    // The first launch of a chain has no predecessor that it knows: it waits for the whole stream.
    cudaLaunchAttribute attribute{};
    bool has_attribute = true;
    if (kind == decode::LaunchKind::kCooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else if (kind == decode::LaunchKind::kChained && early) {
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    } else {
      has_attribute = false;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(decode::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = has_attribute ? 1 : 0;
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
  return decode::workspace_bytes(params);
}

int ffn_decode_launch(const FfnDecodeParams& params, void* stream) {
  const DeviceGuard guard(params.device);
  if (guard.error() != cudaSuccess) return guard.error();
  const Launcher launcher{static_cast<cudaStream_t>(stream), params.device};
  bool one_launch = params.form == DecodeForm::kOneLaunch;
  if (params.form == DecodeForm::kAuto) {
    // All kernels were compiled for the same chip: any of them says whether launches of it can begin early.
    bool early = false;
    const cudaError_t error = prepare(decode::finish_kernel_of<BFloat16>(decode::DecodePlan{}), params.device, early);
    if (error != cudaSuccess) return error;
    one_launch = !early;
  }
  int error = decode::launch_step(params, one_launch, launcher);
  if (params.form == DecodeForm::kAuto && one_launch && no_room_for_all(error)) {
    cudaGetLastError();  // nothing was launched, and the next call must not find the error
    error = decode::launch_step(params, false, launcher);
  }
  return error;
}

const char* ffn_decode_error_text(int code) {
  if (code == kDecodeUnsupported) return "the decode kernels do not take this input";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace memvp
