// The FFN's large products on Hopper, for training and prefill, one launch each: parameters and launcher.
//
//     kHidden    pre = x G^T + b_G, x K^T + b_K;  hidden = act(pre_G) * pre_K      (without gate: act(x K^T + b_K))
//     kOutput    y = sum_i left_i right_i + bias + residual                         y, and dx
//     kDHidden   dHidden = dy V^T;  dpre = dHidden * pre_K * act'(pre_G), dHidden * act(pre_G)
//                 (without gate: dHidden * act'(pre))
//
// and beside kHidden and kDHidden, in the same launch, columns = left memory^T of a memory that all rows share. All
// numbers have 16 bits but the biases, which may have 32; sums are float32, and rounded once.
//
// This header needs neither CUDA nor Python. Nothing here allocates on the device or synchronises, and any number of
// threads may call it at once.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace memvp {

enum class GemmKind : int32_t { kHidden = 0, kOutput = 1, kDHidden = 2 };

constexpr int kMaxProducts = 3;  // of a kOutput: dG G + dU K + dS memory

// Rows of 16-bit numbers, contiguous within a row. data == nullptr: absent. The stride counts elements.
struct GemmMatrix {
  const void* data = nullptr;
  int64_t stride = 0;
};

// A bias, contiguous, of the params' type or float32.
struct GemmVector {
  const void* data = nullptr;
  bool wide = false;
};

// left (rows, depth) times right, which is (depth, columns) where `across`, else its transpose (columns, depth).
struct GemmProduct {
  GemmMatrix left, right;
  int32_t depth = 0;
  bool across = false;
};

struct FfnGemmParams {
  DType type = DType::kBFloat16;
  GemmKind kind = GemmKind::kOutput;
  Activation activation = Activation::kSilu;
  int32_t rows = 0, columns = 0;  // N, and F or d
  // kHidden: x with key; kDHidden: dy with value. Then right may be absent: only `shared` is wanted.
  GemmProduct products[kMaxProducts];
  int32_t product_count = 0;
  GemmMatrix gate;             // kHidden: beside the key
  GemmVector bias, gate_bias;  // of key or y; of gate
  GemmMatrix residual;         // kOutput: (rows, columns)
  GemmMatrix result;           // hidden or y: (rows, columns), written
  // (1 or 2, rows, columns), contiguous: gate's and key's, or key's. kHidden: written, or absent; kDHidden: read.
  void* pre = nullptr;
  void* dpre = nullptr;  // kDHidden: their gradients, possibly in their place
  bool gated = false;
  // kHidden, kDHidden: the first product's left once more, times (shared_columns, depth)^T.
  GemmMatrix shared, shared_result;
  int32_t shared_columns = 0;
  int32_t multiprocessors = 132;  // of the device: as many persistent blocks
  // Blocks of a cluster, and warpgroups of a block that multiply: 1 or 2; 0: what takes the least time.
  int32_t cluster = 0, warpgroups = 0;
  int32_t device = 0;  // CUDA ordinal that all pointers and the stream belong to
};

// Why these params can't be taken, as a sentence; nullptr: they can. Looks at no data.
const char* ffn_gemm_unsupported(const FfnGemmParams& params);

// Enqueues the work on `stream` (a cudaStream_t). Returns 0, or a code that ffn_gemm_error_text explains: positive
// codes are cudaError_t, kGemmUnsupported means that ffn_gemm_unsupported has the sentence. Capturable in a CUDA graph.
constexpr int kGemmUnsupported = -1;
constexpr int kGemmNotBuilt = -2;  // the library has no machine code for sm_90a
constexpr int kGemmNoMap = -3;     // the driver made no TMA descriptor of an operand
int ffn_gemm_launch(const FfnGemmParams& params, void* stream);
const char* ffn_gemm_error_text(int code);

}  // namespace memvp
