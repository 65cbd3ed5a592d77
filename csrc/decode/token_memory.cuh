// Which memory row a token reads, and which tokens read the same one. Out-of-range indices and lengths mean no memory:
// they are on the device and never checked on the host.
#pragma once
#include "common/memory.cuh"
#include "decode/arguments.cuh"

namespace memvp::decode {

constexpr int kNoMemory = -1;

// Tokens of one memory row, at most eight: what one block computes together.
struct TokenGroup {
  int32_t memory = kNoMemory;
  int32_t slots = 0;  // valid ones
  int32_t count = 0;  // 0: there are fewer groups
};

struct MemoryOfToken {
  int32_t row, slots;
};

MEMVP_DEVICE MemoryOfToken memory_of_token(const FfnDecodeParams& p, int token) {
  int64_t row = 0;
  if (!p.shared_memory) {
    int sequence = p.cu_seqlens == nullptr ? token / p.length : kNoMemory;
    if (p.cu_seqlens != nullptr) {  // the last sequence that begins at or before the token, if the token is in it
      int low = 0, high = p.sequences;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (load_input(p.cu_seqlens + middle) <= token)
          low = middle + 1;
        else
          high = middle;
      }
      if (low > 0 && token < load_input(p.cu_seqlens + low)) sequence = low - 1;
    }
    if (sequence < 0 || sequence >= p.sequences) return {kNoMemory, 0};
    row = p.visual_index == nullptr ? sequence : load_input(p.visual_index + sequence);
  }
  if (row < 0 || row >= p.memories) return {kNoMemory, 0};
  const int slots = p.visual_lengths == nullptr ? p.slots : load_input(p.visual_lengths + row);
  if (slots < 0 || slots > p.slots) return {kNoMemory, 0};
  return {static_cast<int32_t>(row), slots};
}

// Group `number`; all threads of the block call. Tokens of one memory row are taken eight by eight in their order, so
// exactly one group has each; those without memory are in none. `members` gets the tokens, the first again past the
// count. Without as many groups, nothing.
MEMVP_DEVICE TokenGroup find_group(const FfnDecodeParams& p, int number, size_t shared_offset,
                                   const int32_t*& members) {
  int32_t* rows = shared_at<int32_t>(shared_offset, kGroupBytes / sizeof(int32_t));
  int32_t *slots = rows + kDecodeMaxTokens, *places = slots + kDecodeMaxTokens, *of_group = places + kDecodeMaxTokens;
  members = of_group;
  const int me = threadIdx.x;
  if (me < p.tokens) {
    const MemoryOfToken mine = memory_of_token(p, me);
    rows[me] = mine.row;
    slots[me] = mine.slots;
  }
  __syncthreads();
  if (me < p.tokens) {
    int before = 0;  // tokens of the same memory row
    for (int token = 0; token < me; ++token) before += rows[token] == rows[me];
    places[me] = rows[me] == kNoMemory ? kDecodeMaxTokens + 1 : before;
  }
  __syncthreads();
  TokenGroup group;
  int first = 0;
  for (; first < p.tokens; ++first)
    if (places[first] % kTokenTile == 0 && number-- == 0) break;
  if (first == p.tokens) return group;  // the same for the whole block
  group.memory = rows[first];
  group.slots = slots[first];
  for (int token = first; token < p.tokens; ++token) group.count += rows[token] == group.memory;
  group.count = least(group.count, kTokenTile);
  if (me >= group.count && me < kTokenTile) of_group[me] = first;
  const int place = me < p.tokens && rows[me] == group.memory ? places[me] - places[first] : kTokenTile;
  if (place >= 0 && place < kTokenTile) of_group[place] = me;
  __syncthreads();
  return group;
}

}  // namespace memvp::decode
