// What becomes of a tile's sums: biases, activation, the gradients of both, and how they are stored. Of a gated kHidden
// the first 64 of a thread's accumulators are gate's and the other 64 key's, of the same rows and columns.
#pragma once
#include "common/activations.cuh"
#include "hopper/pieces.cuh"

namespace memvp::hopper {

// acc += bias of 8 kBlocks columns from `column` on; outside of the result, where nothing is stored, some other's.
template <class T, int kFirst, int kBlocks>
MEMVP_DEVICE void add_bias(float (&acc)[kColumns / 2], const StepVector& bias, int column, int columns) {
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
MEMVP_DEVICE void with_activation(DecodeActivation activation, Body body) {
  switch (activation) {
    case DecodeActivation::kRelu:
      return body(std::integral_constant<DecodeActivation, DecodeActivation::kRelu>{});
    case DecodeActivation::kGelu:
      return body(std::integral_constant<DecodeActivation, DecodeActivation::kGelu>{});
    case DecodeActivation::kGeluTanh:
      return body(std::integral_constant<DecodeActivation, DecodeActivation::kGeluTanh>{});
    default:
      return body(std::integral_constant<DecodeActivation, DecodeActivation::kSilu>{});
  }
}

template <class T, bool kGated>
MEMVP_DEVICE void end_hidden(float (&acc)[kColumns / 2], const StepArgs& args, Staging& staging, const Tile& at) {
  constexpr int kOwn = kGated ? kPieces / 2 : kPieces;  // pieces of one branch
  constexpr int kKey = kGated ? kColumns / 4 : 0;       // key's first accumulator
  const StepPlan& plan = args.plan;
  if (kGated) add_bias<T, 0, 8 * kOwn>(acc, args.gate_bias, at.column, plan.columns);
  add_bias<T, kKey, 8 * kOwn>(acc, args.bias, at.column, plan.columns);
  uint32_t words[kWords];
  if (plan.keeps_pre) {
    for_pieces<kOwn>(at.column, plan.columns, [&](auto piece) {
      constexpr int kFirst = decltype(piece)::value * 32;
      const int column = at.column + 2 * kFirst;
      pack_piece<T, kFirst>(words, acc);
      staging.store(words, args.maps[kPre], plan.rows, at.row, column, 0);
      if constexpr (kGated) {
        pack_piece<T, kKey + kFirst>(words, acc);
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
  for_pieces<kOwn>(at.column, plan.columns, [&](auto piece) {
    constexpr int kFirst = decltype(piece)::value * 32;
    pack_piece<T, kFirst>(words, acc);
    staging.store(words, args.maps[kResult], plan.rows, at.row, at.column + 2 * kFirst);
  });
}

template <class T>
MEMVP_DEVICE void end_shared(const float (&acc)[kColumns / 2], const StepArgs& args, Staging& staging, const Tile& at) {
  uint32_t words[kWords];
  for_pieces<kPieces>(at.column, args.plan.shared_columns, [&](auto piece) {
    constexpr int kFirst = decltype(piece)::value * 32;
    pack_piece<T, kFirst>(words, acc);
    staging.store(words, args.maps[kSharedResult], args.plan.rows, at.row, at.column + 2 * kFirst);
  });
}

template <class T>
MEMVP_DEVICE void end_output(float (&acc)[kColumns / 2], const StepArgs& args, const Shared& shared, Turn& turn,
                             Staging& staging, const Tile& at, int group) {
  const StepPlan& plan = args.plan;
  add_bias<T, 0, 8 * kPieces>(acc, args.bias, at.column, plan.columns);
  uint32_t words[kWords];
  for_pieces<kPieces>(at.column, plan.columns, [&](auto piece) {
    constexpr int kFirst = decltype(piece)::value * 32;
    if (plan.reads) {
      wait(shared.full[turn.stage], turn.parity);
      read_piece(words, shared.ring + turn.stage * kStageBytes + group * kBlockBytes);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        acc[kFirst + 2 * i] += low_float<T>(words[i]);
        acc[kFirst + 2 * i + 1] += high_float<T>(words[i]);
      }
    }
    pack_piece<T, kFirst>(words, acc);
    staging.store(words, args.maps[kResult], plan.rows, at.row, at.column + 2 * kFirst);
    if (plan.reads) {  // behind the barriers of the store: all lanes have read
      end_stage(plan, shared, turn.stage);
      turn.next();
    }
  });
}

template <class T, bool kGated>
MEMVP_DEVICE void end_dhidden(const float (&acc)[kColumns / 2], const StepArgs& args, const Shared& shared, Turn& turn,
                              Staging& staging, const Tile& at, int group) {
  const StepPlan& plan = args.plan;
  uint32_t first[kWords], key[kWords];  // gate's pre-activations and key's, or key's alone; then their gradients
  for_pieces<kPieces>(at.column, plan.columns, [&](auto piece) {
    constexpr int kFirst = decltype(piece)::value * 32;
    wait(shared.full[turn.stage], turn.parity);
    const unsigned char* const stage = shared.ring + turn.stage * kStageBytes + group * kBlockBytes;
    read_piece(first, stage);
    if (kGated) read_piece(key, stage + kLeftBytes);
    with_activation(args.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        float of_first[2], of_key[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float pre = half == 0 ? low_float<T>(first[i]) : high_float<T>(first[i]);
          const float dhidden = acc[kFirst + 2 * i + half];
          float slope;
          const float active = activate_derivative(decltype(activation)::value, pre, slope);
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
    end_stage(plan, shared, turn.stage);  // behind the barriers of the store: all lanes have read
    turn.next();
    if (kGated) staging.store(key, args.maps[kPre], plan.rows, at.row, column, 1);
  });
}

}  // namespace memvp::hopper
