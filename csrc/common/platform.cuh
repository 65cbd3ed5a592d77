// How functions are marked for the device. The CPU emulation of the tests (tests/csrc/emulation/common) replaces this
// header and the others here that contain PTX or CUDA names, by coming first on the include path.
#pragma once
#include <cstddef>
#include <cstdint>

#define MEMVP_DEVICE static __device__ __forceinline__
#define MEMVP_HOST_DEVICE __host__ __device__
