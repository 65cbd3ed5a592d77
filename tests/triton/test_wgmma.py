"""The road of the extension's Hopper kernels: the Python side, the bindings and the kernels themselves, these run on the CPU."""

from __future__ import annotations

import collections
import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from memvp_kernels import fused_ffn
from memvp_kernels.backends.cuda import extension
from memvp_kernels.backends.cuda import gemm as wgmma
from memvp_kernels.backends.triton import gemm as steps
from memvp_kernels.backends.triton.heuristics import cost_model as roads
from memvp_kernels.problem import Segments
from tests import cases, tolerance
from tests.csrc.conftest import build_host_extension
from tests.csrc.fake_gpu import Machine, forget, problem_of
from tests.triton.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="the kernels run on the CPU here; a GPU has its own test of them"
)

BF16, FP16 = torch.bfloat16, torch.float16
run = functools.partial(fused_ffn, backend="triton")


@pytest.fixture(autouse=True)
def launched(fused_road: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """Every step asked for by this road, on the host's extension: how often each kind of kernel ran."""
    built = build_host_extension()
    names = {code: name for name, code in built.step_codes.items()}
    found: collections.Counter[str] = collections.Counter()

    def step(**arguments: Any) -> None:
        assert arguments["stream"] == 77
        found[names[arguments["kind"]]] += 1
        built.step(**arguments)

    shown = types.SimpleNamespace(**{**vars(built), "step": step})
    monkeypatch.setattr(extension, "load", lambda: shown)
    monkeypatch.setattr(wgmma, "missing", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    with steps.forced("wgmma"):
        yield found


# Of every form of memory, with and without gate and biases, packed and padded.
@pytest.mark.parametrize(
    ("name", "dtype"), [*zip(cases.names(), itertools.cycle((BF16, FP16)), strict=False)][::5], ids=str
)
def test_case(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, cases.build(name, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.names())
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_case(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, cases.build(name, dtype))


@pytest.mark.parametrize("form", ["plain", "factored", "none"])
@pytest.mark.parametrize("transposed", [True, False])
def test_every_step_runs_natively(form: str, transposed: bool, launched: collections.Counter[str]) -> None:
    a = cases.ffn(BF16, d=24, F=40, biased=True, transposed=transposed)
    if form != "none":
        a = cases.memory(a, R=3, M=8, r=8 if form == "factored" else None)
    tolerance.check(run, a, names=["x"])
    assert launched == {"hidden": 1, "output": 2, "dhidden": 1}


ODD = {
    "F": lambda: cases.ffn(BF16, F=44),
    "d": lambda: cases.ffn(BF16, d=20),
    "number type": lambda: cases.ffn(torch.float32),
    "base": lambda: _moved(cases.ffn(BF16), 1),
}


def _moved(a: dict[str, Any], elements: int) -> dict[str, Any]:
    """The weights at addresses that are no multiples of 16 bytes, and value without contiguous rows or columns."""
    for name in ("key", "gate"):
        whole = a[name].new_zeros(a[name].numel() + elements)
        a[name] = whole[elements:].view(a[name].shape).copy_(a[name])
    a["value"] = a["value"].repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    return a


@pytest.mark.parametrize("what", ODD)
def test_what_the_kernels_do_not_take_goes_by_the_fused_ones(what: str, launched: collections.Counter[str]) -> None:
    """Of a step that fits nothing, nothing runs; x and y still fit where only the weights do not."""
    tolerance.check(run, ODD[what](), names=["x"])
    assert not launched


def test_a_bias_of_any_layout(launched: collections.Counter[str]) -> None:
    a = cases.ffn(BF16, biased=True)
    a["key_bias"] = a["key_bias"].float()
    a["gate_bias"] = a["gate_bias"].double()  # neither x's dtype nor float32
    a["value_bias"] = a["value_bias"].new_zeros(25)[1:].copy_(a["value_bias"])  # no multiple of 4 bytes
    tolerance.check(run, a, names=["x"])
    assert launched["hidden"] == launched["dhidden"] == 1


def test_a_residual_that_can_not_be_copied(launched: collections.Counter[str]) -> None:
    a = cases.ffn(BF16)
    a["residual"] = cases.random(3, 5, 25, dtype=BF16)[..., :24]
    tolerance.check(run, a, names=["x"])
    assert launched == {"hidden": 1, "dhidden": 1, "output": 1}


def test_pre_activations_formed_again_are_overwritten(launched: collections.Counter[str]) -> None:
    a = cases.ffn(BF16)
    x, key, value = (a[n].reshape(-1, a[n].shape[-1]) for n in ("x", "key", "value"))
    segments = Segments(rows=len(x), sequences=3, length=5)
    nothing: tuple[Any, ...] = (None, segments, None)
    made = wgmma.hidden(
        x, key, a["gate"], None, None, "silu", *nothing, save_hidden=True, save_scores=False, need_hidden=False
    )
    assert made.hidden is None
    assert made.pre is not None
    kept = made.pre.clone()
    apart, over = (
        wgmma.dhidden(
            x, value, pre, "silu", None, 0, None, segments, None, need_visual=False, overwrite=pre is made.pre
        )
        for pre in (kept, made.pre)
    )
    assert over.dpre is made.pre
    assert apart.dpre is not None
    assert torch.equal(over.dpre, apart.dpre)


def test_the_choice_never_takes_it() -> None:
    assert set(roads.ROADS) - set(roads.CHOSEN_FROM) >= {"wgmma"}
    with steps.forced(None):
        for rows in (64, 8192):
            chosen = steps.steps_of(problem_of(**cases.ffn(BF16, S=1, T=rows, d=8, F=8)))
            for step in roads.STEPS:
                assert getattr(chosen, step) in (getattr(steps.Fused, step), getattr(steps.Library, step))


@pytest.mark.parametrize(
    ("device", "capability", "archs", "reason"),
    [
        ("cuda:0", (9, 0), "80;90a", None),
        ("cpu", (9, 0), "80;90a", "need an NVIDIA GPU"),
        ("cuda:0", (10, 0), "90a;100a", "compute capability 9.0"),
        ("cuda:0", (8, 0), "80;90a", "compute capability 9.0"),
        ("cuda:0", (9, 0), "80;90+PTX", "90a in MEMVP_CUDA_ARCHS"),
        ("cuda:0", (9, 0), None, "was not built"),
    ],
)
def test_says_what_is_missing(
    device: str, capability: tuple[int, int], archs: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    built: Any = None if archs is None else types.SimpleNamespace(archs=archs)
    Machine(built, capability=capability).install(monkeypatch)
    forget()
    known = wgmma.missing(torch.device(device))
    forget()
    assert (known is None) == (reason is None)
    assert reason is None or reason in str(known)
