// The large products of training and prefill on Hopper, a step of them in one launch: what a caller fills in, and the
// launcher that takes it.
//
//     kHidden    pre = x G^T + b_G, x K^T + b_K;  hidden = act(pre_G) * pre_K      (without gate: act(x K^T + b_K))
//     kOutput    y = sum_i left_i right_i + bias + residual                         y, and dx
//     kDHidden   dHidden = dy V^T;  dpre = dHidden * pre_K * act'(pre_G), dHidden * act(pre_G)    (or dHidden *
//     act'(pre))
//
// and beside kHidden and kDHidden, in the same launch, columns = left memory^T of a memory that all rows share. All
// numbers have 16 bits but the biases, which may have 32; sums are float32, and rounded once.
//
// This header needs neither CUDA nor Python. Nothing here allocates on the device or synchronises; all may be called
// from any number of threads at once.
#pragma once
#include <cstdint>

#include "decode/ffn_decode.h"

namespace memvp {

enum class StepKind : int32_t { kHidden = 0, kOutput = 1, kDHidden = 2 };

constexpr int kMostProducts = 3;  // of a kOutput: dG G + dU K + dS memory

// Rows of 16-bit numbers, contiguous within a row. data == nullptr: absent. The stride counts elements.
struct StepMatrix {
  const void* data = nullptr;
  int64_t stride = 0;
};

// A bias, contiguous, of the step's own type or float32.
struct StepVector {
  const void* data = nullptr;
  bool wide = false;
};

// left (rows, depth) times right, which is (depth, columns) where `across`, else its transpose (columns, depth).
struct StepProduct {
  StepMatrix left, right;
  int32_t depth = 0;
  bool across = false;
};

struct FfnStepParams {
  DecodeType type = DecodeType::kBFloat16;
  StepKind kind = StepKind::kOutput;
  DecodeActivation activation = DecodeActivation::kSilu;
  int32_t rows = 0, columns = 0;  // N, and F or d
  // kHidden: x with key; kDHidden: dy with value. Then right may be absent: only `shared` is wanted.
  StepProduct products[kMostProducts];
  int32_t product_count = 0;
  StepMatrix gate;             // kHidden: beside the key
  StepVector bias, gate_bias;  // of key or y; of gate
  StepMatrix residual;         // kOutput: (rows, columns)
  StepMatrix result;           // hidden or y: (rows, columns), written
  // (1 or 2, rows, columns), contiguous: gate's and key's, or key's. kHidden: written, or absent; kDHidden: read.
  void* pre = nullptr;
  void* dpre = nullptr;  // kDHidden: their gradients, possibly in their place
  bool gated = false;
  // kHidden, kDHidden: the first product's left once more, times (shared_columns, depth)^T.
  StepMatrix shared, shared_result;
  int32_t shared_columns = 0;
  int32_t multiprocessors = 132;  // of the device: as many blocks, each of which walks through the tiles
  // Blocks that share right operands' copies, and warpgroups that multiply in each: 1 or 2; 0: what takes the least
  // time.
  int32_t cluster = 0, warpgroups = 0;
  int32_t device = 0;  // CUDA ordinal that all pointers and the stream belong to
};

// Why these params can't be taken, as a sentence; nullptr: they can. Looks at no data.
const char* ffn_step_unsupported(const FfnStepParams& params);

// Enqueues the work on `stream` (a cudaStream_t). Returns 0, or a code that ffn_step_error_text explains: positive
// codes are cudaError_t, kStepUnsupported means that ffn_step_unsupported has the sentence. Capturable in a CUDA graph.
constexpr int kStepUnsupported = -1;
constexpr int kStepNotBuilt = -2;  // the library has no machine code for sm_90a
constexpr int kStepNoMap = -3;     // the driver refused to describe an operand
int ffn_step_launch(const FfnStepParams& params, void* stream);
const char* ffn_step_error_text(int code);

}  // namespace memvp
