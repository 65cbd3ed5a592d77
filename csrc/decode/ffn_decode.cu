// The launcher on a device: three kernels in the caller's stream, or one cooperative kernel.
#include "common/launch.h"
#include "decode/launch.h"

namespace memvp {
namespace {

// Why a cooperative launch is refused: only a share of the device is ours, or the device has no such launches.
bool lacks_room(int error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported;
}

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
  using decode::LaunchKind;
  const DeviceGuard guard(params.device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto launch = [&](decode::DecodeKernel kernel, int blocks, size_t shared_bytes, const decode::DecodeArgs& args,
                          LaunchKind kind) -> int {
    bool pdl = false;
    const cudaError_t error = prepare_kernel(kernel, params.device, decode::kMaxSharedBytes, pdl);
    if (error != cudaSuccess) return error;
    // The first launch of a step knows no predecessor, and waits for the whole stream.
    const LaunchShape shape{blocks, decode::kThreads, shared_bytes, pdl && kind == LaunchKind::kPdl,
                            kind == LaunchKind::kCooperative};
    return launch_kernel(kernel, args, shape, static_cast<cudaStream_t>(stream));
  };
  bool cooperative = params.form == DecodeForm::kCooperative;
  if (params.form == DecodeForm::kAuto) {
    // All kernels were compiled for the same chip, so any of them answers.
    bool pdl = false;
    const auto kernel = decode::finish_kernel_of<BFloat16>(decode::DecodePlan{});
    const cudaError_t error = prepare_kernel(kernel, params.device, decode::kMaxSharedBytes, pdl);
    if (error != cudaSuccess) return error;
    cooperative = !pdl;
  }
  int error = decode::launch_step(params, cooperative, launch);
  if (params.form == DecodeForm::kAuto && cooperative && lacks_room(error)) {
    cudaGetLastError();  // nothing was launched, and the next call must not find the error
    error = decode::launch_step(params, false, launch);
  }
  return error;
}

const char* ffn_decode_error_text(int code) {
  if (code == kDecodeUnsupported) return "the decode kernels do not take this input";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace memvp
