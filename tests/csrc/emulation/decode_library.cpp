// The decode step as a C library, for tests that hand over tensors' addresses.
#include "decode.h"

using namespace memvp;

extern "C" {

// For the caller to compare with its own picture of the struct.
uint64_t emulation_decode_params_bytes() {
  return sizeof(FfnDecodeParams);
}

// 0, or 1 with a message. `early_blocks`: how many began before the launch ahead had ended.
int emulation_decode(const FfnDecodeParams* params, const emulation::Config* config, uint64_t* early_blocks,
                     char* message, size_t bytes) {
  try {
    *early_blocks = emulation::run_decode(*params, *config);
    return 0;
  } catch (const std::exception& error) {
    snprintf(message, bytes, "%s", error.what());
    return 1;
  }
}

const char* emulation_decode_unsupported(const FfnDecodeParams* params) {
  return decode::why_unsupported(*params);
}
int emulation_decode_is_fast(const FfnDecodeParams* params) {
  return decode::is_fast(*params);
}
uint64_t emulation_decode_workspace_bytes(const FfnDecodeParams* params) {
  return decode::workspace_bytes(*params);
}

// For tests of the plan, in the order of emulate_decode.py's PLAN.
void emulation_decode_plan(const FfnDecodeParams* params, int64_t out[28]) {
  const decode::DecodePlan plan = decode::make_plan(*params, params->form == DecodeForm::kCooperative);
  for (const decode::PipelinePlan* pipeline : {&plan.hidden, &plan.value, &plan.scores, &plan.values})
    for (const int32_t number : {pipeline->pairs_per_block, pipeline->row_blocks, pipeline->splits,
                                 pipeline->slices_per_split, pipeline->slices_per_stage})
      *out++ = number;
  for (const size_t number : {size_t(plan.first_blocks()), size_t(plan.second_blocks()), size_t(plan.finish_blocks),
                              hidden_shared_bytes(plan), values_shared_bytes(plan), size_t(plan.cooperative_blocks),
                              size_t(plan.core_blocks), cooperative_shared_bytes(plan)})
    *out++ = static_cast<int64_t>(number);
}
}
