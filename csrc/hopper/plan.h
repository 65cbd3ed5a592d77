// Which products the kernel takes, how they are divided into tiles, and in which order a block takes those.
#pragma once
#include "common/arithmetic.h"
#include "hopper/ffn_gemm.h"

namespace memvp::hopper {

// A tile is 128 x 256 sums, 64 rows to each of two warpgroups: 128 registers a thread. A stage holds 64 of k of both
// operands, and four stages are in flight. Where tiles are few, one warpgroup has 64 rows and the other none.
constexpr int kRows = 128, kColumns = 256, kDepth = 64, kStages = 4;
constexpr int kGroups = 2, kGroupRows = kRows / kGroups, kGroupThreads = 128;
constexpr int kThreads = kGroupThreads * (1 + kGroups);  // one more warpgroup copies
constexpr int kBlockBytes = kDepth * 64 * 2;             // 64 x 64 numbers, the unit of all copies
constexpr int kLeftBytes = kRows / 64 * kBlockBytes, kRightBytes = kColumns / 64 * kBlockBytes;
constexpr int kStageBytes = kLeftBytes + kRightBytes;
// Results leave in subtiles of 64 columns, each warpgroup's by way of two buffers.
constexpr int kSubtileColumns = 64, kSubtiles = kColumns / kSubtileColumns, kBuffers = 2;
constexpr int kPipelineBytes = kStages * kStageBytes, kStagingBytes = kGroups * kBuffers * kBlockBytes;
constexpr int kSharedBytes = kPipelineBytes + kStagingBytes + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 << 10, "shared memory of one block");
// Rows that are taken before the next column: 16 tiles of 16 KB and 8 columns of 32 KB a stage are the least that 132
// blocks can read together.
constexpr int kSideRows = 16 * kRows;

// Of GemmArgs::maps. An operand of product i is at kLeft + i and kRight + i; kShared is one more product.
constexpr int kShared = kMaxProducts;
enum Map { kLeft = 0, kRight = 4, kGate = 8, kRead, kPre, kResult, kSharedResult, kMaps };

struct GemmPlan {
  int32_t rows, columns, shared_columns;
  // Blocks with the same columns of neighbouring rows, whose right operands are copied once for all of them; and of
  // each block the warpgroups that multiply.
  int32_t cluster, groups;
  int32_t tile_rows, tile_columns;  // of a block: 64 a warpgroup; 256, or 128 of gate's and key's
  // A unit is the row tiles of a cluster, a tile what it takes at a time, `side` units are side by side.
  int32_t units, side, column_tiles, ffn_tiles, tiles, clusters;
  int32_t products;
  int32_t depth[kMaxProducts + 1];
  bool across[kMaxProducts + 1];
  bool reads, keeps_pre, keeps_result;  // the epilogue has something to read; stores these
};

// Where a block's tile is, and which products it is the sum of. In the last unit it may begin past the last row.
struct Tile {
  int row, column;
  int first_product, end_product;
  bool shared;
};

MEMVP_HOST_DEVICE inline Tile tile_of(const GemmPlan& plan, int number, int rank) {
  const bool shared = number >= plan.ffn_tiles;
  if (shared) number -= plan.ffn_tiles;
  const int width = shared ? kColumns : plan.tile_columns;
  const int columns = shared ? ceil_div(plan.shared_columns, kColumns) : plan.column_tiles;
  const int per_group = plan.side * columns, first = number / per_group * plan.side;
  const int rows = least(plan.units - first, plan.side), inside = number % per_group;
  return {((first + inside % rows) * plan.cluster + rank) * plan.tile_rows, inside / rows * width, shared ? kShared : 0,
          shared ? kShared + 1 : plan.products, shared};
}

// TMA copies by 16 bytes. A single row needs no stride.
inline bool is_aligned16(const GemmMatrix& m, int64_t rows) {
  const bool has_stride = rows == 1 || (m.stride > 0 && m.stride % 8 == 0 && m.stride < int64_t{1} << 39);
  return m.data == nullptr || (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && has_stride);
}
inline bool is_aligned4(const GemmVector& v) {
  return reinterpret_cast<uintptr_t>(v.data) % 4 == 0;
}

