// Makes the TensorMap of a kernel's parameter, on the host.
#pragma once
#include <cuda.h>

#include <type_traits>

#include "common/driver.h"
#include "common/numbers.cuh"
#include "common/tma.cuh"

namespace memvp {

// A tensor of T = BFloat16 or Float16 with `rank` = 2 or 3 dimensions, contiguous along the first: its sizes in
// elements, the bytes between neighbours in each further dimension, and a tile's elements in each (kTileColumns of the
// first). Whether the driver took it.
template <class T>
bool make_tensor_map(TensorMap& map, const void* base, int rank, const int64_t* sizes, const int64_t* strides,
                     const int* tile) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap), "opaque");
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
  if (encode == nullptr) return false;
  constexpr auto kType =
      std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t size[3], stride[2];
  cuuint32_t box[3];
  const cuuint32_t every[3] = {1, 1, 1};
  for (int i = 0; i < rank; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes[i]);
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(strides[i - 1]);
    box[i] = static_cast<cuuint32_t>(tile[i]);
  }
  return encode(reinterpret_cast<CUtensorMap*>(&map), kType, static_cast<cuuint32_t>(rank), const_cast<void*>(base),
                size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace memvp
