// The scheduler: every CUDA thread is a fiber, which gives way at barriers, at collectives and, by chance, at any
// primitive; asynchronous work lands at any time that is allowed. A run is a function of its inputs and its Config.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "runtime/fiber.h"

namespace memvp::emulation {

enum class Order { kForward, kReverse, kRandom };

struct Range {
  const void* data;
  size_t bytes;
};

// What load_input may read; nothing may write there.
struct Inputs {
  const Range* first = nullptr;
  uint64_t count = 0;

  const Range* begin() const { return first; }
  const Range* end() const { return first + count; }
  bool empty() const { return count == 0; }
};

// As tests hand it over from Python, too.
struct Config {
  Order order = Order::kRandom;
  uint32_t resident = 4;  // blocks alive at a time
  uint64_t seed = 1;
  Inputs inputs;
};
constexpr double kYieldChance = 0.1;  // Order::kRandom: that a thread gives way at a primitive

struct Launch {
  unsigned blocks = 0, threads = 0;
  size_t shared_bytes = 0;
  std::function<void()> kernel;
  bool pdl = false;          // may begin when every block of the launch before has begun and let it
  bool cooperative = false;  // all its blocks are resident at once, and may wait for one another
  unsigned cluster = 1;      // so many blocks are resident together, and reach each other's shared memory
};

struct Site {
  const char* file = "";
  int line = 0;
  const char* what = "";

  bool operator==(const Site& other) const { return line == other.line && strcmp(file, other.file) == 0; }
};

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

enum class State { kReady, kBarrier, kWarp, kWarpgroup, kEvent, kGrid, kDone };

struct PendingCopy {
  char* to;
  const char* from;
  bool valid;  // else zeros
};

struct Block;
struct Warp;

struct Thread {
  FiberContext fiber;
  State state = State::kReady;
  Site site;
  Index3 index;
  unsigned lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool waited_for_grid = false;
  const void* waits_for = nullptr;                    // in State::kEvent
  std::vector<std::vector<PendingCopy>> copy_groups;  // committed, oldest first
  std::vector<PendingCopy> copies;                    // not yet committed
};

// The lanes of a warp that have arrived at a collective.
struct Warp {
  unsigned lanes = 0, arrived = 0;
  Site site;
  const void* in[32];
  void* out[32];
  Thread* thread[32];
};

struct Carve {
  void* data;
  size_t bytes;
  void* memory;            // what was allocated: `data` lies in it as the offset asks for
  std::vector<char> seen;  // by units other than the threads (runtime/shared_memory.h); empty: nothing yet
};

// One of the block's units beside its threads' own: barriers in shared memory, copies and products that go on without a
// thread. Made by the first primitive that needs it.
struct BlockUnit {
  virtual ~BlockUnit() = default;
  virtual std::string awaited(const Thread&) const { return ""; }      // in State::kEvent: what has not happened yet
  virtual std::string left_behind(const Thread&) const { return ""; }  // by a thread that returns: a mistake
  virtual std::string end() { return ""; }                             // of the block; likewise
};
enum UnitSlot { kBarrierUnit, kCopyUnit, kWarpgroupUnit, kUnits };

// What no thread carries out, a copy or a product: to be done at any time after its start, whatever the threads do.
struct Landing {
  const Block* block;
  const void* completes;  // what a thread waits for that needs it
  std::function<void()> land;
};

// Where a known number of threads meet, again and again.
struct Rendezvous {
  std::vector<Thread*> arrived;
  unsigned meetings = 0;
  char objects[2];  // for the thread sanitizer: of this meeting and the next
};

struct Block {
  Index3 index;
  unsigned launch = 0, done = 0;
  bool let_next_begin = false;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Rendezvous barrier, cluster;     // of its threads; of a cluster's first block: of the threads of all
  std::map<size_t, Carve> shared;  // by offset; each an allocation of its own
  std::unique_ptr<BlockUnit> units[kUnits];
  char end_object;  // for the thread sanitizer: its threads' ends, which the reuse of their stacks comes after
};

struct Progress {  // of one launch
  std::vector<unsigned> order;
  unsigned begun = 0, let = 0, done = 0;
  std::vector<Thread*> waiting;  // threads of the next launch
  Rendezvous grid;               // of all threads, where it is cooperative
  char object = 0;               // for the thread sanitizer
};

struct Run {
  Config config;
  std::vector<Launch> launches;
  std::vector<Progress> progress;
  std::vector<std::unique_ptr<Block>> blocks;  // resident ones
  std::vector<Thread*> ready;
  size_t first_ready = 0;
  std::vector<Landing> landings;  // begun and not done, oldest first
  double landing_chance = 0;      // kRandom only: that one lands at a primitive
  unsigned alive = 0;
  Thread main, *current = nullptr;
  uint64_t early_blocks = 0;  // that began before the launch ahead had ended
  std::string error;
  uint64_t random_state = 1;
  char end_object = 0;  // for the thread sanitizer: all that threads did, before run_launches frees it

  uint64_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state >> 11;
  }
  bool chance(double p) { return static_cast<double>(random()) * 0x1p-53 < p; }
};

