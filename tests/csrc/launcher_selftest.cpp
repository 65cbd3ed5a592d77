// The device side of the launcher, csrc/decode/ffn_decode.cu itself, over a made-up runtime: which launches may begin
// early, what is set and how often, which device is current afterwards. Prints what is wrong; exit status 1 then.
#include <cstdio>
#include <thread>

#include "decode/ffn_decode.cu"

namespace memvp::decode {

template <class T, int kNumber>
void kernel(DecodeArgs) {}

template <class T>
DecodeKernel hidden_kernel_of(const DecodePlan&) {
  return kernel<T, 1>;
}
template <class T>
DecodeKernel values_kernel_of(const DecodePlan&) {
  return kernel<T, 2>;
}
template <class T>
DecodeKernel finish_kernel_of(const DecodePlan&) {
  return kernel<T, 3>;
}
template DecodeKernel hidden_kernel_of<memvp::BFloat16>(const DecodePlan&);
template DecodeKernel values_kernel_of<memvp::BFloat16>(const DecodePlan&);
template DecodeKernel finish_kernel_of<memvp::BFloat16>(const DecodePlan&);
template DecodeKernel hidden_kernel_of<memvp::Float16>(const DecodePlan&);
template DecodeKernel values_kernel_of<memvp::Float16>(const DecodePlan&);
template DecodeKernel finish_kernel_of<memvp::Float16>(const DecodePlan&);

}  // namespace memvp::decode

namespace {

using namespace memvp;

int failures = 0;

void check(bool right, const char* what) {
  if (right) return;
  ++failures;
  printf("%s\n", what);
}

// A step of text alone; its addresses are never read.
FfnDecodeParams a_step(int tokens, int device) {
  FfnDecodeParams p;
  p.tokens = p.length = tokens;
  p.width = 1024;
  p.pairs = 2816;
  p.sequences = 1;
  p.device = device;
  DecodeTensor matrix;
  matrix.data = reinterpret_cast<const void*>(4096);
  matrix.strides[0] = p.width;
  matrix.strides[1] = 1;
  p.x = p.key = p.gate = p.value = matrix;
  p.value.strides[0] = 1;
  p.value.strides[1] = p.pairs;
  return p;
}

std::vector<bool> early_launches(int ptx_version, int binary_version, int device) {
  fake::machine.ptx_version = ptx_version;
  fake::machine.binary_version = binary_version;
  fake::machine.launches.clear();
  check(ffn_decode_launch(a_step(1, device), nullptr) == 0, "a launch failed");
  std::vector<bool> early;
  for (const fake::Launch& launch : fake::machine.launches) early.push_back(launch.early);
  return early;
}

// Each on a device of its own: what is known of a kernel there is known for good.
void begins_early_where_the_kernel_waits() {
  check(early_launches(90, 90, 1) == std::vector<bool>{false, true, true}, "sm_90: the second and third begin early");
  check(early_launches(80, 80, 2) == std::vector<bool>(3), "sm_80: none begins early");
  check(early_launches(80, 90, 3) == std::vector<bool>(3), "compiled on a 9.0 for sm_80: no kernel waits");
  check(early_launches(90, 120, 4) == std::vector<bool>{false, true, true}, "PTX of sm_90 on a newer chip waits");
}

void prepares_a_kernel_once() {
  const int before = fake::machine.attribute_calls;
  for (int i = 0; i < 3; ++i) check(ffn_decode_launch(a_step(1, 5), nullptr) == 0, "a launch failed");
  check(fake::machine.attribute_calls - before == 2 * 3, "attributes are set once for each kernel");
}

// One kernel here, so the threads' plans share it: each must find its own shared memory allowed.
void threads_with_different_plans() {
  std::vector<std::thread> threads;
  std::vector<int> failed(8);
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&failed, i] {
      for (int round = 0; round < 500; ++round) failed[i] += ffn_decode_launch(a_step(1 + i * 9, 6), nullptr) != 0;
    });
  for (std::thread& thread : threads) thread.join();
  for (const int count : failed) check(count == 0, "a launch had less shared memory than its plan");
}

void a_larger_chip_is_read_further_ahead() {
  fake::machine.launches.clear();
  fake::machine.shared_bytes = 227 << 10;
  FfnDecodeParams p = a_step(64, 8);
  p.shared_bytes = 228 << 10;
  check(ffn_decode_launch(p, nullptr) == 0, "a launch failed");
  const std::vector<fake::Launch>& all = fake::machine.launches;
  check(all.size() == 3 && all[0].shared_bytes + all[1].shared_bytes + 2048 <= 228 << 10, "two launches fit beside");
  p.shared_bytes = 164 << 10;
  check(ffn_decode_launch(p, nullptr) == 0 && all[3].shared_bytes < all[0].shared_bytes, "one stage more");
}

void leaves_the_devices_as_they_were() {
  fake::current_device = 0;
  fake::machine.contexts = {0};
  check(ffn_decode_launch(a_step(1, 7), nullptr) == 0 && fake::current_device == 0, "the caller's device is current");
  fake::machine.contexts.clear();
  check(ffn_decode_launch(a_step(1, 7), nullptr) == 0, "a launch failed");
  check(fake::machine.contexts == std::set<int>{7}, "no context on a device that nobody uses");
  for (const fake::Launch& launch : fake::machine.launches)
    check(launch.shared_bytes <= launch.allowed_bytes, "shared memory as allowed");
}

}  // namespace

int main() {
  begins_early_where_the_kernel_waits();
  prepares_a_kernel_once();
  threads_with_different_plans();
  a_larger_chip_is_read_further_ahead();
  leaves_the_devices_as_they_were();
  return failures == 0 ? 0 : 1;
}
