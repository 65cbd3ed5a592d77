// The launchers themselves, csrc/decode/ffn_decode.cu and csrc/hopper/ffn_gemm.cu, over a made-up runtime: which
// launches use PDL, what is set and how often, which device is current afterwards. Prints what is wrong; exit status 1
// then.
#include <cstdio>
#include <thread>

#include "decode/ffn_decode.cu"
#define MEMVP_HAS_SM90A
#include "hopper/ffn_gemm.cu"

namespace memvp::decode {

template <class T, int kNumber>
void kernel(DecodeArgs) {}

#define MEMVP_KERNEL(name, number)                         \
  template <class T>                                       \
  DecodeKernel name(const DecodePlan&) {                   \
    return kernel<T, number>;                              \
  }                                                        \
  template DecodeKernel name<BFloat16>(const DecodePlan&); \
  template DecodeKernel name<Float16>(const DecodePlan&);
MEMVP_KERNEL(hidden_kernel_of, 1)
MEMVP_KERNEL(values_kernel_of, 2)
MEMVP_KERNEL(finish_kernel_of, 3)
MEMVP_KERNEL(cooperative_kernel_of, 4)

}  // namespace memvp::decode

namespace memvp::hopper {

template <class T>
void kernel(GemmArgs) {}
template <class T>
GemmKernel gemm_kernel_of(GemmKind, bool) {
  return kernel<T>;
}
template GemmKernel gemm_kernel_of<BFloat16>(GemmKind, bool);
template GemmKernel gemm_kernel_of<Float16>(GemmKind, bool);

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

void compiled_for(int ptx_version, int capability = 9, int driver = 13000) {
  fake::machine.ptx_version = ptx_version;
  fake::machine.capability = capability;
  fake::machine.driver = driver;
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
std::vector<bool> pdl_launches(int device, DecodeForm form = DecodeForm::kPdl) {
  std::vector<bool> pdl;
  for (const fake::Launch& launch : launches_of(in_form(form, 1, device))) pdl.push_back(launch.pdl);
  return pdl;
}
bool is_cooperative(const std::vector<fake::Launch>& all) {
  return all.size() == 1 && all[0].cooperative && !all[0].pdl;
}

// Each on a device of its own: what is known of a kernel there is known for good.
void uses_pdl_where_chip_driver_and_kernel_have_it() {
  const std::vector<bool> none(3), later{false, true, true};
  compiled_for(90);
  check(pdl_launches(1) == later, "sm_90: the second and third launch");
  check(pdl_launches(1, DecodeForm::kAuto) == later, "sm_90: by default");
  compiled_for(100, 10);
  check(pdl_launches(2) == later, "sm_100");
  compiled_for(90, 12);
  check(pdl_launches(3) == none, "sm_120: graphs that capture such launches are reported to fail");
  compiled_for(80, 8);
  check(pdl_launches(4) == none, "sm_80 has none");
  compiled_for(80);
  check(pdl_launches(14) == none, "compiled on a 9.0 for sm_80: no kernel waits");
  compiled_for(90, 9, 12020);
  check(pdl_launches(15) == none, "a driver before 12.3 captures no such launch");
}

void is_cooperative_without_pdl() {
  compiled_for(80, 8);
  check(is_cooperative(launches_of(in_form(DecodeForm::kAuto, 16, 11))), "sm_80: one launch");
  check(fake::machine.launches[0].blocks <= 132, "a block on each multiprocessor");
  check(launches_of(in_form(DecodeForm::kAuto, 17, 11)).size() == 3, "of many tokens three");
  compiled_for(90);
  check(is_cooperative(launches_of(in_form(DecodeForm::kCooperative, 1, 12))), "sm_90: when asked for");
}

void is_three_launches_where_not_all_blocks_have_room() {
  compiled_for(80, 8);
  fake::machine.resident = 100;
  const std::vector<fake::Launch> all = launches_of(in_form(DecodeForm::kAuto, 1, 13));
  check(all.size() == 3 && !all[0].cooperative, "three launches need no room for all");
  check(fake::machine.last_error == cudaSuccess, "no error is left for the caller's next call");
  check(ffn_decode_launch(in_form(DecodeForm::kCooperative, 1, 13), nullptr) == cudaErrorCooperativeLaunchTooLarge,
        "one launch that was asked for says why it can't be");
  fake::machine.resident = 132;
  fake::machine.last_error = cudaSuccess;
}

void prepares_a_kernel_once() {
  compiled_for(90);
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
}

// A product of (rows, 64) and (64, 512), whose addresses are never read.
FfnGemmParams an_output(int rows, int device) {
  const GemmMatrix matrix{reinterpret_cast<const void*>(4096), 512};
  FfnGemmParams p;
  p.rows = rows;
  p.columns = 512;
  p.products[0] = {matrix, matrix, 64, true};
  p.product_count = 1;
  p.result = matrix;
  p.device = device;
  return p;
}

void a_product_is_one_persistent_launch() {
  fake::machine.launches.clear();
  const int before = fake::machine.attribute_calls;
  fake::current_device = 0;
  fake::machine.contexts = {0};
  for (const int rows : {60, 300, 128 * 100})
    check(ffn_gemm_launch(an_output(rows, 9), nullptr) == 0, "a product failed");
  const std::vector<fake::Launch>& all = fake::machine.launches;
  check(all.size() == 3 && all[0].blocks == 2 && all[0].cluster == 1, "a block for each tile of few rows");
  check(all[1].blocks == 12 && all[1].cluster == 2, "two together for neighbouring rows");
  check(all[2].blocks == 132 && all[2].cluster == 2, "as many as multiprocessors, and tiles in turn");
  for (const fake::Launch& launch : all) {
    check(launch.shared_bytes == hopper::kSharedBytes && launch.device == 9, "its shared memory, on its device");
    check(launch.pdl && !launch.cooperative, "with PDL, and no block waits for another's place");
  }
  check(fake::machine.attribute_calls - before == 2, "attributes are set once");
  check(fake::current_device == 0, "the caller's device is current after a product");
}

void an_unsupported_product_launches_nothing() {
  fake::machine.launches.clear();
  FfnGemmParams p = an_output(300, 9);
  p.products[0].depth = 0;
  check(ffn_gemm_launch(p, nullptr) == kGemmUnsupported, "an unsupported product says so");
  check(ffn_gemm_launch(an_output(0, 9), nullptr) == 0, "no rows are no work");
  check(fake::machine.launches.empty(), "neither is launched");
  fake::machine.shared_bytes = 99 << 10;
  check(ffn_gemm_launch(an_output(300, 10), nullptr) == cudaErrorInvalidValue, "too little shared memory is an error");
  check(fake::machine.launches.empty(), "and not launched");
}

}  // namespace

int main() {
  uses_pdl_where_chip_driver_and_kernel_have_it();
  is_cooperative_without_pdl();
  is_three_launches_where_not_all_blocks_have_room();
  prepares_a_kernel_once();
  threads_with_different_plans();
  a_larger_chip_is_read_further_ahead();
  leaves_the_devices_as_they_were();
  a_product_is_one_persistent_launch();
  an_unsupported_product_launches_nothing();
  return failures == 0 ? 0 : 1;
}
