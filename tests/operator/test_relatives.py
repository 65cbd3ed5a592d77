"""A feature map of the scores, the lowest of them dropped, no activation: ADEM-VL and MemVR on the torch backend."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memvp_kernels import autograd, fused_ffn
from memvp_kernels.autograd import KEEP_HIDDEN, KEEP_SCORES
from memvp_kernels.backends.torch.dropout import keep_mask
from memvp_kernels.torch_op import backward_op, forward_op, pack
from tests import cases, relatives, tolerance
from tests.cases import DEVICE
from tests.operator.test_frozen import kept_bytes, trainable

run = functools.partial(fused_ffn, backend="torch")
NAMES = [
    f"{sharing}-{form}"
    for sharing in (
        "one_each", "index", "lengths", "packed_index_lengths", "shared_by_all", "shared_lengths", "same_tensor", "wide",
        "alone_residual", "no_positions", "one_slot", "odd_sizes",
    )
    for form in ("plain", "factored")
]  # fmt: skip
SEVERAL = ["index-plain", "packed_index_lengths-factored", "lengths-plain", "same_tensor-factored"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_adem(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, relatives.build(name, "adem", dtype, DEVICE))


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["memvr", "mapped", "dropped"])
@pytest.mark.parametrize("name", SEVERAL)
def test_each_part(name: str, method: str, dtype: torch.dtype) -> None:
    tolerance.check(run, relatives.build(name, method, dtype, DEVICE))


@pytest.mark.device
@pytest.mark.parametrize("name", SEVERAL)
def test_recompute_gives_the_same_bits(name: str) -> None:
    a = cases.build(name, torch.bfloat16, DEVICE) | relatives.METHODS["adem"]  # near ties included
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]
    grad = torch.randn_like(a["x"])
    kept, again = (tolerance.gradients(functools.partial(run, recompute=r), a, names, grad) for r in (False, True))
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][n], again[1][n]) for n in names)


def visual(scores: Tensor, drop: float, **options: Any) -> Tensor:
    """What the operator makes of these scores (S, M), one row of x and one memory row for each."""
    S, M = scores.shape
    eye = torch.eye(M, dtype=scores.dtype, device=scores.device).expand(S, M, M)
    given = {"visual_activation": "identity", "visual_drop": drop, "backend": "torch"} | options
    return fused_ffn(scores[:, None], None, None, eye, eye, **given)[:, 0]


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop", [0.1, 0.29, 0.3, 0.7, 0.999])
def test_how_many_are_dropped(drop: float, dtype: torch.dtype) -> None:
    """As Python counts: int(0.7 · 10) is 7, and int(0.29 · 100) is 28; padding is never counted."""
    lengths = torch.tensor([100, 1, 10, 30, 0, 99], device=DEVICE)
    scores = torch.stack([torch.randperm(100, device=DEVICE) - 50 for _ in lengths]).to(dtype)
    out = visual(scores, drop, visual_lengths=lengths)
    for found, given, length in zip(out, scores, lengths.tolist(), strict=True):
        dropped = given[:length].sort().indices[: int(drop * length)]
        expected = torch.where(torch.arange(100, device=DEVICE) < length, given, 0)
        expected[dropped] = 0
        assert torch.equal(found, expected)
    whole = visual(scores, drop)
    assert torch.equal(whole[0], out[0])
    assert ((whole == 0) == (scores < scores.sort(1).values[:, int(drop * 100), None]) | (scores == 0)).all()


@pytest.mark.device
def test_ties_stay_and_nothing_is_rescaled() -> None:
    scores = torch.tensor([[-1.0, -2.0, -2.0, 3.0, -2.0], [0.0, -0.0, 5.0, -0.0, 1.0]], device=DEVICE)
    out = visual(scores, 0.4)  # θ is the third lowest
    assert torch.equal(out, scores)
    assert torch.equal(
        visual(scores, 0.7), torch.where(scores < torch.tensor([[-1.0], [0.0]], device=DEVICE), 0, scores)
    )


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("method", ["dropped", "adem"])
def test_nan_reaches_only_the_rows_that_read_it(form: str, method: str) -> None:
    relatives.check_unread_nan(run, form, method)


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_nan_reaches_every_row_that_reads_it(form: str) -> None:
    """Dropping multiplies, as dropout does: NaN · 0 is NaN."""
    a = cases.build(f"one_each-{form}", torch.float32) | relatives.METHODS["adem"]
    a["visual_key"][1, 2] = float("nan")
    assert run(**a)[1].isnan().all()
    assert run(**a)[[0, 2]].isfinite().all()


@pytest.mark.device
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["index-plain", "packed_index_lengths-factored"])
def test_with_dropout(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order statistic comes first: it looks at scores, and dropout at activations."""
    seed = torch.tensor([424242], device=DEVICE)
    monkeypatch.setattr(autograd, "draw_seed", lambda device: seed)
    a = relatives.build(name, "adem", torch.float32, DEVICE) | {"dropout_p": 0.25, "recompute": recompute}
    tolerance.check(run, a, keep=keep_mask(seed, a["x"].shape[:-1].numel(), a["visual_key"].shape[-2], 0.25))


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_nothing_more_is_kept_than_without(form: str) -> None:
    a = cases.build(f"one_each-{form}", torch.float32) | relatives.METHODS["adem"]
    tokens, pairs, slots = 15, 40, 7
    everything = trainable(a, *[n for n in tolerance.FLOATING if a.get(n) is not None])
    assert kept_bytes(everything) == 4 * tokens * (2 * pairs + slots)
    assert kept_bytes(everything, recompute=True) == 0


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_every_pair_of_frozen_and_trainable(form: str) -> None:
    a = relatives.build(f"index-{form}", "adem", torch.float64)
    switches = [n for n in ("x", *tolerance.FLOATING[3:6], "key_position", "value_position") if a.get(n) is not None]
    grad = torch.randn_like(a["x"])
    _, full = tolerance.gradients(run, a, switches, grad)
    for chosen in itertools.chain.from_iterable(itertools.combinations(switches, k) for k in (1, 2)):
        _, found = tolerance.gradients(run, a, list(chosen), grad)
        for n, g in found.items():
            torch.testing.assert_close(g, full[n], msg=lambda m, n=n, c=chosen: f"{n} of {c}: {m}")


