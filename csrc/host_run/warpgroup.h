#pragma once
#include "host_run/barriers.h"
namespace memvp::host_run {
struct Operand {
  const char* start;
  unsigned leading, stride;
  bool along_k;
};
Operand operand(const void* shared, bool along_k, unsigned leading_bytes, unsigned stride_bytes, const Site& site);
void begin_products(const Site& site);
void commit_products(const Site& site);
void wait_products(size_t pending, const Site& site);
void multiply(float* acc, int columns, const Operand& a, const Operand& b, bool b_along_k, bool accumulate, bool bfloat,
              const Site& site);
void store_matrices(void* row, const uint32_t (&words)[4], const Site& site);
void store_matrices_transposed(void* row, const uint32_t (&words)[4], const Site& site);
}  // namespace memvp::host_run
