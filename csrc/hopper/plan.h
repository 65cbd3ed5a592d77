// How a step is cut into tiles and in which order a block takes them; what it takes at all. Plain arithmetic on the
// params.
#pragma once
#include "common/platform.cuh"
#include "hopper/ffn_steps.h"

namespace memvp::hopper {

// A tile is 128 x 256 sums, 64 rows to each of two warpgroups: 128 registers a thread. A step along k brings 64 of both
// operands, and four steps are under way at once. Where tiles are few, one warpgroup has 64 rows and the other nothing.
constexpr int kRows = 128, kColumns = 256, kDepth = 64, kStages = 4;
constexpr int kGroups = 2, kGroupRows = kRows / kGroups, kGroupThreads = 128;
constexpr int kThreads = kGroupThreads * (1 + kGroups);  // one more warpgroup asks for the copies
constexpr int kBlockBytes = kDepth * 64 * 2;             // 64 x 64 numbers, the unit of all copies
constexpr int kLeftBytes = kRows / 64 * kBlockBytes, kRightBytes = kColumns / 64 * kBlockBytes;
constexpr int kStageBytes = kLeftBytes + kRightBytes;
// Results leave in pieces of 64 columns, each warpgroup's by way of two buffers.
constexpr int kPiece = 64, kPieces = kColumns / kPiece, kBuffers = 2;
constexpr int kRingBytes = kStages * kStageBytes, kStagingBytes = kGroups * kBuffers * kBlockBytes;
constexpr int kSharedBytes = kRingBytes + kStagingBytes + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 << 10, "shared memory of one block");
// Rows side by side, all of them before the next column: 16 tiles of 16 KB and 8 columns of 32 KB a step are the least
// that 132 blocks can read between them.
constexpr int kSideRows = 16 * kRows;

// Of StepArgs::maps. An operand of product i is at kLeft + i and kRight + i; kShared is one more product.
constexpr int kShared = kMostProducts;
enum Map { kLeft = 0, kRight = 4, kGate = 8, kRead, kPre, kResult, kSharedResult, kMaps };

struct StepPlan {
  int32_t rows, columns, shared_columns;
  // Blocks with the same columns of neighbouring rows, whose right operands are copied once for all of them; and of
  // each block the warpgroups that multiply.
  int32_t cluster, groups;
  int32_t tile_rows, tile_columns;  // of a block: 64 a warpgroup; 256, or 128 of gate's and key's
  // A unit is the row tiles of a cluster, a tile what it takes at a time, `side` units are side by side.
  int32_t units, side, column_tiles, ffn_tiles, tiles, clusters;
  int32_t products;
  int32_t depth[kMostProducts + 1];
  bool across[kMostProducts + 1];
  bool reads, keeps_pre, keeps_result;  // the epilogue has something to read; stores these
};

// Where a block's tile is, and which products it is the sum of. In the last unit it may begin past the last row.
struct Tile {
  int row, column;
  int first_product, end_product;
  bool shared;
};

MEMVP_HOST_DEVICE inline Tile tile_of(const StepPlan& plan, int number, int rank) {
  const bool shared = number >= plan.ffn_tiles;
  if (shared) number -= plan.ffn_tiles;
  const int width = shared ? kColumns : plan.tile_columns;
  const int columns = shared ? ceil_div(plan.shared_columns, kColumns) : plan.column_tiles;
  const int per_group = plan.side * columns, first = number / per_group * plan.side;
  const int rows = least(plan.units - first, plan.side), inside = number % per_group;
  return {((first + inside % rows) * plan.cluster + rank) * plan.tile_rows, inside / rows * width, shared ? kShared : 0,
          shared ? kShared + 1 : plan.products, shared};
}

// Copies go by 16 bytes, and walk no stride of a single row.
inline bool in_sixteens(const StepMatrix& m, int64_t rows) {
  const bool walkable = rows == 1 || (m.stride > 0 && m.stride % 8 == 0 && m.stride < int64_t{1} << 39);
  return m.data == nullptr || (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && walkable);
}
inline bool in_words(const StepVector& v) {
  return reinterpret_cast<uintptr_t>(v.data) % 4 == 0;
}

