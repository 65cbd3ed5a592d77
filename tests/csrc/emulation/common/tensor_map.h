// Makes a TensorMap, with the driver's rules.
#pragma once
#include "common/numbers.cuh"
#include "common/tma.cuh"

namespace memvp {

template <class T>
bool make_tensor_map(TensorMap& map, const void* base, int rank, const int64_t* sizes, const int64_t* strides,
                     const int* tile) {
  if (rank < 2 || rank > 3 || base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0) return false;
  map.base = const_cast<char*>(static_cast<const char*>(base));
  map.rank = rank;
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > int64_t{1} << 32 || tile[i] < 1 || tile[i] > 256) return false;
    map.sizes[i] = sizes[i];
    map.box[i] = tile[i];
    if (i == 0) continue;
    if (strides[i - 1] < 16 || strides[i - 1] % 16 != 0 || strides[i - 1] >= int64_t{1} << 40) return false;
    map.strides[i] = strides[i - 1];
  }
  return tile[0] == kTileColumns;
}

}  // namespace memvp
