// The launchers of decode/ffn_decode.h and hopper/ffn_gemm.h on the CPU. With csrc/bindings.cpp they make an extension
// module whose pointers are the host's, so that a problem goes through Python, bindings and kernels without a GPU. The
// same file is the library for ctypes: the kernels are compiled once.
#include "decode_library.cpp"
#include "gemm_library.cpp"

namespace memvp {

namespace {

thread_local std::string message;

template <class Run>
int code_of(Run run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
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
  return code_of([&] { emulation::run_decode(params, {}); });
}
const char* ffn_decode_error_text(int) {
  return message.c_str();
}

const char* ffn_gemm_unsupported(const FfnGemmParams& params) {
  return hopper::why_unsupported(params);
}
int ffn_gemm_launch(const FfnGemmParams& params, void*) {
  if (hopper::why_unsupported(params) != nullptr) return kGemmUnsupported;
  return code_of([&] { emulation::run_gemm(params, {}); });
}
const char* ffn_gemm_error_text(int) {
  return message.c_str();
}

}  // namespace memvp
