"""Mutations of the Hopper kernels, one at a time: a run of the cases must fail with each."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.csrc.decode_mutations import Mutation
from tests.csrc.emulate_decode import SOURCES, EmulationError
from tests.csrc.emulate_gemm import GemmLibrary
from tests.csrc.gemm_cases import GemmCase, dhidden_case, hidden_case, output_case

PIPELINE, SUBTILES, EPILOGUES, KERNEL = (
    "hopper/pipeline.cuh",
    "hopper/subtiles.cuh",
    "hopper/epilogues.cuh",
    "hopper/gemm_kernel.cuh",
)
PLAN, LAUNCH = "hopper/plan.h", "hopper/launch.h"

MUTATIONS: dict[str, Mutation] = {
    # the pipeline
    "more stages than the pipeline has": Mutation(PIPELINE, "if (++stage == kStages)", "if (++stage == kStages + 1)"),
    "stage filled while it is read": Mutation(PIPELINE, "  wait(shared.empty[state.stage], state.parity ^ 1);", "  //"),
    "parity of the phase before": Mutation(PIPELINE, "wait(shared.empty[state.stage], state.parity ^ 1)", "wait(shared.empty[state.stage], state.parity)"),
    "parity never changes": Mutation(PIPELINE, "      parity ^= 1;\n", ""),
    "products of what is not there yet": Mutation(PIPELINE, "      wait(shared.full[state.stage], state.parity);\n", ""),
    "stage released while it is multiplied": Mutation(PIPELINE, "wgmma_wait<1>();", "wgmma_wait<2>();"),
    "this step's stage released for the last one's": Mutation(PIPELINE, "release_stage(plan, shared, before);", "release_stage(plan, shared, state.stage);", count=2),
    "sums read before they are there": Mutation(PIPELINE, "  wgmma_wait<0>();\n", ""),
    "products not begun": Mutation(PIPELINE, "  wgmma_fence();\n", ""),
    "a tile goes on from the last one's sums": Mutation(PIPELINE, "accumulate || k > 0", "true"),
    "only the first product of a stage starts anew": Mutation(PIPELINE, "accumulate || k > 0", "accumulate"),
    "both warpgroups multiply the first rows": Mutation(PIPELINE, "make_descriptor(stage + group * kBlockBytes,", "make_descriptor(stage,"),
    "columns across by another distance": Mutation(PIPELINE, "kMajor == Major::kK ? 0 : kBlockBytes", "0"),
    "k across by another distance": Mutation(PIPELINE, "2 * k : 128 * k", "2 * k : 64 * k"),
    "gate and key swapped": Mutation(PIPELINE, "half == 0 ? args.maps[kGate] : right", "half == 1 ? args.maps[kGate] : right"),
    "fewer bytes expected than copied": Mutation(PIPELINE, "acquire_stage(shared, state, plan.groups * kBlockBytes + kRightBytes)", "acquire_stage(shared, state, kRightBytes)"),
    "barriers not published": Mutation(KERNEL, "    fence_barrier_init();\n", ""),
    "a warp too few releases a stage": Mutation(KERNEL, "args.plan.cluster * args.plan.groups * kGroupThreads / 32", "args.plan.cluster * args.plan.groups * kGroupThreads / 32 - 1"),
    "more registers than there are": Mutation(KERNEL, "kProducerRegisters = 40, kConsumerRegisters = 232;\nstatic_assert(", "kProducerRegisters = 80, kConsumerRegisters = 240;\nstatic_assert(true || "),
    "no wait for the launch before": Mutation(KERNEL, "  pdl_wait();\n", ""),
    # two blocks together
    "copies into a block that is not there yet": Mutation(KERNEL, "    sync_cluster();\n  else\n", "    __syncthreads();\n  else\n"),
    "a block ends before the other has released its stages": Mutation(KERNEL, "  if (together) sync_cluster();", "  //"),
    "a stage released to one block alone": Mutation(PIPELINE, "threadIdx.x % 32 == 1 && plan.cluster > 1", "false"),
    "a stage released twice to one block": Mutation(PIPELINE, "1 - blockIdx.x % 2)", "blockIdx.x % 2)"),
    "the other block's warps not counted": Mutation(KERNEL, "args.plan.cluster * args.plan.groups * kGroupThreads", "args.plan.groups * kGroupThreads"),
    "both blocks ask for the same half": Mutation(PIPELINE, "half = together ? rank : 0; half < (together ? rank + 1 : 2)", "half = 0; half < (together ? 1 : 2)"),
    "a half for one block alone": Mutation(PIPELINE, "tma_load_multicast(3, ", "tma_load_multicast(1 << rank, "),
    "both blocks with the same rows": Mutation(PLAN, "* plan.cluster + rank) * plan.tile_rows", "* plan.cluster) * plan.tile_rows"),
    "two clusters with the same tiles": Mutation(KERNEL, "static_cast<int>(blockIdx.x) / 2", "static_cast<int>(blockIdx.x) / 4"),
    # one warpgroup
    "a warpgroup that multiplies without rows": Mutation(KERNEL, "if (group < args.plan.groups) consume", "consume"),
    "the bytes of two warpgroups' rows expected for one": Mutation(PIPELINE, "plan.groups * kBlockBytes + kRightBytes", "kStageBytes"),
    "tiles of two warpgroups' rows for one": Mutation(LAUNCH, "make_maps<T>(args.maps, p, args.plan.tile_rows)", "make_maps<T>(args.maps, p, kRows)"),
    # tiles
    "the last row tiles of a short group": Mutation(PLAN, "least(plan.units - first, plan.side)", "plan.side"),
    "a column tile forgotten": Mutation(PLAN, "plan.column_tiles = ceil_div(p.columns, plan.tile_columns)", "plan.column_tiles = greatest(1, p.columns / plan.tile_columns)"),
    "shared columns from the first product's right": Mutation(LAUNCH, "make_map<T>(maps[kRight + kShared], p.shared,", "make_map<T>(maps[kRight + kShared], first.right,"),
    # subtiles
    "a buffer written while its store reads it": Mutation(SUBTILES, "tma_wait_stores_read<kBuffers - 1>();", "tma_wait_stores_read<kBuffers>();"),
    "a warpgroup without rows loses count of its stores": Mutation(SUBTILES, "      tma_commit_stores();  // empty groups too: the next wait counts them\n    }", "    }\n    if (first && row + row_ < rows) tma_commit_stores();"),
    "a buffer written before the others know it is free": Mutation(SUBTILES, "    sync_named_barrier(1 + group_, kGroupThreads);  // the buffer's last store has read it\n", ""),
    "stored before all have written": Mutation(SUBTILES, "    fence_async_proxy();\n    sync_named_barrier(1 + group_, kGroupThreads);\n", "    fence_async_proxy();\n"),
    "written and not fenced": Mutation(SUBTILES, "    fence_async_proxy();\n", ""),
    "ended before the stores have read": Mutation(SUBTILES, "tma_wait_stores<0>();", ";"),
    "both warpgroups at one barrier": Mutation(SUBTILES, "sync_named_barrier(1 + group_, kGroupThreads);  //", "sync_named_barrier(1, kGroupThreads);  //"),
    "subtiles not swizzled": Mutation(SUBTILES, "^ lane % 8) * 16", ") * 16"),
    "columns of a word swapped": Mutation(SUBTILES, "acc[kFirst + 2 * i], acc[kFirst + 2 * i + 1]", "acc[kFirst + 2 * i + 1], acc[kFirst + 2 * i]"),
    # what becomes of sums
    "key's accumulators for gate's": Mutation(EPILOGUES, "kGated ? kColumns / 4 : 0;", "0;"),
    "bias of the next columns": Mutation(EPILOGUES, "least(column + 8 * j, columns - 8)", "least(column + 8 * j + 8, columns - 8)"),
    "bias past its end": Mutation(EPILOGUES, "least(column + 8 * j, columns - 8)", "column + 8 * j"),
    "gradients in each other's place": Mutation(EPILOGUES, "staging.store(key, args.maps[kPre], plan.rows, at.row, column, 1);", "staging.store(first, args.maps[kPre], plan.rows, at.row, column, 1);"),
    "a residual's stage never released": Mutation(EPILOGUES, "      release_stage(plan, shared, state.stage);\n      state.next();\n", "      state.next();\n"),
    "a stage released while it is read": Mutation(EPILOGUES, "    read_subtile(first, stage);\n", "    release_stage(plan, shared, state.stage);\n    read_subtile(first, stage);\n"),
    "the subtiles past the end of a row": Mutation(SUBTILES, "if (column + (kCount - 1) * kSubtileColumns < columns) body", "body"),
}  # fmt: skip
QUICK = ("a warpgroup without rows loses count of its stores",)  # in every run of the suite; the others are `slow`


def cases() -> Iterator[tuple[GemmCase, dict[str, Any]]]:
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


def noticed(mutation: Mutation, folder: Path) -> str:
    """What the cases say of the mutated kernels; "" when they pass."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    mutation.apply(sources)
    library = GemmLibrary(sources)
    for case, how in cases():
        try:
            library.run(case.gemm, **how)
            case.check()
        except (EmulationError, AssertionError) as error:
            return str(error)
    return ""
