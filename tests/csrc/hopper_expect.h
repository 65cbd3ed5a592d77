// What the tests of Hopper's primitives share: schedules, what a run says, tensors for maps.
#pragma once
#include "common/hopper.cuh"
#include "common/tensor_map.h"

namespace memvp::hopper_test {

using host_run::Config;
using host_run::fail;
using host_run::Launch;
using host_run::Order;
using host_run::run_chain;
using host_run::text;

inline int failures = 0;

inline void complain(const std::string& what) {
  ++failures;
  printf("%s\n", what.c_str());
}

struct Schedule {
  Order order;
  uint64_t seed;
};
inline std::vector<Schedule> schedules = {{Order::kForward, 1}, {Order::kRandom, 2}, {Order::kReverse, 1},
                                          {Order::kRandom, 0},  {Order::kRandom, 1}, {Order::kRandom, 3}};

// The message of a run, or nothing.
inline std::string run(const Launch& launch, const Schedule& schedule) {
  Config config;
  config.order = schedule.order;
  config.seed = schedule.seed;
  try {
    run_chain({launch}, config);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Under every schedule. `wanted`: part of the message; empty: no complaint.
template <class Kernel>
void expect(const char* name, const std::string& wanted, unsigned threads, size_t shared_bytes, Kernel kernel,
            const std::vector<Schedule>& under = schedules) {
  for (const Schedule& schedule : under) {
    const std::string message = run({1, threads, shared_bytes, kernel, false, false}, schedule);
    if (wanted.empty() ? !message.empty() : message.find(wanted) == std::string::npos)
      complain(text("%s (order %d): wanted \"%s\", got \"", name, int(schedule.order), wanted.c_str()) + message + '"');
  }
}

inline void check(bool right, const char* what) {
  if (!right) fail(what);
}

// A tensor of 16-bit numbers in memory, its rows and pages further apart than they need be.
template <class T>
struct Tensor {
  int64_t pages, rows, columns;
  int64_t row_stride = round_up<int64_t>(columns, 8) + 8, page_stride = row_stride * rows + 16;
  std::vector<T> storage = std::vector<T>(static_cast<size_t>(pages * page_stride + 8), T{0xFFFF});

  // At a multiple of 16 bytes.
  T* data() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16); }
  T& at(int64_t page, int64_t row, int64_t column) { return data()[page * page_stride + row * row_stride + column]; }
  bool has(int64_t page, int64_t row, int64_t column) const {
    return page >= 0 && page < pages && row >= 0 && row < rows && column >= 0 && column < columns;
  }
  template <class Value>
  void fill(Value value) {
    for (int64_t z = 0; z < pages; ++z)
      for (int64_t y = 0; y < rows; ++y)
        for (int64_t x = 0; x < columns; ++x) at(z, y, x) = value(z, y, x);
  }
  TensorMap map(int rank, int box_rows, int box_pages = 1) {
    const int64_t sizes[] = {columns, rows, pages}, strides[] = {row_stride * 2, page_stride * 2};
    const int box[] = {kTileColumns, box_rows, box_pages};
    TensorMap made;
    if (make_map<T>(made, data(), rank, sizes, strides, box) != 0) complain("make_map refuses a right tensor");
    return made;
  }
};

}  // namespace memvp::hopper_test
