// What the kernel is given, and its launch: the same for the device and for the host run;
// `launch(kernel, blocks, args)` is theirs.
#pragma once
#include "common/tensor_map.h"
#include "hopper/plan.h"

namespace memvp::hopper {

struct StepArgs {
  StepPlan plan;
  DecodeActivation activation;
  StepVector bias, gate_bias;
  TensorMap maps[kMaps];
};

using StepKernel = void (*)(StepArgs);

// Of kernels.cuh.
template <class T>
StepKernel step_kernel_of(StepKind kind, bool gated);

// A map of a matrix, or of `pages` that follow one another, in tiles of 64 columns and so many rows. Absent: none.
template <class T>
bool describe(TensorMap& map, const StepMatrix& m, int columns, int rows, int tile_rows, int pages = 0) {
  if (m.data == nullptr) return true;
  const int64_t stride = rows == 1 ? round_up(columns, 8) : m.stride;
  const int64_t sizes[] = {columns, rows, pages}, strides[] = {2 * stride, 2 * stride * rows};
  const int box[] = {kTileColumns, tile_rows, 1};
  return make_map<T>(map, m.data, pages > 0 ? 3 : 2, sizes, strides, box) == 0;
}

// Whether the driver describes all that the kernel copies, in tiles of a block's rows or a warpgroup's.
template <class T>
bool describe_all(TensorMap (&maps)[kMaps], const FfnStepParams& p, int tile_rows) {
  const int half = kColumns / 2, branches = 1 + p.gated;
  const StepProduct& first = p.products[0];
  bool good = true;
  for (int i = 0; i < p.product_count; ++i) {
    const StepProduct& product = p.products[i];
    good = good && describe<T>(maps[kLeft + i], product.left, product.depth, p.rows, tile_rows);
    if (p.columns > 0 && product.across)
      good = good && describe<T>(maps[kRight + i], product.right, p.columns, product.depth, kDepth);
    else if (p.columns > 0)
      good = good && describe<T>(maps[kRight + i], product.right, product.depth, p.columns, half);
  }
  if (p.columns > 0) {
    const StepMatrix pre{p.pre, p.columns}, dpre{p.dpre, p.columns};
    const bool reads = p.kind == StepKind::kDHidden;
    good = good && describe<T>(maps[kGate], p.gate, first.depth, p.columns, half) &&
           (reads ? describe<T>(maps[kRead], pre, p.columns, p.rows, tile_rows, branches)
                  : describe<T>(maps[kRead], p.residual, p.columns, p.rows, tile_rows)) &&
           describe<T>(maps[kPre], reads ? dpre : pre, p.columns, p.rows, kGroupRows, branches) &&
           describe<T>(maps[kResult], p.result, p.columns, p.rows, kGroupRows);
  }
  if (p.shared_columns > 0) {
    maps[kLeft + kShared] = maps[kLeft];
    good = good && describe<T>(maps[kRight + kShared], p.shared, first.depth, p.shared_columns, half) &&
           describe<T>(maps[kSharedResult], p.shared_result, p.shared_columns, p.rows, kGroupRows);
  }
  return good;
}

template <class T, class Launch>
int launch_step(const FfnStepParams& p, Launch launch) {
  StepArgs args{make_plan(p), p.activation, p.bias, p.gate_bias, {}};
  if (args.plan.tiles == 0) return 0;
  if (!describe_all<T>(args.maps, p, args.plan.tile_rows)) return kStepNoMap;
  return launch(step_kernel_of<T>(p.kind, p.gated), args.plan.clusters * args.plan.cluster, args);
}

// The error of `launch`, or one of ours, or 0.
template <class Launch>
int launch_step(const FfnStepParams& p, Launch launch) {
  if (why_unsupported(p) != nullptr) return kStepUnsupported;
  return p.type == DecodeType::kBFloat16 ? launch_step<BFloat16>(p, launch) : launch_step<Float16>(p, launch);
}

}  // namespace memvp::hopper
