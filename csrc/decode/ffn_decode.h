// The FFN with visual memory for a handful of tokens: parameters and launcher.
//
//     hidden = act(x G^T + b_G) * (x K^T + b_K)            (without gate: act(x K^T + b_K))
//     visual = s * vact(x Kv^T)                             of the sequence's memory row
//     y      = hidden V + b_V + visual Vv + residual
//
// with Kv = visual_key + key_position and Vv = visual_value + value_position, or factored (visual_basis W, cores A):
// x Kv^T = (x W^T) A_k^T + x p^k^T and visual Vv = (visual A_v) W + visual p^v, so that no row of width d belongs to
// one image.
//
// This header needs neither CUDA nor Python. Nothing here allocates on the device or synchronises, and any number of
// threads may call it at once.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace memvp {

constexpr int kDecodeMaxTokens = 64;

// How the three phases follow one another. kPdl: three launches, each with programmatic dependent launch where the chip
// has it. kCooperative: one cooperative launch, whose blocks wait for one another between the phases; three launches
// all the same with more than 16 tokens, or an operand that can't be read 16 bytes at a time along k. kAuto: kPdl on a
// chip that has it, else kCooperative.
enum class DecodeForm : int32_t { kAuto = 0, kPdl = 1, kCooperative = 2 };

// An input tensor of up to three dimensions. data == nullptr: the tensor is absent. Strides count elements, outermost
// first; a tensor of fewer dimensions uses the first ones. Any strides are right; the fast path is in
// ffn_decode_is_fast.
struct DecodeTensor {
  const void* data = nullptr;
  int64_t strides[3] = {0, 0, 0};
  DType type = DType::kBFloat16;
};

struct FfnDecodeParams {
  // x, key, value, gate, residual and y have `type`; the other floating-point tensors have `type` or float32, each its
  // own.
  DType type = DType::kBFloat16;
  DecodeTensor x;                 // (tokens, width)
  DecodeTensor key, value, gate;  // (pairs, width); key and value absent: the visual branch alone; gate absent: plain
  DecodeTensor key_bias, gate_bias;           // (pairs,)
  DecodeTensor value_bias;                    // (width,)
  DecodeTensor visual_key, visual_value;      // (memories, slots, width), or (memories, slots, rank) with visual_basis
  DecodeTensor visual_basis;                  // (rank, width)
  DecodeTensor key_position, value_position;  // (slots, width)
  DecodeTensor residual;                      // (tokens, width)
  // Which memory row a token reads: contiguous int32, or nullptr.
  const int32_t* cu_seqlens = nullptr;      // (sequences + 1,): sequence s is tokens cu[s] .. cu[s + 1]; else `length`
  const int32_t* visual_index = nullptr;    // (sequences,): outside [0, memories) no memory; nullptr: s reads row s
  const int32_t* visual_lengths = nullptr;  // (memories,): outside [0, slots] no memory; nullptr: all slots are valid
  void* y = nullptr;                        // (tokens, width), row stride y_stride, unit stride within a row
  int64_t y_stride = 0;
  void* workspace = nullptr;  // ffn_decode_workspace_bytes(params) bytes, 256-byte aligned, never read before written
  // Sizes, named as in the contract: N, d, F, M, r, R, S, T.
  int32_t tokens = 0, width = 0, pairs = 0, slots = 0, rank = 0, memories = 0, sequences = 0;
  int32_t length = 0;          // T of padded sequences: token n is of sequence n / T. Ignored when packed or shared
  bool shared_memory = false;  // every token reads memory row 0
  Activation activation = Activation::kSilu;
  Activation visual_activation = Activation::kSilu;
  float visual_scale = 1.0f;
  DecodeForm form = DecodeForm::kAuto;
  int32_t multiprocessors = 132;     // of the device: decides how the work is divided
  int32_t shared_bytes = 100 << 10;  // shared memory of one multiprocessor: decides how far ahead a block reads
  int32_t device = 0;                // CUDA ordinal that all pointers and the stream belong to
};

// Why these params can't be taken, as a sentence for the user; nullptr: they can. Looks at no data.
const char* ffn_decode_unsupported(const FfnDecodeParams& params);

// True when every large operand can be read 16 bytes at a time: width, pairs and rank multiples of 8, unit inner stride
// (value: along either dimension), 16-byte aligned rows. Otherwise the result is the same and the time several times
// longer.
bool ffn_decode_is_fast(const FfnDecodeParams& params);

size_t ffn_decode_workspace_bytes(const FfnDecodeParams& params);

// Enqueues the work on `stream` (a cudaStream_t). Returns 0, or a code that ffn_decode_error_text explains: positive
// codes are cudaError_t, kDecodeUnsupported means that ffn_decode_unsupported has the sentence. Capturable in a CUDA
// graph.
constexpr int kDecodeUnsupported = -1;
int ffn_decode_launch(const FfnDecodeParams& params, void* stream);
const char* ffn_decode_error_text(int code);

}  // namespace memvp
