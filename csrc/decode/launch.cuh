// The three launches of a step, in their order: which instance of each kernel, how many blocks, how much shared memory.
// The same for the device and for the host run; `launch(kernel, blocks, shared bytes, args)` is theirs.
#pragma once
#include "decode/finish.cuh"

namespace memvp::decode {

inline size_t hidden_shared_bytes(const DecodePlan& plan) {
  const size_t ring = plan.fast && plan.hidden_blocks > 0 ? ring_bytes(plan.hidden, plan.token_tiles) : 0;
  return greatest(ring, kRowSumsBytes + kGroupBytes);
}
inline size_t values_shared_bytes(const DecodePlan& plan) {
  const size_t ring = plan.value_ring ? ring_bytes(plan.value, plan.token_tiles) : 0;
  return greatest(ring, kColumnSumsBytes + kGroupBytes);
}

using DecodeKernel = void (*)(DecodeArgs);

template <class T>
DecodeKernel hidden_kernel_of(const DecodePlan& plan) {
  if (!plan.fast) return hidden_kernel<T, 0>;
  switch (plan.token_tiles) {
    case 1:
      return hidden_kernel<T, 1>;
    case 2:
      return hidden_kernel<T, 2>;
    case 4:
      return hidden_kernel<T, 4>;
    default:
      return hidden_kernel<T, 8>;
  }
}

template <class T>
DecodeKernel values_kernel_of(const DecodePlan& plan) {
  if (!plan.fast) return values_kernel<T, 0, false>;
  if (!plan.value_ring) return values_kernel<T, 0, true>;
  switch (plan.token_tiles) {
    case 1:
      return values_kernel<T, 1, true>;
    case 2:
      return values_kernel<T, 2, true>;
    case 4:
      return values_kernel<T, 4, true>;
    default:
      return values_kernel<T, 8, true>;
  }
}

// The first error of `launch`, or 0.
template <class T, class Launch>
int launch_step(const DecodeArgs& args, Launch launch) {
  const DecodePlan& plan = args.plan;
  const int first = plan.hidden_blocks + plan.score_blocks, second = plan.value_blocks + plan.memory_blocks;
  bool chained = false;  // a launch before this one belongs to the step
  int error = 0;
  if (error == 0 && first > 0) {
    error = launch(hidden_kernel_of<T>(plan), first, hidden_shared_bytes(plan), args, chained);
    chained = true;
  }
  if (error == 0 && second > 0) {
    error = launch(values_kernel_of<T>(plan), second, values_shared_bytes(plan), args, chained);
    chained = true;
  }
  if (error == 0) {
    const DecodeKernel finish = plan.fast ? finish_kernel<T, true> : finish_kernel<T, false>;
    error = launch(finish, plan.finish_blocks, kColumnSumsBytes, args, chained);
  }
  return error;
}

template <class Launch>
int launch_step(const FfnDecodeParams& params, Launch launch) {
  if (why_unsupported(params) != nullptr) return kDecodeUnsupported;
  if (params.tokens == 0 || params.width == 0) return 0;
  DecodeArgs args{params, make_plan(params)};
  // Memory without slots or rows is no memory, and key without pairs no FFN.
  if (!has_memory(params)) args.p.visual_key = args.p.visual_value = args.p.visual_basis = DecodeTensor{};
  return params.type == DecodeType::kBFloat16 ? launch_step<BFloat16>(args, launch)
                                              : launch_step<Float16>(args, launch);
}

}  // namespace memvp::decode
