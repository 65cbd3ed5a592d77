// The device of a launch, made current for as long as it takes.
#pragma once
#include "common/driver.h"

namespace memvp {

// Whether a device has a context already. The driver answers without making one.
inline bool has_context(int device) {
  using State = int (*)(int device, unsigned* flags, int* active);  // of cuda.h, where it returns a CUresult
  static const State state = driver_function<State>("cuDevicePrimaryCtxGetState", 7000);
  unsigned flags = 0;
  int active = 0;
  return state != nullptr && state(device, &flags, &active) == 0 && active != 0;
}

// Restores the caller's device at the end, unless nothing has used it: making it current would put a context of some
// hundred megabytes there.
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
