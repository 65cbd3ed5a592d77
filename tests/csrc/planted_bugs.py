"""Mistakes to plant in the decode kernels, one at a time: each must make the host run fail. What it lets pass, it can't guard."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.csrc.host_run import SOURCES, compile_host

SANITIZERS = {
    "plain": ["-O1"],
    # -DMEMVP_HOST_UNCHECKED_INPUTS would leave reads to the sanitizer alone; both together are what CI runs.
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-Wno-tsan"],
}
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}


@dataclass(frozen=True)
class Bug:
    """A text to replace in one file of csrc/; the `nth` occurrence, of `count` in all."""

    file: str
    old: str
    new: str
    nth: int = 0
    count: int = 1
    build: str = "plain"

    def plant(self, sources: Path) -> None:
        path = sources / self.file
        parts = path.read_text().split(self.old)
        assert len(parts) - 1 == self.count, (
            f"{self.file}: {len(parts) - 1} occurrences of {self.old!r}, wanted {self.count}"
        )
        left, right = parts[: self.nth + 1], parts[self.nth + 1 :]
        path.write_text(self.old.join(left) + self.new + self.old.join(right))


RING, BLOCK, MMA = "decode/ring.cuh", "decode/block_product.cuh", "common/mma.cuh"
HIDDEN, VALUES, FINISH = "decode/hidden.cuh", "decode/values.cuh", "decode/finish.cuh"
ORDER, STEP = "decode/order.cuh", "decode/step.cuh"
TOKENS, PLAN, RING_PLAN = "decode/token_memory.cuh", "decode/plan.h", "decode/ring_plan.h"
SYNC = "  __syncthreads();\n"

BUGS: dict[str, Bug] = {
    # the ring
    "no barrier between stages": Bug(RING, "__syncthreads();  // all copies", "// all copies"),
    "one copy group too many in flight": Bug(RING, "wait_copies<2>();", "wait_copies<3>();"),
    "one copy group too many in flight, of three stages": Bug(RING, "wait_copies<1>();", "wait_copies<2>();"),
    "copies left in flight": Bug(RING, "wait_copies<0>();", ""),
    "stage filled while it is read": Bug(RING, "const int ahead = step + stages() - 1;", "const int ahead = step + stages();"),
    "k past the end": Bug(RING, "k_end_ = least(k_end, k_begin_ + part);", "k_end_ = greatest(k_end, k_begin_ + part);"),
    "rows past the last one": Bug(RING, "least(pairs_, rows.count[half] - first_pair_)", "pairs_", build="address"),
    "wrong half of a row tile": Bug(RING, "swizzled(lane % 16, lane / 16)", "swizzled(lane % 8, lane / 16)"),
    "matrices in another order": Bug(RING, "swizzled(lane % 16, lane / 16)", "swizzled(lane % 16, lane / 8 % 2)"),
    "transposed matrices in another order": Bug(RING, "swizzled(lane / 16 * 8 + lane % 8,", "swizzled(lane / 8 % 2 * 8 + lane % 8,"),
    "rows across past the last one": Bug(RING, "k + i < k_end_ && row < rows.count", "k + i < k_end_", build="address"),
    "k across past the end": Bug(RING, "k + i < k_end_ && row < rows.count", "row < rows.count", build="address"),
    "weights that were started copied to another stage": Bug(RING, "if (ahead >= rows_started_)", "if (ahead > rows_started_)"),
    "tokens of the other half of a slice": Bug(RING, "^ half * 4;", "^ (4 - half * 4);"),
    "k part of another block": Bug(RING, "k_begin_ = split * part;", "k_begin_ = split / 2 * part;"),
    "ring cut short": Bug(RING_PLAN, "return ring.stages * rows", "return (ring.stages - 1) * rows"),
    # fragments
    "row fragments swapped": Bug(MMA, "row.x, row8.x, row.y, row8.y", "row.x, row.y, row8.x, row8.y"),
    "k in another order": Bug(MMA, "token.z, token.w);", "token.w, token.z);"),
    "column halves swapped": Bug(MMA, "low_halves(r2, r3), high_halves(r2, r3)", "high_halves(r2, r3), low_halves(r2, r3)"),
    "column tokens swapped": Bug(MMA, "high_halves(r2, r3), token.x,", "high_halves(r2, r3), token.y,"),
    # sums over warps
    "no barrier before the row sums": Bug(BLOCK, "sum[3];\n" + SYNC, "sum[3];\n"),
    "no barrier before column sums are stored": Bug(BLOCK, "member_of_lane();\n" + SYNC, "member_of_lane();\n"),
    "no barrier before the column sums": Bug(BLOCK, "  }\n" + SYNC, "  }\n"),
    "last warp forgotten": Bug(BLOCK, "warp < kWarps; ++warp) all", "warp < kWarps - 1; ++warp) all"),
    "warps overlap in k": Bug(BLOCK, "static_cast<int64_t>(first) * 32", "static_cast<int64_t>(first) * 16"),
    "written data through the read-only path": Bug(BLOCK, "load_written<uint2>(token + k)", "host_run::load_input<uint2>(token + k)"),
    # which memory
    "no memory read as one": Bug(TOKENS, "if (row < 0 || row >= p.memories)", "if (row >= p.memories)"),
    "lengths ignored": Bug(TOKENS, "load_input(p.visual_lengths + row);", "p.slots;"),
    "tokens past the eighth forgotten": Bug(TOKENS, "places[first] % kTokenTile == 0", "places[first] == 0"),
    "members read before they are written": Bug(TOKENS, "= me;\n" + SYNC, "= me;\n"),
    "first token of a packed sequence lost": Bug(TOKENS, "+ middle) <= token)", "+ middle) < token)"),
    # the first launch
    "padding of the activations not written": Bug(HIDDEN, "const int unit = 2 * pair + half;\n", "const int unit = 2 * pair + half;\n    if (unit >= p.pairs) continue;\n"),
    "gate and key swapped": Bug(HIDDEN, "row_of(gated ? p.gate : p.key, low), row8 = row_of(p.key, high)", "row_of(p.key, low), row8 = row_of(gated ? p.gate : p.key, high)"),
    "a token's scores in another's row": Bug(HIDDEN, "static_cast<int64_t>(members[t]) * plan.slot_stride", "static_cast<int64_t>(t) * plan.slot_stride"),
    "value's position for the key's": Bug(HIDDEN, "position = row_of(p.key_position, low)", "position = row_of(p.value_position, low)"),
    # the second
    "no wait for the first launch": Bug(VALUES, "  order.wait();\n  ring.run(sums);", "  ring.run(sums);", count=2),
    "no wait for the first launch, by an image": Bug(VALUES, "  order.wait();\n  ring.run(sums);", "  ring.run(sums);", nth=1, count=2),
    "wait after the read": Bug(VALUES, "  order.wait();\n  ring.run(sums);", "  ring.run(sums);\n  order.wait();", count=2),
    "no barrier between visual and u": Bug(VALUES, "  __syncthreads();  // visual", "  // visual"),
    "visual past a length": Bug(VALUES, "if (slot < group.slots) {", "if (slot < p.slots) {"),
    "two writers of one part": Bug(VALUES, "part_of(args, args.plan.parts - 1, members[t])", "part_of(args, 0, members[t])", count=2),
    "two writers of one part, wide memory": Bug(VALUES, "part_of(args, args.plan.parts - 1, members[t])", "part_of(args, 0, members[t])", nth=1, count=2),
    "positions of an image's scores forgotten": Bug(VALUES, "image.x + position.x", "image.x"),
    "visual not kept for the positions": Bug(VALUES, "strip == 0 &&", "strip < 0 &&"),
    # the third
    "a part that nobody wrote": Bug(FINISH, "memory_of_token(p, n).row == kNoMemory;", "false;"),
    "a split forgotten": Bug(FINISH, "if (j < parts[i]) v", "if (j > 0 && j < parts[i]) v"),
    # all phases in one launch
    "blocks that never meet": Bug(ORDER, "if (!met_) meet_all_blocks();", ""),
    "the third phase does not wait": Bug(ORDER, "    met_ = false;\n", ""),
    "a block without work is not at the meeting": Bug(ORDER, "    wait();\n    met_ = false;", "    met_ = false;"),
    "shared memory of the next piece of work while this one is read": Bug(STEP, "    renew_shared();\n", "", nth=1, count=3),
    "a core that no block computes": Bug(PLAN, "plan.value_blocks + block - of_value", "plan.value_blocks + 1 + block - of_value"),
    # the plan
    "workspace too small": Bug(PLAN, "take(plan.at.bytes, 4 * tokens * p.width * plan.parts)", "take(plan.at.bytes, 2 * tokens * p.width * plan.parts)", build="address"),
    "a group of tokens without blocks": Bug(PLAN, "images + p.tokens / kTokenTile", "images"),
    "intermediate results overlap": Bug(PLAN, "take(plan.at.bytes, 2 * tokens * plan.visual_stride)", "take(plan.at.bytes, tokens * plan.visual_stride)"),
    # seen by the thread sanitizer however the schedule falls
    "no barrier between stages, by the thread sanitizer": Bug(RING, "__syncthreads();  // all copies", "// all copies", build="thread"),
    "no barrier before the column sums, by the thread sanitizer": Bug(BLOCK, "  }\n" + SYNC, "  }\n", build="thread"),
}  # fmt: skip
QUICK = ("one copy group too many in flight", "wait after the read")  # in every run of the suite; the others are `slow`


def build_cases(folder: Path, build: str, bug: Bug | None = None) -> Path:
    """The program of csrc/host_run/cases.cpp, with a mistake if one is given."""
    sources, flags = SOURCES, SANITIZERS[build]
    if bug is not None:
        sources, flags = folder / "csrc", [*flags, "-Wno-error"]  # a mistake may leave something unused
        shutil.copytree(SOURCES, sources)
        bug.plant(sources)
    program = folder / f"cases-{build}"
    compile_host(sources / "host_run" / "cases.cpp", program, *flags, include=sources)
    return program


def run_cases(program: Path, build: str, file: Path, schedules: int) -> subprocess.CompletedProcess[str]:
    """Runs it over a file of cases. The thread sanitizer wants addresses that don't move."""
    fixed = ["setarch", "-R"] if build == "thread" else []
    command = [*fixed, str(program), str(file), str(schedules)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
