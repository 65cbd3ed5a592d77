// A warpgroup's products and registers. A product reads its operands at any time between its start and the wait for it;
// until then a thread's accumulators are NaN, and their values are kept here.
#pragma once
#include <deque>
#include <list>
#include <type_traits>

#include "common/barriers.cuh"
#include "common/mma.cuh"

namespace memvp {

enum class Major { kK, kMN };

// An operand in shared memory, as its 64 bits on the device say it; the instruction knows the major dimension there.
struct MatrixDescriptor {
  const char* start;
  unsigned leading, stride;
  Major major;

  bool operator==(const MatrixDescriptor& o) const {
    return start == o.start && leading == o.leading && stride == o.stride && major == o.major;
  }
};

namespace emulation {

constexpr int kWarpgroup = 128;
constexpr int kProductRows = 64, kProductDepth = 16, kProductColumns = 256, kSums = kProductColumns / 2;
constexpr uint32_t kInFlight = 0x7F80F11Fu;  // a signalling NaN: whatever is computed with it is another one

struct Accumulators {  // all threads' together
  float* registers[kWarpgroup];
  std::vector<float> values = std::vector<float>(kProductRows * kProductColumns);  // [row][column]
  uint64_t last = 0;  // product that writes here, counted from 1
  bool handed_back[kWarpgroup] = {};
  int held = kWarpgroup;
};

struct Product {
  MatrixDescriptor a, b;
  bool accumulate;
  float (*value)(uint16_t);
  Site site;
  Accumulators* acc;
};

struct ProductThread {
  bool begun = false;           // since its last commit
  unsigned open = 0;            // products since then
  uint64_t issued = 0;          // in all
  uint64_t history = 0;         // of begins, commits and waits: the same for all threads of a warpgroup
  std::deque<uint64_t> groups;  // committed and not waited for: the number of each one's last product
};

struct Warpgroup {
  unsigned arrived = 0;
  Site site;
  const void* in[kWarpgroup];
  Thread* thread[kWarpgroup];

  ProductThread threads[kWarpgroup];
  std::deque<Product> queue;  // begun and not carried out
  uint64_t carried_out = 0;
  std::vector<std::pair<Thread*, uint64_t>> waiting;  // until so many are carried out
  std::list<Accumulators> in_flight;                  // not handed back to all threads

  int registers = 0;  // of each thread
};

struct WarpgroupUnit : BlockUnit {
  static constexpr UnitSlot kSlot = kWarpgroupUnit;
  Block& block;
  std::vector<Warpgroup> warpgroups;
  int free_registers = 0;
  std::vector<Thread*> want_registers;

  explicit WarpgroupUnit(Block& b) : block(b), warpgroups((b.threads.size() + kWarpgroup - 1) / kWarpgroup) {
    const size_t fit = 65536 / b.threads.size() / 8 * 8;  // they are given out by eights
    for (Warpgroup& warpgroup : warpgroups) warpgroup.registers = static_cast<int>(std::min<size_t>(fit, 256));
  }

