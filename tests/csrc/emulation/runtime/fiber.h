// One CUDA thread as a fiber: a stack of its own, and a switch that the sanitizers follow. All fibers share one OS
// thread, so a run is a function of its inputs and its seed.
#pragma once
#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <vector>
#if !defined(__x86_64__)
#define MEMVP_FIBER_UCONTEXT 1
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define MEMVP_FIBER_ASAN 1
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_poison_memory_region(void const volatile*, size_t);
void __asan_unpoison_memory_region(void const volatile*, size_t);
}
#endif
#if defined(__SANITIZE_THREAD__)
#define MEMVP_FIBER_TSAN 1
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace memvp::emulation {

#if defined(MEMVP_FIBER_ASAN) || defined(MEMVP_FIBER_TSAN)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kGuardBytes = 4096;  // below a stack: running over it is a fault, not a corruption

// What a fiber runs on. Making one asks the kernel for memory (a megabyte under the thread sanitizer), so later fibers
// use it again.
struct Stack {
  char* memory = nullptr;
  void* tsan = nullptr;
};

struct FiberContext {
  void* stack_pointer = nullptr;
  Stack stack;
  const void* bottom = nullptr;  // of the stack, for the address sanitizer
  size_t bytes = 0;
  void* fake_stack = nullptr;
  int quiet = 0;  // depth of Quiet, to be undone when the fiber ends
#ifdef MEMVP_FIBER_UCONTEXT
  ucontext_t context;
#endif
};

// What stands between two threads in the thread sanitizer's eyes.
inline void release(void* object) {
  (void)object;
#ifdef MEMVP_FIBER_TSAN
  __tsan_release(object);
#endif
}
inline void acquire(void* object) {
  (void)object;
#ifdef MEMVP_FIBER_TSAN
  __tsan_acquire(object);
#endif
}
inline void watch_again() {
#ifdef MEMVP_FIBER_TSAN
  AnnotateIgnoreWritesEnd("", 0);
  AnnotateIgnoreReadsEnd("", 0);
#endif
}
// The runner's own bookkeeping is not the kernel's data: the thread sanitizer looks away while one of these lives.
class Quiet {
 public:
  explicit Quiet(FiberContext& fiber) : fiber_(fiber) {
#ifdef MEMVP_FIBER_TSAN
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
#endif
    fiber_.quiet++;
  }
  ~Quiet() {
    fiber_.quiet--;
    watch_again();
  }
  Quiet(const Quiet&) = delete;

 private:
  FiberContext& fiber_;
};

#ifndef MEMVP_FIBER_UCONTEXT
// Saves the callee's registers and the stack, takes the other's: a twentieth of swapcontext's time, which asks the
// kernel.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save*/, void* /*load*/) {
  __asm__ volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline void arrived(FiberContext& me) {
  (void)me;
#ifdef MEMVP_FIBER_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(me.fake_stack, &bottom, &bytes);
#endif
}

// Runs `to` until something switches back. `last`: `from` never runs again.
inline void switch_fiber(FiberContext& from, FiberContext& to, bool last) {
  (void)last;
#ifdef MEMVP_FIBER_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#endif
#ifndef MEMVP_FIBER_UCONTEXT
  void** save = &from.stack_pointer;
  void* load = to.stack_pointer;
#endif
#ifdef MEMVP_FIBER_TSAN
  // From here to the switch no access to memory: it would count as the other fiber's. No order is implied between the
  // two.
  void* tsan = to.stack.tsan;
  if (last)
    for (int depth = from.quiet; depth > 0; --depth) watch_again();  // a fiber must not end while ignoring
  __tsan_switch_to_fiber(tsan, 1);
#endif
#ifdef MEMVP_FIBER_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  switch_stacks(save, load);
#endif
  arrived(from);
}

// Makes `fiber` the caller's own thread of execution, to switch away from and back to.
inline void adopt_thread(FiberContext& fiber) {
  (void)fiber;
#ifdef MEMVP_FIBER_TSAN
  fiber.stack.tsan = __tsan_get_current_fiber();
#endif
#ifdef MEMVP_FIBER_ASAN
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &fiber.bytes);
  pthread_attr_destroy(&attributes);
  fiber.bottom = bottom;
#endif
}

class StackPool {
 public:
  ~StackPool() {
    for (const Stack& stack : all_) {
#ifdef MEMVP_FIBER_TSAN
      __tsan_destroy_fiber(stack.tsan);
#endif
      munmap(stack.memory - kGuardBytes, kStackBytes + kGuardBytes);
    }
  }
  Stack take() {
    if (free_.empty()) {
      void* p = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::runtime_error("emulation: no memory for a fiber's stack");
      mprotect(p, kGuardBytes, PROT_NONE);
      Stack made{static_cast<char*>(p) + kGuardBytes};
#ifdef MEMVP_FIBER_TSAN
      made.tsan = __tsan_create_fiber(0);
#endif
      all_.push_back(made);
      free_.push_back(made);
    }
    const Stack stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(const Stack& stack) {
#ifdef MEMVP_FIBER_ASAN
    __asan_unpoison_memory_region(stack.memory, kStackBytes);  // its fiber ended in the middle of a function
#endif
    free_.push_back(stack);
  }

 private:
  std::vector<Stack> all_, free_;
};

inline StackPool& stack_pool() {
  static StackPool pool;
  return pool;
}

// A fiber that will begin with `entry`, which must never return.
inline void start_fiber(FiberContext& fiber, const Stack& stack, unsigned number, void (*entry)()) {
  fiber.stack = stack;
  fiber.bottom = stack.memory;
  fiber.bytes = kStackBytes;
#ifdef MEMVP_FIBER_UCONTEXT
  (void)number;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack.memory;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  void** top =
      reinterpret_cast<void**>(stack.memory + kStackBytes - 64 - number * 192 % 4096);  // spread over the cache's sets
  *--top = nullptr;  // keeps the stack aligned at entry
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

}  // namespace memvp::emulation
