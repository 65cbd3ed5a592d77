// The model of Hopper's units: layouts are those of the PTX ISA, a small product is right in every order, and each
// mistake in it is noticed. With the argument "right" only what must pass, under two schedules; with "race" one mistake
// that the thread sanitizer must name.
#include "hopper_mistakes.h"

namespace {

using namespace memvp;
using namespace memvp::hopper_test;

// Bytes from a tile's beginning to an element of its row r.
int in_tile(int r, int x) {
  return r * 128 + (x / 8 ^ r % 8) * 16 + x % 8 * 2;
}

void tiles() {
  Tensor<Float16> from{3, 20, 100}, to{3, 20, 100};
  from.fill([](int64_t z, int64_t y, int64_t x) { return Float16{uint16_t(1 + z * 2000 + y * 100 + x)}; });
  const TensorMap map = from.map(3, 8, 2), flat = from.map(2, 16), out = to.map(3, 8, 2), flat_out = to.map(2, 16);
  struct Corner {
    int column, row, page;
  };
  for (const Corner& at : {Corner{0, 0, 0}, Corner{64, 8, 1}, Corner{-5, -3, -1}, Corner{91, 17, 2}, Corner{200, 0, 0}})
    for (const bool pages : {true, false}) {
      to.fill([](int64_t, int64_t, int64_t) { return Float16{0}; });
      expect("a tile there and back", "", 32, 2048 + 8, [&] {
        char* tile = shared_at<char>(0, 2048);
        Barrier* full = shared_at<Barrier>(2048, 1);
        if (threadIdx.x == 0) {
          init_barrier(*full, 1);
          publish_barriers();
          arrive_expecting(*full, 2048);
          if (pages)
            load_tile(tile, map, *full, at.column, at.row, at.page);
          else
            load_tile(tile, flat, *full, at.column, at.row);
        }
        __syncthreads();
        wait(*full, 0);
        for (int r = 0; r < 16; ++r)
          for (int x = static_cast<int>(threadIdx.x); x < 64; x += 32) {
            const int z = pages ? at.page + r / 8 : 0, y = at.row + (pages ? r % 8 : r);
            uint16_t got;
            memcpy(&got, tile + in_tile(r, x), 2);
            check(got == (from.has(z, y, at.column + x) ? from.at(z, y, at.column + x).bits : 0), "a tile's layout");
            got = uint16_t(got + 1);
            memcpy(tile + in_tile(r, x), &got, 2);
          }
        fence_async_shared();
        __syncthreads();
        if (threadIdx.x != 5) return;
        if (pages)
          store_tile(out, tile, at.column, at.row, at.page);
        else
          store_tile(flat_out, tile, at.column, at.row);
        commit_stores();
        wait_stores<0>();
      });
      for (int64_t z = 0; z < 3; ++z)
        for (int64_t y = 0; y < 20; ++y)
          for (int64_t x = 0; x < 100; ++x) {
            const bool inside = x >= at.column && x < at.column + 64 && y >= at.row && y < at.row + (pages ? 8 : 16) &&
                                (pages ? z >= at.page && z < at.page + 2 : z == 0);
            if (to.at(z, y, x).bits != (inside ? from.at(z, y, x).bits + 1 : 0)) complain("a stored tile's layout");
          }
    }
}

// Operands where the PTX ISA's "Canonical Layouts" say that an element is, written there by threads; the swizzle is its
// Swizzle<3, 4, 3>: bits 4 to 6 of an address are crossed with bits 7 to 9.
template <class T, int N, Major kB>
void operands() {
  constexpr unsigned kLeading = 4096, kStride = 2048;  // with gaps in between
  const auto place = [](bool along_k, int n, int k) {
    const unsigned linear = along_k ? n / 8 * kStride + n % 8 * 128 + k * 2
                                    : n / 64 * kLeading + k / 8 * kStride + k % 8 * 128 + n % 64 * 2;
    return linear ^ (linear & 0x380) >> 3;
  };
  const auto a_value = [](int row, int k) { return float((row * 7 + k * 3) % 11 - 5); };
  const auto b_value = [](int n, int k) { return float((n * 5 + k) % 13 - 6); };
  expect("operands in shared memory", "", 128, 2 * 65536, [&] {
    char *a = shared_at<char>(0, 65536), *b = shared_at<char>(65536, 65536);
    const int t = threadIdx.x;
    for (int i = t; i < 64 * 16; i += 128) {
      const T value = round_to<T>(a_value(i / 16, i % 16));
      memcpy(a + (place(true, i / 16, i % 16) ^ 64), &value, 2);  // 64 bytes along its row
    }
    for (int i = t; i < N * 16; i += 128) {
      const T value = round_to<T>(b_value(i / 16, i % 16));
      memcpy(b + place(kB == Major::kK, i / 16, i % 16), &value, 2);
    }
    fence_async_shared();
    __syncthreads();
    float acc[N / 2];
    for (float& one : acc) one = 100;
    begin_products();
    for (const bool accumulate : {false, true, true})  // a begins at k = 32 of its rows
      multiply<T, N, kB>(acc, advance(operand(a, Major::kK, 0, kStride), 64), operand(b, kB, kLeading, kStride),
                         accumulate);
    commit_products();
    wait_products<0>();
    for (int j = 0; j < N / 8; ++j)
      for (int i = 0; i < 4; ++i) {
        const int row = t / 32 * 16 + t % 32 / 4 + i / 2 * 8, column = j * 8 + t % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += 3 * a_value(row, k) * b_value(column, k);
        check(acc[4 * j + i] == sum, "a product of operands at their places");
      }
  });
}

void matrices() {
  expect("matrices to shared memory", "", 32, 1024, [] {  // words that name themselves
    uint16_t* rows = shared_at<uint16_t>(0, 512);
    const unsigned lane = threadIdx.x;
    uint32_t words[4];
    for (unsigned m = 0; m < 4; ++m) {
      const unsigned first = m * 64 + lane / 4 * 8 + lane % 4 * 2;
      words[m] = first | (first + 1) << 16;
    }
    store_matrices(rows + lane * 8, words);
    store_matrices_transposed(rows + 256 + lane * 8, words);
    __syncthreads();
    for (unsigned i = 0; i < 8; ++i) {
      check(rows[lane * 8 + i] == lane * 8 + i, "matrix layout");
      check(rows[256 + lane * 8 + i] == lane / 8 * 64 + i * 8 + lane % 8, "transposed matrix layout");
    }
  });
}

// ---- barriers and registers ---------------------------------------------------------------------

void right_barriers() {
  expect("what was written before arriving", "", 64, 1024, [] {  // one warp to the other and back, three times
    int* value = shared_at<int>(0, 32);
    Barrier* barriers = shared_at<Barrier>(128, 2);
    if (threadIdx.x == 40) {
      init_barrier(barriers[0], 32);
      init_barrier(barriers[1], 32);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int round = 0; round < 3; ++round) {
      if (threadIdx.x < 32) {
        if (round > 0) wait(barriers[1], (round - 1) % 2);
        value[lane] = 100 * round + lane;
        arrive(barriers[0]);
      } else {
        wait(barriers[0], round % 2);
        check(value[31 - lane] == 100 * round + 31 - lane, "a value that was not there yet");
        arrive(barriers[1]);
      }
    }
  });
  expect("what was written before a numbered barrier", "", 96, 256, [] {
    int* value = shared_at<int>(0, 64);
    if (threadIdx.x < 64) {
      value[threadIdx.x] = static_cast<int>(threadIdx.x);
      arrive_some(3, 96);
    } else {
      sync_some(3, 96);
      check(value[threadIdx.x - 64] == static_cast<int>(threadIdx.x - 64), "a value that was not there yet");
    }
  });
  expect("registers from one warpgroup to the others", "", 384, 0, [] {
    if (threadIdx.x < 128)
      lower_registers<40>();
    else
      raise_registers<232>();
  });
}

void wrong_kernels() {
  expect("a barrier that nobody made", "no barrier there", 32, 64, [] { arrive(*shared_at<Barrier>(0, 1)); });
  expect("a barrier written over", "no barrier there", 32, 64, [] {
    Barrier* barrier = shared_at<Barrier>(0, 1);
    if (threadIdx.x == 0) init_barrier(*barrier, 32);
    __syncthreads();
    if (threadIdx.x == 0) barrier->state = 0;
    __syncthreads();
    arrive(*barrier);
  });
  expect("a barrier outside of shared memory", "outside of shared memory", 32, 64, [] {
    static Barrier barrier;
    init_barrier(barrier, 32);
  });
  const auto one_thread = [](const char* name, const std::string& wanted, auto use) {  // with a barrier of its own
    expect(name, wanted, 32, 8192, [use] {
      Barrier* barrier = shared_at<Barrier>(4096, 1);
      if (threadIdx.x != 0) return;
      init_barrier(*barrier, 1);
      publish_barriers();
      use(*barrier);
    });
  };
  one_thread("parity two", "parity 2", [](Barrier& barrier) { wait(barrier, 2); });
  one_thread("a phase that never ends", "which lacks 1 of 1 arrivals and 0 bytes", [](Barrier& b) { wait(b, 0); });
  one_thread("more bytes than a barrier counts", "cannot count", [](Barrier& b) { arrive_expecting(b, 1 << 20); });

  static Tensor<BFloat16> tensor{1, 64, 64};
  tensor.fill([](int64_t, int64_t, int64_t) { return BFloat16{0}; });
  static const TensorMap map = tensor.map(2, 16);
  one_thread("a map that nobody made", "make_map has not made",
             [](Barrier& b) { load_tile(shared_at<char>(0, 2048), TensorMap{}, b, 0, 0); });
  one_thread("three coordinates of two dimensions", "3 coordinates",
             [](Barrier& b) { load_tile(shared_at<char>(0, 2048), map, b, 0, 0, 0); });
  one_thread("a tile past its part of shared memory", "outside of shared memory",
             [](Barrier& b) { load_tile(shared_at<char>(0, 2032), map, b, 0, 0); });
  one_thread("a tile as late as can be, or at once", "", [](Barrier& barrier) {
    uint16_t* tile = shared_at<uint16_t>(0, 1024);
    tile[0] = 1;
    load_tile(tile, map, barrier, 0, 0);
    const uint16_t now = tile[0];
    arrive_expecting(barrier, 2048);
    wait(barrier, 0);
    const Order order = host_run::run().config.order;
    check(now == (order == Order::kForward ? 0xFFFF : order == Order::kReverse ? 0 : now), "when a tile lands");
    check(tile[0] == 0, "a tile that was waited for");
  });
  expect("what a store reads, written meanwhile", "has written what it reads", 32, 2048,
         [] {
           uint16_t* tile = shared_at<uint16_t>(0, 1024);
           if (threadIdx.x != 0) return;
           memset(tile, 0, 2048);
           fence_async_shared();
           store_tile(map, tile, 0, 0);
           commit_stores();
           tile[0] = 1;
           wait_stores_read<0>();
         },
         {{Order::kForward, 1}});  // where it reads late
  expect("a barrier that another thread publishes", "without publish_barriers", 32, 8192, [] {
    Barrier* barrier = shared_at<Barrier>(4096, 1);
    if (threadIdx.x == 0) init_barrier(*barrier, 1);
    __syncthreads();
    if (threadIdx.x != 1) return;
    publish_barriers();
    load_tile(shared_at<char>(0, 2048), map, *barrier, 0, 0);
  });
  expect("half a warp at a numbered barrier", "sync_some", 32, 0, [] {
    if (threadIdx.x < 16) sync_some(1, 32);
  });
  expect("barrier 0 by its number", "1 to 15", 32, 0, [] { sync_some(0, 32); });
  expect("half a warp's number", "whole warps", 64, 0, [] { sync_some(1, 48); });
  expect("two numbers of threads", "others meet as", 96, 0, [] { sync_some(1, threadIdx.x < 32 ? 64 : 96); });
  expect("more registers than others give up", "for registers, of which 8 a thread are free", 384, 0, [] {
    if (threadIdx.x < 128)
      lower_registers<160>();
    else if (threadIdx.x < 256)
      raise_registers<184>();
  });
  expect("fewer registers by raising", "to 40 registers, from 256", 256, 0, [] { raise_registers<40>(); });
  expect("more registers by lowering", "to 200 registers, from 168", 384, 0, [] { lower_registers<200>(); });
  expect("two numbers of registers", "different numbers", 128, 0,
         [] { host_run::change_registers(threadIdx.x < 64 ? 40 : 48, false, {"", 0, "lower_registers"}); });

  const auto product = [](auto after) {
    return [after] {
      char* tile = shared_at<char>(0, 8192);
      memset(tile + threadIdx.x * 64, 0, 64);
      fence_async_shared();
      __syncthreads();
      float acc[32] = {};
      const Operand one = operand(tile, Major::kK, 0, 1024);
      begin_products();
      multiply<BFloat16, 64, Major::kK>(acc, one, one, false);
      after(acc, one);
    };
  };
  expect("a product of 96 threads", "by 128 threads together", 96, 8192, product([](auto&, Operand) {}));
  expect("products not committed", "not committed", 128, 8192, product([](auto&, Operand) {}));
  expect("products not waited for", "not waited for", 128, 8192, product([](auto&, Operand) { commit_products(); }));
  expect("accumulators read too soon", "a number that is not there yet", 128, 8192, product([](auto& acc, Operand) {
           if (std::isnan(acc[7])) fail("a number that is not there yet");
         }));
  expect("accumulators written too soon", "were touched", 128, 8192, product([](auto& acc, Operand) {
           commit_products();
           acc[7] = 0;
           wait_products<0>();
         }));
  expect("an operand past its part of shared memory", "past its part", 128, 8192, product([](auto& acc, Operand one) {
           multiply<BFloat16, 64, Major::kK>(acc, one, advance(one, 1024), true);
           commit_products();
           wait_products<0>();
         }));
  expect("a second group that nothing begins", "begin_products comes before", 128, 8192,
         product([](auto& acc, Operand one) {
           commit_products();
           multiply<BFloat16, 64, Major::kK>(acc, one, one, true);
         }));
  expect("two warps with another b", "different operands", 128, 8192, product([](auto& acc, Operand one) {
           multiply<BFloat16, 64, Major::kK>(acc, one, threadIdx.x < 64 ? one : advance(one, 32), true);
         }));
  expect("operands without a fence", "without fence_async_shared", 128, 8192, [] {
    char* tile = shared_at<char>(0, 8192);
    memset(tile + threadIdx.x * 64, 0, 64);
    __syncthreads();
    float acc[32];
    const Operand one = operand(tile, Major::kK, 0, 1024);
    begin_products();
    multiply<BFloat16, 64, Major::kK>(acc, one, one, false);
    commit_products();
    wait_products<0>();
  });
  expect("an operand at an odd place", "multiples of 16", 128, 8192,
         [] { operand(shared_at<char>(0, 8192) + 8, Major::kK, 0, 1024); });

  TensorMap made;
  const int64_t sizes[] = {64, 64, 2}, strides[] = {128, 8192}, odd[] = {136, 8192}, none[] = {64, 0, 2};
  const int box[] = {64, 64, 1}, wide[] = {128, 64, 1}, tall[] = {64, 257, 1};
  const char* base = reinterpret_cast<const char*>(tensor.data());
  const auto refused = [&made](int error) { return error == kMapInvalid; };
  check(make_map<BFloat16>(made, base, 3, sizes, strides, box) == 0, "a right map");
  if (!refused(make_map<BFloat16>(made, base + 8, 3, sizes, strides, box)) ||
      !refused(make_map<BFloat16>(made, nullptr, 3, sizes, strides, box)) ||
      !refused(make_map<BFloat16>(made, base, 4, sizes, strides, box)) ||
      !refused(make_map<BFloat16>(made, base, 3, none, strides, box)) ||
      !refused(make_map<BFloat16>(made, base, 3, sizes, odd, box)) ||
      !refused(make_map<BFloat16>(made, base, 3, sizes, strides, wide)) ||
      !refused(make_map<BFloat16>(made, base, 3, sizes, strides, tall)))
    complain("a tensor that no map takes");
}

}  // namespace

int main(int count, char** arguments) {
  const std::string part = count > 1 ? arguments[1] : "";
  if (part == "race") {
    kAlongK({1, 64, 64, 64}, kNoSyncAfterInit, {Order::kForward, 1});
    return 0;
  }
  if (part == "right") schedules.resize(2);
  tiles();
  operands<BFloat16, 128, Major::kK>();
  operands<Float16, 256, Major::kMN>();
  matrices();
  right_barriers();
  right_product("64 columns along k", kAlongK, {2, 100, 120, 300});
  right_product("128 columns along n", kAlongN, {2, 100, 120, 300});
  right_product("256 columns along k", kWideAlongK, {1, 200, 264, 136});
  right_product("256 columns along n", kWideAlongN, {1, 70, 264, 136});
  if (part.empty()) {
    wrong_kernels();
    for (const Noticed& bug : kNoticed) noticed(bug);
  }
  printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
