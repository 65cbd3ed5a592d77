// The device of a launch, made current for as long as it takes.
#pragma once
#include <cuda_runtime.h>

namespace memvp {

// Whether something on this device has a context yet. Asked of the driver, which answers without making one.
inline bool has_context(int device) {
  using State = int (*)(int device, unsigned* flags, int* active);  // of cuda.h, where it returns a CUresult
  static const State state = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<State>(found);
  }();
  unsigned flags = 0;
  int active = 0;
  return state != nullptr && state(device, &flags, &active) == 0 && active != 0;
}

// Makes the params' device current, and the caller's again at the end: unless nothing has used that one, for then
// making it current would put a context of some hundred megabytes there.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      const bool used = has_context(before_);
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess && used;
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

}  // namespace memvp
