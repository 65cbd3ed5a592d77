"""Host time of one call, and the CPU paths, under pytest-benchmark, so that a regression shows.

    make bench                                            # on the state before a change; keeps its figures under out/bench
    make bench-compare                                    # on the state after it; fails where a median is 25 % slower
    python -m pytest benchmarks/host_overhead.py --benchmark-only                            # what both run, but for --benchmark-…

Compare on one quiet machine: microseconds of another say nothing, which is why no figures are committed.

The operands of the overhead tests are so small that the arithmetic takes next to nothing: what is left is the road through
checks, dispatcher and autograd. The same two branches in plain PyTorch stand beside them.

The Triton backend's launches are prepared as for a Hopper and not made: tiles, descriptors and arguments, up to where Triton takes over.
What Triton itself needs for a launch comes on top.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from memvp_kernels import fused_ffn
from memvp_kernels.checks import TENSORS
from memvp_kernels.problem import Problem, normalise

SMALL = {"sequences": 2, "tokens": 1, "width": 16, "pairs": 32, "slots": 4, "rank": 8}
DECODE = {"sequences": 16, "tokens": 1, "width": 512, "pairs": 1408, "slots": 320, "rank": 136}
PREFILL = {**DECODE, "sequences": 4, "tokens": 64}


def operands(sizes: dict[str, int], *, form: str, trained: bool = False) -> dict[str, Any]:
    """Arguments of fused_ffn; trained: x and the memory ask for gradients, the weights stay frozen."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    s, t, d, f, m = (sizes[name] for name in ("sequences", "tokens", "width", "pairs", "slots"))
    found: dict[str, Any] = {"x": normal(s, t, d), "key": normal(f, d), "value": normal(d, f).T, "gate": normal(f, d)}
    if form != "text":
        memory = normal(s, m, sizes["rank"] if form == "factored" else d)
        found |= {"visual_key": memory, "visual_value": memory if form == "factored" else normal(s, m, d)}
    if form == "factored":
        found |= {
            "visual_basis": normal(sizes["rank"], d),
            "key_position": normal(m, d),
            "value_position": normal(m, d),
        }
    if trained:
        for name, tensor in found.items():
            tensor.requires_grad_(name not in ("key", "value", "gate"))
    return found


def two_branches(x: Any, key: Any, value: Any, gate: Any, visual_key: Any, visual_value: Any) -> torch.Tensor:
    """The plain form in plain PyTorch."""
    y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, key), value.T)
    return y + F.silu(x @ visual_key.transpose(1, 2)) @ visual_value


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Threads wait for one another longer than such small products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(group="host overhead, no gradient")
@pytest.mark.parametrize("form", ["text", "plain", "factored"])
def test_call(benchmark: Any, form: str) -> None:
    arguments = operands(SMALL, form=form)
    with torch.no_grad():
        benchmark(lambda: fused_ffn(**arguments))


@pytest.mark.benchmark(group="host overhead, no gradient")
def test_call_in_plain_pytorch(benchmark: Any) -> None:
    arguments = operands(SMALL, form="plain")
    with torch.no_grad():
        benchmark(lambda: two_branches(**arguments))


@pytest.mark.benchmark(group="host overhead, forward that keeps")
@pytest.mark.parametrize("form", ["text", "plain", "factored"])
def test_training_call(benchmark: Any, form: str) -> None:
    arguments = operands(SMALL, form=form, trained=True)
    benchmark(lambda: fused_ffn(**arguments))


@pytest.mark.benchmark(group="host overhead, forward and backward")
@pytest.mark.parametrize("form", ["text", "plain", "factored"])
def test_step(benchmark: Any, form: str) -> None:
    arguments = operands(SMALL, form=form, trained=True)
    leaves = list({id(t): t for t in arguments.values() if t.requires_grad}.values())
    benchmark(lambda: torch.autograd.grad(fused_ffn(**arguments).sum(), leaves))


@pytest.mark.benchmark(group="host overhead, forward and backward")
def test_step_in_plain_pytorch(benchmark: Any) -> None:
    arguments = operands(SMALL, form="plain", trained=True)
    leaves = [t for t in arguments.values() if t.requires_grad]
    benchmark(lambda: torch.autograd.grad(two_branches(**arguments).sum(), leaves))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels whose launch was prepared, by name; none is made."""
    jit = pytest.importorskip("triton.runtime.jit")
    from memvp_kernels.backends.triton.runtime import launch

    if launch.interpreted():
        pytest.skip("TRITON_INTERPRET is set: kernels would be interpreted, not launched")
    names: list[str] = []
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *_, **__: names.append(self.__name__))
    return names


def problem(form: str) -> Problem:
    arguments = {name: t.bfloat16() for name, t in operands(SMALL, form=form).items()}
    scalars = {"activation": "silu", "visual_activation": "silu", "visual_scale": 0.1, "dropout_p": 0.0}
    return normalise({name: arguments.get(name) for name in TENSORS}, scalars)


@pytest.mark.benchmark(group="triton backend, preparing the launches")
@pytest.mark.parametrize("form", ["plain", "factored"])
def test_triton_launches(benchmark: Any, form: str, launched: list[str]) -> None:
    from memvp_kernels.backends import triton as backend

    given = problem(form)
    backend.forward(given, save_hidden=False, save_scores=False)
    assert {"hidden_fwd_kernel", "output_fwd_kernel"} <= set(launched)
    benchmark(lambda: backend.forward(given, save_hidden=False, save_scores=False))


@pytest.mark.benchmark(group="torch backend")
@pytest.mark.parametrize("form", ["text", "plain", "factored"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_torch_backend(benchmark: Any, phase: str, form: str) -> None:
    arguments = operands(DECODE if phase == "decode" else PREFILL, form=form)
    with torch.no_grad():
        benchmark(lambda: fused_ffn(**arguments, backend="torch"))


@pytest.mark.benchmark(group="torch backend, step")
@pytest.mark.parametrize("form", ["plain", "factored"])
def test_torch_backend_step(benchmark: Any, form: str) -> None:
    arguments = operands(PREFILL, form=form, trained=True)
    leaves = list({id(t): t for t in arguments.values() if t.requires_grad}.values())
    benchmark(lambda: torch.autograd.grad(fused_ffn(**arguments, backend="torch").sum(), leaves))
