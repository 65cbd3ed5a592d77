"""The Python side of the cuda backend, on a pretended GPU with a stand-in for the extension: what it refuses, what it passes on."""

from __future__ import annotations

import importlib
import re
import types
from typing import Any, ClassVar

import pytest
import torch

from memvp_kernels import __main__, dispatch, fused_ffn
from memvp_kernels.backends import cuda
from memvp_kernels.backends.cuda import decode, extension
from memvp_kernels.problem import Problem
from tests import cases
from tests.csrc.fake_gpu import Machine, OnGPU, on_gpu, problem_of

TENSORS = (
    "x", "key", "value", "gate", "key_bias", "gate_bias", "value_bias", "visual_key", "visual_value", "visual_basis",
    "key_position", "value_position", "residual",
)  # fmt: skip


class Params:
    """Stands in for FfnDecodeParams: keeps what it was given."""

    instances: ClassVar[list[Params]] = []
    limit: str | None = None
    fast = True

    def __init__(self, tensors: tuple[Any, ...], **fields: Any) -> None:
        self.tensors = dict(zip(TENSORS, tensors, strict=True))
        self.fields = fields
        self.launches: list[dict[str, int]] = []
        Params.instances.append(self)

    def unsupported(self) -> str | None:
        return Params.limit

    def is_fast(self) -> bool:
        return Params.fast

    def workspace_bytes(self) -> int:
        return 12345

    def launch(self, **arguments: int) -> None:
        self.launches.append(arguments)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> Machine:
    """An sm_90 GPU and the stand-in."""
    stand_in = types.ModuleType("memvp_kernels._C")
    vars(stand_in).update(
        cuda="13.0",
        archs="80;90a;90+PTX",
        max_tokens=64,
        tensor_names=TENSORS,
        type_codes={"bfloat16": 0, "float16": 1, "float32": 2},
        activation_codes={"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3},
        form_codes={"auto": 0, "pdl": 1, "cooperative": 2},
        gemm_codes={"hidden": 0, "output": 1, "dhidden": 2},
        gemm=None,
        FfnDecodeParams=Params,
    )
    monkeypatch.setattr(Params, "instances", [])
    machine = Machine(stand_in)
    machine.install(monkeypatch)
    return machine


def a_problem(
    name: str = "gated_biased_residual-factored", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Problem:
    return on_gpu(problem_of(**cases.build(name, dtype)), **changes)


def launched(problem: Problem) -> Params:
    """The parameters with which the problem was launched."""
    assert decode.unsupported(problem) is None
    decode.forward(problem)
    (params,) = (params for params in Params.instances if params.launches)
    return params


def test_what_a_launch_is_given_beside_the_problem(gpu: Machine) -> None:
    """The machine, output, workspace and stream; that the problem arrives whole, test_decode_end_to_end.py sees in the results."""
    y, pre, scores = decode.forward(a_problem())
    (params,) = Params.instances
    output, workspace = gpu.allocated
    assert y is output
    assert (pre, scores) == (None, None)
    assert (output.shape, output.dtype) == ((15, 24), torch.bfloat16)
    assert (workspace.shape, workspace.dtype) == ((12345,), torch.uint8)
    assert [params.fields[n] for n in ("multiprocessors", "shared_bytes", "device")] == [132, 228 << 10, 0]
    assert params.launches == [
        {"y": output.data_ptr(), "y_stride": 24, "workspace": workspace.data_ptr(), "stream": 77}
    ]


@pytest.mark.usefixtures("gpu")
def test_an_index_with_strides_is_copied_for_the_launch() -> None:
    arguments = cases.build("index-plain", torch.bfloat16)
    every_second = torch.tensor([2, 9, -1, 9, 2, 9, 0, 9], dtype=torch.int32)[::2]
    problem = on_gpu(problem_of(**dict(arguments, visual_index=every_second)))
    address = launched(problem).fields["visual_index"]
    copy = decode._latest.indices[1]
    assert address == copy.data_ptr() != every_second.data_ptr()
    assert copy.tensor.tolist() == [2, -1, 2, 0]


@pytest.mark.usefixtures("gpu")
def test_params_are_made_once_per_problem() -> None:
    first, second = a_problem(), a_problem("index-factored")
    for problem in (first, first, second):
        assert decode.unsupported(problem) is None
        assert decode.is_fast(problem)
        decode.forward(problem)
    assert [params.fields["tokens"] for params in Params.instances] == [15, 20]
    del first
    address = second.x.data_ptr()
    decode.forward(a_problem())
    assert Params.instances[-1].tensors["x"][0] != address
    assert len(Params.instances) == 3


@pytest.mark.usefixtures("gpu")
def test_a_dead_problem_is_not_mistaken_for_its_successor() -> None:
    for tokens in range(1, 30):  # CPython gives the next object the last one's address
        decode.forward(on_gpu(problem_of(**cases.ffn(torch.bfloat16, S=1, T=tokens))))
        assert Params.instances[-1].fields["tokens"] == tokens


@pytest.mark.usefixtures("gpu")
def test_nothing_is_kept_for_a_backward() -> None:
    with pytest.raises(RuntimeError, match="no backward"):
        decode.forward(a_problem(), save_hidden=True)
    with pytest.raises(RuntimeError, match="no backward"):
        decode.forward(a_problem(), save_scores=True)
    assert Params.instances == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: problem_of(**cases.build("text_only", torch.bfloat16)), "x is on cpu, and .* an NVIDIA GPU"),
        (lambda: a_problem(dtype=torch.float32), "x is float32, and .* bfloat16 or float16"),
        (lambda: on_gpu(problem_of(**cases.ffn(torch.bfloat16, S=13, T=5))), "x has 65 tokens, and .* at most 64"),
        (lambda: a_problem(dropout_p=0.1), "dropout_p is 0.1, and .* no dropout"),
        (lambda: a_problem(visual_map="silu"), "visual_map is 'silu', and .* scores as they are"),
        (lambda: a_problem(visual_drop=0.1), "visual_drop is 0.1, and .* scores as they are"),
        (lambda: a_problem(visual_activation="identity"), "visual_activation is 'identity'"),
        (lambda: a_problem(visual_basis=OnGPU(torch.ones(0, 24))), "visual_basis has no rows"),
        (
            lambda: a_problem(visual_basis=OnGPU(torch.ones(9, 24, dtype=torch.float64))),
            "visual_basis is float64, and .* float32",
        ),
    ],
)
def test_refuses(build: Any, reason: str) -> None:
    found = decode.unsupported(build())
    assert found is not None
    assert re.search(reason, found)
    assert Params.instances == []


