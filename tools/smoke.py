"""A GPU's first minute: one small check of each thing that could stop everything else, against float64.

python3 -m tools.smoke                          all checks; a failure says which, and the rest goes on
compute-sanitizer python3 -m tools.smoke calls  odd sizes of every backend, for the sanitizer
TRITON_INTERPRET=1 python3 -m tools.smoke       without a GPU; what needs one is skipped
"""

from __future__ import annotations

import functools
import sys
import traceback

import torch

from memvp_kernels import fused_ffn
from memvp_kernels.dispatch import missing
from tests import cases, tolerance
from tests.cases import DEVICE
from tests.gpu import assert_same, captured

GPU = DEVICE.type == "cuda"
# The interpreter's bfloat16 truncates.
DTYPE, SIZES = (torch.bfloat16, {"d": 512, "F": 1024}) if GPU else (torch.float32, {"d": 24, "F": 40})


def arguments(form: str, *, tokens: int, **sizes: int) -> cases.Arguments:
    """A gated FFN over ragged memories of which one sequence has none."""
    a = cases.memory(
        cases.ffn(DTYPE, S=4, T=tokens if GPU else 5, **(sizes or SIZES)),
        R=3,
        M=35,
        r=24 if form == "factored" else None,
    )
    a |= {"visual_index": torch.tensor([2, -1, 0, 1]), "visual_lengths": torch.tensor([35, 17, 1])}
    return cases.moved(a)


def gated_call() -> None:
    """A training step through Triton, and a decode step through the extension, where they are."""
    tolerance.check(functools.partial(fused_ffn, backend="triton"), arguments("plain", tokens=64))
    if missing("cuda", DEVICE) is None:
        a = arguments("factored", tokens=1)
        tolerance.check(functools.partial(fused_ffn, backend="cuda"), a, names=[])


def descriptors_over_two_allocations() -> None:
    """Gate and key far apart in memory, in either order; one descriptor spans both where the driver takes it."""
    a = arguments("plain", tokens=64)
    fillers = []
    for megabytes in (1, 100, 9000) if GPU else (1,):
        fillers.append(torch.empty(megabytes << 20, dtype=torch.uint8, device=DEVICE))
        a["gate"] = a["gate"].clone()
        far = dict(a, key=a["gate"], gate=a["key"])
        for each in (a, far):
            tolerance.check(functools.partial(fused_ffn, backend="triton"), each, names=["x"])


def graph() -> None:
    """A captured call sees new values of x at every replay."""
    a = arguments("factored", tokens=64)
    run = functools.partial(fused_ffn, **{name: t for name, t in a.items() if name != "x"}, backend="triton")
    with torch.no_grad():
        replayed, found = captured(lambda: [run(a["x"])])
        for factor in (1.0, -2.0):
            a["x"].mul_(factor)
            replayed.replay()
            assert_same(found, [run(a["x"])])


def dependent_launches() -> None:
    """A hundred calls in a row, each reading the one before: launches that begin early still wait for its stores."""
    a = arguments("factored", tokens=16)
    x, rest = a.pop("x"), {**a, "backend": "triton"}

    def launches(wait: bool) -> list[torch.Tensor]:
        y = x
        for _ in range(100):
            y = torch.nn.functional.normalize(fused_ffn(y, **rest), dim=-1)
            if wait:
                torch.cuda.synchronize()
        return [y]

    with torch.no_grad():
        expected = launches(wait=True)
        for _ in range(5):
            assert_same(launches(wait=False), expected)


def calls() -> None:
    """Odd sizes of every backend that is here, forward and backward: what compute-sanitizer looks at."""
    for backend in ("torch", "triton", "cuda"):
        if missing(backend, DEVICE) is not None:
            print(f"  {backend}: skipped, {missing(backend, DEVICE)}")
            continue
        for form in ("plain", "factored"):
            for tokens in (1,) if backend == "cuda" else (1, 37):
                a = arguments(form, tokens=tokens, d=136, F=200)
                names = [] if backend == "cuda" else None
                tolerance.check(functools.partial(fused_ffn, backend=backend), a, names=names)


def main(chosen: list[str]) -> int:
    """Runs the checks that were named, or all but `calls`; the exit status is 1 when one failed."""
    needs_gpu = (graph, dependent_launches)
    every = (gated_call, descriptors_over_two_allocations, *needs_gpu, calls)
    failed = []
    for check in every:
        if check.__name__ not in chosen if chosen else check is calls:
            continue
        if check in needs_gpu and not GPU:
            print(f"{check.__name__}: skipped, needs a GPU", flush=True)
            continue
        torch.manual_seed(0)
        try:
            check()
            print(f"{check.__name__}: ok", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(check.__name__)
            print(f"{check.__name__}: FAILED", flush=True)
    print(f"smoke test: {f'FAILED: {failed}' if failed else 'ok'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
