// The host run as a C library, for tests that hand over tensors' addresses.
#include "host_run/ffn_decode_host.h"
#include "host_run/options.h"

using namespace memvp;
using namespace memvp::host_run;

extern "C" {

// For the caller to compare with its own picture of the structs.
uint64_t memvp_host_params_bytes() {
  return sizeof(FfnDecodeParams);
}

// 0, or 1 with a message. Adds to `stats` (switches, barriers, collectives, blocks that began early).
int memvp_host_decode(const FfnDecodeParams* params, const Options* options, uint64_t stats[4], char* message,
                      size_t bytes) {
  try {
    const Stats run = run_decode(*params, options->config());
    stats[0] += run.switches;
    stats[1] += run.barriers;
    stats[2] += run.collectives;
    stats[3] += run.early_blocks;
    return 0;
  } catch (const std::exception& error) {
    snprintf(message, bytes, "%s", error.what());
    return 1;
  }
}

const char* memvp_host_unsupported(const FfnDecodeParams* params) {
  return decode::why_unsupported(*params);
}
int memvp_host_is_fast(const FfnDecodeParams* params) {
  return decode::is_fast(*params);
}

// How the step is cut, for tests of the plan: rows by two in a block, blocks of rows, parts of k, slices in a part and
// in a stage, of the first and the second ring and of an image's two; blocks of the three launches; dynamic shared
// memory of the first two; of the one launch, blocks, those of them for the cores, shared memory.
void memvp_host_plan(const FfnDecodeParams* params, int64_t out[28]) {
  const decode::DecodePlan plan = decode::make_plan(*params, params->form == DecodeForm::kOneLaunch);
  for (const decode::RingPlan* ring : {&plan.hidden, &plan.value, &plan.scores, &plan.values}) {
    *out++ = ring->pairs_per_block;
    *out++ = ring->row_blocks;
    *out++ = ring->splits;
    *out++ = ring->slices_per_split;
    *out++ = ring->slices_per_stage;
  }
  *out++ = plan.hidden_blocks + plan.score_blocks;
  *out++ = plan.value_blocks + plan.memory_blocks;
  *out++ = plan.finish_blocks;
  *out++ = static_cast<int64_t>(decode::hidden_shared_bytes(plan));
  *out++ = static_cast<int64_t>(decode::values_shared_bytes(plan));
  *out++ = plan.step_blocks;
  *out++ = plan.core_blocks;
  *out++ = static_cast<int64_t>(decode::step_shared_bytes(plan));
}
uint64_t memvp_host_workspace_bytes(const FfnDecodeParams* params) {
  return decode::workspace_bytes(*params);
}
}
