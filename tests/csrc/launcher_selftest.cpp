// The device side of the launchers, csrc/decode/ffn_decode.cu and csrc/hopper/ffn_steps.cu themselves, over a made-up
// runtime: which launches may begin early, what is set and how often, which device is current afterwards. Prints what
// is wrong; exit status 1 then.
#include <cstdio>
#include <thread>

#include "decode/ffn_decode.cu"
#define MEMVP_HAS_SM90A
#include "hopper/ffn_steps.cu"

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
template <class T>
DecodeKernel step_kernel_of(const DecodePlan&) {
  return kernel<T, 4>;
}
template DecodeKernel hidden_kernel_of<memvp::BFloat16>(const DecodePlan&);
template DecodeKernel values_kernel_of<memvp::BFloat16>(const DecodePlan&);
template DecodeKernel finish_kernel_of<memvp::BFloat16>(const DecodePlan&);
template DecodeKernel step_kernel_of<memvp::BFloat16>(const DecodePlan&);
template DecodeKernel hidden_kernel_of<memvp::Float16>(const DecodePlan&);
template DecodeKernel values_kernel_of<memvp::Float16>(const DecodePlan&);
template DecodeKernel finish_kernel_of<memvp::Float16>(const DecodePlan&);
template DecodeKernel step_kernel_of<memvp::Float16>(const DecodePlan&);

}  // namespace memvp::decode

namespace memvp::hopper {

template <class T, bool kGated>
void kernel(StepArgs) {}

template <class T>
StepKernel step_kernel_of(StepKind, bool gated) {
  return gated ? kernel<T, true> : kernel<T, false>;
}
template StepKernel step_kernel_of<memvp::BFloat16>(StepKind, bool);
template StepKernel step_kernel_of<memvp::Float16>(StepKind, bool);

}  // namespace memvp::hopper

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

void compiled_for(int ptx_version, int binary_version) {
  fake::machine.ptx_version = ptx_version;
  fake::machine.binary_version = binary_version;
}

// What one step of this form launched.
std::vector<fake::Launch> launches_of(const FfnDecodeParams& step) {
  fake::machine.launches.clear();
  check(ffn_decode_launch(step, nullptr) == 0, "a launch failed");
  return fake::machine.launches;
}
FfnDecodeParams in_form(DecodeForm form, int tokens, int device) {
  FfnDecodeParams p = a_step(tokens, device);
  p.form = form;
  return p;
}
std::vector<bool> early_launches(int device, DecodeForm form = DecodeForm::kChained) {
  std::vector<bool> early;
  for (const fake::Launch& launch : launches_of(in_form(form, 1, device))) early.push_back(launch.early);
  return early;
}
bool is_one_launch(const std::vector<fake::Launch>& all) {
  return all.size() == 1 && all[0].cooperative && !all[0].early;
}

// Each on a device of its own: what is known of a kernel there is known for good.
void begins_early_where_the_kernel_waits() {
  const std::vector<bool> late(3), early{false, true, true};
  compiled_for(90, 90);
  check(early_launches(1) == early, "sm_90: the second and third begin early");
  check(early_launches(1, DecodeForm::kAuto) == early, "sm_90: which is what it takes by itself");
  compiled_for(80, 80);
  check(early_launches(2) == late, "sm_80: none begins early");
  compiled_for(80, 90);
  check(early_launches(3) == late, "compiled on a 9.0 for sm_80: no kernel waits");
  compiled_for(90, 120);
  check(early_launches(4) == early, "PTX of sm_90 on a newer chip waits");
}

void is_one_launch_where_none_can_begin_early() {
  compiled_for(80, 80);
  check(is_one_launch(launches_of(in_form(DecodeForm::kAuto, 16, 11))), "sm_80: one launch");
  check(fake::machine.launches[0].blocks <= 132, "a block on each multiprocessor");
  check(launches_of(in_form(DecodeForm::kAuto, 17, 11)).size() == 3, "of many tokens three");
  compiled_for(90, 90);
  check(is_one_launch(launches_of(in_form(DecodeForm::kOneLaunch, 1, 12))), "sm_90: when asked for");
}

void goes_by_three_where_not_all_blocks_have_room() {
  compiled_for(80, 80);
  fake::machine.resident = 100;
  const std::vector<fake::Launch> all = launches_of(in_form(DecodeForm::kAuto, 1, 13));
  check(all.size() == 3 && !all[0].cooperative, "three launches need no room for all");
  check(fake::machine.last_error == cudaSuccess, "no error is left for the caller's next call");
  check(ffn_decode_launch(in_form(DecodeForm::kOneLaunch, 1, 13), nullptr) == cudaErrorCooperativeLaunchTooLarge,
        "one launch that was asked for says why it can't be");
  fake::machine.resident = 132;
  fake::machine.last_error = cudaSuccess;
}

void prepares_a_kernel_once() {
  compiled_for(90, 90);
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

// A product of (rows, 64) and (64, 512), whose addresses are never read.
FfnStepParams an_output(int rows, int device) {
  const StepMatrix matrix{reinterpret_cast<const void*>(4096), 512};
  FfnStepParams p;
  p.rows = rows;
  p.columns = 512;
  p.products[0] = {matrix, matrix, 64, true};
  p.product_count = 1;
  p.result = matrix;
  p.device = device;
  return p;
}

void a_step_is_one_launch_of_blocks_that_stay() {
  fake::machine.launches.clear();
  const int before = fake::machine.attribute_calls;
  fake::current_device = 0;
  fake::machine.contexts = {0};
  for (const int rows : {60, 300, 128 * 100}) check(ffn_step_launch(an_output(rows, 9), nullptr) == 0, "a step failed");
  const std::vector<fake::Launch>& all = fake::machine.launches;
  check(all.size() == 3 && all[0].blocks == 2 && all[0].cluster == 1, "a block for each tile of few rows");
  check(all[1].blocks == 12 && all[1].cluster == 2, "two together for neighbouring rows");
  check(all[2].blocks == 132 && all[2].cluster == 2, "as many as multiprocessors, and tiles in turn");
  for (const fake::Launch& launch : all) {
    check(launch.shared_bytes == hopper::kSharedBytes && launch.device == 9,
          "shared memory of the step, on its device");
    check(launch.early && !launch.cooperative, "it begins early, and no block waits for another's place");
  }
  check(fake::machine.attribute_calls - before == 1, "shared memory is allowed once");
  check(fake::current_device == 0, "the caller's device is current after a step");
}

void a_step_that_can_not_be_taken_launches_nothing() {
  fake::machine.launches.clear();
  FfnStepParams p = an_output(300, 9);
  p.products[0].depth = 0;
  check(ffn_step_launch(p, nullptr) == kStepUnsupported, "an unsupported step says so");
  check(ffn_step_launch(an_output(0, 9), nullptr) == 0, "no rows are no work");
  check(fake::machine.launches.empty(), "neither is launched");
  fake::machine.shared_bytes = 99 << 10;
  check(ffn_step_launch(an_output(300, 10), nullptr) == cudaErrorInvalidValue, "too little shared memory is an error");
  check(fake::machine.launches.empty(), "and not launched");
}

}  // namespace

int main() {
  begins_early_where_the_kernel_waits();
  is_one_launch_where_none_can_begin_early();
  goes_by_three_where_not_all_blocks_have_room();
  prepares_a_kernel_once();
  threads_with_different_plans();
  a_larger_chip_is_read_further_ahead();
  leaves_the_devices_as_they_were();
  a_step_is_one_launch_of_blocks_that_stay();
  a_step_that_can_not_be_taken_launches_nothing();
  return failures == 0 ? 0 : 1;
}
