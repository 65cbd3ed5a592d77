// The launchers of decode/ffn_decode.h and hopper/ffn_steps.h on the CPU. With csrc/bindings.cpp they make an extension
// module whose pointers are the host's: the tests take a problem through all of the Python side and the bindings, to a
// result, without a GPU.
#include "host_run/ffn_decode_host.h"
#include "host_run/ffn_steps_host.h"

namespace memvp {

namespace {

constexpr int kHostRunFailed = 1;
thread_local std::string host_run_message;

template <class Run>
int code_of(Run run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    host_run_message = error.what();
    return kHostRunFailed;
  }
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

int ffn_decode_launch(const FfnDecodeParams& params, void*) {
  if (decode::why_unsupported(params) != nullptr) return kDecodeUnsupported;
  return code_of([&] { host_run::run_decode(params, host_run::Config{}); });
}

const char* ffn_decode_error_text(int) {
  return host_run_message.c_str();
}

const char* ffn_step_unsupported(const FfnStepParams& params) {
  return hopper::why_unsupported(params);
}

int ffn_step_launch(const FfnStepParams& params, void*) {
  if (hopper::why_unsupported(params) != nullptr) return kStepUnsupported;
  return code_of([&] { host_run::run_step(params, host_run::Config{}); });
}

const char* ffn_step_error_text(int) {
  return host_run_message.c_str();
}

}  // namespace memvp
