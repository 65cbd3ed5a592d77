// Functions of the CUDA driver, looked up through the runtime: the library does not link the driver, and so imports
// where there is none.
#pragma once
#include <cuda_runtime.h>

namespace memvp {

// The function as it is since `version` of the driver API; nullptr where the driver is older or absent.
template <class Function>
Function driver_function(const char* name, [[maybe_unused]] unsigned version) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  return reinterpret_cast<Function>(found);
}

}  // namespace memvp
