// How both launchers launch a kernel: attributes set once for each device, programmatic dependent launch (PDL) where
// the chip, the driver and the kernel's own code have it.
#pragma once
#include <map>
#include <mutex>
#include <utility>

#include "common/arithmetic.h"
#include "common/device_guard.h"

namespace memvp {

// Whether launches on this device may overlap, by the rule of memvp_kernels/backends/triton/runtime/pdl.py: Hopper and
// sm_100 / sm_103 (on sm_120 such launches are reported to break graph capture), and drivers since CUDA 12.3, before
// which no graph captures them.
inline cudaError_t supports_pdl(int device, bool& supported) {
  constexpr int kOldestDriver = 12030;
  int major = 0, driver = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  supported = (major == 9 || major == 10) && driver >= kOldestDriver;
  return error;
}

// Once for each kernel and device, whichever thread comes first: allows `shared_bytes` of dynamic shared memory, or as
// much as the chip has. `pdl`: the kernel may begin before the launch ahead has ended; code for chips before sm_90
// would not wait for it (memory.cuh).
template <class Kernel>
cudaError_t prepare_kernel(Kernel kernel, int device, int shared_bytes, bool& pdl) {
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) {
    pdl = found->second;
    return cudaSuccess;
  }
  cudaFuncAttributes code{};
  int most = 0;
  bool supported = false;
  cudaError_t error = cudaFuncGetAttributes(&code, kernel);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, least(most, shared_bytes));
  // All kernels ask for the same division of L1 and shared memory: a multiprocessor changes it only when it is idle,
  // and then no launch could begin beside the one ahead of it.
  if (error == cudaSuccess)
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) error = supports_pdl(device, supported);
  if (error != cudaSuccess) return error;
  pdl = supported && code.ptxVersion >= 90;
  known.emplace(std::make_pair(kernel, device), pdl);
  return cudaSuccess;
}

struct LaunchShape {
  int blocks, threads;
  size_t shared_bytes;
  bool pdl = false, cooperative = false;
  int cluster = 1;
};

template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), const Args& args, const LaunchShape& shape, cudaStream_t stream) {
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  const auto add = [&](cudaLaunchAttributeID id) -> cudaLaunchAttribute& {
    attributes[config.numAttrs].id = id;
    return attributes[config.numAttrs++];
  };
  if (shape.cooperative) add(cudaLaunchAttributeCooperative).val.cooperative = 1;
  if (shape.pdl) add(cudaLaunchAttributeProgrammaticStreamSerialization).val.programmaticStreamSerializationAllowed = 1;
  if (shape.cluster > 1) {
    auto& cluster = add(cudaLaunchAttributeClusterDimension).val.clusterDim;
    cluster.x = static_cast<unsigned>(shape.cluster);
    cluster.y = cluster.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace memvp
