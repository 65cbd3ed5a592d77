"""The Hopper kernels' source, executed on the CPU thread by thread, against float64 by the 2x rule."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.csrc.emulate_decode import ACTIVATIONS, ORDERS, compiler
from tests.csrc.emulate_gemm import KINDS, GemmLibrary, GemmParams
from tests.csrc.gemm_cases import GemmCase, columns_case, dhidden_case, hidden_case, output_case
from tests.csrc.gemm_mutations import MUTATIONS, QUICK, noticed

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def library() -> GemmLibrary:
    return GemmLibrary()


def check(library: GemmLibrary, case: GemmCase, **how: Any) -> None:
    library.run(case.gemm, **how)
    case.check()


# Rows: less than a warpgroup's, a whole tile, tiles of which the last warpgroup has none. Columns: tails of a subtile and of a tile.
HIDDEN = {
    "one_row": {"N": 1, "F": 264, "d": 72, "M": 24},
    "tails": {"N": 77, "F": 264, "d": 72, "M": 136, "bias": "same"},
    "whole_tiles": {"N": 128, "F": 256, "d": 128, "dtype": FP16, "bias": "wide"},
    "more_tiles_than_blocks": {"N": 300, "F": 384, "d": 320, "M": 24, "activation": "gelu"},
    "pre_alone": {"N": 128, "F": 384, "d": 72, "keep": "pre", "activation": "relu", "dtype": FP16},
    "hidden_alone": {"N": 77, "F": 384, "d": 72, "keep": "hidden", "activation": "gelu_tanh", "bias": "same"},
    "plain": {"N": 300, "F": 264, "d": 72, "M": 136, "gated": False, "bias": "wide"},
    "plain_fp16": {"N": 77, "F": 384, "d": 320, "gated": False, "activation": "gelu", "dtype": FP16},
    "any_depth": {"N": 77, "F": 64, "d": 71, "M": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden(library: GemmLibrary, name: str) -> None:
    check(library, hidden_case(**HIDDEN[name]))


OUTPUT = {
    "one_row": {"N": 1, "d": 72, "depths": (264, 24), "across": "-+"},
    "tails": {"N": 77, "d": 72, "depths": (264, 136), "across": "++", "bias": "same", "residual": "other"},
    "three_products": {"N": 300, "d": 320, "depths": (264, 264, 24), "across": "+++"},
    "three_otherwise": {"N": 128, "d": 320, "depths": (72, 136, 24), "across": "-+-", "dtype": FP16, "bias": "wide"},
    "in_place": {"N": 300, "d": 72, "depths": (24,), "across": "+", "residual": "in place"},
    "more_tiles_than_blocks": {"N": 300, "d": 520, "depths": (384, 9), "across": "-+", "bias": "wide", "residual": "other", "dtype": FP16},
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUT)
def test_output(library: GemmLibrary, name: str) -> None:
    check(library, output_case(**OUTPUT[name]))


DHIDDEN = {
    "one_row": {"N": 1, "F": 264, "d": 72, "M": 24, "across": True},
    "tails": {"N": 77, "F": 264, "d": 72, "M": 136, "activation": "gelu"},
    "in_place": {"N": 300, "F": 384, "d": 320, "M": 24, "in_place": True, "across": True, "activation": "gelu_tanh"},
    "fp16": {"N": 128, "F": 512, "d": 128, "dtype": FP16},
    "plain": {"N": 300, "F": 264, "d": 72, "M": 136, "gated": False, "in_place": True},
    "plain_fp16": {"N": 77, "F": 384, "d": 320, "gated": False, "activation": "gelu", "dtype": FP16, "across": True},
    "relu": {"N": 77, "F": 64, "d": 71, "activation": "relu"},
}  # fmt: skip


@pytest.mark.parametrize("name", DHIDDEN)
def test_dhidden(library: GemmLibrary, name: str) -> None:
    check(library, dhidden_case(**DHIDDEN[name]))


@pytest.mark.parametrize("form", [(1, 2), (2, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_any_order(library: GemmLibrary, order: str, form: tuple[int, int]) -> None:
    """However copies and products fall, and whichever of the blocks are resident. Of two together the last one has no rows."""
    for seed in (1, 2) if order == "random" else (1,):
        how: dict[str, Any] = {"order": order, "seed": seed, "resident": 1 + seed}
        cluster, warpgroups = form
        same: dict[str, Any] = {
            "seed": seed,
            "cluster": cluster,
            "warpgroups": warpgroups,
            "multiprocessors": 3 * cluster,
        }
        check(library, hidden_case(300, 264, 72, M=24, **same), **how)
        check(
            library, output_case(300, 264, (136, 72, 24), across="+-+", bias="same", residual="in place", **same), **how
        )
        check(library, dhidden_case(300, 264, 72, M=24, in_place=True, **same), **how)


def test_other_shapes(library: GemmLibrary) -> None:
    check(library, hidden_case(1, 264, 72, gated=False, cluster=2))  # two blocks, of which one has nothing to store
    check(library, dhidden_case(100, 264, 72, gated=False, warpgroups=1))
    check(library, output_case(100, 264, (72,), bias="same", residual="other", warpgroups=1, cluster=1))
    check(library, output_case(520, 320, (264,), cluster=2, multiprocessors=5))
    check(library, dhidden_case(256, 264, 72, M=264, across=True, cluster=2))


def test_more_row_tiles_than_a_group(library: GemmLibrary) -> None:
    """Groups of 16 row tiles, the last one short: every tile once, with blocks that have two or three."""
    check(library, hidden_case(17 * 128 + 8, 136, 24, M=264, keep="hidden", multiprocessors=40), resident=3)


@pytest.mark.parametrize("kind", ["hidden", "dhidden"])
def test_shared_columns_alone(library: GemmLibrary, kind: str) -> None:
    check(library, columns_case(kind, 77, 72, 264))


def test_nothing_to_do(library: GemmLibrary) -> None:
    library.run(output_case(0, 72, (24,)).gemm)


SWEEP = [
    (N, F, d, M, activation, dtype)
    for (N, F, d, M), activation, dtype in itertools.product(
        [(1, 264, 72, 0), (77, 384, 320, 24), (128, 264, 320, 136), (300, 384, 72, 24)], ACTIVATIONS, (BF16, FP16)
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("N", "F", "d", "M", "activation", "dtype"), SWEEP)
def test_sweep(library: GemmLibrary, N: int, F: int, d: int, M: int, activation: str, dtype: torch.dtype) -> None:
    for seed, (gated, flag) in enumerate(itertools.product((True, False), (True, False))):
        form: dict[str, Any] = {"cluster": 1 + gated, "warpgroups": 1 + flag}
        same: dict[str, Any] = {"M": M, "dtype": dtype, "activation": activation, "gated": gated, "seed": seed, **form}
        bias = "wide" if flag else "same"
        check(library, hidden_case(N, F, d, bias=bias, keep="hidden pre" if flag else "hidden", **same), seed=seed + 1)
        check(library, dhidden_case(N, F, d, across=flag, in_place=not flag, **same), seed=seed + 1)
        depths = (F, F, M or 8)[: 1 + seed % 3]
        check(
            library,
            output_case(
                N,
                d,
                depths,
                across="+-+"[seed % 3 :] + "+-",
                bias=bias,
                residual="other" if gated else None,
                dtype=dtype,
                **form,
            ),
        )


def test_which_shape_a_launch_takes(library: GemmLibrary) -> None:
    """Of an output of LLaMA-7B on 132 multiprocessors: few tiles are halved, many keep 128 rows and go by two blocks."""
    found = {}
    for rows in (32, 100, 512, 1024, 8192):
        p = GemmParams()
        p.kind, p.rows, p.columns, p.product_count, p.multiprocessors = KINDS["output"], rows, 4096, 1, 132
        found[rows] = library.shape(p)
    assert found == {32: (1, 1), 100: (2, 1), 512: (2, 1), 1024: (2, 2), 8192: (2, 2)}


def test_says_what_it_does_not_take(library: GemmLibrary) -> None:
    def of(**changes: Any) -> str | None:
        gemm = hidden_case(8, 16, 8, M=8).gemm
        for name, value in changes.items():
            setattr(gemm.params, name, value)
        return library.unsupported(gemm)

    assert of() is None
    assert "bfloat16 or float16" in str(of(type=2))
    assert "multiple of 8" in str(of(columns=12))
    assert "by 16 bytes" in str(of(pre=8))
    assert "negative" in str(of(rows=-1))
    assert "gated goes with a gate" in str(of(gated=False))
    assert "one to three products" in str(of(product_count=2))
    assert "multiprocessors" in str(of(multiprocessors=0))
    assert "one block or two" in str(of(cluster=3))
    assert "one block or two" in str(of(cluster=2, multiprocessors=1))
    assert "one warpgroup multiplies, or two" in str(of(warpgroups=3))
    gemm = output_case(8, 16, (8,)).gemm
    gemm.params.products[0].left.stride = 12
    assert "by 16 bytes" in str(library.unsupported(gemm))
    gemm.params.products[0].left.data = None
    assert "operand is missing" in str(library.unsupported(gemm))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MUTATIONS])
def test_mutation_is_noticed(name: str, tmp_path: Path) -> None:
    assert noticed(MUTATIONS[name], tmp_path) != ""
