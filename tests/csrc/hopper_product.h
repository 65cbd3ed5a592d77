// A product c[M x N] = a[M x K] b[K x N] as Hopper does it, as small as it can be: one thread loads tiles into a ring
// of stages, warpgroups multiply them, one thread of each stores what the others have staged. For the tests of the
// primitives: any of its steps can be done wrong.
#pragma once
#include "common/hopper.cuh"
#include "common/tensor_map.h"

namespace memvp::hopper_test {

enum Mistake {
  kNone,
  kNoPublish,
  kNoSyncAfterInit,
  kNoEmptyWait,
  kFullParity,
  kEmptyParity,
  kFewerBytes,
  kMoreBytes,
  kFewerArrivals,
  kMoreArrivals,
  kReleaseBeforeTheWait,
  kReleaseByAllThreads,
  kFullNotWaitedFor,
  kLoadAfterTheEnd,
  kNoBegin,
  kNoCommit,
  kWaitForAllButOne,
  kAccumulatorsInFlight,
  kAccumulateFromTheStart,
  kLeadingBytes,
  kStrideBytes,
  kAdvance,
  kOtherMajor,
  kSwappedCoordinates,
  kPageOfTheNext,
  kMisalignedStage,
  kNoSwizzle,
  kNoFence,
  kFenceAfterTheBarrier,
  kNoBarrierBeforeTheStore,
  kStagedTooSoon,
  kStoreNotCommitted,
  kStoreNotWaitedFor,
  kBarrierOfFewer,
  kDivergentWarpgroup,
  kOneWarpWaitsLess,
  kDifferentOperands,
  kRegistersNotGivenUp,
  kRegistersByOneWarp,
  kMistakes
};

constexpr int kDepth = 64;         // of a stage
constexpr int kMatrix = 64 * 128;  // bytes of 64 rows of a tile

struct Problem {
  TensorMap a, b, c;
  int row_tiles, column_tiles, steps;
  Mistake mistake;
};

// Of a: [pages, M, K], of which a block takes one page after the other; b: [N, K] or [K, N]; c: [pages, M, N].
template <class T, int N, Major kB, int kGroups, int kStages>
struct TinyProduct {
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kABytes = kMatrix * kGroups, kBBytes = 128 * N, kStage = kABytes + kBBytes;
  static constexpr int kBegins = least(65536 / kThreads / 8 * 8, 256);  // registers of each thread
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters =
      least((kBegins * (kGroups + 1) - kProducerRegisters) / kGroups / 8 * 8, 256);
  static constexpr int kStaging = kRows * N * 2;
  static constexpr size_t kSharedBytes = kStages * kStage + 1024 + kStaging + 16 * kStages;

  const Problem& p;
  char* const stages = shared_at<char>(0, kStages* kStage + 1024) + (wrong(kMisalignedStage) ? 512 : 0);
  char* const staging = shared_at<char>(kStages * kStage + 1024, kStaging);
  Barrier* const full = shared_at<Barrier>(kStages * kStage + 1024 + kStaging, kStages);
  Barrier* const empty = shared_at<Barrier>(kStages * kStage + 1024 + kStaging + 8 * kStages, kStages);

  // Nothing is, on the device.
  __device__ bool wrong(Mistake mistake) const {
#ifdef __CUDACC__
    return false;
#else
    return p.mistake == mistake;
#endif
  }

