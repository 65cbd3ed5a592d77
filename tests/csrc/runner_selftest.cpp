// The runner's own test: small kernels with one mistake each must be named, right ones must pass, in three orders.
#include "common/memory.cuh"
#include "common/mma.cuh"

namespace {

using namespace memvp;
using host_run::bfloat_of_float;
using host_run::Config;
using host_run::fail;
using host_run::float_of_bfloat;
using host_run::float_of_half;
using host_run::half_of_float;
using host_run::Launch;
using host_run::Order;
using host_run::Range;
using host_run::run_chain;
using host_run::yield_point;

int failures = 0;

struct Shape {
  unsigned blocks = 1, threads = 32;
  size_t shared_bytes = 0;
};

template <class Kernel>
Launch launch_of(const Shape& shape, Kernel kernel, bool chained = false) {
  return {shape.blocks, shape.threads, shape.shared_bytes, kernel, chained, false};
}

template <class Kernel>
Launch cooperative_launch_of(const Shape& shape, Kernel kernel) {
  return {shape.blocks, shape.threads, shape.shared_bytes, kernel, false, true};
}

// `wanted`: part of the message; empty: no complaint.
void expect(const char* name, const std::string& wanted, const std::vector<Launch>& launches,
            const std::vector<Range>& inputs = {}) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    Config config;
    config.order = order;
    config.seed = 5;
    config.inputs = inputs;
    std::string message;
    try {
      run_chain(launches, config);
    } catch (const std::exception& error) {
      message = error.what();
    }
    const bool good = wanted.empty() ? message.empty() : message.find(wanted) != std::string::npos;
    if (!good) {
      ++failures;
      printf("%s (order %d): wanted \"%s\", got \"%s\"\n", name, static_cast<int>(order), wanted.c_str(),
             message.c_str());
    }
  }
}
template <class Kernel>
void expect(const char* name, const std::string& wanted, const Shape& shape, Kernel kernel,
            const std::vector<Range>& inputs = {}) {
  expect(name, wanted, {launch_of(shape, kernel)}, inputs);
}

void check(bool right, const char* what) {
  if (!right) fail(what);
}

uint32_t pack_bfloat(float low, float high) {
  return pack(BFloat16{}, low, high);
}

void right_kernels() {
  static float out[3][64];
  expect("shared memory between barriers", "", {3, 64, 256}, [] {
    float* shared = shared_at<float>(0, 64);
    shared[threadIdx.x] = static_cast<float>(blockIdx.x * 100 + threadIdx.x);
    __syncthreads();
    out[blockIdx.x][threadIdx.x] = shared[63 - threadIdx.x];
  });
  for (int b = 0; b < 3; ++b)
    for (int t = 0; t < 64; ++t) failures += out[b][t] != static_cast<float>(b * 100 + 63 - t);

  expect("fragments of the product", "", {1, 32}, [] {  // a = 2 I, b counts: c must be 2 b
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto a = [](int row, int k) { return row == k ? 2.0f : 0.0f; };
    const auto b = [](int k, int n) { return static_cast<float>(k * 8 + n); };
    float c[4] = {};
    mma_16x8x16(BFloat16{}, c, pack_bfloat(a(g, 2 * t), a(g, 2 * t + 1)),
                pack_bfloat(a(g + 8, 2 * t), a(g + 8, 2 * t + 1)), pack_bfloat(a(g, 2 * t + 8), a(g, 2 * t + 9)),
                pack_bfloat(a(g + 8, 2 * t + 8), a(g + 8, 2 * t + 9)), pack_bfloat(b(2 * t, g), b(2 * t + 1, g)),
                pack_bfloat(b(2 * t + 8, g), b(2 * t + 9, g)));
    for (int i = 0; i < 4; ++i) check(c[i] == 2 * b(g + i / 2 * 8, 2 * t + i % 2), "fragment layout");
  });

  expect("matrices from shared memory", "", {1, 32, 512}, [] {  // rows of words that name themselves
    uint4* rows = shared_at<uint4>(0, 32);
    const unsigned lane = threadIdx.x;
    rows[lane] = {lane * 4, lane * 4 + 1, lane * 4 + 2, lane * 4 + 3};
    __syncthreads();
    uint32_t words[4];
    load_matrices(words, rows + lane);
    for (unsigned i = 0; i < 4; ++i) check(words[i] == (i * 8 + lane / 4) * 4 + lane % 4, "matrix layout");
  });

  static uint4 source[32];
  for (unsigned i = 0; i < 32; ++i) source[i] = {i, i, i, i};
  expect("asynchronous copies", "", {1, 32, 1024}, [] {
    uint4* shared = shared_at<uint4>(0, 64);
    copy16_async(shared + threadIdx.x, source + threadIdx.x, true);
    commit_copies();
    copy16_async(shared + 32 + threadIdx.x, source, false);
    commit_copies();
    wait_copies<1>();
    check(shared[threadIdx.x].w == threadIdx.x, "first group has landed");
    wait_copies<0>();
    check(shared[32 + threadIdx.x].x == 0, "a copy that is not valid writes zeros");
  });

  static int made[6], sum;
  sum = 0;
  const auto maker = [] {
    let_next_grid_begin();
    yield_point();
    made[blockIdx.x] = 1;
  };
  const auto taker = [] {
    wait_for_previous_grid();
    if (threadIdx.x == 0)
      for (const int one : made) sum += one;
  };
  expect("a chained launch that waits", "", {launch_of({6, 32}, maker), launch_of({1, 32}, taker, true)});
  failures += sum != 3 * 6;

  static int met[9];
  expect("blocks that meet, twice", "", {cooperative_launch_of({9, 64}, [] {
           if (threadIdx.x == 7) met[blockIdx.x] = 1;
           meet_all_blocks();
           int found = 0;
           for (const int one : met) found += one;
           check(found == 9, "what a block wrote before the meeting");
           meet_all_blocks();
           if (threadIdx.x == 7) met[blockIdx.x] = 0;
         })});
  expect("shared memory put to another use", "", {2, 64, 256}, [] {
    shared_at<float>(0, 64)[threadIdx.x] = 1;
    renew_shared();
    check(std::isnan(shared_at<float>(128, 32)[threadIdx.x / 2]), "nothing is left of the first use");
  });

  for (unsigned bits = 0; bits < 65536; ++bits) {  // both number types survive the way to float and back
    const auto h = static_cast<uint16_t>(bits);
    if ((h & 0x7C00) != 0x7C00 || (h & 0x3FF) == 0) failures += half_of_float(float_of_half(h)) != h;
    if ((h & 0x7F80) != 0x7F80 || (h & 0x7F) == 0) failures += bfloat_of_float(float_of_bfloat(h)) != h;
  }
  failures += half_of_float(65519.9f) != 0x7BFF || half_of_float(65520.0f) != 0x7C00 ||
              half_of_float(1.0f + 0x1p-11f) != 0x3C00 || half_of_float(1.0f + 0x3p-11f) != 0x3C02 ||
              bfloat_of_float(1.0f + 0x1p-8f) != 0x3F80 || bfloat_of_float(1.0f + 0x3p-8f) != 0x3F82;
}

