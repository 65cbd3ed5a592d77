"""The registered ops: opcheck, torch.compile, vmap, meta tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from memvp_kernels import fused_ffn
from memvp_kernels.autograd import KEEP_HIDDEN, KEEP_SCORES
from memvp_kernels.torch_op import backward_op, forward_op, pack
from tests import cases, relatives, tolerance

#: Of MemVP and of ADEM-VL, dropout's probability last.
SCALARS: dict[str, tuple[Any, ...]] = {
    "memvp": ("silu", "silu", None, 0.0, 0.5, 0.0),
    "adem": ("silu", "identity", "silu", 0.45, 0.5, 0.0),
}
KEEP = KEEP_HIDDEN | KEEP_SCORES
OPS = [*((name, "memvp") for name in cases.FORMS), ("index-factored", "adem")]


@pytest.mark.parametrize(("name", "method"), OPS)
def test_opcheck_forward(name: str, method: str) -> None:
    a = cases.leaves(cases.build(name, torch.float32))
    torch.library.opcheck(forward_op, (*pack(a), *SCALARS[method], KEEP, True, "torch", None))


def test_opcheck_forward_with_dropout_and_nothing_kept() -> None:
    a = cases.leaves(cases.build("index-factored", torch.float32)) | {"seed": torch.tensor([5])}
    torch.library.opcheck(forward_op, (*pack(a), *SCALARS["memvp"][:-1], 0.3, 0, True, "torch", None))


@pytest.mark.parametrize(("name", "method"), OPS)
def test_opcheck_backward(name: str, method: str) -> None:
    a = cases.build(name, torch.float32)
    _, pre, scores = forward_op(*pack(a), *SCALARS[method], KEEP, True, "torch", None)
    kept = {"residual": None, "pre": pre if pre.numel() else None, "scores": scores if scores.numel() else None}
    _, needs = pack({n: a.get(n) for n in tolerance.FLOATING if n != "residual"})
    arguments = (torch.randn_like(a["x"]), *pack(a | kept), *SCALARS[method], needs, "torch", None)
    torch.library.opcheck(backward_op, arguments)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("one_each-plain", "memvp"),
        ("index-factored", "adem"),
        ("alone_residual-plain", "memvp"),
        ("text_only_biased", "memvp"),
    ],
)
def test_compile_fullgraph(name: str, method: str) -> None:
    a = relatives.build(name, method, torch.float32)
    torch._dynamo.reset()
    found = tolerance.results(torch.compile(fused_ffn, fullgraph=True, backend="aot_eager"), a)
    torch.testing.assert_close(found, tolerance.results(fused_ffn, a))


def test_compile_traces_what_older_versions_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.10 and 2.11 can't trace the question whether a device has autocast."""
    untraceable = torch._dynamo.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    torch._dynamo.reset()
    a = cases.build("text_only", torch.float32)
    torch.compile(fused_ffn, fullgraph=True, backend="aot_eager")(**a)


