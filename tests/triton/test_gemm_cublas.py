"""The large products by cuBLAS, with the package's passes and memory kernels around them: held to the same rules as the fused kernels."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from memvp_kernels import fused_ffn, philox
from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton import gemm_cublas
from memvp_kernels.backends.triton.gemm import (
    IMPLEMENTATIONS,
    GemmSteps,
    choose_steps,
    override_implementation,
    shape_of,
)
from memvp_kernels.backends.triton.heuristics import cost_model, tiles
from memvp_kernels.backends.triton.kernels.output import output_forward
from memvp_kernels.hardware import chip_of
from tests import cases, tolerance
from tests.triton.test_backward_needs import (
    DEVICE,
    FORMS,
    arguments,
    dy,
    judge,
    problem,
    problem_of,
    trainable,
)

run = functools.partial(fused_ffn, backend="triton")


@pytest.fixture(autouse=True)
def cublas(fused: None) -> Iterator[None]:
    with override_implementation("cublas"):
        yield


DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize(("name", "dtype"), list(zip(cases.names(), itertools.cycle(DTYPES), strict=False)), ids=str)
def test_case(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, cases.build(name, dtype, DEVICE))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.names())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_case_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, cases.build(name, dtype, DEVICE))


@pytest.mark.parametrize("form", FORMS)
def test_layouts(form: str) -> None:
    layouts = dict(cases.strided(cases.build(f"one_each-{form}", torch.bfloat16, DEVICE)))
    for which in ("x_transposed", "gate_every_second", "key_position_transposed"):
        tolerance.check(run, layouts[which])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_dropout_is_the_same_philox(form: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a = dict(cases.build(f"index-{form}", torch.bfloat16, DEVICE), dropout_p=0.4, recompute=recompute)
    seed = torch.tensor([0x1234_5678_9ABC_DEF], device=DEVICE)
    monkeypatch.setattr("memvp_kernels.autograd.draw_seed", lambda device: seed)
    rows, slots = a["x"].shape[0] * a["x"].shape[1], a["visual_key"].shape[1]
    tolerance.check(run, a, keep=philox.keep_mask(seed, rows, slots, 0.4))


@pytest.mark.parametrize("form", FORMS)
def test_each_implementation_takes_up_what_the_other_kept(form: str) -> None:
    """Forward and backward choose each for itself: both keep the same numbers, biases included, up to their own rounding."""
    a = arguments(form, torch.float32)
    p = problem_of(a)
    kept = backend.forward(p, save_hidden=True, save_scores=True)
    with override_implementation("fused"):
        expected = backend.forward(p, save_hidden=True, save_scores=True)
        judge(backend.backward(p, dy(p), kept[1], kept[2], trainable(p)), a, dy(p))
    for found, wanted in zip(kept, expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found, wanted)
    judge(backend.backward(p, dy(p), expected[1], expected[2], trainable(p)), a, dy(p))


def test_nothing_but_what_is_asked_for_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """hidden takes gate's place where the pre-activations are not saved, and dpre that of recomputed ones."""
    p = problem("plain")
    assert p.key is not None
    ffn = (p.x, p.key, p.gate, p.key_bias, p.gate_bias, "silu", None, p.segments, None)
    out = gemm_cublas.hidden(*ffn, save_hidden=False, save_scores=False)
    assert out.pre is None
    assert out.hidden is not None
    assert out.hidden.untyped_storage().nbytes() == 2 * p.rows * p.pairs * 2
    out = gemm_cublas.hidden(*ffn, save_hidden=True, save_scores=False, need_hidden=False)
    assert out.hidden is None
    assert out.pre is not None
    gradients = gemm_cublas.dhidden(
        dy(p), p.value, out.pre, "silu", None, 0, None, p.segments, None, need_visual=False, overwrite=True
    )
    assert gradients.dpre is out.pre


@pytest.mark.parametrize("splits", [1, 3])
def test_a_memory_per_sequence_is_added_in_place(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "output_tile", lambda *_: tiles.Tile(32, 32, 16, 4, 2, splits=splits))
    p = problem("plain")
    assert p.value is not None
    assert p.visual_value is not None
    memory = p.visual_value.contiguous()
    hidden, visual = torch.randn(45, 72).to(p.x), torch.randn(45, 17).to(p.x)
    y = hidden @ p.value
    apart = output_forward(None, None, None, visual, memory, p.segments, y.clone(), p.x)
    assert not torch.equal(apart, y)
    assert gemm_cublas._add_memory(y, visual, memory, p.segments).data_ptr() == y.data_ptr()
    assert torch.equal(y, apart)
    assert torch.equal(gemm_cublas.output(hidden, p.value, None, visual, memory, p.segments, None, p.x), apart)


def test_which_steps_the_choice_gives() -> None:
    """IEEE float32 by cuBLAS, whose products block registers where `tl.dot` can't; a tiny problem in 16 bits fused."""
    with override_implementation(None):
        chip = chip_of(90)
        wide = shape_of(problem(dtype=torch.float32))._replace(rows=8192, width=4096, pairs=11008, precision="ieee")
        assert set(cost_model.choice(chip, wide)) == {"cublas"}
        assert choose_steps(problem()) == IMPLEMENTATIONS["fused"]
    assert choose_steps(problem()) is IMPLEMENTATIONS["cublas"]


def test_an_implementation_can_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*IMPLEMENTATIONS, "cutlass"):
        monkeypatch.setenv("MEMVP_GEMM", name)
        spec = importlib.util.find_spec("memvp_kernels.backends.triton.gemm")
        assert spec is not None and spec.loader is not None
        fresh = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fresh)
        if name in IMPLEMENTATIONS:
            assert fresh.choose_steps(problem()) == IMPLEMENTATIONS[name]
        else:
            with pytest.raises(ValueError, match="MEMVP_GEMM: wanted one of fused, cublas, got 'cutlass'"):
                fresh.choose_steps(problem())


def test_a_caller_may_bring_steps_of_its_own() -> None:
    """As the cuda backend does; the override is about the Triton backend's own."""
    ran: list[str] = []

    def recorded(step: str) -> Any:
        def run_step(*arguments: Any, **options: Any) -> Any:
            ran.append(step)
            return getattr(IMPLEMENTATIONS["fused"], step)(*arguments, **options)

        return run_step

    p, steps = problem("factored"), GemmSteps(*map(recorded, GemmSteps._fields))
    _, pre, scores = backend.forward(p, save_hidden=True, save_scores=True, steps=steps)
    backend.backward(p, dy(p), pre, scores, trainable(p), steps=steps)
    assert set(ran) == set(GemmSteps._fields)
