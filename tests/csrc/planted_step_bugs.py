"""Mistakes to plant in the Hopper steps, one at a time: a run of the cases must fail with each."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.csrc.host_run import SOURCES, HostRunError
from tests.csrc.planted_bugs import Bug
from tests.csrc.step_cases import StepCase, dhidden_case, hidden_case, output_case
from tests.csrc.steps_host import StepsLibrary

RING, PIECES, EPILOGUES, KERNEL = (
    "hopper/ring.cuh",
    "hopper/pieces.cuh",
    "hopper/epilogues.cuh",
    "hopper/step_kernel.cuh",
)
PLAN, LAUNCH = "hopper/plan.h", "hopper/launch.h"

BUGS: dict[str, Bug] = {
    # the ring
    "more stages than the ring has": Bug(RING, "if (++stage == kStages)", "if (++stage == kStages + 1)"),
    "stage filled while it is read": Bug(RING, "  wait(shared.empty[turn.stage], turn.parity ^ 1);", "  //"),
    "parity of the phase before": Bug(RING, "wait(shared.empty[turn.stage], turn.parity ^ 1)", "wait(shared.empty[turn.stage], turn.parity)"),
    "parity never changes": Bug(RING, "      parity ^= 1;\n", ""),
    "products of what is not there yet": Bug(RING, "      wait(shared.full[turn.stage], turn.parity);\n", ""),
    "stage given back while it is multiplied": Bug(RING, "wait_products<1>();", "wait_products<2>();"),
    "this step's stage given back for the last one's": Bug(RING, "end_stage(plan, shared, before);", "end_stage(plan, shared, turn.stage);", count=2),
    "sums read before they are there": Bug(RING, "  wait_products<0>();\n", ""),
    "products not begun": Bug(RING, "  begin_products();\n", ""),
    "a tile goes on from the last one's sums": Bug(RING, "accumulate || k > 0", "true"),
    "only the first product of a stage starts anew": Bug(RING, "accumulate || k > 0", "accumulate"),
    "both warpgroups multiply the first rows": Bug(RING, "operand(stage + group * kBlockBytes,", "operand(stage,"),
    "columns across by another distance": Bug(RING, "kMajor == Major::kK ? 0 : kBlockBytes", "0"),
    "k across by another distance": Bug(RING, "2 * k : 128 * k", "2 * k : 64 * k"),
    "gate and key swapped": Bug(RING, "half == 0 ? args.maps[kGate] : right", "half == 1 ? args.maps[kGate] : right"),
    "fewer bytes expected than copied": Bug(RING, "begin_stage(shared, turn, plan.groups * kBlockBytes + kRightBytes)", "begin_stage(shared, turn, kRightBytes)"),
    "barriers not published": Bug(KERNEL, "    publish_barriers();\n", ""),
    "a warp too few gives a stage back": Bug(KERNEL, "args.plan.cluster * args.plan.groups * kGroupThreads / 32", "args.plan.cluster * args.plan.groups * kGroupThreads / 32 - 1"),
    "more registers than there are": Bug(KERNEL, "kFewRegisters = 40, kManyRegisters = 232;\nstatic_assert(", "kFewRegisters = 80, kManyRegisters = 240;\nstatic_assert(true || "),
    "no wait for the launch before": Bug(KERNEL, "  wait_for_previous_grid();\n", ""),
    # two blocks together
    "copies into a block that is not there yet": Bug(KERNEL, "    sync_cluster();\n  else\n", "    __syncthreads();\n  else\n"),
    "a block ends before the other has given its stages back": Bug(KERNEL, "  if (together) sync_cluster();", "  //"),
    "a stage given back to one block alone": Bug(RING, "threadIdx.x % 32 == 1 && plan.cluster > 1", "false"),
    "a stage given back twice to one block": Bug(RING, "1 - blockIdx.x % 2)", "blockIdx.x % 2)"),
    "the other block's warps not counted": Bug(KERNEL, "args.plan.cluster * args.plan.groups * kGroupThreads", "args.plan.groups * kGroupThreads"),
    "both blocks ask for the same half": Bug(RING, "half = together ? rank : 0; half < (together ? rank + 1 : 2)", "half = 0; half < (together ? 1 : 2)"),
    "a half for one block alone": Bug(RING, "load_tile_to(3, ", "load_tile_to(1 << rank, "),
    "both blocks with the same rows": Bug(PLAN, "* plan.cluster + rank) * plan.tile_rows", "* plan.cluster) * plan.tile_rows"),
    "two clusters with the same tiles": Bug(KERNEL, "static_cast<int>(blockIdx.x) / 2", "static_cast<int>(blockIdx.x) / 4"),
    # one warpgroup
    "a warpgroup that multiplies without rows": Bug(KERNEL, "if (group < args.plan.groups) consume", "consume"),
    "the bytes of two warpgroups' rows expected for one": Bug(RING, "plan.groups * kBlockBytes + kRightBytes", "kStageBytes"),
    "tiles of two warpgroups' rows for one": Bug(LAUNCH, "describe_all<T>(args.maps, p, args.plan.tile_rows)", "describe_all<T>(args.maps, p, kRows)"),
    # tiles
    "the last row tiles of a short group": Bug(PLAN, "least(plan.units - first, plan.side)", "plan.side"),
    "a column tile forgotten": Bug(PLAN, "plan.column_tiles = ceil_div(p.columns, plan.tile_columns)", "plan.column_tiles = greatest(1, p.columns / plan.tile_columns)"),
    "shared columns from the first product's right": Bug(LAUNCH, "describe<T>(maps[kRight + kShared], p.shared,", "describe<T>(maps[kRight + kShared], first.right,"),
    # pieces
    "a buffer written while its store reads it": Bug(PIECES, "wait_stores_read<kBuffers - 1>();", "wait_stores_read<kBuffers>();"),
    "a warpgroup without rows loses count of its stores": Bug(PIECES, "      commit_stores();  // of none, too: the next wait counts groups\n    }", "    }\n    if (first && row + row_ < rows) commit_stores();"),
    "a buffer written before the others know it is free": Bug(PIECES, "    sync_some(1 + group_, kGroupThreads);  // the buffer's last store has read it\n", ""),
    "stored before all have written": Bug(PIECES, "    fence_async_shared();\n    sync_some(1 + group_, kGroupThreads);\n", "    fence_async_shared();\n"),
    "written and not fenced": Bug(PIECES, "    fence_async_shared();\n", ""),
    "ended before the stores have read": Bug(PIECES, "wait_stores<0>();", ";"),
    "both warpgroups at one barrier": Bug(PIECES, "sync_some(1 + group_, kGroupThreads);  //", "sync_some(1, kGroupThreads);  //"),
    "pieces not swizzled": Bug(PIECES, "^ lane % 8) * 16", ") * 16"),
    "columns of a word swapped": Bug(PIECES, "acc[kFirst + 2 * i], acc[kFirst + 2 * i + 1]", "acc[kFirst + 2 * i + 1], acc[kFirst + 2 * i]"),
    # what becomes of sums
    "key's accumulators for gate's": Bug(EPILOGUES, "kGated ? kColumns / 4 : 0;", "0;"),
    "bias of the next columns": Bug(EPILOGUES, "least(column + 8 * j, columns - 8)", "least(column + 8 * j + 8, columns - 8)"),
    "bias past its end": Bug(EPILOGUES, "least(column + 8 * j, columns - 8)", "column + 8 * j"),
    "gradients in each other's place": Bug(EPILOGUES, "staging.store(key, args.maps[kPre], plan.rows, at.row, column, 1);", "staging.store(first, args.maps[kPre], plan.rows, at.row, column, 1);"),
    "a residual's stage never given back": Bug(EPILOGUES, "      end_stage(plan, shared, turn.stage);\n      turn.next();\n", "      turn.next();\n"),
    "a stage given back while it is read": Bug(EPILOGUES, "    read_piece(first, stage);\n", "    end_stage(plan, shared, turn.stage);\n    read_piece(first, stage);\n"),
    "the pieces past the end of a row": Bug(PIECES, "if (column + (kCount - 1) * kPiece < columns) body", "body"),
}  # fmt: skip
QUICK = ("a warpgroup without rows loses count of its stores",)  # in every run of the suite; the others are `slow`


def cases() -> Iterator[tuple[StepCase, dict[str, Any]]]:
    """Small cases that reach all of the kernel between them, with the order and the seed to run each in."""
    schedules = [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)]
    for (order, seed), (cluster, warpgroups) in itertools.product(schedules, ((1, 2), (2, 2), (2, 1))):
        how = {"order": order, "seed": seed, "resident": 2 * cluster}
        same: dict[str, Any] = {
            "seed": seed,
            "cluster": cluster,
            "warpgroups": warpgroups,
            "multiprocessors": 2 * cluster,
        }
        yield hidden_case(300, 264, 200, M=24, bias="wide", **same), how
        yield output_case(300, 264, (136, 72, 24), across="+-+", bias="same", residual="in place", **same), how
        yield dhidden_case(300, 264, 72, M=24, in_place=True, **same), how
    yield hidden_case(17 * 128 + 8, 136, 24, M=264, keep="hidden", multiprocessors=40), {}


def noticed(bug: Bug, folder: Path) -> str:
    """What the cases say of the steps with this mistake; "" when they pass."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    bug.plant(sources)
    library = StepsLibrary(sources, "-Wno-error", "-Og")  # a mistake may leave something unused
    for case, how in cases():
        try:
            library.run(case.step, **how)
            case.check()
        except (HostRunError, AssertionError) as error:
            return str(error)
    return ""
