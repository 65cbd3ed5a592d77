"""A small Gluon kernel that does what the shipped ones do: a ring, two partitions, both orders of an operand, stores by TMA.

Its lines are what test_gluon_interpreter.py spoils, one at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

#: Of a box, of a tile as the tensor cores read it, and of a box of three dimensions: the same bytes.
FLAT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
DEEP = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))


@gluon.jit
def products_kernel(
    left, low, high, turned, bias, out, rows, F: gl.constexpr, K: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """out (2, rows, F) = left (rows, K) · weightᵀ + left · turned (2, K, F), weight being low (F, K), then high; bias (F,) to the first."""
    lefts = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, BLOCK], FLAT)
    rights = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK, BLOCK], FLAT)
    buffers = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, BLOCK], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (lefts, rights, buffers, full, empty, bias, out, rows, F, K, BLOCK, STAGES)),
            (_produce, (lefts, rights, full, empty, left, low, high, turned, rows, F, K, BLOCK, STAGES)),
        ],
        [1],
        [24],
    )


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The step after: the next stage, in the other phase after the last one."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _corner(tile, rows, BLOCK: gl.constexpr):
    row_tiles = gl.cdiv(rows, BLOCK)
    return tile % row_tiles * BLOCK, tile // row_tiles * BLOCK


@gluon.jit
def _produce(
    lefts, rights, full, empty, left, low, high, turned, rows,
    F: gl.constexpr, K: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    halves = rights._reinterpret(gl.bfloat16, [2 * STAGES, BLOCK, BLOCK], FLAT)
    pairs = rights._reinterpret(gl.bfloat16, [STAGES, 2, BLOCK, BLOCK], DEEP)
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), gl.cdiv(rows, BLOCK) * gl.cdiv(F, BLOCK), gl.num_programs(0)):
        row, column = _corner(tile, rows, BLOCK)
        for k in range(0, K, BLOCK):
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            mbarrier.expect(arrived, 3 * BLOCK * BLOCK * 2)
            tma.async_copy_global_to_shared(left, [row, k], arrived, lefts.index(stage))
            tma.async_copy_global_to_shared(low, [column, k], arrived, halves.index(2 * stage))
            tma.async_copy_global_to_shared(high, [column, k], arrived, halves.index(2 * stage + 1))
            stage, phase = _next(stage, phase, STAGES)
        for k in range(0, K, BLOCK):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), 3 * BLOCK * BLOCK * 2)
            tma.async_copy_global_to_shared(left, [row, k], full.index(stage), lefts.index(stage))
            tma.async_copy_global_to_shared(turned, [0, k, column], full.index(stage), pairs.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _consume(
    lefts, rights, buffers, full, empty, bias, out, rows,
    F: gl.constexpr, K: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 2 * BLOCK, 16])
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK, 16])
    across = rights._reinterpret(gl.bfloat16, [STAGES, BLOCK, 2 * BLOCK], FLAT)
    boxes = buffers._reinterpret(gl.bfloat16, [2, 1, BLOCK, BLOCK], DEEP)
    stage = 0
    phase = 0
    previous = 0
    for tile in range(gl.program_id(0), gl.cdiv(rows, BLOCK) * gl.cdiv(F, BLOCK), gl.num_programs(0)):
        row, column = _corner(tile, rows, BLOCK)
        acc = warpgroup_mma_init(gl.zeros((BLOCK, 2 * BLOCK), gl.float32, WIDE))
        for k in range(0, K, BLOCK):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(lefts.index(stage), rights.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index(previous), count=1, pred=k > 0)
            previous = stage
            stage, phase = _next(stage, phase, STAGES)
        for _ in range(0, K, BLOCK):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(lefts.index(stage), across.index(stage), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index(previous), count=1)
            previous = stage
            stage, phase = _next(stage, phase, STAGES)
        sums = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(previous), count=1)
        first, second = sums.reshape((BLOCK, 2, BLOCK)).permute((0, 2, 1)).split()
        o_column = column + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, PIECE))
        b_bias = gl.load(bias + o_column, mask=o_column < F, other=0.0)
        results = (gl.convert_layout(first, PIECE) + b_bias.to(gl.float32)[None, :], gl.convert_layout(second, PIECE))
        for half in gl.static_range(2):
            tma.store_wait(1)
            buffers.index(half).store(results[half].to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [half, row, column], boxes.index(half))
    tma.store_wait(0)
