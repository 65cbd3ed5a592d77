"""A ring of stages in shared memory: one warp fills them by TMA, two warpgroups multiply what is there, and two barriers a stage keep order.

Step t of a program, counted through all its tiles, uses stage t mod STAGES. Of a stage's barriers, `full` completes when the bytes that
were announced have arrived, `empty` when the consumers have read them: a phase for each turn round the ring. The producer may so be
STAGES steps ahead, and fills the next tile's first stages while the last one's epilogue runs.

A stage holds a left tile [BLOCK_N, BLOCK_K] and a right one of WIDE columns of the product, in the order in which the weight is stored:
K_MAJOR [WIDE, BLOCK_K] where its own rows are contiguous along k, else [BLOCK_K, WIDE]. The tensor cores read either. Two weights come as
two boxes into the halves of one right tile, so that one instruction multiplies both without packing them: in the 128-byte swizzle a tile
is made of columns of 64 numbers, one after the other, and halves of either order lie end to end.
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

__all__ = [
    "SWIZZLED",
    "SWIZZLED_BOX",
    "accumulator_layout",
    "begin_step",
    "end_step",
    "finish_product",
    "load_memory",
    "load_product",
    "load_step",
    "make_ring",
    "multiply",
    "release",
    "start_product",
    "wait_empty",
    "wait_full",
]

#: Of every tile in shared memory, and of every descriptor that fills or empties one: 16-bit numbers in rows of 128 bytes.
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
#: The same bytes as a box [1, rows, columns].
SWIZZLED_BOX = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))


@gluon.jit
def make_ring(
    DTYPE: gl.constexpr, BLOCK_N: gl.constexpr, WIDE: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr
):
    """(left tiles, right tiles, full barriers, empty barriers), before the warps part."""
    gl.static_assert(STAGES & (STAGES - 1) == 0, "a stage's number and phase are bits of the step's")
    gl.static_assert(STAGES > 2, "a product, the one before it and a piece for an epilogue are there at once")
    left = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_K], SWIZZLED)
    right = gl.allocate_shared_memory(DTYPE, [STAGES, WIDE, BLOCK_K], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    return left, right, full, empty


@gluon.jit
def wait_empty(empty, step):
    """The stage of this step, once its last reader is done; a fresh barrier lets the first turn pass."""
    STAGES: gl.constexpr = empty.shape[0]
    stage = step & (STAGES - 1)
    mbarrier.wait(empty.index(stage), ((step & STAGES) == 0).to(gl.int32))
    return stage


@gluon.jit
def wait_full(full, step):
    """The stage of this step, once its tiles are there."""
    STAGES: gl.constexpr = full.shape[0]
    stage = step & (STAGES - 1)
    mbarrier.wait(full.index(stage), ((step & STAGES) != 0).to(gl.int32))
    return stage


@gluon.jit
def release(empty, step, pred=True):
    """Hand the stage of this step, read by all consumers, to the producer."""
    STAGES: gl.constexpr = empty.shape[0]
    mbarrier.arrive(empty.index(step & (STAGES - 1)), count=1, pred=pred)


@gluon.jit
def load_step(ring, step, left, first, second, row, column, k, K_MAJOR: gl.constexpr):
    """Producer: one step of one tile, left rows from `row`, right columns from `column`, both from k on; returns the next step.

    Args:
        left: descriptor (N, K), boxes [BLOCK_N, BLOCK_K].
        first: descriptor of the weight; second: of another beside it, or None. Boxes of all WIDE columns, or of half as many each.
    """
    tiles_left, tiles_right, full, empty = ring
    DTYPE: gl.constexpr = tiles_left.dtype
    STAGES: gl.constexpr = tiles_left.shape[0]
    BLOCK_N: gl.constexpr = tiles_left.shape[1]
    BLOCK_K: gl.constexpr = tiles_left.shape[2]
    WIDE: gl.constexpr = tiles_right.shape[1]
    HALF: gl.constexpr = WIDE // 2
    stage = wait_empty(empty, step)
    arrived = full.index(stage)
    mbarrier.expect(arrived, (BLOCK_N + WIDE) * BLOCK_K * 2)
    tma.async_copy_global_to_shared(left, [row, k], arrived, tiles_left.index(stage))
    if K_MAJOR:
        if second is None:
            tma.async_copy_global_to_shared(first, [column, k], arrived, tiles_right.index(stage))
        else:
            halves = tiles_right._reinterpret(DTYPE, [2 * STAGES, HALF, BLOCK_K], SWIZZLED)
            tma.async_copy_global_to_shared(first, [column, k], arrived, halves.index(2 * stage))
            tma.async_copy_global_to_shared(second, [column, k], arrived, halves.index(2 * stage + 1))
    else:
        if second is None:
            turned = tiles_right._reinterpret(DTYPE, [STAGES, BLOCK_K, WIDE], SWIZZLED)
            tma.async_copy_global_to_shared(first, [k, column], arrived, turned.index(stage))
        else:
            halves = tiles_right._reinterpret(DTYPE, [2 * STAGES, BLOCK_K, HALF], SWIZZLED)
            tma.async_copy_global_to_shared(first, [k, column], arrived, halves.index(2 * stage))
            tma.async_copy_global_to_shared(second, [k, column], arrived, halves.index(2 * stage + 1))
    return step + 1


@gluon.jit
def load_product(
    ring, step, left, first, second, row, column, K: gl.constexpr, K_MAJOR: gl.constexpr, BEGIN: gl.constexpr = 0
):
    """Producer: the steps over K of one tile from BEGIN on; returns the next step."""
    BLOCK_K: gl.constexpr = ring[0].shape[2]
    for k in range(BEGIN, K, BLOCK_K):
        step = load_step(ring, step, left, first, second, row, column, k, K_MAJOR)
    return step


@gluon.jit
def load_memory(ring, step, left, memory, read, row, column, M: gl.constexpr):
    """Producer: the steps over the slots of image `read` of a memory (R, M, d); from R on an image is zeros."""
    tiles_left, tiles_right, full, empty = ring
    STAGES: gl.constexpr = tiles_left.shape[0]
    BLOCK_N: gl.constexpr = tiles_left.shape[1]
    BLOCK_K: gl.constexpr = tiles_left.shape[2]
    WIDE: gl.constexpr = tiles_right.shape[1]
    for k in range(0, M, BLOCK_K):
        stage = wait_empty(empty, step)
        arrived = full.index(stage)
        mbarrier.expect(arrived, (BLOCK_N + WIDE) * BLOCK_K * 2)
        tma.async_copy_global_to_shared(left, [row, k], arrived, tiles_left.index(stage))
        boxes = tiles_right._reinterpret(tiles_right.dtype, [STAGES, 1, BLOCK_K, WIDE], SWIZZLED_BOX)
        tma.async_copy_global_to_shared(memory, [read, k, column], arrived, boxes.index(stage))
        step += 1
    return step


@gluon.constexpr_function
def accumulator_layout(columns, warps):
    """Of [16 · warps, columns] float32: each warp has 16 rows, as the tensor cores leave them."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16])


