"""The warp-specialised kernels' tiles: they fit, no launch is promised faster than its arithmetic and bytes, and waves decide."""

from __future__ import annotations

import itertools

import pytest

from memvp_kernels.backends.triton.heuristics import cost_model as roads
from memvp_kernels.backends.triton.heuristics import hopper_tiles as ring_tiles
from memvp_kernels.backends.triton.heuristics import tiles
from tests.triton.test_roads import shape

HOPPER = tiles.chip_of(90)
LAUNCHES = [
    (rows, columns, depth)
    for rows, columns, depth in itertools.product(
        (1, 64, 512, 1000, 8192), ((4096,), (22016, 456), (11008, 0)), (456, 4096, 22472)
    )
]


@pytest.mark.parametrize("road", ring_tiles.TILES)
def test_the_stages_fit_beside_what_results_leave_through(road: str) -> None:
    for tile in ring_tiles.TILES[road]:
        assert tile.block_n * tile.columns // (32 * tile.warps) <= 128  # accumulators of a thread
        stages = tile.stages * (tile.block_n + tile.columns) * tile.block_k * 2
        assert stages + 32 * 1024 + 1024 <= HOPPER.shared


@pytest.mark.parametrize("road", ring_tiles.TILES)
@pytest.mark.parametrize(("rows", "columns", "depth"), LAUNCHES)
def test_no_launch_is_faster_than_its_arithmetic_and_its_bytes(
    road: str, rows: int, columns: tuple[int, ...], depth: int
) -> None:
    tile = ring_tiles.ring_tile(HOPPER, road, rows, columns, depth)
    cycles = ring_tiles.ring_cycles(HOPPER, road, tile, rows, columns, depth)
    assert cycles >= 2 * rows * sum(columns) * depth / (HOPPER.tensor * HOPPER.multiprocessors)
    assert cycles >= 2 * (rows * depth + (depth + rows) * sum(columns)) / HOPPER.memory
    for other in ring_tiles.TILES[road]:
        assert cycles <= ring_tiles.ring_cycles(HOPPER, road, other, rows, columns, depth)


def test_few_tiles_are_made_smaller() -> None:
    """LLaMA-7B's output at 512 rows is 64 wide tiles for 132 multiprocessors, at 1024 rows one for each."""
    for road, small in (("gluon", (128, 128)), ("wgmma", (64, 256))):
        taken = [ring_tiles.ring_tile(HOPPER, road, rows, (4096,), 11008) for rows in (512, 1024)]
        assert [(tile.block_n, tile.columns) for tile in taken] == [small, (128, 256)]


@pytest.mark.parametrize("road", ring_tiles.TILES)
def test_what_it_cannot_take_costs_endlessly(road: str) -> None:
    for step in roads.STEPS:
        assert roads.step_cycles(HOPPER, shape(512), step, road) < float("inf")
        assert roads.step_cycles(HOPPER, shape(512, descriptors=False), step, road) == float("inf")
        assert roads.step_cycles(tiles.chip_of(100), shape(512), step, road) == float("inf")
