// Shared memory as units other than the threads see it: copies of tiles and products read what they themselves copied,
// and of the threads' writes those before a fence_async_shared. (PTX ISA, "Proxies": the generic and the async one.)
#pragma once
#include "host_run/primitives.h"

namespace memvp::host_run {

inline std::string name_of(const Site& site) {
  return text("%s at %s:%d", site.what, site.file, site.line);
}

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
         ": a thread has written what it reads of shared memory, without fence_async_shared in between or before it "
         "was read");
}

// Everything that stands there now, of all threads: which of them wrote it is not known.
inline void fence_async_shared(const Site&) {
  yield_point();
  Quiet quiet(this_thread().fiber);
  for (auto& [offset, carve] : this_thread().block->shared) {
    carve.seen.resize(carve.bytes);
    memcpy(carve.seen.data(), carve.data, carve.bytes);
  }
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

}  // namespace memvp::host_run
