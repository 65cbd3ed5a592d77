// Epilogues: what becomes of a tile's sums. In a gated kHidden the first 64 of a thread's accumulators are gate's and
// the other 64 key's, of the same rows and columns.
#pragma once
#include "common/activations.cuh"
#include "hopper/subtiles.cuh"

namespace memvp::hopper {

// acc += bias of 8 kBlocks columns from `column` on. Past the last column, where nothing is stored, any bias will do.
template <class T, int kFirst, int kBlocks>
MEMVP_DEVICE void add_bias(float (&acc)[kColumns / 2], const GemmVector& bias, int column, int columns) {
  const auto add = [&](auto pair_at) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      float low, high;
      pair_at(least(column + 8 * j, columns - 8) + static_cast<int>(threadIdx.x) % 4 * 2, low, high);
      acc[kFirst + 4 * j] += low;
      acc[kFirst + 4 * j + 1] += high;
      acc[kFirst + 4 * j + 2] += low;
      acc[kFirst + 4 * j + 3] += high;
    }
  };
  if (bias.data == nullptr) return;
  if (bias.wide) {
    add([&](int at, float& low, float& high) {
      low = load_input(static_cast<const float*>(bias.data) + at);
      high = load_input(static_cast<const float*>(bias.data) + at + 1);
    });
  } else {
    add([&](int at, float& low, float& high) {
      const uint32_t word = load_input(static_cast<const uint32_t*>(bias.data) + at / 2);
      low = low_float<T>(word);
      high = high_float<T>(word);
    });
  }
}

// body(the activation as a constant).
template <class Body>
MEMVP_DEVICE void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    default:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

template <class T, bool kGated>
MEMVP_DEVICE void hidden_epilogue(float (&acc)[kColumns / 2], const GemmArgs& args, Staging& staging, const Tile& at) {
  constexpr int kOwn = kGated ? kSubtiles / 2 : kSubtiles;  // subtiles of one branch
  constexpr int kKey = kGated ? kColumns / 4 : 0;           // key's first accumulator
  const GemmPlan& plan = args.plan;
  if (kGated) add_bias<T, 0, 8 * kOwn>(acc, args.gate_bias, at.column, plan.columns);
  add_bias<T, kKey, 8 * kOwn>(acc, args.bias, at.column, plan.columns);
  uint32_t words[kWords];
  if (plan.keeps_pre) {
    for_subtiles<kOwn>(at.column, plan.columns, [&](auto subtile) {
      constexpr int kFirst = decltype(subtile)::value * 32;
      const int column = at.column + 2 * kFirst;
      pack_subtile<T, kFirst>(words, acc);
      staging.store(words, args.maps[kPre], plan.rows, at.row, column, 0);
      if constexpr (kGated) {
        pack_subtile<T, kKey + kFirst>(words, acc);
        staging.store(words, args.maps[kPre], plan.rows, at.row, column, 1);
      }
    });
  }
  if (!plan.keeps_result) return;
  with_activation(args.activation, [&](auto activation) {
#pragma unroll
    for (int i = 0; i < 32 * kOwn; ++i)
      acc[i] = activate(decltype(activation)::value, acc[i]) * (kGated ? acc[kKey + i] : 1.0f);
  });
  for_subtiles<kOwn>(at.column, plan.columns, [&](auto subtile) {
    constexpr int kFirst = decltype(subtile)::value * 32;
    pack_subtile<T, kFirst>(words, acc);
    staging.store(words, args.maps[kResult], plan.rows, at.row, at.column + 2 * kFirst);
  });
}

template <class T>
MEMVP_DEVICE void shared_epilogue(const float (&acc)[kColumns / 2], const GemmArgs& args, Staging& staging,
                                  const Tile& at) {
  uint32_t words[kWords];
  for_subtiles<kSubtiles>(at.column, args.plan.shared_columns, [&](auto subtile) {
    constexpr int kFirst = decltype(subtile)::value * 32;
    pack_subtile<T, kFirst>(words, acc);
    staging.store(words, args.maps[kSharedResult], args.plan.rows, at.row, at.column + 2 * kFirst);
  });
}

template <class T>
MEMVP_DEVICE void output_epilogue(float (&acc)[kColumns / 2], const GemmArgs& args, const SharedStorage& shared,
                                  PipelineState& state, Staging& staging, const Tile& at, int group) {
  const GemmPlan& plan = args.plan;
  add_bias<T, 0, 8 * kSubtiles>(acc, args.bias, at.column, plan.columns);
  uint32_t words[kWords];
  for_subtiles<kSubtiles>(at.column, plan.columns, [&](auto subtile) {
    constexpr int kFirst = decltype(subtile)::value * 32;
    if (plan.reads) {
      wait(shared.full[state.stage], state.parity);
      read_subtile(words, shared.stages + state.stage * kStageBytes + group * kBlockBytes);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        acc[kFirst + 2 * i] += low_float<T>(words[i]);
        acc[kFirst + 2 * i + 1] += high_float<T>(words[i]);
      }
    }
    pack_subtile<T, kFirst>(words, acc);
    staging.store(words, args.maps[kResult], plan.rows, at.row, at.column + 2 * kFirst);
    if (plan.reads) {  // behind the barriers of the store: all lanes have read
      release_stage(plan, shared, state.stage);
      state.next();
    }
  });
}

template <class T, bool kGated>
MEMVP_DEVICE void dhidden_epilogue(const float (&acc)[kColumns / 2], const GemmArgs& args, const SharedStorage& shared,
                                   PipelineState& state, Staging& staging, const Tile& at, int group) {
  const GemmPlan& plan = args.plan;
  uint32_t first[kWords], key[kWords];  // gate's pre-activations and key's, or key's alone; then their gradients
  for_subtiles<kSubtiles>(at.column, plan.columns, [&](auto subtile) {
    constexpr int kFirst = decltype(subtile)::value * 32;
    wait(shared.full[state.stage], state.parity);
    const unsigned char* const stage = shared.stages + state.stage * kStageBytes + group * kBlockBytes;
    read_subtile(first, stage);
    if (kGated) read_subtile(key, stage + kLeftBytes);
    with_activation(args.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        float of_first[2], of_key[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float pre = half == 0 ? low_float<T>(first[i]) : high_float<T>(first[i]);
          const float dhidden = acc[kFirst + 2 * i + half];
          float slope;
          const float active = activate_with_slope(decltype(activation)::value, pre, slope);
          of_key[half] = dhidden * active;
          of_first[half] = dhidden * slope;
          if (kGated) of_first[half] *= half == 0 ? low_float<T>(key[i]) : high_float<T>(key[i]);
        }
        first[i] = pack(T{}, of_first[0], of_first[1]);
        if (kGated) key[i] = pack(T{}, of_key[0], of_key[1]);
      }
    });
    const int column = at.column + 2 * kFirst;
    staging.store(first, args.maps[kPre], plan.rows, at.row, column, 0);
    release_stage(plan, shared, state.stage);  // behind the barriers of the store: all lanes have read
    state.next();
    if (kGated) staging.store(key, args.maps[kPre], plan.rows, at.row, column, 1);
  });
}

}  // namespace memvp::hopper
