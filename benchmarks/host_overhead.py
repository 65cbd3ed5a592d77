"""Host time of one call, and the CPU paths, under pytest-benchmark, so that a regression shows.

    make bench                                            # on the state before a change; keeps its figures under out/bench
    make bench-compare                                    # on the state after it; fails where a median is 25 % slower

Compare on one quiet machine: microseconds of another say nothing, which is why no figures are committed. The operands of the overhead
tests are so small that what is left is the way through checks, dispatcher and autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from memvp_kernels import fused_ffn
from memvp_kernels.checks import TENSORS
from memvp_kernels.problem import normalize

SMALL = {"sequences": 2, "tokens": 1, "width": 16, "pairs": 32, "slots": 4, "rank": 8}
DECODE = {"sequences": 16, "tokens": 1, "width": 512, "pairs": 1408, "slots": 320, "rank": 136}
PREFILL = {**DECODE, "sequences": 4, "tokens": 64}
#: fused_ffn without a memory and with either form of it; and the plain form in plain PyTorch.
FORMS = ("text", "plain", "factored", "pytorch")


def operands(sizes: dict[str, int], form: str, *, trained: bool = False) -> dict[str, Any]:
    """Arguments of fused_ffn; trained: x and the memory ask for gradients, the weights stay frozen."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    s, t, d, f, m = (sizes[name] for name in ("sequences", "tokens", "width", "pairs", "slots"))
    found: dict[str, Any] = {"x": normal(s, t, d), "key": normal(f, d), "value": normal(d, f).T, "gate": normal(f, d)}
    if form in ("plain", "pytorch"):
        found |= {"visual_key": normal(s, m, d), "visual_value": normal(s, m, d)}
    if form == "factored":
        core = normal(s, m, sizes["rank"])
        found |= {"visual_key": core, "visual_value": core, "visual_basis": normal(sizes["rank"], d)}
        found |= {"key_position": normal(m, d), "value_position": normal(m, d)}
    for name, tensor in found.items():
        tensor.requires_grad_(trained and name not in ("key", "value", "gate"))
    return found


def two_branches(x: Any, key: Any, value: Any, gate: Any, visual_key: Any, visual_value: Any) -> torch.Tensor:
    y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, key), value.T)
    return y + F.silu(x @ visual_key.transpose(1, 2)) @ visual_value


def call(sizes: dict[str, int], form: str, **options: Any) -> Callable[[], torch.Tensor]:
    arguments = operands(sizes, form)
    return lambda: two_branches(**arguments) if form == "pytorch" else fused_ffn(**arguments, **options)


def step(sizes: dict[str, int], form: str, **options: Any) -> Callable[[], object]:
    """Forward and backward."""
    arguments = operands(sizes, form, trained=True)
    leaves = list({id(t): t for t in arguments.values() if t.requires_grad}.values())
    function = two_branches if form == "pytorch" else fused_ffn
    return lambda: torch.autograd.grad(function(**arguments, **options).sum(), leaves)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads wait for one another longer than such small products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(group="host overhead, no gradient")
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_call(benchmark: Any, form: str) -> None:
    benchmark(call(SMALL, form))


@pytest.mark.benchmark(group="host overhead, forward that keeps")
@pytest.mark.parametrize("form", FORMS[:-1])
def test_training_call(benchmark: Any, form: str) -> None:
    arguments = operands(SMALL, form, trained=True)
    benchmark(lambda: fused_ffn(**arguments))


@pytest.mark.benchmark(group="host overhead, forward and backward")
@pytest.mark.parametrize("form", FORMS)
def test_step(benchmark: Any, form: str) -> None:
    benchmark(step(SMALL, form))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels whose launch was prepared as for a Hopper, up to where Triton takes over, by name; none is made."""
    jit = pytest.importorskip("triton.runtime.jit")
    from memvp_kernels.backends.triton.runtime import launch

    if launch.interpreted():
        pytest.skip("TRITON_INTERPRET is set: kernels would be interpreted, not launched")
    names: list[str] = []
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *_, **__: names.append(self.__name__))
    return names


@pytest.mark.benchmark(group="triton backend, preparing the launches")
@pytest.mark.parametrize("form", ["plain", "factored"])
def test_triton_launches(benchmark: Any, form: str, launched: list[str]) -> None:
    from memvp_kernels.backends import triton as backend

    arguments = {name: t.bfloat16() for name, t in operands(SMALL, form).items()}
    scalars = {"activation": "silu", "visual_activation": "silu", "visual_scale": 0.1, "dropout_p": 0.0}
    problem = normalize({name: arguments.get(name) for name in TENSORS}, scalars)
    backend.forward(problem, save_hidden=False, save_scores=False)
    assert {"hidden_fwd_kernel", "output_fwd_kernel"} <= set(launched)
    benchmark(lambda: backend.forward(problem, save_hidden=False, save_scores=False))


@pytest.mark.benchmark(group="torch backend")
@pytest.mark.parametrize("form", FORMS[:-1])
@pytest.mark.parametrize("sizes", [DECODE, PREFILL], ids=["decode", "prefill"])
@torch.no_grad()
def test_torch_backend(benchmark: Any, sizes: dict[str, int], form: str) -> None:
    benchmark(call(sizes, form, backend="torch"))


@pytest.mark.benchmark(group="torch backend, step")
@pytest.mark.parametrize("form", ["plain", "factored"])
def test_torch_backend_step(benchmark: Any, form: str) -> None:
    benchmark(step(PREFILL, form, backend="torch"))