def llama_7b(rows: int, **changes: Any) -> Problem:
    """LLaMA-7B's FFN and a factored memory, of one number each."""
    matrix, core, basis, x = (
        torch.tensor(0.0, dtype=torch.bfloat16).expand(shape)
        for shape in ((11008, 4096), (1, 320, 136), (136, 4096), (1, rows, 4096))
    )
    tensors = {"key": matrix, "value": matrix, "gate": matrix, "visual_key": core, "visual_value": core}
    return on_gpu(problem_of(x=x, **tensors, visual_basis=basis), **changes)


@pytest.mark.parametrize(
    ("rows", "training", "changes", "backend"),
    [
        (1, False, {}, "cuda"),
        (64, False, {}, "cuda"),
        (65, False, {}, "triton"),
        (4, True, {}, "triton"),
        (4, False, {"fast": False}, "triton"),
        (4, False, {"limit": "the core is too wide"}, "triton"),
        (4, False, {"extension": None}, "triton"),
        (4, False, {"archs": "80"}, "triton"),
        (4, False, {"dropout_p": 0.1}, "triton"),
        (4, False, {"capability": (7, 5)}, "torch"),
    ],
    ids=str,
)
def test_auto_goes_to_triton_where_this_kernel_does_not_serve(
    gpu: Machine, monkeypatch: pytest.MonkeyPatch, rows: int, training: bool, changes: dict[str, Any], backend: str
) -> None:
    problem = llama_7b(rows, dropout_p=changes.get("dropout_p", 0.0))
    for name, value in changes.items():
        if name in ("fast", "limit"):
            monkeypatch.setattr(Params, name, value)
        elif name == "archs":
            gpu.extension.archs = value
        elif name != "dropout_p":
            setattr(gpu, name, value)
    chosen = dispatch.choose(problem, "auto", training=training)
    assert chosen.__name__.rsplit(".", 1)[-1] == {"torch": "eager", "cuda": "decode"}.get(backend, backend)
    # Asked for by name, slow is right, and what decode does not take goes to Hopper's other kernels where they run.
    if not changes.get("fast", True) or backend == "cuda":
        assert dispatch.choose(problem, "cuda", training=training) is decode
    elif changes.keys().isdisjoint(("extension", "archs", "capability")):
        assert dispatch.choose(problem, "cuda", training=training).__name__.endswith("cuda.gemm")
    else:
        with pytest.raises(RuntimeError, match=r"backend: wanted 'cuda', but .*; backend='auto' takes"):
            dispatch.choose(problem, "cuda", training=training)


