"""Mutations of the decode kernels, one at a time: each must make the emulation fail. What it lets pass, it cannot guard."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.csrc.emulate_decode import EMULATION, SOURCES, compile_emulation

SANITIZERS = {
    "plain": ["-Og"],
    "address": ["-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-Wno-tsan"],
}
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}


@dataclass(frozen=True)
class Mutation:
    """A text to replace in one file of csrc/; the `nth` occurrence, of `count` in all."""

    file: str
    old: str
    new: str
    nth: int = 0
    count: int = 1
    build: str = "plain"

    def apply(self, sources: Path) -> None:
        path = sources / self.file
        parts = path.read_text().split(self.old)
        assert len(parts) - 1 == self.count, (
            f"{self.file}: {len(parts) - 1} occurrences of {self.old!r}, wanted {self.count}"
        )
        left, right = parts[: self.nth + 1], parts[self.nth + 1 :]
        path.write_text(self.old.join(left) + self.new + self.old.join(right))


PIPELINE, BLOCK = "decode/pipeline.cuh", "decode/block_product.cuh"
HIDDEN, VALUES, FINISH = "decode/hidden.cuh", "decode/values.cuh", "decode/finish.cuh"
SYNC, COOPERATIVE = "decode/phase_sync.cuh", "decode/cooperative.cuh"
TOKENS, PLAN, PIPELINE_PLAN = "decode/token_memory.cuh", "decode/plan.h", "decode/pipeline_plan.h"
BARRIER = "  __syncthreads();\n"

MUTATIONS: dict[str, Mutation] = {
    # the pipeline
    "no barrier between stages": Mutation(PIPELINE, "__syncthreads();  // all copies", "// all copies"),
    "one copy group too many in flight": Mutation(PIPELINE, "cp_async_wait<2>();", "cp_async_wait<3>();"),
    "one copy group too many in flight, of three stages": Mutation(PIPELINE, "cp_async_wait<1>();", "cp_async_wait<2>();"),
    "copies left in flight": Mutation(PIPELINE, "cp_async_wait<0>();", ""),
    "stage filled while it is read": Mutation(PIPELINE, "const int ahead = step + stages() - 1;", "const int ahead = step + stages();"),
    "k past the end": Mutation(PIPELINE, "k_end_ = least(k_end, k_begin_ + depth);", "k_end_ = greatest(k_end, k_begin_ + depth);"),
    "rows past the last one": Mutation(PIPELINE, "least(pairs_, rows.count[half] - first_pair_)", "pairs_", build="address"),
    "wrong half of a row tile": Mutation(PIPELINE, "swizzled(lane % 16, lane / 16)", "swizzled(lane % 8, lane / 16)"),
    "matrices in another order": Mutation(PIPELINE, "swizzled(lane % 16, lane / 16)", "swizzled(lane % 16, lane / 8 % 2)"),
    "transposed matrices in another order": Mutation(PIPELINE, "swizzled(lane / 16 * 8 + lane % 8,", "swizzled(lane / 8 % 2 * 8 + lane % 8,"),
    "rows across past the last one": Mutation(PIPELINE, "k + i < k_end_ && row < rows.count", "k + i < k_end_", build="address"),
    "k across past the end": Mutation(PIPELINE, "k + i < k_end_ && row < rows.count", "row < rows.count", build="address"),
    "weights that were started copied to another stage": Mutation(PIPELINE, "if (ahead >= rows_started_)", "if (ahead > rows_started_)"),
    "tokens of the other half of a slice": Mutation(PIPELINE, "^ half * 4;", "^ (4 - half * 4);"),
    "k of another block": Mutation(PIPELINE, "k_begin_ = split * depth;", "k_begin_ = split / 2 * depth;"),
    "stages cut short": Mutation(PIPELINE_PLAN, "return plan.stages * rows", "return (plan.stages - 1) * rows"),
    # fragments
    "row fragments swapped": Mutation(BLOCK, "row.x, row8.x, row.y, row8.y", "row.x, row.y, row8.x, row8.y"),
    "k in another order": Mutation(BLOCK, "token.z, token.w);", "token.w, token.z);"),
    "column halves swapped": Mutation(BLOCK, "low_halves(r2, r3), high_halves(r2, r3)", "high_halves(r2, r3), low_halves(r2, r3)"),
    "column tokens swapped": Mutation(BLOCK, "high_halves(r2, r3), token.x,", "high_halves(r2, r3), token.y,"),
    # sums over warps
    "no barrier before the row sums": Mutation(BLOCK, "sum[3];\n" + BARRIER, "sum[3];\n"),
    "no barrier before column sums are stored": Mutation(BLOCK, "member_of_lane();\n" + BARRIER, "member_of_lane();\n"),
    "no barrier before the column sums": Mutation(BLOCK, "  }\n" + BARRIER, "  }\n"),
    "last warp forgotten": Mutation(BLOCK, "warp < kWarps; ++warp) all", "warp < kWarps - 1; ++warp) all"),
    "warps overlap in k": Mutation(BLOCK, "static_cast<int64_t>(first) * 32", "static_cast<int64_t>(first) * 16"),
    "written data through the read-only path": Mutation(BLOCK, "load_written<uint2>(token + k)", "emulation::load_read_only<uint2>(token + k)"),
    # which memory
    "no memory read as one": Mutation(TOKENS, "if (row < 0 || row >= p.memories)", "if (row >= p.memories)"),
    "lengths ignored": Mutation(TOKENS, "load_input(p.visual_lengths + row);", "p.slots;"),
    "tokens past the eighth forgotten": Mutation(TOKENS, "places[first] % kTokenTile == 0", "places[first] == 0"),
    "members read before they are written": Mutation(TOKENS, "= me;\n" + BARRIER, "= me;\n"),
    "first token of a packed sequence lost": Mutation(TOKENS, "+ middle) <= token)", "+ middle) < token)"),
    # the first launch
    "padding of the activations not written": Mutation(HIDDEN, "const int unit = 2 * pair + half;\n", "const int unit = 2 * pair + half;\n    if (unit >= p.pairs) continue;\n"),
    "gate and key swapped": Mutation(HIDDEN, "row_of(gated ? p.gate : p.key, low), row8 = row_of(p.key, high)", "row_of(p.key, low), row8 = row_of(gated ? p.gate : p.key, high)"),
    "a token's scores in another's row": Mutation(HIDDEN, "static_cast<int64_t>(members[t]) * plan.slot_stride", "static_cast<int64_t>(t) * plan.slot_stride"),
    "value's position for the key's": Mutation(HIDDEN, "position = row_of(p.key_position, low)", "position = row_of(p.value_position, low)"),
    # the second
    "no wait for the first launch": Mutation(VALUES, "  sync.wait();\n  pipeline.run(sums);", "  pipeline.run(sums);", count=2),
    "no wait for the first launch, by an image": Mutation(VALUES, "  sync.wait();\n  pipeline.run(sums);", "  pipeline.run(sums);", nth=1, count=2),
    "wait after the read": Mutation(VALUES, "  sync.wait();\n  pipeline.run(sums);", "  pipeline.run(sums);\n  sync.wait();", count=2),
    "no barrier between visual and u": Mutation(VALUES, "  __syncthreads();  // visual", "  // visual"),
    "visual past a length": Mutation(VALUES, "if (slot < group.slots) {", "if (slot < p.slots) {"),
    "two writers of one partial sum": Mutation(VALUES, "partial_of(args, args.plan.partials - 1, members[t])", "partial_of(args, 0, members[t])", count=2),
    "two writers of one partial sum, wide memory": Mutation(VALUES, "partial_of(args, args.plan.partials - 1, members[t])", "partial_of(args, 0, members[t])", nth=1, count=2),
    "positions of an image's scores forgotten": Mutation(VALUES, "image.x + position.x", "image.x"),
    "visual not kept for the positions": Mutation(VALUES, "strip == 0 &&", "strip < 0 &&"),
    # the third
    "a partial sum that nobody wrote": Mutation(FINISH, "memory_of_token(p, n).row == kNoMemory;", "false;"),
    "a split forgotten": Mutation(FINISH, "if (j < partials[i]) v", "if (j > 0 && j < partials[i]) v"),
    # all phases in one launch
    "blocks that never wait for one another": Mutation(SYNC, "if (!waited_) sync_grid();", ""),
    "the third phase does not wait": Mutation(SYNC, "    waited_ = false;\n", ""),
    "a block without work does not wait": Mutation(SYNC, "    wait();\n    waited_ = false;", "    waited_ = false;"),
    "shared memory of the next work item while this one is read": Mutation(COOPERATIVE, "    reuse_shared_memory();\n", "", nth=1, count=3),
    "a core that no block computes": Mutation(PLAN, "plan.value_blocks + block - of_value", "plan.value_blocks + 1 + block - of_value"),
    # the plan
    "workspace too small": Mutation(PLAN, "take(plan.at.bytes, 4 * tokens * p.width * plan.partials)", "take(plan.at.bytes, 2 * tokens * p.width * plan.partials)", build="address"),
    "a group of tokens without blocks": Mutation(PLAN, "images + p.tokens / kTokenTile", "images"),
    "intermediate results overlap": Mutation(PLAN, "take(plan.at.bytes, 2 * tokens * plan.visual_stride)", "take(plan.at.bytes, tokens * plan.visual_stride)"),
    # seen by the thread sanitizer however the schedule falls
    "no barrier between stages, by the thread sanitizer": Mutation(PIPELINE, "__syncthreads();  // all copies", "// all copies", build="thread"),
    "no barrier before the column sums, by the thread sanitizer": Mutation(BLOCK, "  }\n" + BARRIER, "  }\n", build="thread"),
}  # fmt: skip
QUICK = ("one copy group too many in flight", "wait after the read")  # in every run of the suite; the others are `slow`


def build_cases(folder: Path, build: str, mutation: Mutation | None = None) -> Path:
    """The program of emulation/cases.cpp, over mutated kernels if a mutation is given."""
    sources, flags = SOURCES, SANITIZERS[build]
    if mutation is not None:
        sources, flags = folder / "csrc", [*flags, "-Wno-error"]  # a mutation may leave something unused
        shutil.copytree(SOURCES, sources)
        mutation.apply(sources)
    program = folder / f"cases-{build}"
    compile_emulation(EMULATION / "cases.cpp", program, *flags, sources=sources)
    return program


def run_cases(program: Path, build: str, file: Path, schedules: int) -> subprocess.CompletedProcess[str]:
    """Runs it over a file of cases. The thread sanitizer wants addresses that don't move."""
    fixed = ["setarch", "-R"] if build == "thread" else []
    command = [*fixed, str(program), str(file), str(schedules)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
