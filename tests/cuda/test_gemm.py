"""backend="cuda" for training and prefill on Hopper: the Python side, the bindings, and the kernels themselves in the CPU emulation."""

from __future__ import annotations

import collections
import functools
import itertools
import types
from typing import Any

import pytest
import torch

from memvp_kernels import dispatch, fused_ffn
from memvp_kernels.backends.cuda import decode, extension, gemm
from memvp_kernels.problem import Segments
from tests import cases, tolerance
from tests.csrc.conftest import build_emulated_extension
from tests.csrc.fake_gpu import Machine, forget, on_gpu, problem_of
from tests.triton.conftest import INTERPRETED, poisoned

__all__ = ["poisoned"]  # a fixture for every test here
pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="the kernels run on the CPU here; a GPU has its own test of them"
)

BF16, FP16 = torch.bfloat16, torch.float16
run = functools.partial(fused_ffn, backend="cuda")


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """A machine with an H100, as far as the package can tell, whose kernels are the emulated ones: how often each kind ran."""
    built = build_emulated_extension()
    names = {code: name for name, code in built.gemm_codes.items()}
    found: collections.Counter[str] = collections.Counter()

    def launch(**arguments: Any) -> None:
        assert arguments["stream"] == 77
        found[names[arguments["kind"]]] += 1
        built.gemm(**arguments)

    shown = types.SimpleNamespace(**{**vars(built), "gemm": launch})
    monkeypatch.setattr(extension, "load", lambda: shown)
    monkeypatch.setattr(dispatch, "missing", lambda name, device: None)
    monkeypatch.setattr(decode, "unsupported", lambda problem: "not the subject here")
    monkeypatch.setattr(gemm, "unsupported", lambda problem: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    return found


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


def test_recomputed_pre_activations_are_overwritten(launched: collections.Counter[str]) -> None:
    a = cases.ffn(BF16)
    x, key, value = (a[n].reshape(-1, a[n].shape[-1]) for n in ("x", "key", "value"))
    segments = Segments(rows=len(x), sequences=3, length=5)
    nothing: tuple[Any, ...] = (None, segments, None)
    out = gemm.hidden(
        x, key, a["gate"], None, None, "silu", *nothing, save_hidden=True, save_scores=False, need_hidden=False
    )
    assert out.hidden is None
    assert out.pre is not None
    kept = out.pre.clone()
    apart, over = (
        gemm.dhidden(x, value, pre, "silu", None, 0, None, segments, None, need_visual=False, overwrite=pre is out.pre)
        for pre in (kept, out.pre)
    )
    assert over.dpre is out.pre
    assert apart.dpre is not None
    assert torch.equal(over.dpre, apart.dpre)


def hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), archs: str | None = "80;90a") -> None:
    """A GPU of this capability and an extension built for these architectures, of which a problem may be asked."""
    monkeypatch.undo()
    built: Any = None if archs is None else types.SimpleNamespace(archs=archs)
    Machine(built, capability=capability).install(monkeypatch)
    forget()


@pytest.mark.parametrize(
    ("capability", "archs", "dtype", "reason"),
    [
        ((9, 0), "80;90a", BF16, None),
        ((9, 0), "80;90a", FP16, None),
        ((9, 0), "80;90a", torch.float32, "x is float32"),
        ((10, 0), "90a;100a", BF16, "compute capability 9.0"),
        ((8, 0), "80;90a", BF16, "compute capability 9.0"),
        ((9, 0), "80;90+PTX", BF16, "90a in MEMVP_CUDA_ARCHS"),
        ((9, 0), None, BF16, "was not built"),
    ],
)
def test_says_what_it_does_not_take(
    capability: tuple[int, int],
    archs: str | None,
    dtype: torch.dtype,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hopper(monkeypatch, capability, archs)
    found = gemm.unsupported(on_gpu(problem_of(**cases.ffn(dtype))))
    forget()
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
    assert "x is on cpu" in str(gemm.unsupported(problem_of(**cases.ffn(dtype))))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [4, 65])
def test_what_backend_cuda_takes(rows: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode keeps its kernel; everything else goes to these, on Hopper only; "auto" takes them when the constant says so."""
    hopper(monkeypatch)
    monkeypatch.setattr(dispatch, "missing", lambda name, device: None)
    monkeypatch.setattr(decode, "is_fast", lambda problem: True)
    few = None if rows <= 64 else "x has 65 tokens, and the decode kernel takes at most 64"
    monkeypatch.setattr(decode, "unsupported", lambda problem: few)
    dispatch._chip.cache_clear()
    p = on_gpu(problem_of(**cases.ffn(BF16, S=1, T=rows)))
    decoded = rows <= 64 and not training
    assert dispatch.choose(p, "cuda", training=training) is (decode if decoded else gemm)
    assert dispatch.choose(p, "auto", training=training) is not gemm
    monkeypatch.setattr(dispatch, "AUTO_TAKES_HOPPER", True)
    large = on_gpu(problem_of(**cases.ffn(BF16, S=1, T=8192, d=256, F=512)))
    assert dispatch.choose(large, "auto", training=True) is gemm

    hopper(monkeypatch, (8, 0))
    monkeypatch.setattr(dispatch, "missing", lambda name, device: None)
    monkeypatch.setattr(decode, "unsupported", lambda problem: few)
    if not decoded:
        why = "has no backward" if training else "at most 64"
        with pytest.raises(
            RuntimeError, match=f"backend: wanted 'cuda', but .*{why}.*compute capability 9.0.*backend='auto'"
        ):
            dispatch.choose(p, "cuda", training=training)
    forget()
    dispatch._chip.cache_clear()