  __device__ void run(int pages) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        init_barrier(full[s], wrong(kMoreArrivals) ? 2 : 1);
        init_barrier(empty[s], wrong(kFewerArrivals) ? kGroups - 1 + (kGroups == 1) : kGroups);
      }
      if (!wrong(kNoPublish)) publish_barriers();
    }
    if (!wrong(kNoSyncAfterInit)) __syncthreads();
    if (threadIdx.x / 128 == kGroups) {
      if (!wrong(kRegistersNotGivenUp)) lower_registers<kProducerRegisters>();
      if (threadIdx.x % 128 == 0) produce(pages);
    } else {
      if (!wrong(kRegistersByOneWarp) || threadIdx.x / 32 != 1) raise_registers<kConsumerRegisters>();
      consume(pages);
    }
  }

  template <class Tile>
  __device__ void each_tile(int pages, Tile tile) const {
    int step = 0;
    for (int page = 0; page < pages; ++page)
      for (int t = static_cast<int>(blockIdx.x); t < p.row_tiles * p.column_tiles; t += 2, step += p.steps)
        tile(page, t % p.row_tiles * kRows, t / p.row_tiles * N, step);
  }

  __device__ void produce(int pages) const {
    each_tile(pages, [&](int page, int row, int column, int first) {
      for (int k = 0; k < p.steps; ++k) {
        const int stage = (first + k) % kStages, round = (first + k) / kStages;
        if (!wrong(kNoEmptyWait)) wait(empty[stage], (round + (wrong(kEmptyParity) ? 0 : 1)) % 2);
        arrive_expecting(full[stage], kStage - (wrong(kFewerBytes) ? 16 : 0) + (wrong(kMoreBytes) ? 16 : 0));
        char* a = stages + stage * kStage;
        for (int g = 0; g < kGroups; ++g)
          if (wrong(kSwappedCoordinates))
            load_tile(a + g * kMatrix, p.a, full[stage], row + 64 * g, k * kDepth, page);
          else
            load_tile(a + g * kMatrix, p.a, full[stage], k * kDepth, row + 64 * g, page + wrong(kPageOfTheNext));
        if constexpr (kB == Major::kK)
          load_tile(a + kABytes, p.b, full[stage], k * kDepth, column);
        else
          for (int n = 0; n < N / 64; ++n)
            load_tile(a + kABytes + n * kMatrix, p.b, full[stage], column + 64 * n, k * kDepth);
      }
      if (wrong(kLoadAfterTheEnd)) load_tile(stages, p.a, full[0], 0, 0, 0);
    });
  }

  __device__ void consume(int pages) const {
    const int group = static_cast<int>(threadIdx.x) / 128;
    char* const staged = staging + group * N / 64 * kMatrix;
    each_tile(pages, [&](int page, int row, int column, int first) {
      float acc[N / 2];
      for (float& one : acc) one = 1;
      for (int k = 0; k < p.steps; ++k) {
        const int stage = (first + k) % kStages, round = (first + k) / kStages;
        if (!wrong(kFullNotWaitedFor)) wait(full[stage], (round + (wrong(kFullParity) ? 1 : 0)) % 2);
        const char* tile = stages + stage * kStage;
        const Operand a = operand(tile + group * kMatrix, Major::kK, 0, wrong(kStrideBytes) ? 512 : 1024);
        const Operand b = operand(tile + kABytes, wrong(kOtherMajor) ? (kB == Major::kK ? Major::kMN : Major::kK) : kB,
                                  wrong(kLeadingBytes) ? kMatrix / 2 : kMatrix, 1024);
        keep(acc);
        if (!wrong(kNoBegin)) begin_products();
        for (int i = 0; i < kDepth / 16; ++i) {
          const int along = kB == Major::kK ? 32 * i : 2048 * i;
          Operand mine = advance(a, wrong(kAdvance) ? 16 * i : 32 * i);
          if (wrong(kDifferentOperands) && threadIdx.x % 128 / 32 == 3) mine = a;
          const bool accumulate = k > 0 || i > 0 || wrong(kAccumulateFromTheStart);
          if (wrong(kDivergentWarpgroup) && threadIdx.x % 128 >= 64)
            multiply<T, N, kB>(acc, mine, advance(b, along), accumulate);
          else
            multiply<T, N, kB>(acc, mine, advance(b, along), accumulate);
        }
        if (!wrong(kNoCommit)) commit_products();
        keep(acc);
        if (wrong(kAccumulatorsInFlight)) acc[3] *= 2;
        if (wrong(kReleaseBeforeTheWait)) {
          release(stage);
          wait_products<0>();
        } else if (k > 0) {
          wait_products<1>();
          release((first + k - 1) % kStages);
        }
      }
      if (wrong(kWaitForAllButOne) || (wrong(kOneWarpWaitsLess) && threadIdx.x % 128 / 32 == 2))
        wait_products<1>();
      else
        wait_products<0>();
      keep(acc);
      if (!wrong(kReleaseBeforeTheWait)) release((first + p.steps - 1) % kStages);
      store(acc, staged, page, row + 64 * group, column, group);
    });
    if (threadIdx.x % 128 == 0 && !wrong(kStoreNotWaitedFor)) wait_stores_read<0>();
  }

  __device__ void release(int stage) const {
    if (threadIdx.x % 128 == 0 || wrong(kReleaseByAllThreads)) arrive(empty[stage]);
  }

  // c's tiles are 64 x 64; each warpgroup waits for its own.
  __device__ void store(const float (&acc)[N / 2], char* staged, int page, int row, int column, int group) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int threads = wrong(kBarrierOfFewer) ? 96 : 128;
    if (threadIdx.x % 128 == 0 && !wrong(kStagedTooSoon)) wait_stores_read<0>();
    sync_some(1 + group, threads);
    for (int j = 0; j < N / 16; ++j) {
      const float* c = acc + 8 * j;
      const uint32_t words[4] = {pack(T{}, c[0], c[1]), pack(T{}, c[2], c[3]), pack(T{}, c[4], c[5]),
                                 pack(T{}, c[6], c[7])};
      const int r = 16 * warp + lane % 16, piece = 2 * j + lane / 16;
      const int swizzled = wrong(kNoSwizzle) ? piece % 8 : piece % 8 ^ r % 8;
      store_matrices(staged + piece / 8 * kMatrix + r * 128 + swizzled * 16, words);
    }
    if (!wrong(kNoFence) && !wrong(kFenceAfterTheBarrier)) fence_async_shared();
    if (!wrong(kNoBarrierBeforeTheStore)) sync_some(1 + group, threads);
    if (threadIdx.x % 128 == 0) {
      for (int n = 0; n < N / 64; ++n) store_tile(p.c, staged + n * kMatrix, column + 64 * n, row, page);
      if (!wrong(kStoreNotCommitted)) commit_stores();
    }
    if (wrong(kFenceAfterTheBarrier)) fence_async_shared();
  }
};

}  // namespace memvp::hopper_test