inline char begin_object = 0;  // likewise: what main did before a thread began
inline Run*& run_pointer() {
  static Run* run = nullptr;
  return run;
}
inline Run& run() {
  return *run_pointer();
}
inline Thread& this_thread() {
  return *run().current;
}

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}
inline std::string name_of(const Thread& t) {
  return text("launch %u block %u thread %u", t.block->launch, t.block->index.x, t.index.x);
}
inline std::string name_of(const Site& site) {
  return text("%s at %s:%d", site.what, site.file, site.line);
}
// Who waits where.
inline std::string state_table() {
  std::map<std::string, std::pair<int, std::string>> rows;
  for (const auto& block : run().blocks)
    for (const Thread& t : block->threads) {
      std::string key = t.state == State::kDone    ? "returned"
                        : t.state == State::kReady ? "ready"
                                                   : "waiting in " + name_of(t.site);
      if (t.state == State::kEvent)
        for (const auto& unit : block->units)
          if (unit != nullptr) key += unit->awaited(t);
      auto& row = rows[key];
      if (row.first++ == 0) row.second = name_of(t);
    }
  std::string table;
  for (const auto& [key, row] : rows)
    table += text("\n  %5d thread(s) %s, first: %s", row.first, key.c_str(), row.second.c_str());
  return table;
}

inline void switch_to(Thread& to, bool last = false) {
  Run& r = run();
  Thread& from = *r.current;
  r.current = &to;
  switch_fiber(from.fiber, to.fiber, last);
}

// Abandons all fibers; run_launches throws the message.
[[noreturn]] inline void fail(const std::string& message) {
  Quiet quiet(this_thread().fiber);
  Run& r = run();
  if (r.error.empty()) r.error = message;
  if (r.current == &r.main) throw std::runtime_error(message);
  switch_to(r.main, true);
  abort();
}

inline void make_ready(Thread* t) {
  t->state = State::kReady;
  run().ready.push_back(t);
}

// Empties the list of those who waited.
inline void wake_all(std::vector<Thread*>& waiting) {
  for (Thread* t : waiting) make_ready(t);
  waiting.clear();
}

inline Thread* next_ready() {
  Run& r = run();
  if (r.first_ready == r.ready.size()) {
    r.ready.clear();
    r.first_ready = 0;
    return nullptr;
  }
  if (r.config.order == Order::kForward) return r.ready[r.first_ready++];
  if (r.config.order == Order::kRandom) {
    const size_t i = r.first_ready + r.random() % (r.ready.size() - r.first_ready);
    std::swap(r.ready[i], r.ready.back());
  }
  Thread* t = r.ready.back();
  r.ready.pop_back();
  return t;
}

inline void land(size_t i) {
  Run& r = run();
  Landing landing = std::move(r.landings[i]);
  r.landings.erase(r.landings.begin() + static_cast<std::ptrdiff_t>(i));
  landing.land();
}

// Begins what no thread carries out. Order::kForward does it as late as can be, kReverse at once, kRandom somewhere
// between.
inline void begin_landing(Landing landing) {
  Run& r = run();
  r.landings.push_back(std::move(landing));
  if (r.config.order == Order::kReverse) land(r.landings.size() - 1);
}

// The next thread to run. When there is none, something lands until there is: first what somebody waits for.
inline Thread* next_ready_or_landed() {
  Run& r = run();
  for (;;) {
    Thread* next = next_ready();
    if (next != nullptr || r.landings.empty()) return next;
    std::vector<size_t> awaited;
    for (size_t i = 0; i < r.landings.size(); ++i)
      for (const Thread& t : r.landings[i].block->threads)
        if (t.state == State::kEvent && t.waits_for == r.landings[i].completes) {
          awaited.push_back(i);
          break;
        }
    const bool any = r.config.order == Order::kRandom;
    if (awaited.empty())
      land(any ? r.random() % r.landings.size() : 0);
    else
      land(awaited[any ? r.random() % awaited.size() : 0]);
  }
}

// Leaves the processor to another thread; main decides when there is none.
inline void sleep(State state) {
  Thread& me = this_thread();
  me.state = state;
  release(&run().end_object);  // acquired once, by run_launches, so that it may free after a failed run
  Thread* next = next_ready_or_landed();
  if (next == nullptr) next = &run().main;
  if (next != &me) switch_to(*next);
}

// Sleeps until somebody who completes `what` makes this thread ready.
inline void sleep_for(const void* what, const Site& site) {
  Thread& me = this_thread();
  me.site = site;
  me.waits_for = what;
  sleep(State::kEvent);
  me.waits_for = nullptr;
}

// Until `all` threads are there.
inline void meet(Rendezvous& where, size_t all, State state) {
  void* object = &where.objects[where.meetings % 2];
  release(object);
  where.arrived.push_back(&this_thread());
  if (where.arrived.size() == all) {
    where.meetings++;
    wake_all(where.arrived);
    state = State::kReady;
  }
  sleep(state);
  acquire(object);
}

// Called by primitives: under Order::kRandom something may land, and the thread may give way.
inline void yield_point() {
  Quiet quiet(this_thread().fiber);
  Run& r = run();
  if (r.config.order != Order::kRandom) return;
  if (!r.landings.empty() && r.chance(r.landing_chance)) land(r.random() % r.landings.size());
  if (!r.chance(kYieldChance)) return;
  r.ready.push_back(r.current);
  sleep(State::kReady);
}

inline void free_shared(Block& block) {
  for (auto& [offset, carve] : block.shared) free(carve.memory);
  block.shared.clear();
}

inline void note_let(Block& block) {
  if (block.let_next_begin) return;
  block.let_next_begin = true;
  run().progress[block.launch].let++;
}

}  // namespace memvp::emulation
