"""The Hopper kernels on a GPU, as a program of its own: a barrier that nobody reaches would hang whoever runs it.

Prints what it begins, so that the last line says where it stopped; exit status 77 where this machine can't run the kernels.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from memvp_kernels import fused_ffn
from memvp_kernels.backends.cuda import extension
from tests import cases, tolerance
from tests.gpu import captured

MISSING = 77
DTYPES = (torch.bfloat16, torch.float16)
#: (S, T, d, F, M, r): tails of every tile; more tiles than a GPU has multiprocessors, and more row tiles than are taken side by side.
SIZES = ((1, 1, 72, 264, 24, 8), (3, 100, 320, 384, 136, 24), (8, 300, 1024, 2816, 64, 64))

run = functools.partial(fused_ffn, backend="cuda")


def arguments(
    sizes: tuple[int, ...], dtype: torch.dtype, form: str, *, gated: bool = True, transposed: bool = True
) -> dict[str, Any]:
    S, T, d, F, M, r = sizes
    a = cases.ffn(dtype, S=S, T=T, d=d, F=F, gated=gated, biased=gated, transposed=transposed)
    for name in ("key", "gate", "value"):
        if name in a:
            a[name] *= (d if name != "value" else F) ** -0.5
    if form != "none":
        a = cases.memory(a, R=S, M=M, r=r if form == "factored" else None)
    return cases.moved(a)


def again(a: dict[str, Any]) -> None:
    """The same to the bit in a graph, and each time that it is replayed."""
    with torch.no_grad():
        expected = run(**a)
        graph, y = captured(lambda: run(**a))
        for _ in range(3):
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected)


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in DTYPES:
        for sizes in SIZES:
            for form in ("none", "plain", "factored"):
                for gated, transposed in ((True, True), (False, False)):
                    a = functools.partial(arguments, sizes, dtype, form, gated=gated, transposed=transposed)
                    yield (
                        f"{dtype} {sizes} {form} gated={gated} transposed={transposed}",
                        lambda a=a: tolerance.check(run, a()),
                    )
        for name in cases.names()[::5]:  # the kernels beside them are compiled for each
            a = functools.partial(lambda name, dtype: cases.moved(cases.build(name, dtype)), name, dtype)
            yield f"{dtype} {name}", lambda a=a: tolerance.check(run, a())
    for form in ("none", "plain", "factored"):
        yield f"graph {form}", lambda form=form: again(arguments(SIZES[1], torch.bfloat16, form))


def main() -> int:
    reason = extension.hopper_status()
    if reason is not None:
        print(reason)
        return MISSING
    torch.manual_seed(0)
    for what, check in checks():
        print(what, flush=True)
        check()
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