void wrong_kernels() {
  static float out[64];
  expect("a barrier after a return", "returned", {1, 64}, [] {
    if (threadIdx.x >= 50) return;
    __syncthreads();
  });
  expect("two barriers at once", "divergent __syncthreads", {1, 64}, [] {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncthreads();
  });
  expect("half a warp in the product", "deadlock", {1, 32}, [] {
    float c[4] = {};
    if (threadIdx.x < 16)
      mma_16x8x16(BFloat16{}, c, 0, 0, 0, 0, 0, 0);
    else
      __syncthreads();
  });
  expect("two collectives of one warp", "warp divergence", {1, 32, 512}, [] {
    float c[4] = {};
    uint32_t words[4];
    if (threadIdx.x < 16)
      mma_16x8x16(BFloat16{}, c, 0, 0, 0, 0, 0, 0);
    else
      load_matrices(words, shared_at<uint4>(0, 32));
  });
  expect("the product after a lane's return", "returned", {1, 32}, [] {
    float c[4] = {};
    if (threadIdx.x == 3) return;
    mma_16x8x16(BFloat16{}, c, 0, 0, 0, 0, 0, 0);
  });
  expect("shared memory past the launch's", "does not fit", {1, 32, 100}, [] { shared_at<float>(0, 26)[0] = 1; });
  expect("shared memory twice", "overlaps", {1, 32, 200}, [] {
    shared_at<float>(0, 20);
    shared_at<float>(64, 4);
  });
  expect("shared memory misaligned", "misaligned", {1, 32, 200}, [] { shared_at<float>(2, 4); });
  expect("a misaligned load", "misaligned", {1, 32}, [] { load_input16(reinterpret_cast<char*>(out) + 4, true); });
  expect("the read-only path outside of the inputs", "outside of every input", {1, 32}, [] { load_input(out + 32); },
         {{out, 128}});
  expect("a written input", "was written", {1, 32}, [] { out[threadIdx.x] += 1; }, {{out, 128}});
  expect("copies not waited for", "not waited for", {1, 32, 512},
         [] { copy16_async(shared_at<uint4>(0, 32) + threadIdx.x, out, true); });
  expect("an exception", "exception in kernel", {1, 32}, [] {
    if (threadIdx.x == 7) throw std::runtime_error("thrown");
    __syncthreads();
  });
  expect("no barrier", "a value that nobody wrote", {1, 64, 256}, [] {
    float* shared = shared_at<float>(0, 64);
    shared[threadIdx.x] = 1;
    if (std::isnan(shared[63 - threadIdx.x])) fail("a value that nobody wrote");
  });
  const auto idle = [] {};
  expect("a chained launch that never waits", "without waiting",
         {launch_of({6, 32}, idle), launch_of({2, 32}, idle, true)});
  static float late[2];
  late[0] = late[1] = NAN;
  const auto late_maker = [] {
    let_next_grid_begin();
    __syncthreads();
    late[blockIdx.x] = 1;
  };
  const auto early = [] {
    const bool missing = std::isnan(late[0] + late[1]);
    wait_for_previous_grid();
    __syncthreads();
    late[0] = late[1] = NAN;
    if (missing) fail("read before it was written");
  };
  expect("a chained launch that reads first", "read before",
         {launch_of({2, 32}, late_maker), launch_of({2, 32}, early, true)});
  expect("a meeting of blocks that need not be resident", "not cooperative", {2, 32}, [] { meet_all_blocks(); });
  expect("a block that is not at the meeting", "deadlock", {cooperative_launch_of({6, 32}, [] {
           if (blockIdx.x != 4) meet_all_blocks();
         })});
  expect("a thread that is not at the meeting", "deadlock", {cooperative_launch_of({2, 64}, [] {
           if (threadIdx.x == 63 && blockIdx.x == 1) __syncthreads();
           meet_all_blocks();
         })});
  expect("an impossible launch", "impossible", {1, 2048}, [] {});
}

}  // namespace

int main() {
  right_kernels();
  wrong_kernels();
  printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