@gluon.jit
def start_product(ring):
    """An accumulator of zeros."""
    tiles_left, tiles_right, _, _ = ring
    BLOCK_N: gl.constexpr = tiles_left.shape[1]
    WIDE: gl.constexpr = tiles_right.shape[1]
    return warpgroup_mma_init(gl.zeros((BLOCK_N, WIDE), gl.float32, accumulator_layout(WIDE, gl.num_warps())))


@gluon.jit
def begin_step(acc, ring, step, K_MAJOR: gl.constexpr):
    """Consumers: acc + left · right of this step, asynchronously."""
    tiles_left, tiles_right, full, _ = ring
    STAGES: gl.constexpr = tiles_left.shape[0]
    BLOCK_K: gl.constexpr = tiles_left.shape[2]
    WIDE: gl.constexpr = tiles_right.shape[1]
    stage = wait_full(full, step)
    if K_MAJOR:
        b_right = tiles_right.index(stage).permute((1, 0))
    else:
        turned = tiles_right._reinterpret(tiles_right.dtype, [STAGES, BLOCK_K, WIDE], SWIZZLED)
        b_right = turned.index(stage)
    return warpgroup_mma(tiles_left.index(stage), b_right, acc, is_async=True)


@gluon.jit
def end_step(acc, ring, previous):
    """Let the step just begun run on; the product of step `previous` is done then, and its stage free. -1: this tile has none before."""
    _, _, _, empty = ring
    acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
    release(empty, previous, previous >= 0)
    return acc


@gluon.jit
def multiply(acc, ring, step, previous, K: gl.constexpr, K_MAJOR: gl.constexpr, BEGIN: gl.constexpr = 0):
    """Consumers: acc + left · right over the steps of one product from BEGIN on.

    Returns:
        The accumulator, the next step, and the last one, which is still running.
    """
    BLOCK_K: gl.constexpr = ring[0].shape[2]
    for _ in range(BEGIN, K, BLOCK_K):
        acc = end_step(begin_step(acc, ring, step, K_MAJOR), ring, previous)
        previous = step
        step += 1
    return acc, step, previous


@gluon.jit
def finish_product(acc, ring, previous):
    """The accumulator after its last step, `previous`."""
    _, _, _, empty = ring
    done = warpgroup_mma_wait(0, deps=(acc,))
    release(empty, previous)
    return done