@pytest.mark.parametrize("name", ["index-plain", "packed_index_lengths-factored", "same_tensor-factored"])
def test_gradcheck(name: str) -> None:
    a = cases.leaves(relatives.build(name, "adem", torch.float64))
    names = list({id(a[n]): n for n in tolerance.FLOATING if a.get(n) is not None}.values())
    assert torch.autograd.gradcheck(
        lambda *t: fused_ffn(**{**a, **dict(zip(names, t, strict=True))}), [a[n] for n in names], fast_mode=True
    )


def test_opcheck() -> None:
    a = cases.leaves(cases.build("index-factored", torch.float32))
    scalars = ("silu", "identity", "silu", 0.45, 0.5, 0.0)
    given = (*pack(a), *scalars, KEEP_HIDDEN | KEEP_SCORES, True, "torch", None)
    torch.library.opcheck(forward_op, given)
    _, pre, scores = (t.detach() for t in forward_op(*given))
    _, needs = pack({n: a.get(n) for n in tolerance.FLOATING if n != "residual"})
    kept = {n: t.detach() if isinstance(t, Tensor) else t for n, t in a.items()} | {"pre": pre, "scores": scores}
    torch.library.opcheck(backward_op, (torch.randn_like(a["x"]), *pack(kept), *scalars, needs, "torch", None))


def test_compile_fullgraph() -> None:
    a = relatives.build("index-factored", "adem", torch.float32)
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]
    grad = torch.randn_like(a["x"])
    torch._dynamo.reset()
    found = tolerance.gradients(torch.compile(fused_ffn, fullgraph=True, backend="aot_eager"), a, names, grad)
    torch.testing.assert_close(found, tolerance.gradients(fused_ffn, a, names, grad))


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_autocast_is_the_cast_form(form: str) -> None:
    a = cases.build(f"index-{form}", torch.float32) | relatives.METHODS["adem"]
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]
    cast = {n: t.bfloat16() if n in ("x", "key", "value", "gate") else t for n, t in a.items()}
    grad = torch.randn_like(cast["x"])
    expected, expected_grads = tolerance.gradients(fused_ffn, cast, names, grad)
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = tolerance.gradients(fused_ffn, a, names, grad)
    assert torch.equal(out, expected)
    assert all(torch.equal(grads[n], expected_grads[n].to(grads[n].dtype)) for n in names)


def test_pytorch_counts_the_flops() -> None:
    """Keys multiplied out and met as they are, values factored."""
    a = cases.leaves(cases.build("index-factored", torch.float32) | relatives.METHODS["adem"], "x")
    N, d, F, M, r, R = 20, 24, 40, 7, 9, 1  # the count is of one image, whichever rows read it
    with FlopCounterMode(display=False) as counter:
        fused_ffn(**a)
    assert (
        counter.get_total_flops()
        == 3 * 2 * N * d * F + 2 * R * M * r * d + 2 * N * M * d + 2 * N * (r + M) * d + 2 * N * M * r
    )
