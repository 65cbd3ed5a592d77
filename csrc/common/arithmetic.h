// Integer helpers for host and device.
#pragma once
#include "common/platform.cuh"

namespace memvp {

template <class I>
MEMVP_HOST_DEVICE constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
template <class I>
MEMVP_HOST_DEVICE constexpr I round_up(I a, I b) {
  return ceil_div(a, b) * b;
}
template <class I>
MEMVP_HOST_DEVICE constexpr I least(I a, I b) {
  return a < b ? a : b;
}
template <class I>
MEMVP_HOST_DEVICE constexpr I greatest(I a, I b) {
  return a < b ? b : a;
}

}  // namespace memvp
