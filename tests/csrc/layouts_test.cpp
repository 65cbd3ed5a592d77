// Checks the emulation's data layouts against the formulas of the PTX ISA: the kernels are written for the same
// layouts, so a mistake that both shared would show nowhere else. Exit status 1 with a line for each mistake.
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

using namespace memvp;

namespace {

int failures = 0;

template <class Kernel>
void run(const char* name, unsigned threads, size_t shared_bytes, Kernel kernel) {
  for (const emulation::Order order : {emulation::Order::kForward, emulation::Order::kReverse}) {
    emulation::Config config;
    config.order = order;
    try {
      emulation::run_launches({{1, threads, shared_bytes, kernel}}, config);
    } catch (const std::exception& error) {
      ++failures;
      printf("%s: %s\n", name, error.what());
    }
  }
}

void check(bool right, const char* what) {
  if (!right) emulation::fail(what);
}

// "Canonical Layouts" with the swizzle <3, 4, 3>: bits 4 to 6 of an address are crossed with bits 7 to 9.
template <class T, Major kMajor>
void operands() {
  constexpr unsigned kLeading = 4096, kStride = 2048;
  const auto place = [](bool along_k, int n, int k) {
    const unsigned linear = along_k ? n / 8 * kStride + n % 8 * 128 + k * 2
                                    : n / 64 * kLeading + k / 8 * kStride + k % 8 * 128 + n % 64 * 2;
    return linear ^ (linear & 0x380) >> 3;
  };
  const auto a_value = [](int row, int k) { return float((row * 7 + k * 3) % 11 - 5); };
  const auto b_value = [](int n, int k) { return float((n * 5 + k) % 13 - 6); };
  run("wgmma operands", 128, 2 * 65536, [&] {
    char *a = shared_at<char>(0, 65536), *b = shared_at<char>(65536, 65536);
    const int t = threadIdx.x;
    for (int i = t; i < 64 * 16; i += 128) {  // a begins at k = 32 of its rows
      const T value = round_to<T>(a_value(i / 16, i % 16));
      memcpy(a + (place(true, i / 16, i % 16) ^ 64), &value, 2);
    }
    for (int i = t; i < 256 * 16; i += 128) {
      const T value = round_to<T>(b_value(i / 16, i % 16));
      memcpy(b + place(kMajor == Major::kK, i / 16, i % 16), &value, 2);
    }
    fence_async_proxy();
    __syncthreads();
    float acc[128];
    wgmma_fence();
    for (const bool accumulate : {false, true})
      wgmma<T, kMajor>(acc, advance(make_descriptor(a, Major::kK, 0, kStride), 64),
                       make_descriptor(b, kMajor, kLeading, kStride), accumulate);
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < 128; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += 2 * a_value(row, k) * b_value(column, k);
      check(acc[i] == sum, "a sum of another row or column");
    }
  });
}

void tiles() {
  alignas(16) static uint16_t from[20][104], to[20][104];
  for (int y = 0; y < 20; ++y)
    for (int x = 0; x < 104; ++x) from[y][x] = static_cast<uint16_t>(1 + y * 104 + x);
  const int64_t sizes[] = {100, 20}, strides[] = {208};
  const int tile_shape[] = {64, 16};
  TensorMap source, target;
  failures += !make_tensor_map<Float16>(source, from, 2, sizes, strides, tile_shape);
  failures += !make_tensor_map<Float16>(target, to, 2, sizes, strides, tile_shape);
  for (const auto& [column, row] : {std::pair{0, 0}, std::pair{64, 8}, std::pair{-5, -3}, std::pair{200, 0}}) {
    const int first_column = column, first_row = row;
    memset(to, 0, sizeof(to));
    run("tiles", 32, 2048 + 8, [&] {
      uint16_t* tile = shared_at<uint16_t>(0, 1024);
      Barrier& full = *shared_at<Barrier>(2048, 1);
      if (threadIdx.x == 0) {
        init_barrier(full, 1);
        fence_barrier_init();
        arrive_expect_bytes(full, 2048);
        tma_load(tile, source, full, first_column, first_row);
      }
      __syncthreads();
      wait(full, 0);
      for (int i = threadIdx.x; i < 1024; i += 32) {
        const int y = first_row + i / 64, x = first_column + i % 64;
        const uint16_t wanted = y >= 0 && y < 20 && x >= 0 && x < 100 ? from[y][x] : 0;
        check(tile[i / 64 * 64 + (i % 64 / 8 ^ i / 64 % 8) * 8 + i % 8] == wanted, "an element of a tile");
      }
      if (threadIdx.x != 0) return;
      tma_store(target, tile, first_column, first_row);
      tma_commit_stores();
      tma_wait_stores<0>();
    });
    for (int y = 0; y < 20; ++y)
      for (int x = 0; x < 104; ++x) {
        const bool inside = x >= column && x < std::min(column + 64, 100) && y >= row && y < row + 16;
        failures += to[y][x] != (inside ? from[y][x] : 0);
      }
  }
}

