// Makes the TensorMap of a kernel's parameter, on the host.
#pragma once
#include "common/numbers.cuh"
#include "common/tensor_copies.cuh"
#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>
#endif

namespace memvp {

// Why make_map refuses; 0 is success. The values are CUDA's own cudaErrorInvalidValue and cudaErrorNotSupported.
constexpr int kMapInvalid = 1, kMapUnsupported = 801;

// A tensor of T = BFloat16 or Float16 with `rank` = 2 or 3 dimensions, the first the one whose elements are neighbours:
// its sizes in elements, the bytes between neighbours in each further dimension, and how many elements of each a tile
// has (kTileColumns of the first). The base and the strides are multiples of 16 bytes, as the copies need them.
template <class T>
int make_map(TensorMap& map, const void* base, int rank, const int64_t* sizes, const int64_t* strides, const int* box) {
  static_assert(sizeof(T) == 2, "16 bits");
  if (rank < 2 || rank > 3 || base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0) return kMapInvalid;
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > int64_t{1} << 32) return kMapInvalid;
    if (box[i] < 1 || box[i] > 256) return kMapInvalid;
    if (i > 0 && (strides[i - 1] < 16 || strides[i - 1] % 16 != 0 || strides[i - 1] >= int64_t{1} << 40))
      return kMapInvalid;
  }
  if (box[0] != kTileColumns) return kMapInvalid;
#ifdef __CUDACC__
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap), "opaque");
  using Encode = decltype(&cuTensorMapEncodeTiled);  // asked of the driver: nothing links it
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Encode>(found);
  }();
  if (encode == nullptr) return kMapUnsupported;
  constexpr auto kType =
      std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t size[3], stride[2];
  cuuint32_t tile[3], every[3];
  for (int i = 0; i < rank; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes[i]);
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(strides[i - 1]);
    tile[i] = static_cast<cuuint32_t>(box[i]);
    every[i] = 1;
  }
  const CUresult made =
      encode(reinterpret_cast<CUtensorMap*>(&map), kType, static_cast<cuuint32_t>(rank), const_cast<void*>(base), size,
             stride, tile, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? 0 : kMapInvalid;
#else
  map = host_run::make_map(base, rank, sizes, strides, box);
  return 0;
#endif
}

}  // namespace memvp
