// As much of the CUDA runtime as the launchers in csrc call, on a machine that the test makes up, and a record of what
// was set and launched.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801
};
using cudaStream_t = void*;
struct dim3 {
  dim3(unsigned size = 1) : x(size) {}
  unsigned x, y = 1, z = 1;
};
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int programmaticStreamSerializationAllowed, cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
constexpr unsigned long long cudaEnableDefault = 0;

namespace fake {

struct Launch {
  const void* kernel;
  int device;
  size_t shared_bytes;
  bool pdl, cooperative;
  unsigned blocks, cluster;
};

struct Machine {
  std::mutex mutex;
  int ptx_version = 90, binary_version = 90;  // of every kernel
  int capability = 9, driver = 13000;         // major
  int shared_bytes = 99 << 10;                // that a block may have
  unsigned resident = 132;                    // blocks at a time
  cudaError_t last_error = cudaSuccess;       // until it is asked for
  std::set<int> contexts{0};
  std::map<std::pair<const void*, int>, size_t> allowed;  // dynamic shared memory
  int attribute_calls = 0;
  std::vector<Launch> launches;
};
inline Machine machine;
inline thread_local int current_device = 0;

inline int context_state(int device, unsigned*, int* active) {
  *active = machine.contexts.count(device) != 0;
  return 0;
}

}  // namespace fake

inline cudaError_t cudaGetDevice(int* device) {
  *device = fake::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  const std::lock_guard<std::mutex> lock(fake::machine.mutex);
  fake::current_device = device;
  fake::machine.contexts.insert(device);  // as since CUDA 12
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult*) {
  *function = reinterpret_cast<void*>(&fake::context_state);
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake::machine.driver;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? fake::machine.capability : fake::machine.shared_bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {fake::machine.ptx_version, fake::machine.binary_version};
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(fake::machine.mutex);
  fake::machine.attribute_calls++;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > fake::machine.shared_bytes)
    return cudaErrorInvalidValue;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    fake::machine.allowed[{reinterpret_cast<const void*>(kernel), fake::current_device}] = value;
  return cudaSuccess;
}
// Like the device: a launch with more shared memory than the kernel is allowed at that moment fails.
template <class Kernel, class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Args&) {
  const std::lock_guard<std::mutex> lock(fake::machine.mutex);
  const void* const key = reinterpret_cast<const void*>(kernel);
  const size_t allowed = fake::machine.allowed[{key, fake::current_device}];
  const auto value = [&](cudaLaunchAttributeID id, auto read, unsigned otherwise) {
    for (unsigned i = 0; i < config->numAttrs; ++i)
      if (config->attrs[i].id == id) return static_cast<unsigned>(read(config->attrs[i].val));
    return otherwise;
  };
  const bool pdl = value(
      cudaLaunchAttributeProgrammaticStreamSerialization,
      [](const auto& v) { return v.programmaticStreamSerializationAllowed; }, 0);
  const bool cooperative = value(cudaLaunchAttributeCooperative, [](const auto& v) { return v.cooperative; }, 0);
  const unsigned cluster = value(cudaLaunchAttributeClusterDimension, [](const auto& v) { return v.clusterDim.x; }, 1);
  if (cooperative && config->gridDim.x > fake::machine.resident)
    return fake::machine.last_error = cudaErrorCooperativeLaunchTooLarge;
  if (config->dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  fake::machine.launches.push_back(
      {key, fake::current_device, config->dynamicSmemBytes, pdl, cooperative, config->gridDim.x, cluster});
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(fake::machine.last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid argument";
}
