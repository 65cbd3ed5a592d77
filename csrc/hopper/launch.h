// What the kernel is given, and its launch. The caller's `launch(kernel, blocks, args)` launches on a device or in the
// emulation.
#pragma once
#include "common/tensor_map.h"
#include "hopper/plan.h"

namespace memvp::hopper {

struct GemmArgs {
  GemmPlan plan;
  Activation activation;
  GemmVector bias, gate_bias;
  TensorMap maps[kMaps];
};

using GemmKernel = void (*)(GemmArgs);

// Of kernels.cuh.
template <class T>
GemmKernel gemm_kernel_of(GemmKind kind, bool gated);

// A TMA descriptor of a matrix, or of `pages` that follow one another, in tiles of 64 columns and `tile_rows` rows.
// Absent: none.
template <class T>
bool make_map(TensorMap& map, const GemmMatrix& m, int columns, int rows, int tile_rows, int pages = 0) {
  if (m.data == nullptr) return true;
  const int64_t stride = rows == 1 ? round_up(columns, 8) : m.stride;
  const int64_t sizes[] = {columns, rows, pages}, strides[] = {2 * stride, 2 * stride * rows};
  const int box[] = {kTileColumns, tile_rows, 1};
  return make_tensor_map<T>(map, m.data, pages > 0 ? 3 : 2, sizes, strides, box);
}

// Descriptors of all that the kernel copies, in tiles of a block's rows or a warpgroup's. Whether the driver took them.
template <class T>
bool make_maps(TensorMap (&maps)[kMaps], const FfnGemmParams& p, int tile_rows) {
  const int half = kColumns / 2, branches = 1 + p.gated;
  const GemmProduct& first = p.products[0];
  bool good = true;
  for (int i = 0; i < p.product_count; ++i) {
    const GemmProduct& product = p.products[i];
    good = good && make_map<T>(maps[kLeft + i], product.left, product.depth, p.rows, tile_rows);
    if (p.columns > 0 && product.across)
      good = good && make_map<T>(maps[kRight + i], product.right, p.columns, product.depth, kDepth);
    else if (p.columns > 0)
      good = good && make_map<T>(maps[kRight + i], product.right, product.depth, p.columns, half);
  }
  if (p.columns > 0) {
    const GemmMatrix pre{p.pre, p.columns}, dpre{p.dpre, p.columns};
    const bool reads = p.kind == GemmKind::kDHidden;
    good = good && make_map<T>(maps[kGate], p.gate, first.depth, p.columns, half) &&
           (reads ? make_map<T>(maps[kRead], pre, p.columns, p.rows, tile_rows, branches)
                  : make_map<T>(maps[kRead], p.residual, p.columns, p.rows, tile_rows)) &&
           make_map<T>(maps[kPre], reads ? dpre : pre, p.columns, p.rows, kGroupRows, branches) &&
           make_map<T>(maps[kResult], p.result, p.columns, p.rows, kGroupRows);
  }
  if (p.shared_columns > 0) {
    maps[kLeft + kShared] = maps[kLeft];
    good = good && make_map<T>(maps[kRight + kShared], p.shared, first.depth, p.shared_columns, half) &&
           make_map<T>(maps[kSharedResult], p.shared_result, p.shared_columns, p.rows, kGroupRows);
  }
  return good;
}

template <class T, class Launch>
int launch_gemm(const FfnGemmParams& p, Launch launch) {
  GemmArgs args{make_plan(p), p.activation, p.bias, p.gate_bias, {}};
  if (args.plan.tiles == 0) return 0;
  if (!make_maps<T>(args.maps, p, args.plan.tile_rows)) return kGemmNoMap;
  return launch(gemm_kernel_of<T>(p.kind, p.gated), args.plan.clusters * args.plan.cluster, args);
}

// The error of `launch`, or one of ours, or 0.
template <class Launch>
int launch_gemm(const FfnGemmParams& p, Launch launch) {
  if (why_unsupported(p) != nullptr) return kGemmUnsupported;
  return p.type == DType::kBFloat16 ? launch_gemm<BFloat16>(p, launch) : launch_gemm<Float16>(p, launch);
}

}  // namespace memvp::hopper
