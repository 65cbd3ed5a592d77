"""The decode kernels' source, executed on the CPU thread by thread, against the float64 reference by the 2x rule."""

from __future__ import annotations

from typing import Any

import pytest

from tests.csrc import decode_cases
from tests.csrc.decode_cases import BF16, FP16, SMALL, make
from tests.csrc.host_run import Case, HostLibrary, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library() -> HostLibrary:
    return HostLibrary()


@pytest.mark.parametrize("name", SMALL)
def test_matches_float64(library: HostLibrary, name: str) -> None:
    for order, seed in (("random", 3), ("forward", 1), ("reverse", 1)):
        case = Case(make(**SMALL[name]))
        library.run(case, order=order, seed=seed)
        case.check()


@pytest.mark.parametrize("sizes", decode_cases.SWEEP, ids=lambda s: "-".join(str(s[k]) for k in ("tokens", "width", "pairs", "slots", "rank")))
@pytest.mark.slow
def test_sweep(library: HostLibrary, sizes: dict[str, Any]) -> None:
    for dtype in (BF16, FP16):
        case = Case(make(**sizes, dtype=dtype), multiprocessors=1 + sizes["tokens"] % 5)
        library.run(case, seed=sizes["seed"] + 1, resident=1 + sizes["width"] % 6)
        case.check()