  std::string awaited(const Thread& thread) const override {
    if (thread.waits_for != &free_registers) return "";
    return text(" for registers, of which %d a thread are free", free_registers / kWarpgroup);
  }
  std::string left_behind(const Thread& thread) const override {
    const ProductThread& mine = warpgroups[thread.index.x / kWarpgroup].threads[thread.index.x % kWarpgroup];
    if (mine.open > 0) return name_of(thread) + " returned with products not committed";
    if (!mine.groups.empty()) return name_of(thread) + " returned with products not waited for";
    return "";
  }
};

inline Warpgroup& this_warpgroup() {
  return unit<WarpgroupUnit>().warpgroups[this_thread().index.x / kWarpgroup];
}

// All threads of a warpgroup meet; the last one does `complete(warpgroup)` for all, with what each brought.
template <class Complete>
void meet_warpgroup(const void* in, const Site& site, Complete complete) {
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Warpgroup& warpgroup = this_warpgroup();
  const unsigned first = me.index.x / kWarpgroup * kWarpgroup;
  if (first + kWarpgroup > me.block->threads.size())
    fail(name_of(site) + text(": by 128 threads together, and the last warpgroup of the block has %zu",
                              me.block->threads.size() - first));
  for (unsigned warp = first / 32; warp < first / 32 + 4; ++warp)
    if (me.block->warps[warp].lanes != ~0u)
      fail(name_of(site) + text(": after a thread of the warpgroup returned, in warp %u", warp));
  if (warpgroup.arrived != 0 && !(warpgroup.site == site))
    fail("warpgroup divergence: " + name_of(me) + " in " + name_of(site) + " while others of it are in " +
         name_of(warpgroup.site));
  me.site = warpgroup.site = site;
  warpgroup.in[me.index.x - first] = in;
  warpgroup.thread[me.index.x - first] = &me;
  if (++warpgroup.arrived < kWarpgroup) {
    sleep(State::kWarpgroup);
    return;
  }
  complete(warpgroup);
  for (Thread* t : warpgroup.thread) make_ready(t);
  warpgroup.arrived = 0;
  sleep(State::kReady);
}

// Calls chunk(line, index, elements) for each 16 bytes of an operand: eight elements of row or column `line` from k = 8
// index on, or of the k `line` from row or column 8 index on.
template <class Chunk>
void each_chunk(Block& block, const MatrixDescriptor& operand, int columns, const Site& site, Chunk chunk) {
  Carve& carve = carve_of(block, operand.start, 16, site);
  const uintptr_t first = reinterpret_cast<uintptr_t>(carve.data), end = first + carve.bytes;
  const bool along_k = operand.major == Major::kK;
  const int lines = along_k ? columns : kProductDepth, chunks = along_k ? 2 : columns / 8;
  for (int line = 0; line < lines; ++line)
    for (int index = 0; index < chunks; ++index) {
      uintptr_t at = reinterpret_cast<uintptr_t>(operand.start) + uintptr_t{operand.stride} * (line / 8) +
                     line % 8 * 128 + index % 8 * 16 + uintptr_t{operand.leading} * (index / 8);
      at ^= (at >> 7 & 7) << 4;
      if (at < first || at + 16 > end) fail(name_of(site) + ": an operand that reaches past its part of shared memory");
      const char* bytes = reinterpret_cast<const char*>(at);
      check_seen(carve, bytes, 16, site);
      uint16_t elements[8];
      memcpy(elements, bytes, 16);
      chunk(line, index, elements);
    }
}

typedef float Four __attribute__((vector_size(16), may_alias));

// The oldest one of a warpgroup.
inline void carry_out(Block& block, Warpgroup& warpgroup) {
  alignas(16) static float a[kProductRows][kProductDepth], b[kProductDepth][kProductColumns];
  constexpr int columns = kProductColumns;
  const Product& product = warpgroup.queue.front();
  each_chunk(block, product.a, kProductRows, product.site, [&](int row, int index, const uint16_t* elements) {
    for (int i = 0; i < 8; ++i) a[row][index * 8 + i] = product.value(elements[i]);
  });
  each_chunk(block, product.b, columns, product.site, [&](int line, int index, const uint16_t* elements) {
    for (int i = 0; i < 8; ++i)
      (product.b.major == Major::kK ? b[index * 8 + i][line] : b[line][index * 8 + i]) = product.value(elements[i]);
  });
  if (!product.accumulate) std::fill(product.acc->values.begin(), product.acc->values.end(), 0.0f);
  for (int row = 0; row < kProductRows; ++row)
    for (int column = 0; column < columns; column += 16) {
      auto* c = reinterpret_cast<Four*>(product.acc->values.data() + row * columns + column);
      Four sum0 = c[0], sum1 = c[1], sum2 = c[2], sum3 = c[3];  // not an array: in registers at -O1, too
      for (int k = 0; k < kProductDepth; ++k) {
        const auto* line = reinterpret_cast<const Four*>(&b[k][column]);
        const Four value = {a[row][k], a[row][k], a[row][k], a[row][k]};
        sum0 += value * line[0];
        sum1 += value * line[1];
        sum2 += value * line[2];
        sum3 += value * line[3];
      }
      c[0] = sum0, c[1] = sum1, c[2] = sum2, c[3] = sum3;
    }
  warpgroup.queue.pop_front();
  warpgroup.carried_out++;
  const auto done = [&warpgroup](const std::pair<Thread*, uint64_t>& w) { return w.second <= warpgroup.carried_out; };
  for (const auto& waiting : warpgroup.waiting)
    if (done(waiting)) make_ready(waiting.first);
  warpgroup.waiting.erase(std::remove_if(warpgroup.waiting.begin(), warpgroup.waiting.end(), done),
                          warpgroup.waiting.end());
}

// Where thread t of the warpgroup has value number i: csrc/common/wgmma.cuh.
inline float& value_of(Accumulators& acc, int t, int i) {
  const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
  return acc.values[static_cast<size_t>(row) * kProductColumns + column];
}

struct ProductRequest {
  float* acc;
  MatrixDescriptor a, b;
  bool accumulate;
};

inline void check_untouched(const Accumulators& acc, int t, const Site& site) {
  for (int i = 0; i < kSums; ++i)
    if (bit_cast<uint32_t>(acc.registers[t][i]) != kInFlight)
      fail(name_of(site) + ": accumulators were touched while a product was in flight");
}

// Those that all threads have brought: in flight, or now to be.
inline Accumulators& accumulators_of(Warpgroup& warpgroup, const Site& site) {
  const auto brought = [&warpgroup](int t) { return static_cast<const ProductRequest*>(warpgroup.in[t])->acc; };
  for (Accumulators& acc : warpgroup.in_flight) {
    if (acc.registers[0] != brought(0)) continue;
    for (int t = 0; t < kWarpgroup; ++t) {
      if (acc.registers[t] != brought(t))
        fail(name_of(site) + ": other accumulators than those of the product in flight");
      check_untouched(acc, t, site);
    }
    return acc;
  }
  Accumulators& acc = warpgroup.in_flight.emplace_back();
  for (int t = 0; t < kWarpgroup; ++t) {
    acc.registers[t] = brought(t);
    for (int i = 0; i < kSums; ++i)
      value_of(acc, t, i) = std::exchange(acc.registers[t][i], bit_cast<float>(kInFlight));
  }
  return acc;
}

inline ProductThread& this_product_thread() {
  return this_warpgroup().threads[this_thread().index.x % kWarpgroup];
}

inline void multiply(const ProductRequest& request, Major b_major, float (*value)(uint16_t), const Site& site) {
  yield_point();
  Quiet quiet(this_thread().fiber);
  ProductThread& mine = this_product_thread();
  // The chip asks for it only where a thread has touched the accumulators since they were last in flight, which does
  // not show here.
  if (!mine.begun) fail(name_of(site) + ": wgmma_fence comes before a group's first product");
  if (request.a.major != Major::kK || request.b.major != b_major)
    fail(name_of(site) + ": an operand that runs along the other dimension");
  mine.open++;
  mine.issued++;
  meet_warpgroup(&request, site, [&](Warpgroup& warpgroup) {
    for (int t = 0; t < kWarpgroup; ++t) {
      const auto& other = *static_cast<const ProductRequest*>(warpgroup.in[t]);
      if (!(other.a == request.a) || !(other.b == request.b) || other.accumulate != request.accumulate)
        fail(name_of(site) + ": threads of a warpgroup bring different operands");
      if (warpgroup.threads[t].history != mine.history || warpgroup.threads[t].issued != mine.issued)
        fail(name_of(site) + ": threads of a warpgroup have begun, committed or waited for different products");
    }
    Accumulators& acc = accumulators_of(warpgroup, site);
    acc.last = mine.issued;
    warpgroup.queue.push_back({request.a, request.b, request.accumulate, value, site, &acc});
    Block* const block = this_thread().block;
    begin_landing({block, &warpgroup, [block, &warpgroup] { carry_out(*block, warpgroup); }});
  });
}

inline void wait_products(size_t pending, const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  Warpgroup& warpgroup = this_warpgroup();
  const int t = static_cast<int>(me.index.x % kWarpgroup);
  ProductThread& mine = warpgroup.threads[t];
  mine.history = mine.history * 31 + 3 + pending;
  uint64_t done = 0;
  while (mine.groups.size() > pending) {
    done = mine.groups.front();
    mine.groups.pop_front();
  }
  if (warpgroup.carried_out < done) {
    warpgroup.waiting.push_back({&me, done});
    sleep_for(&warpgroup, site);
  }
  for (auto acc = warpgroup.in_flight.begin(); acc != warpgroup.in_flight.end();) {
    if (!acc->handed_back[t] && acc->last <= done) {
      check_untouched(*acc, t, site);
      for (int i = 0; i < kSums; ++i) acc->registers[t][i] = value_of(*acc, t, i);
      acc->handed_back[t] = true;
      acc->held--;
    }
    acc = acc->held == 0 ? warpgroup.in_flight.erase(acc) : std::next(acc);
  }
}

// A block has as many registers as its threads began with. One warpgroup takes what another has given up.
inline void change_registers(int registers, bool more, const Site& site) {
  yield_point();
  Thread& me = this_thread();
  Quiet quiet(me.fiber);
  WarpgroupUnit& all = unit<WarpgroupUnit>();
  Warpgroup& mine = this_warpgroup();
  meet_warpgroup(&registers, site, [&](Warpgroup& warpgroup) {
    for (const void* other : warpgroup.in)
      if (*static_cast<const int*>(other) != registers)
        fail(name_of(site) + ": threads of a warpgroup ask for different numbers of registers");
    if (more ? registers < warpgroup.registers : registers > warpgroup.registers)
      fail(name_of(site) + text(": to %d registers, from %d", registers, warpgroup.registers));
    if (more) return;
    all.free_registers += (warpgroup.registers - registers) * kWarpgroup;
    warpgroup.registers = registers;
    wake_all(all.want_registers);
  });
  while (mine.registers < registers) {  // the first thread that finds enough takes them for all
    const int needed = (registers - mine.registers) * kWarpgroup;
    if (all.free_registers >= needed) {
      all.free_registers -= needed;
      mine.registers = registers;
      wake_all(all.want_registers);
      break;
    }
    all.want_registers.push_back(&me);
    sleep_for(&all.free_registers, site);
  }
}

}  // namespace emulation

inline MatrixDescriptor make_descriptor(const void* shared, Major major, unsigned leading_bytes, unsigned stride_bytes,
                                        MEMVP_SITE) {
  for (const uintptr_t bytes : {reinterpret_cast<uintptr_t>(shared), uintptr_t{leading_bytes}, uintptr_t{stride_bytes}})
    if (bytes % 16 != 0)
      emulation::fail(
          emulation::text("make_descriptor at %s:%d: addresses and offsets are multiples of 16", file, line));
  return {static_cast<const char*>(shared), leading_bytes, stride_bytes, major};
}
inline MatrixDescriptor advance(MatrixDescriptor operand, unsigned bytes) {
  operand.start += bytes;
  return operand;
}

inline void wgmma_fence() {
  using namespace emulation;
  Quiet quiet(this_thread().fiber);
  ProductThread& mine = this_product_thread();
  mine.begun = true;
  mine.history = mine.history * 31 + 1;
}
inline void wgmma_commit() {
  using namespace emulation;
  Quiet quiet(this_thread().fiber);
  ProductThread& mine = this_product_thread();
  mine.groups.push_back(mine.issued);
  mine.begun = false;
  mine.open = 0;
  mine.history = mine.history * 31 + 2;
}
template <int kPending>
void wgmma_wait(MEMVP_SITE) {
  emulation::wait_products(kPending, MEMVP_HERE("wgmma_wait"));
}
inline void pin_accumulators(float (&)[128]) {}

template <class T, Major kMajor>
void wgmma(float (&acc)[128], MatrixDescriptor a, MatrixDescriptor b, bool accumulate, MEMVP_SITE) {
  const auto value = [](uint16_t bits) { return to_float(T{bits}); };
  emulation::multiply({acc, a, b, accumulate}, kMajor, value, MEMVP_HERE("wgmma"));
}

template <int kCount>
void raise_registers(MEMVP_SITE) {
  emulation::change_registers(kCount, true, MEMVP_HERE("raise_registers"));
}
template <int kCount>
void lower_registers(MEMVP_SITE) {
  emulation::change_registers(kCount, false, MEMVP_HERE("lower_registers"));
}

// Lane l names row l % 8 of matrix l / 8, and brings word l % 4 of row l / 4 of each.
inline void stmatrix(void* row, const uint32_t (&words)[4], MEMVP_SITE) {
  emulation::check_row(row, "stmatrix");
  uint32_t mine[4];
  emulation::meet_warp(words, mine, MEMVP_HERE("stmatrix"), [](emulation::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<uint32_t*>(warp.out[lane])[i] = static_cast<const uint32_t*>(warp.in[lane % 8 * 4 + i])[lane / 8];
  });
  memcpy(row, mine, sizeof(mine));  // the lane's own access, which the sanitizers see
}

}  // namespace memvp