@pytest.mark.parametrize(
    ("capability", "archs", "reason"),
    [
        ((7, 5), "75;80", "needs a GPU of compute capability 8.0 or newer, and cuda:0 has 7.5"),
        ((9, 0), "80", "built for 80, and cuda:0 has compute capability 9.0; .* MEMVP_CUDA_ARCHS"),
        ((9, 0), "90a", None),
    ],
)
def test_status_of_a_gpu(gpu: Machine, capability: tuple[int, int], archs: str, reason: str | None) -> None:
    gpu.capability, gpu.extension.archs = capability, archs
    status = cuda.status()
    assert status.available == (reason is None)
    assert status.build == {"cuda": "13.0", "archs": archs}
    assert re.search(reason or "^$", status.reason)
    assert decode.unsupported(a_problem()) == (status.reason or None)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("extension", None, "the CUDA extension was not built.* CUDA_HOME"),
        ("torch.cuda.is_available", lambda: False, "PyTorch finds no NVIDIA GPU .*CUDA_VISIBLE_DEVICES"),
        ("torch.version.cuda", None, "was built without CUDA"),
    ],
)
def test_status_of_a_machine_that_lacks_a_part(
    gpu: Machine, monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any, reason: str
) -> None:
    if attribute == "extension":
        gpu.extension = None
    else:
        monkeypatch.setattr(attribute, value)
    available, found, build = cuda.status()
    assert not available
    assert re.search(reason, found)
    assert (build == {}) == (attribute == "extension")
    assert attribute != "extension" or decode.unsupported(a_problem()) == found


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("90a", (9, 0), True),
        ("90", (9, 0), True),
        ("100a", (10, 3), False),
        ("100f", (10, 3), True),
        ("103f", (10, 0), False),
        ("100f", (12, 0), False),
        ("90+PTX", (9, 0), True),
        ("90+PTX", (12, 1), True),
        ("90+PTX", (8, 9), False),
        ("90a+PTX", (10, 0), False),
        ("80;90a;100a;90+PTX", (8, 6), True),
        ("80;90a;100a;90+PTX", (10, 3), True),
        ("80;90a;100a", (12, 0), False),
    ],
)
def test_runs_on(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert extension.runs_on(archs, capability) is runs


def fails_with(error: Exception) -> Any:
    real = importlib.import_module

    def import_module(name: str) -> Any:
        if name == "memvp_kernels._C":
            raise error
        return real(name)

    return import_module


@pytest.mark.usefixtures("forgetful")
def test_a_missing_extension_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ModuleNotFoundError("No module named 'memvp_kernels._C'", name="memvp_kernels._C")
    monkeypatch.setattr(importlib, "import_module", fails_with(missing))
    assert extension.load() is None
    assert "was not built" in extension.status().reason


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol: launch"),
        ModuleNotFoundError("No module named 'other'", name="other"),
        SystemError("initialization of _C raised unreported exception"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_extension_is_a_missing_part_that_says_why(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(importlib, "import_module", fails_with(error))
    assert extension.load() is None
    available, reason, build = extension.status()
    assert (available, build) == (False, {})
    assert f"the CUDA extension does not load ({type(error).__name__}: {error}); install memvp_kernels again" in reason
    assert dispatch.available()["cuda"] == reason
    x, weight = torch.ones(1, 2, 8), torch.ones(4, 8)
    assert fused_ffn(x, weight, weight).shape == x.shape
    with pytest.raises(RuntimeError, match=r"backend: wanted 'cuda', but .*"):
        fused_ffn(x, weight, weight, backend="cuda")
    assert ("extension", f"not here: {reason}") in __main__.rows()


@pytest.mark.usefixtures("forgetful")
def test_an_extension_of_another_version_is_a_missing_part(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    old = types.ModuleType("memvp_kernels._C")
    vars(old).update({name: value for name, value in vars(gpu.extension).items() if name != "gemm"})
    monkeypatch.setattr(importlib, "import_module", lambda _: old)
    assert extension.load() is None
    assert "of another version of memvp_kernels (it has no gemm)" in extension.status().reason
