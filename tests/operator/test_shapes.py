"""Any shape, any sharing: hypothesis picks them, the float64 definition judges."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memvp_kernels import fused_ffn
from tests import cases, tolerance


@st.composite
def problems(draw: Any, dtype: torch.dtype, smallest: int) -> cases.Arguments:
    """Sizes from `smallest` on where a product sums over them, from 0 on where it doesn't."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sizes = st.integers(smallest, smallest + 8)
    S, T, d, F = draw(st.integers(0, 4)), draw(st.integers(0, 6)), draw(sizes), draw(sizes)
    M, r = draw(st.integers(0, 6)), draw(st.one_of(st.none(), sizes))
    alone = draw(st.booleans())
    a = cases.ffn(dtype, S=S, T=T, d=d, F=F, gated=draw(st.booleans()), biased=draw(st.booleans()), alone=alone)
    if draw(st.booleans()):
        cases.packed(a, [draw(st.integers(0, 5)) for _ in range(S)])
    sharing = draw(st.sampled_from(["one_each", "index", "shared", "shared_index"]))
    R = draw(st.integers(0, 4)) if sharing == "index" else S
    shared = sharing.startswith("shared")
    form = {"positions": draw(st.booleans()), "same": draw(st.booleans()), "wide": draw(st.booleans())}
    cases.memory(a, R=None if shared else R, M=M, r=r, **form)
    rows = 1 if shared else R
    if sharing.endswith("index"):
        a["visual_index"] = torch.tensor([draw(st.integers(-1, rows - 1)) for _ in range(S)], dtype=torch.int64)
    if draw(st.booleans()):
        a["visual_lengths"] = torch.tensor([draw(st.integers(0, M)) for _ in range(rows)], dtype=torch.int32)
    if draw(st.booleans()):
        a["residual"] = cases.random(*a["x"].shape, dtype=dtype)
    a["activation"] = draw(st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"]))
    a["visual_scale"] = draw(st.sampled_from([1.0, 0.1, -2.0, 0.0]))
    return a


_SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@settings(max_examples=150, **_SETTINGS)
@given(problems(torch.float64, 1))
def test_any_problem(a: cases.Arguments) -> None:
    tolerance.check(fused_ffn, a)


@settings(max_examples=30, **_SETTINGS)
@given(st.one_of(problems(torch.float32, 12), problems(torch.bfloat16, 12)))
def test_any_problem_in_fewer_bits(a: cases.Arguments) -> None:
    """Sums of a dozen terms at least: over fewer, PyTorch is exact by luck too often to be a measure."""
    tolerance.check(fused_ffn, a)