def test_compile_once_for_every_length() -> None:
    """Forward and backward: whatever the first length took, the others take nothing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_ffn, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for length in (5, 6, 9, 13):
        a = cases.memory(cases.ffn(torch.float32, T=length), R=3)
        names = ["x", "visual_key", "key_position"]
        torch.testing.assert_close(tolerance.results(compiled, a, names), tolerance.results(fused_ffn, a, names))
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_inductor() -> None:
    torch._dynamo.reset()
    a = cases.build("index-factored", torch.float32)

    def block(**b: Any) -> Tensor:
        return torch.relu(fused_ffn(**{**b, "x": b["x"] * 2}) + 1)

    names = ["x", "visual_key", "visual_basis"]
    found = tolerance.results(torch.compile(block, fullgraph=True), a, names)
    torch.testing.assert_close(found, tolerance.results(block, a, names))


def test_compile_with_dropout() -> None:
    """The seed is drawn in the graph, from the same generator, and the backward replays its mask."""
    torch._dynamo.reset()
    a = cases.build("one_each-factored", torch.float32) | {"dropout_p": 0.5}
    runs = []
    for f in (torch.compile(fused_ffn, fullgraph=True, backend="aot_eager"), fused_ffn):
        torch.manual_seed(11)
        runs.append([tolerance.results(f, a, ["x", "visual_key"]) for _ in range(2)])
    torch.testing.assert_close(runs[0], runs[1])
    assert not torch.equal(runs[0][0][0], runs[0][1][0])


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    a = cases.build("gated_biased_residual-plain", torch.float32)
    compiled = torch.compile(fused_ffn, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (tolerance.results(f, a, ["x", "visual_key", "residual"]) for f in (compiled, fused_ffn))
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", cases.FORMS)
def test_meta_tensors_give_meta_results(name: str) -> None:
    a = cases.build(name, torch.float32) | {"dropout_p": 0.1 if "text" not in name else 0.0}
    a = cases.leaves({n: v.to("meta") if isinstance(v, Tensor) else v for n, v in a.items()})
    with torch.no_grad():
        assert fused_ffn(**a).is_meta
    out = fused_ffn(**a)
    assert out.is_meta
    assert (out.shape, out.dtype) == (a["x"].shape, torch.float32)
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]
    for n, g in zip(names, torch.autograd.grad(out.sum(), [a[n] for n in names]), strict=True):
        assert g.is_meta
        assert g.shape == a[n].shape


@pytest.mark.parametrize("trainable", [False, True])
def test_vmap(trainable: bool) -> None:
    """Over any tensors, integers too; the autograd around it goes on working."""
    a = cases.build("index-factored", torch.float32)
    xs = torch.stack([a["x"], 2 * a["x"]]).requires_grad_(trainable)
    indices = torch.tensor([[2, -1, 2, 0], [1, 1, -1, 0]])

    def run(x: Tensor, index: Tensor) -> Tensor:
        return fused_ffn(**{**a, "x": x, "visual_index": index})

    out = torch.vmap(run)(xs, indices)
    expected = torch.stack([run(x, i) for x, i in zip(xs, indices, strict=True)])
    assert torch.equal(out, expected)
    shared = torch.vmap(lambda key: fused_ffn(**{**a, "visual_key": key}))(a["visual_key"][None])
    assert torch.equal(shared[0], fused_ffn(**a))
    if trainable:
        grad = torch.randn_like(out)
        found, wanted = (torch.autograd.grad(o, xs, grad)[0] for o in (out, expected))
        assert torch.equal(found, wanted)


def test_vmap_with_dropout_follows_its_randomness() -> None:
    a = cases.build("one_each-plain", torch.float32) | {"dropout_p": 0.5}
    xs = a["x"].expand(2, *a["x"].shape)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: fused_ffn(**{**a, "x": x}))(xs)
    for randomness in ("same", "different"):
        one, two = torch.vmap(lambda x: fused_ffn(**{**a, "x": x}), randomness=randomness)(xs)
        assert torch.equal(one, two) == (randomness == "same")


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_compile_once_for_every_batch(form: str) -> None:
    """Sequences, their lengths and the images they read are dynamic together."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_ffn, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for sequences in range(2, 12):
        a = cases.memory(
            cases.ffn(torch.float32, S=sequences, T=sequences + 1), R=5, r=9 if form == "factored" else None
        )
        a["visual_index"] = torch.arange(sequences) % 6 - 1
        torch.testing.assert_close(compiled(**a), fused_ffn(**a))
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict: bool) -> None:
    a = cases.memory(cases.ffn(torch.float32), R=5)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return fused_ffn(**{**a, "x": x}, visual_index=index)

    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch, 1: torch.export.Dim("length")}, "index": {0: batch}}
    given = (torch.randn(3, 5, 24), torch.tensor([0, 1, -1]))
    exported = torch.export.export(Module(), given, dynamic_shapes=shapes, strict=strict).module()
    x, index = torch.randn(6, 9, 24), torch.tensor([0, 1, -1, 4, 3, 2])
    torch.testing.assert_close(exported(x, index), Module()(x, index))


def test_dropout_under_a_memory_budget_is_refused() -> None:
    """PyTorch's partitioner would draw the seed again in the backward."""
    a = cases.leaves(cases.build("one_each-plain", torch.float32), "x")
    compiled = torch.compile(fused_ffn, fullgraph=True, backend="aot_eager")
    for p, error in (
        (0.5, pytest.raises(RuntimeError, match="dropout_p: wanted an activation memory budget of 1")),
        (0.0, nullcontext()),
    ):
        torch._dynamo.reset()
        with torch._functorch.config.patch(activation_memory_budget=0.5), error:
            compiled(**a, dropout_p=p).sum().backward()


def test_a_scale_that_changes_every_step_is_followed_under_inductor() -> None:
    torch._dynamo.reset()
    a = cases.build("one_each-plain", torch.float32)

    def step(x: Tensor, scale: float) -> Tensor:
        return fused_ffn(**{**a, "x": torch.cos(x)}, visual_scale=scale)

    compiled = torch.compile(step)
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(a["x"], scale), step(a["x"], scale))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pytorch_counts_the_flops(backend: str) -> None:
    pytest.importorskip(backend)
    a = cases.leaves(cases.build("index-factored", torch.float32), "x", "visual_key")
    N, d, F, M, r = 20, 24, 40, 7, 9
    with FlopCounterMode(display=False) as counter:
        y = fused_ffn(**a, backend=backend)
        forward = counter.get_total_flops()
        y.sum().backward()
    memory = 2 * N * d * (r + M) + 2 * N * M * r
    assert forward == 3 * 2 * N * d * F + 2 * memory
    # Through hidden and scores to x, and the core's gradient: x Wᵀ again, and its product with the scores' gradient.
    assert counter.get_total_flops() - forward == 3 * 2 * N * d * F + 2 * memory + 2 * N * d * r + 2 * N * M * r