inline const char* why_unsupported(const FfnGemmParams& p) {
  const bool output = p.kind == GemmKind::kOutput, ffn = p.columns > 0, shared = p.shared_columns > 0;
  if (p.type != DType::kBFloat16 && p.type != DType::kFloat16)
    return "the Hopper kernels compute in bfloat16 or float16";
  if (p.rows < 0 || p.columns < 0 || p.shared_columns < 0) return "a size is negative";
  if (p.multiprocessors < 1) return "multiprocessors must be the device's own number";
  if (p.cluster < 0 || p.cluster > least(2, p.multiprocessors)) return "a cluster is one block or two";
  if (p.warpgroups < 0 || p.warpgroups > kGroups) return "one warpgroup multiplies, or two";
  if (p.rows == 0) return nullptr;  // nothing to do
  if (p.columns % 8 != 0) return "the columns must be a multiple of 8";
  if (p.product_count < 1 || p.product_count > (output ? kMaxProducts : 1))
    return "an output is the sum of one to three products, anything else is one product";
  if (output && (shared || p.gated)) return "an output has no activation and no columns beside it";
  for (int i = 0; i < p.product_count; ++i) {
    const GemmProduct& product = p.products[i];
    if (product.depth < 1) return "a product sums over nothing";
    if (product.left.data == nullptr || (ffn && product.right.data == nullptr)) return "an operand is missing";
    if (p.kind == GemmKind::kHidden && product.across) return "key and gate need contiguous rows";
    if (!is_aligned16(product.left, p.rows) || !is_aligned16(product.right, product.across ? product.depth : p.columns))
      return "an operand can't be copied by 16 bytes";
  }
  const GemmMatrix pre{p.pre, p.columns}, dpre{p.dpre, p.columns};
  if (!is_aligned16(p.gate, p.columns) || !is_aligned16(p.residual, p.rows) || !is_aligned16(p.result, p.rows) ||
      !is_aligned16(p.shared, p.shared_columns) || !is_aligned16(p.shared_result, p.rows) ||
      !is_aligned16(pre, p.rows) || !is_aligned16(dpre, p.rows))
    return "an operand can't be copied by 16 bytes";
  if (!is_aligned4(p.bias) || !is_aligned4(p.gate_bias)) return "a bias can't be read by 4 bytes";
  if (p.kind == GemmKind::kHidden && ffn && p.gated != (p.gate.data != nullptr)) return "gated goes with a gate";
  if (p.kind == GemmKind::kDHidden && ffn && (p.pre == nullptr || p.dpre == nullptr))
    return "the pre-activations or the place of their gradients are missing";
  if (output && ffn && p.result.data == nullptr) return "the result is missing";
  if (shared && (p.shared.data == nullptr || p.shared_result.data == nullptr)) return "the shared columns are missing";
  const int64_t across = ceil_div<int64_t>(p.columns, kColumns / 2) + ceil_div<int64_t>(p.shared_columns, kColumns);
  if (ceil_div<int64_t>(p.rows, kGroupRows) * across >= int64_t{1} << 30) return "the result has too many tiles";
  return nullptr;
}

// Blocks of a cluster, and warpgroups of a block that multiply.
struct BlockShape {
  int cluster, groups;
};

// How many tiles of 64 rows the busiest cluster takes.
inline int64_t rounds(const BlockShape& shape, int rows, int columns, int multiprocessors) {
  const int64_t tiles = ceil_div(rows, shape.cluster * shape.groups * kGroupRows) * int64_t{columns};
  return ceil_div<int64_t>(tiles, multiprocessors / shape.cluster) * shape.groups;
}

// The fewest rounds; among equals the fewest copies for a product.
inline BlockShape choose_shape(const FfnGemmParams& p, int columns) {
  BlockShape best{0, 0};
  for (const BlockShape& shape : {BlockShape{2, 2}, BlockShape{1, 2}, BlockShape{2, 1}, BlockShape{1, 1}}) {
    if (p.cluster > 0 ? shape.cluster != p.cluster : shape.cluster > 1 && p.rows <= shape.groups * kGroupRows) continue;
    if ((p.warpgroups > 0 && shape.groups != p.warpgroups) || shape.cluster > p.multiprocessors) continue;
    if (best.cluster == 0 ||
        rounds(shape, p.rows, columns, p.multiprocessors) < rounds(best, p.rows, columns, p.multiprocessors))
      best = shape;
  }
  return best;
}

// Of params that why_unsupported has nothing against.
inline GemmPlan make_plan(const FfnGemmParams& p) {
  GemmPlan plan{};
  plan.rows = p.rows;
  plan.columns = p.columns;
  plan.shared_columns = p.shared_columns;
  plan.tile_columns = p.kind == GemmKind::kHidden && p.gated ? kColumns / 2 : kColumns;
  plan.column_tiles = ceil_div(p.columns, plan.tile_columns);
  const int columns = plan.column_tiles + ceil_div(p.shared_columns, kColumns);
  const BlockShape shape = choose_shape(p, columns);
  plan.cluster = shape.cluster;
  plan.groups = shape.groups;
  plan.tile_rows = shape.groups * kGroupRows;
  plan.units = ceil_div(p.rows, shape.cluster * plan.tile_rows);
  plan.side = kSideRows / (shape.cluster * plan.tile_rows);
  plan.ffn_tiles = plan.units * plan.column_tiles;
  plan.tiles = plan.units * columns;
  plan.clusters = least(plan.tiles, p.multiprocessors / shape.cluster);
  plan.products = p.product_count;
  for (int i = 0; i < p.product_count; ++i) {
    plan.depth[i] = p.products[i].depth;
    plan.across[i] = p.products[i].across;
  }
  plan.depth[kShared] = p.products[0].depth;
  plan.reads = p.kind == GemmKind::kDHidden || p.residual.data != nullptr;
  plan.keeps_pre = p.kind == GemmKind::kHidden && p.pre != nullptr;
  plan.keeps_result = p.result.data != nullptr;
  return plan;
}

}  // namespace memvp::hopper
