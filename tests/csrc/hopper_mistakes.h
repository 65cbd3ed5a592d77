// The small product of hopper_product.h as it should be, and each of its mistakes with what must be said of it.
#pragma once
#include "hopper_expect.h"
#include "hopper_product.h"

namespace memvp::hopper_test {

struct Sizes {
  int pages, rows, columns, depth;
};

// What goes wrong under a schedule, or nothing.
template <class T, int N, Major kB, int kGroups, int kStages>
std::string run_product(const Sizes& sizes, Mistake mistake, const Schedule& schedule) {
  using Tiny = TinyProduct<T, N, kB, kGroups, kStages>;
  constexpr bool kAlongK = kB == Major::kK;
  Tensor<T> a{sizes.pages, sizes.rows, sizes.depth}, c{sizes.pages, sizes.rows, sizes.columns};
  Tensor<T> b{1, kAlongK ? sizes.columns : sizes.depth, kAlongK ? sizes.depth : sizes.columns};
  uint64_t state = 1;
  const auto small = [&state](int64_t, int64_t, int64_t) {  // -2 .. 2: sums are exact
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return round_to<T>(static_cast<float>(static_cast<int>(state >> 33) % 5 - 2));
  };
  a.fill(small);
  b.fill(small);
  const Problem problem{a.map(3, 64),
                        b.map(2, kAlongK ? N : kDepth),
                        c.map(3, 64),
                        ceil_div(sizes.rows, Tiny::kRows),
                        ceil_div(sizes.columns, N),
                        ceil_div(sizes.depth, kDepth),
                        mistake};
  const auto kernel = [&problem, &sizes] { Tiny{problem}.run(sizes.pages); };
  const std::string message = run({2, Tiny::kThreads, Tiny::kSharedBytes, kernel, false, false}, schedule);
  if (!message.empty()) return message;
  for (int64_t z = 0; z < sizes.pages; ++z)
    for (int64_t y = 0; y < sizes.rows; ++y) {
      for (int64_t x = 0; x < sizes.columns; ++x) {
        float sum = 0;
        for (int64_t k = 0; k < sizes.depth; ++k)
          sum += to_float(a.at(z, y, k)) * to_float(kAlongK ? b.at(0, x, k) : b.at(0, k, x));
        if (c.at(z, y, x).bits != round_to<T>(sum).bits)
          return text("wrong number at page %d, row %d, column %d: %g, not %g", int(z), int(y), int(x),
                      to_float(c.at(z, y, x)), sum);
      }
      for (int64_t x = sizes.columns; x < c.row_stride; ++x)
        if (c.at(z, y, x).bits != 0xFFFF) return "a store past the end of a row";
    }
  return "";
}

using RunProduct = std::string (*)(const Sizes&, Mistake, const Schedule&);
inline constexpr RunProduct kAlongK = run_product<BFloat16, 64, Major::kK, 2, 2>;
inline constexpr RunProduct kAlongN = run_product<BFloat16, 128, Major::kMN, 1, 2>;
inline constexpr RunProduct kWideAlongK = run_product<Float16, 256, Major::kK, 2, 2>;
inline constexpr RunProduct kWideAlongN = run_product<Float16, 256, Major::kMN, 1, 3>;

inline void right_product(const char* name, RunProduct product, const Sizes& sizes) {
  for (const Schedule& schedule : schedules) {
    const std::string wrong = product(sizes, kNone, schedule);
    if (!wrong.empty())
      complain(text("a product, %s (order %d, seed %d): ", name, int(schedule.order), int(schedule.seed)) + wrong);
  }
}

// `wanted`: part of what must be said under one schedule at least.
struct Noticed {
  Mistake mistake;
  const char* name;
  const char* wanted;
  RunProduct run = kAlongK;
};
#define MISTAKE(name, ...) {name, #name, __VA_ARGS__}
inline constexpr Noticed kNoticed[] = {
    MISTAKE(kNoPublish, "without publish_barriers"),
    MISTAKE(kNoSyncAfterInit, "no barrier there, or not yet"),
    MISTAKE(kNoEmptyWait, "one more than the 1 arrivals"),
    MISTAKE(kFullParity, "deadlock"),
    MISTAKE(kEmptyParity, "which lacks 2 of 2 arrivals"),
    MISTAKE(kFewerBytes, "16 bytes more are copied"),
    MISTAKE(kMoreBytes, "arrivals and 16 bytes"),
    MISTAKE(kFewerArrivals, "one more than the 1 arrivals"),
    MISTAKE(kMoreArrivals, "which lacks 1 of 2 arrivals"),
    MISTAKE(kReleaseBeforeTheWait, "wrong number"),
    MISTAKE(kReleaseBeforeTheWait, "wrong number", kAlongN),
    MISTAKE(kReleaseByAllThreads, "deadlock"),
    MISTAKE(kFullNotWaitedFor, "wrong number"),
    MISTAKE(kLoadAfterTheEnd, "copies to its shared memory went on"),
    MISTAKE(kNoBegin, "begin_products comes before"),
    MISTAKE(kNoCommit, "were touched"),
    MISTAKE(kWaitForAllButOne, "were touched"),
    MISTAKE(kAccumulatorsInFlight, "were touched"),
    MISTAKE(kAccumulateFromTheStart, "wrong number"),
    MISTAKE(kLeadingBytes, "wrong number", kAlongN),
    MISTAKE(kStrideBytes, "wrong number"),
    MISTAKE(kStrideBytes, "wrong number", kAlongN),
    MISTAKE(kAdvance, "wrong number"),
    MISTAKE(kOtherMajor, "along the other dimension"),
    MISTAKE(kSwappedCoordinates, "wrong number"),
    MISTAKE(kPageOfTheNext, "wrong number"),
    MISTAKE(kMisalignedStage, "a multiple of 1024 bytes"),
    MISTAKE(kNoSwizzle, "wrong number"),
    MISTAKE(kNoFence, "without fence_async_shared"),
    MISTAKE(kFenceAfterTheBarrier, "without fence_async_shared"),
    MISTAKE(kNoBarrierBeforeTheStore, "without fence_async_shared"),
    MISTAKE(kStagedTooSoon, "wrong number"),
    MISTAKE(kStoreNotCommitted, "without commit_stores"),
    MISTAKE(kStoreNotWaitedFor, "without wait_stores_read"),
    MISTAKE(kBarrierOfFewer, "of 96 threads have reached"),
    MISTAKE(kDivergentWarpgroup, "warpgroup divergence"),
    MISTAKE(kOneWarpWaitsLess, "waited for different products"),
    MISTAKE(kDifferentOperands, "bring different operands"),
    MISTAKE(kRegistersNotGivenUp, "for registers, of which 0"),
    MISTAKE(kRegistersByOneWarp, "warpgroup divergence"),
};
#undef MISTAKE

inline void noticed(const Noticed& bug) {
  std::string all;
  for (const Schedule& schedule : schedules) {
    const std::string wrong = bug.run({2, 100, 120, 300}, bug.mistake, schedule);
    if (wrong.find(bug.wanted) != std::string::npos) return;
    all += "\n    " + (wrong.empty() ? std::string("nothing") : wrong);
  }
  complain(std::string(bug.name) + ": wanted \"" + bug.wanted + "\", got" + all);
}

}  // namespace memvp::hopper_test
