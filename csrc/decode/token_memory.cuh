// Which memory row a token reads, and which tokens read one together. Out-of-range indices and lengths mean no memory:
// they come from the device and are never checked on the host.
#pragma once
#include "common/memory.cuh"
#include "decode/arguments.cuh"

namespace memvp::decode {

constexpr int kNoMemory = -1;

// Tokens of one memory row, at most eight: what one block computes together.
struct TokenGroup {
  int32_t memory = kNoMemory;
  int32_t slots = 0;  // valid ones
  int32_t count = 0;  // 0: the token it was asked for is in a group that begins before it
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

// The group that begins at token `first`; all threads of the block call. Tokens of one memory row are taken eight by
// eight in their order, so exactly one block in the grid has each. `members` gets the tokens, `first` again past the
// count. A token without memory is a group of its own.
MEMVP_DEVICE TokenGroup find_group(const FfnDecodeParams& p, int first, size_t shared_offset, int32_t*& members) {
  int32_t* rows = shared_at<int32_t>(shared_offset, kGroupBytes / sizeof(int32_t));
  members = rows + kDecodeMaxTokens;
  const int me = threadIdx.x;
  if (me < p.tokens) rows[me] = memory_of_token(p, me).row;
  if (me < kTokenTile) members[me] = first;
  __syncthreads();
  TokenGroup group;
  group.memory = rows[first];
  if (group.memory == kNoMemory) {
    group.count = 1;
    return group;
  }
  int before_first = 0, before_me = 0, all = 0;  // tokens of the same memory row
  for (int token = 0; token < p.tokens; ++token) {
    const bool same = rows[token] == group.memory;
    before_first += same && token < first;
    before_me += same && token < me;
    all += same;
  }
  if (before_first % kTokenTile != 0) return group;  // the same for the whole block
  const int place = before_me - before_first;
  if (me < p.tokens && rows[me] == group.memory && place >= 0 && place < kTokenTile) members[place] = me;
  __syncthreads();
  group.count = least(all - before_first, kTokenTile);
  group.slots = memory_of_token(p, first).slots;
  return group;
}

}  // namespace memvp::decode
