#pragma once
#include "host_run/barriers.h"
namespace memvp::host_run {
struct alignas(128) TensorMap {
  char* base = nullptr;
  int64_t sizes[3] = {}, strides[3] = {};
  int box[3] = {}, rank = 0;
};
using Coordinates = std::array<int, 3>;
void check_map(const TensorMap& map, const Site& site);
void load_tile(void* shared, const TensorMap& map, int rank, uint64_t& barrier, const Coordinates& at,
               const Site& site);
void store_tile(const TensorMap& map, int rank, const void* shared, const Coordinates& at, const Site& site);
void commit_stores(const Site& site);
void wait_stores(size_t pending, bool written, const Site& site);
}  // namespace memvp::host_run
namespace memvp::host_run {
TensorMap make_map(const void* base, int rank, const int64_t* sizes, const int64_t* strides, const int* box);
}