void fragments() {
  run("fragments", 32, 1024, [] {  // a = 2 I, b counts: c must be 2 b
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto a = [](int row, int k) { return pack(BFloat16{}, row == k ? 2.0f : 0.0f, row == k + 1 ? 2.0f : 0.0f); };
    const auto b = [](int k, int n) { return float(k * 8 + n); };
    const auto b_pair = [&](int k, int n) { return pack(BFloat16{}, b(k, n), b(k + 1, n)); };
    float c[4] = {};
    mma_16x8x16(BFloat16{}, c, a(g, 2 * t), a(g + 8, 2 * t), a(g, 2 * t + 8), a(g + 8, 2 * t + 8), b_pair(2 * t, g),
                b_pair(2 * t + 8, g));
    for (int i = 0; i < 4; ++i) check(c[i] == 2 * b(g + i / 2 * 8, 2 * t + i % 2), "mma");

    uint4* rows = shared_at<uint4>(0, 64);
    const unsigned lane = threadIdx.x;
    uint32_t words[4];
    for (unsigned m = 0; m < 4; ++m) {  // each half names its matrix, row and column
      const unsigned first = m * 64 + lane / 4 * 8 + lane % 4 * 2;
      words[m] = first | (first + 1) << 16;
    }
    stmatrix(rows + lane, words);
    __syncthreads();
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(rows);
    for (unsigned i = 0; i < 8; ++i) check(halves[lane * 8 + i] == lane * 8 + i, "stmatrix");
    uint32_t found[4];
    ldmatrix(found, rows + lane);
    check(memcmp(found, words, sizeof(words)) == 0, "ldmatrix");
    ldmatrix_transposed(found, rows + lane);
    for (unsigned m = 0; m < 4; ++m)
      check(found[m] == (m * 64 + lane % 4 * 16 + lane / 4 | (m * 64 + lane % 4 * 16 + 8 + lane / 4) << 16),
            "ldmatrix.trans");
  });
}

// Every 16-bit number survives the way to float and back; ties go to even.
void numbers() {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto h = static_cast<uint16_t>(bits);
    if ((h & 0x7C00) != 0x7C00 || (h & 0x3FF) == 0) failures += half_of_float(float_of_half(h)) != h;
    if ((h & 0x7F80) != 0x7F80 || (h & 0x7F) == 0) failures += bfloat_of_float(float_of_bfloat(h)) != h;
  }
  failures += half_of_float(65519.9f) != 0x7BFF || half_of_float(65520.0f) != 0x7C00 ||
              half_of_float(1.0f + 0x1p-11f) != 0x3C00 || half_of_float(1.0f + 0x3p-11f) != 0x3C02 ||
              bfloat_of_float(1.0f + 0x1p-8f) != 0x3F80 || bfloat_of_float(1.0f + 0x3p-8f) != 0x3F82;
}

}  // namespace

int main() {
  operands<BFloat16, Major::kK>();
  operands<Float16, Major::kMN>();
  tiles();
  fragments();
  numbers();
  printf("%d failures\n", failures);
  return failures != 0;
}
