// Shared memory as TMA and wgmma see it: what was copied there, and of the threads' writes those before a
// fence_async_proxy. (PTX ISA, "Proxies": the generic and the async one.)
#pragma once
#include "runtime/threads.h"

namespace memvp::emulation {

// The allocation that has these bytes of the block's shared memory.
inline Carve& carve_of(Block& block, const void* shared, size_t bytes, const Site& site) {
  const char* at = static_cast<const char*>(shared);
  for (auto& [offset, carve] : block.shared) {
    const char* first = static_cast<const char*>(carve.data);
    if (at < first || at + bytes > first + carve.bytes) continue;
    if (carve.seen.empty()) carve.seen.assign(carve.bytes, static_cast<char>(0xFF));
    return carve;
  }
  fail(name_of(site) + text(": %zu bytes outside of shared memory, or across two parts of it", bytes));
}

inline char* seen_at(Carve& carve, const void* shared) {
  return carve.seen.data() + (static_cast<const char*>(shared) - static_cast<const char*>(carve.data));
}

// Both views of these bytes must agree while a unit reads them.
inline void check_seen(Carve& carve, const void* shared, size_t bytes, const Site& site) {
  if (memcmp(seen_at(carve, shared), shared, bytes) != 0)
    fail(name_of(site) +
         ": a thread has written what it reads of shared memory, without fence_async_proxy in between or before it "
         "was read");
}

// The unit U of a block, by itself of the running thread's.
template <class U>
U& unit(Block& block) {
  std::unique_ptr<BlockUnit>& found = block.units[U::kSlot];
  if (found == nullptr) found = std::make_unique<U>(block);
  return static_cast<U&>(*found);
}
template <class U>
U& unit() {
  return unit<U>(*this_thread().block);
}

}  // namespace memvp::emulation