inline const char* why_unsupported(const FfnStepParams& p) {
  const bool output = p.kind == StepKind::kOutput, ffn = p.columns > 0, shared = p.shared_columns > 0;
  if (p.type != DecodeType::kBFloat16 && p.type != DecodeType::kFloat16)
    return "the steps compute in bfloat16 or float16";
  if (p.rows < 0 || p.columns < 0 || p.shared_columns < 0) return "a size is negative";
  if (p.multiprocessors < 1) return "multiprocessors must be the device's own number";
  if (p.cluster < 0 || p.cluster > least(2, p.multiprocessors)) return "a cluster is one block or two";
  if (p.warpgroups < 0 || p.warpgroups > kGroups) return "one warpgroup multiplies, or two";
  if (p.rows == 0) return nullptr;  // nothing to do
  if (p.columns % 8 != 0) return "the columns must be a multiple of 8";
  if (p.product_count < 1 || p.product_count > (output ? kMostProducts : 1))
    return "an output is the sum of one to three products, another step one";
  if (output && (shared || p.gated)) return "an output has no activation and no columns beside it";
  for (int i = 0; i < p.product_count; ++i) {
    const StepProduct& product = p.products[i];
    if (product.depth < 1) return "a product sums over nothing";
    if (product.left.data == nullptr || (ffn && product.right.data == nullptr)) return "an operand is missing";
    if (p.kind == StepKind::kHidden && product.across) return "key and gate need contiguous rows";
    if (!in_sixteens(product.left, p.rows) || !in_sixteens(product.right, product.across ? product.depth : p.columns))
      return "an operand can't be copied by 16 bytes";
  }
  const StepMatrix pre{p.pre, p.columns}, dpre{p.dpre, p.columns};
  if (!in_sixteens(p.gate, p.columns) || !in_sixteens(p.residual, p.rows) || !in_sixteens(p.result, p.rows) ||
      !in_sixteens(p.shared, p.shared_columns) || !in_sixteens(p.shared_result, p.rows) || !in_sixteens(pre, p.rows) ||
      !in_sixteens(dpre, p.rows))
    return "an operand can't be copied by 16 bytes";
  if (!in_words(p.bias) || !in_words(p.gate_bias)) return "a bias can't be read by 4 bytes";
  if (p.kind == StepKind::kHidden && ffn && p.gated != (p.gate.data != nullptr)) return "gated goes with a gate";
  if (p.kind == StepKind::kDHidden && ffn && (p.pre == nullptr || p.dpre == nullptr))
    return "the pre-activations or the place of their gradients are missing";
  if (output && ffn && p.result.data == nullptr) return "the result is missing";
  if (shared && (p.shared.data == nullptr || p.shared_result.data == nullptr)) return "the shared columns are missing";
  const int64_t across = ceil_div<int64_t>(p.columns, kColumns / 2) + ceil_div<int64_t>(p.shared_columns, kColumns);
  if (ceil_div<int64_t>(p.rows, kGroupRows) * across >= int64_t{1} << 30) return "the step has too many tiles";
  return nullptr;
}

// How a step is shared out: blocks of a cluster, warpgroups of a block that multiply.
struct Form {
  int cluster, groups;
};

// What the clusters take one after the other, in tiles of 64 rows.
inline int64_t rounds(const Form& form, int rows, int columns, int multiprocessors) {
  const int64_t tiles = ceil_div(rows, form.cluster * form.groups * kGroupRows) * int64_t{columns};
  return ceil_div<int64_t>(tiles, multiprocessors / form.cluster) * form.groups;
}

// The fewest rounds; among equals what copies the least for a product.
inline Form form_of(const FfnStepParams& p, int columns) {
  Form best{0, 0};
  for (const Form& form : {Form{2, 2}, Form{1, 2}, Form{2, 1}, Form{1, 1}}) {
    if (p.cluster > 0 ? form.cluster != p.cluster : form.cluster > 1 && p.rows <= form.groups * kGroupRows) continue;
    if ((p.warpgroups > 0 && form.groups != p.warpgroups) || form.cluster > p.multiprocessors) continue;
    if (best.cluster == 0 ||
        rounds(form, p.rows, columns, p.multiprocessors) < rounds(best, p.rows, columns, p.multiprocessors))
      best = form;
  }
  return best;
}

// Of params that why_unsupported has nothing against.
inline StepPlan make_plan(const FfnStepParams& p) {
  StepPlan plan{};
  plan.rows = p.rows;
  plan.columns = p.columns;
  plan.shared_columns = p.shared_columns;
  plan.tile_columns = p.kind == StepKind::kHidden && p.gated ? kColumns / 2 : kColumns;
  plan.column_tiles = ceil_div(p.columns, plan.tile_columns);
  const int columns = plan.column_tiles + ceil_div(p.shared_columns, kColumns);
  const Form form = form_of(p, columns);
  plan.cluster = form.cluster;
  plan.groups = form.groups;
  plan.tile_rows = form.groups * kGroupRows;
  plan.units = ceil_div(p.rows, form.cluster * plan.tile_rows);
  plan.side = kSideRows / (form.cluster * plan.tile_rows);
  plan.ffn_tiles = plan.units * plan.column_tiles;
  plan.tiles = plan.units * columns;
  plan.clusters = least(plan.tiles, p.multiprocessors / form.cluster);
  plan.products = p.product_count;
  for (int i = 0; i < p.product_count; ++i) {
    plan.depth[i] = p.products[i].depth;
    plan.across[i] = p.products[i].across;
  }
  plan.depth[kShared] = p.products[0].depth;
  plan.reads = p.kind == StepKind::kDHidden || p.residual.data != nullptr;
  plan.keeps_pre = p.kind == StepKind::kHidden && p.pre != nullptr;
  plan.keeps_result = p.result.data != nullptr;
  return plan;
}

}  // namespace memvp::hopper
