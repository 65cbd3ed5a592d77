// What the decode kernels take, and what of it they read 16 bytes at a time: decided from the params alone.
#pragma once
#include "decode/ffn_decode.h"

namespace memvp::decode {

inline bool present(const DecodeTensor& t) {
  return t.data != nullptr;
}
inline bool has_ffn(const FfnDecodeParams& p) {
  return present(p.key);
}
inline bool has_memory(const FfnDecodeParams& p) {
  return present(p.visual_key) && p.slots > 0 && p.memories > 0;
}
inline bool is_factored(const FfnDecodeParams& p) {
  return has_memory(p) && present(p.visual_basis);
}

inline const char* why_unsupported(const FfnDecodeParams& p) {
  const DecodeTensor* same[] = {&p.x, &p.key, &p.value, &p.gate, &p.residual};
  const DecodeTensor* wider[] = {&p.key_bias,     &p.gate_bias,    &p.value_bias,   &p.visual_key,
                                 &p.visual_value, &p.visual_basis, &p.key_position, &p.value_position};
  if (p.type != DType::kBFloat16 && p.type != DType::kFloat16)
    return "the decode kernels compute in bfloat16 or float16";
  for (const DecodeTensor* t : same)
    if (present(*t) && t->type != p.type) return "x, key, value, gate and residual need one dtype";
  for (const DecodeTensor* t : wider)
    if (present(*t) && t->type != p.type && t->type != DType::kFloat32)
      return "biases and memory need the dtype of x or float32";
  const int32_t sizes[] = {p.tokens, p.width, p.pairs, p.slots, p.rank, p.memories, p.sequences, p.length};
  for (int32_t size : sizes)
    if (size < 0) return "a size is negative";
  if (p.tokens > kDecodeMaxTokens) return "the decode kernels take at most 64 tokens in all";
  if (p.multiprocessors < 1) return "multiprocessors must be the device's own number";
  if (p.tokens == 0 || p.width == 0) return nullptr;  // nothing to do
  if (!present(p.x)) return "x is missing";           // y and workspace come with the launch
  if (present(p.key) != present(p.value)) return "key and value go together";
  if (present(p.visual_key) != present(p.visual_value)) return "visual_key and visual_value go together";
  if (present(p.gate) && !present(p.key)) return "gate needs key";
  if (p.cu_seqlens == nullptr && has_memory(p) && !p.shared_memory && p.length == 0)
    return "padded sequences need their length";
  return nullptr;
}

// The numbers of a tensor can be read 16 bytes at a time along its last dimension.
inline bool reads_by_16(const DecodeTensor& t, int dimensions) {
  if (!present(t)) return true;
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0 || t.strides[dimensions - 1] != 1) return false;
  for (int i = 0; i + 1 < dimensions; ++i)
    if (t.strides[i] % 8 != 0) return false;
  return true;
}

// value (pairs, width) as its transpose, whose rows run along the pairs: down_proj.weight.
inline DecodeTensor transposed(const DecodeTensor& value) {
  DecodeTensor t = value;
  t.strides[0] = value.strides[1];
  t.strides[1] = value.strides[0];
  return t;
}
inline bool value_along_pairs(const FfnDecodeParams& p) {
  return reads_by_16(transposed(p.value), 2);
}

inline bool is_fast(const FfnDecodeParams& p) {
  if (p.width % 8 != 0 || p.pairs % 8 != 0) return false;
  if (is_factored(p) && p.rank % 8 != 0) return false;
  const bool ffn = !has_ffn(p) || (reads_by_16(p.key, 2) && reads_by_16(p.gate, 2) &&
                                   (value_along_pairs(p) || reads_by_16(p.value, 2)));
  const bool memory = !has_memory(p) || (reads_by_16(p.visual_key, 3) && reads_by_16(p.visual_value, 3) &&
                                         reads_by_16(p.visual_basis, 2) && reads_by_16(p.key_position, 2) &&
                                         reads_by_16(p.value_position, 2));
  return reads_by_16(p.x, 2) && ffn && memory;
}

}  // namespace memvp::decode
