"""The decode kernels on a GPU: right over the whole grid of shapes, in a graph, beside other work, and without ever waiting."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import fused_ffn, reference
from memvp_kernels.backends.cuda import override_form, status
from tests import cases, tolerance
from tests.csrc.conftest import ROOT
from tests.gpu import captured

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("installed")]

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
TOKENS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64)
#: (d, F, M, r): both fast and slow paths, tails of every tile, rows past one slice, a slice of one row.
SIZES = (
    (8, 8, 1, 8),
    (64, 128, 16, 8),
    (136, 264, 35, 24),
    (584, 392, 17, 136),
    (37, 53, 19, 13),
    (1024, 2816, 320, 136),
)


@pytest.fixture(scope="module")
def installed() -> None:
    """The extension as it is installed: nothing is compiled on a GPU's time."""
    available, reason, _ = status()
    if not available:
        pytest.skip(reason)


@pytest.fixture(params=["pdl", "cooperative"])
def phases(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form that a step's phases may have, whichever this GPU would take."""
    with override_form(request.param):
        yield request.param


def run(arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return fused_ffn(**arguments, backend="cuda")


def check(arguments: dict[str, Any]) -> None:
    arguments = cases.moved(arguments)
    orders = (tolerance.plain, tolerance.reordered(1))
    theirs = [plain(**{"key": None, "value": None, **arguments}) for plain in orders]
    tolerance.assert_within_twice(run(arguments), reference.ffn(**arguments), theirs)


def decode_step(
    tokens: int, *, form: str, sizes: tuple[int, int, int, int] = SIZES[2], **options: Any
) -> dict[str, Any]:
    """One token of each of `tokens` sequences; form: none, plain or factored; each has its image, or all have one."""
    d, f, m, r = sizes
    arguments = cases.ffn(torch.bfloat16, S=tokens, T=1, d=d, F=f, **options)
    if form != "none":
        cases.memory(arguments, R=tokens, M=m, r=r if form == "factored" else None)
    return arguments


@HALVES
@pytest.mark.parametrize("name", [name for name in cases.names() if name not in ("no_tokens", "no_sequences")])
def test_every_case(name: str, dtype: torch.dtype) -> None:
    check(cases.build(name, dtype))


@pytest.mark.usefixtures("phases")
@pytest.mark.parametrize("form", ["none", "plain", "factored"])
def test_the_pipeline_wraps(form: str) -> None:
    """Six and more stages on a large GPU, and the wider matrices of the fast path: for the sanitizer too."""
    check(decode_step(3, form=form, sizes=SIZES[-1]))


@HALVES
@pytest.mark.parametrize("layout", ["along the pairs", "along the width"])
def test_value_runs_either_way(layout: str, dtype: torch.dtype) -> None:
    for tokens in (1, 9, 17, 64):
        arguments = decode_step(tokens, form="none", sizes=SIZES[-1])
        if layout == "along the width":
            arguments["value"] = arguments["value"].contiguous()
        check({name: _as(value, dtype) for name, value in arguments.items()})


@HALVES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", ["none", "plain", "factored"])
def test_grid(form: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, phases: str) -> None:
    for tokens in TOKENS if phases == "pdl" else [n for n in TOKENS if n <= 16]:
        arguments = decode_step(tokens, form=form, sizes=sizes, gated=tokens % 2 == 1, biased=tokens % 3 == 0)
        check({name: _as(value, dtype) for name, value in arguments.items()})


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.usefixtures("phases")
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_the_size_of_a_llama(tokens: int) -> None:
    """At this size a reference in float64 on the CPU would take minutes, so all of it runs on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        values = torch.randn(*shape, device="cuda", generator=generator) / shape[-1] ** 0.5
        return values.bfloat16()

    d, f, m, r = 4096, 11008, 320, 136
    x = torch.randn(tokens, 1, d, device="cuda", generator=generator).bfloat16()
    check(
        {
            "x": x, "key": matrix(f, d), "value": matrix(d, f).T, "gate": matrix(f, d), "visual_basis": matrix(r, d),
            "visual_key": matrix(tokens, m, r), "visual_value": matrix(tokens, m, r),
            "key_position": matrix(m, d), "value_position": matrix(m, d),
        }
    )  # fmt: skip


@pytest.mark.usefixtures("phases")
@pytest.mark.parametrize("form", ["none", "plain", "factored"])
def test_same_bits_every_time(form: str) -> None:
    arguments = cases.moved(decode_step(13, form=form, sizes=SIZES[-1]))
    first = run(arguments)
    assert all(torch.equal(run(arguments), first) for _ in range(20))


@pytest.mark.usefixtures("phases")
@pytest.mark.parametrize("form", ["none", "plain", "factored"])
def test_dependent_steps_in_a_cuda_graph(form: str) -> None:
    """Each step reads what the one before it wrote, and their workspaces may be the same memory."""
    arguments = cases.moved(decode_step(9, form=form, sizes=SIZES[-1]))

    def steps() -> Tensor:
        y = arguments["x"]
        for _ in range(6):
            y = run(dict(arguments, x=y)) / 8 + arguments["x"]
        return y

    wanted = steps()
    graph, found = captured(steps)
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)


def test_two_threads_with_different_plans() -> None:
    problems = [
        cases.moved(decode_step(tokens, form=form, sizes=SIZES[-1]))
        for tokens, form in ((1, "factored"), (64, "plain"))
    ]
    alone = [run(arguments) for arguments in problems]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                if not torch.equal(run(problems[number]), alone[number]):
                    wrong.append(number)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.usefixtures("phases")
@pytest.mark.parametrize("form", ["plain", "factored"])
def test_on_a_second_stream(form: str) -> None:
    problems = [cases.moved(decode_step(tokens, form=form, sizes=SIZES[-1])) for tokens in (5, 16)]
    alone = [run(arguments) for arguments in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, arguments, found in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(arguments))
    torch.cuda.synchronize()
    for found, wanted in zip(results, alone, strict=True):
        assert all(torch.equal(y, wanted) for y in found)


def test_follows_what_the_stream_holds_before_it() -> None:
    arguments = cases.moved(decode_step(4, form="factored"))
    x = arguments["x"]
    wanted = run(dict(arguments, x=x + 1))
    for _ in range(20):
        torch.cuda._sleep(1_000_000)
        late = x + 1
        assert torch.equal(run(dict(arguments, x=late)), wanted)


def test_never_synchronises() -> None:
    arguments = cases.moved(decode_step(4, form="factored"))
    arguments["visual_index"] = torch.tensor([3, -1, 7, 0], device="cuda", dtype=torch.int32)
    run(arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = cases.moved(decode_step(4, form="factored"))
    wanted = run(arguments)
    elsewhere = {name: v.to("cuda:1") if isinstance(v, Tensor) else v for name, v in arguments.items()}
    assert torch.equal(run(elsewhere).to("cuda:0"), wanted)
    assert torch.cuda.current_device() == 0


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_sanitizer(tool: str) -> None:
    """compute-sanitizer over the decode kernels of a few cases; a test selection of this very file, in another process."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    command = [program, "--tool", tool, "--kernel-regex", "kns=memvp", "--error-exitcode", "99"]
    command += [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        str(Path(__file__)),
        "-k",
        "(test_every_case and bf16) or pipeline_wraps",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
