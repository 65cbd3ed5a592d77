// A decode step on the CPU: the device's own kernels, plan and launches.
#pragma once
#include "decode/kernels.cuh"

namespace memvp::emulation {

// A buffer of exact size, so that the address sanitizer guards both ends; filled with NaN, so that an unwritten read
// shows.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t alignment = 256) : bytes_(bytes) {
    if (posix_memalign(&data_, alignment, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
    memset(data_, 0xFF, bytes);
  }
  ~Buffer() { free(data_); }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Buffer(const Buffer&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// Runs one step with a workspace of its own. Returns and throws as run_launches.
inline uint64_t run_decode(FfnDecodeParams params, const Config& config) {
  if (const char* why = decode::why_unsupported(params)) throw std::runtime_error(why);
  const bool cooperative = params.form == DecodeForm::kCooperative;
  const Buffer workspace(params.tokens == 0 ? 0 : decode::make_plan(params, cooperative).at.bytes);
  params.workspace = workspace.data();
  std::vector<Launch> launches;
  const auto launch = [&](decode::DecodeKernel kernel, int blocks, size_t shared_bytes, const decode::DecodeArgs& args,
                          decode::LaunchKind kind) {
    launches.push_back({static_cast<unsigned>(blocks), decode::kThreads, shared_bytes, [kernel, args] { kernel(args); },
                        kind == decode::LaunchKind::kPdl, kind == decode::LaunchKind::kCooperative});
    return 0;
  };
  decode::launch_step(params, cooperative, launch);
  return run_launches(std::move(launches), config);
}

}  // namespace memvp::emulation
