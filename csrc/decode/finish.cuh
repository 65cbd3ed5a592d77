// Third phase: y = partial sums + b_V + residual, and where memory is factored + [u | visual] [W; p^v]. A block has 64
// columns of eight tokens.
#pragma once
#include "decode/values.cuh"

namespace memvp::decode {

// Brings rows of a shared matrix to L2 while the phase ahead still runs: 64 columns are a line or two.
MEMVP_DEVICE void prefetch_columns(const DecodeTensor& t, int rows, int64_t first_column, int64_t width) {
  if (t.data == nullptr) return;
  const int line = t.type == DType::kFloat32 ? 32 : 64;
  for (int row = threadIdx.x; row < rows; row += kThreads)
    for (int64_t column = first_column; column < least(first_column + kColumnTile, width); column += line)
      prefetch_l2(row_of(t, row * t.strides[0] + column * t.strides[1], 1).data);
}

// [u | visual] [W; p^v] for one token and column, over what the token reads. The block's own product also multiplies
// the rows of W and p^v by the zeros of a token that has fewer slots, and zero times NaN or infinity is NaN.
template <class T>
MEMVP_DEVICE float product_alone(const DecodeArgs& args, int64_t n, int64_t column) {
  const FfnDecodeParams& p = args.p;
  const MemoryOfToken memory = memory_of_token(p, n);
  if (memory.row == kNoMemory) return 0.0f;
  const T* visual = in_workspace<T>(args, args.plan.at.visual) + n * args.plan.visual_stride;
  const int rank = p.visual_basis.data == nullptr ? 0 : p.rank,
            slots = p.value_position.data == nullptr ? 0 : memory.slots;
  float sum = 0.0f;
  const auto add = [&](const T* numbers, const DecodeTensor& matrix, int rows) {
#pragma unroll 1
    for (int k = 0; k < rows; ++k)
      sum += to_float(load_written<T>(numbers + k)) * to_float(round_to<T>(element<T>(row_of(matrix, k), column)));
  };
  add(visual, p.visual_basis, rank);
  add(visual + args.plan.rank_stride, p.value_position, slots);
  return sum;
}

template <class T, bool kBy16, class Sync>
MEMVP_DEVICE void finish_phase(const DecodeArgs& args, int block, Sync& sync) {
  constexpr int kOutputs = kColumnTile * kTokenTile / kThreads, kEarlyPartials = 8;  // more are rare
  const FfnDecodeParams& p = args.p;
  const DecodePlan& plan = args.plan;
  const int width_blocks = ceil_div(p.width, kColumnTile);
  const int64_t first_column = block % width_blocks * kColumnTile, column = first_column + group_of_lane() * 8;
  const int first_token = block / width_blocks * kTokenTile;
  const bool factored = p.visual_basis.data != nullptr, materialised = p.visual_key.data != nullptr && !factored;
  const bool positions = (factored || plan.memory_pipelined) && p.value_position.data != nullptr;
  // Everything that the earlier phases do not write is read before the wait.
  if (factored) prefetch_columns(p.visual_basis, p.rank, first_column, p.width);
  if (positions) prefetch_columns(p.value_position, p.slots, first_column, p.width);
  const int64_t token = first_token + group_of_lane();  // of this lane's operands
  const bool reads = (factored || positions) && token < p.tokens && memory_of_token(p, token).row != kNoMemory;
  const int64_t at = first_column + threadIdx.x % kColumnTile;  // of this thread's outputs
  const auto output_token = [&](int i) -> int64_t { return first_token + (threadIdx.x + i * kThreads) / kColumnTile; };
  const float bias = at < p.width ? element_or_zero<T>(p.value_bias, at) : 0.0f;
  float residual[kOutputs], partial[kOutputs][kEarlyPartials];
  int partials[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int64_t n = output_token(i);
    const bool mine = n < p.tokens && at < p.width;
    const bool without =
        mine && materialised && memory_of_token(p, n).row == kNoMemory;  // nobody wrote its last partial sum
    residual[i] = mine && p.residual.data != nullptr ? element<T>(row_of(p.residual, n), at) : 0.0f;
    partials[i] = !mine ? 0 : without ? plan.partials - 1 : plan.partials;
  }
  sync.wait();
#pragma unroll
  for (int i = 0; i < kOutputs; ++i)
#pragma unroll
    for (int j = 0; j < kEarlyPartials; ++j)
      partial[i][j] = j < partials[i] ? load_written<float>(partial_of(args, j, output_token(i)) + at) : 0.0f;
  float sum[4][4] = {};
  if (factored || positions) {
    const T* visual = in_workspace<T>(args, plan.at.visual) + token * plan.visual_stride;
    const T *u = reads ? visual : nullptr, *of_slots = reads ? visual + plan.rank_stride : nullptr;
    with_reading<kBy16>(p.visual_basis, p.value_position, [&](auto reading) {
      constexpr int kAhead = ceil_div(kStepsAhead<reading.value>, 2);
      add_columns<T, kAhead>(sum, 0, factored ? p.rank : 0, u, [&](int64_t k) {
        return load8<T, reading.value>(row_of(p.visual_basis, k), column, k < p.rank ? p.width : 0);
      });
      add_columns<T, kAhead>(sum, 0, positions ? p.slots : 0, of_slots, [&](int64_t k) {
        return load8<T, reading.value>(row_of(p.value_position, k), column, k < p.slots ? p.width : 0);
      });
    });
  }
  share_columns(sum);
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int64_t n = output_token(i);
    if (n >= p.tokens || at >= p.width) continue;
    float v = column_sum(threadIdx.x + i * kThreads);
    if (!(v - v == 0.0f)) v = product_alone<T>(args, n, at);
#pragma unroll
    for (int j = 0; j < kEarlyPartials; ++j)
      if (j < partials[i]) v += partial[i][j];
    for (int j = kEarlyPartials; j < partials[i]; ++j) v += load_written<float>(partial_of(args, j, n) + at);
    v += bias;
    v += residual[i];
    static_cast<T*>(p.y)[n * p.y_stride + at] = round_to<T>(v);
  }
}

template <class T, bool kBy16>
__global__ void __launch_bounds__(kThreads, kBy16 ? 2 : 1) finish_kernel(const __grid_constant__ DecodeArgs args) {
  PdlSync sync;
  finish_phase<T, kBy16>(args, blockIdx.x, sync);
}

}  // namespace memvp::decode
