// Third launch of a step: y = partial sums + b_V + residual, and where memory is factored + [u | visual] [W; p^v]. A
// block has 64 columns of eight tokens.
#pragma once
#include "decode/values.cuh"

namespace memvp::decode {

// Rows of a shared matrix into L2 while the launch ahead still runs: 64 columns are a line or two.
MEMVP_DEVICE void prefetch_columns(const DecodeTensor& t, int rows, int64_t first_column, int64_t width) {
  if (t.data == nullptr) return;
  const int line = t.type == DecodeType::kFloat32 ? 32 : 64;
  for (int row = threadIdx.x; row < rows; row += kThreads)
    for (int64_t column = first_column; column < least(first_column + kColumnTile, width); column += line)
      prefetch_line(row_of(t, row * t.strides[0] + column * t.strides[1], 1).data);
}

template <class T, bool kBy16>
__global__ void __launch_bounds__(kThreads, kBy16 ? 2 : 1) finish_kernel(const __grid_constant__ DecodeArgs args) {
  const FfnDecodeParams& p = args.p;
  const DecodePlan& plan = args.plan;
  const int width_blocks = ceil_div(p.width, kColumnTile), block = blockIdx.x;
  const int64_t first_column = block % width_blocks * kColumnTile, column = first_column + group_of_lane() * 8;
  const int first_token = block / width_blocks * kTokenTile;
  const bool factored = p.visual_basis.data != nullptr, formed = p.visual_key.data != nullptr && !factored;
  if (factored) {
    prefetch_columns(p.visual_basis, p.rank, first_column, p.width);
    prefetch_columns(p.value_position, p.slots, first_column, p.width);
  }
  wait_for_previous_grid();
  float sum[4][4] = {};
  if (factored) {
    const int64_t token = least(first_token + group_of_lane(), p.tokens - 1);
    const T* visual = in_workspace<T>(args, plan.at.visual) + token * plan.visual_stride;
    with_reading<kBy16>(p.visual_basis, p.value_position, [&](auto reading) {
      add_columns<T, ceil_div(kStepsAhead<reading.value>, 2)>(sum, 0, p.rank, visual, [&](int64_t k) {
        return load8<T, reading.value>(row_of(p.visual_basis, k), column, k < p.rank ? p.width : 0);
      });
      add_columns<T, ceil_div(kStepsAhead<reading.value>, 2)>(
          sum, 0, p.value_position.data == nullptr ? 0 : p.slots, visual + plan.rank_stride, [&](int64_t k) {
            return load8<T, reading.value>(row_of(p.value_position, k), column, k < p.slots ? p.width : 0);
          });
    });
  }
  store_columns(sum, [&](int c, int t, float v) {
    const int64_t n = first_token + t, at = first_column + c;
    if (n >= p.tokens || at >= p.width) return;
    const bool with_memory = formed && memory_of_token(p, n).row != kNoMemory;  // else nobody wrote the last part
    const int parts = formed && !with_memory ? plan.parts - 1 : plan.parts;
    for (int part = 0; part < parts; ++part) v += load_written<float>(part_of(args, part, n) + at);
    v += element_or_zero<T>(p.value_bias, at);
    if (p.residual.data != nullptr) v += element<T>(row_of(p.residual, n), at);
    static_cast<T*>(p.y)[n * p.y_stride + at] = round_to<T>(v);
  });
}

}  // namespace memvp::decode
