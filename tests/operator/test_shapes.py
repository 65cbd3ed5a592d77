"""Any shape, any sharing: hypothesis picks them, the float64 definition judges."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memvp_kernels import fused_ffn
from tests import cases, yardstick

SIZES = st.integers(1, 9)


@st.composite
def problems(draw: Any) -> cases.Arguments:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    S, T, d, F = draw(st.integers(0, 4)), draw(st.integers(0, 6)), draw(SIZES), draw(SIZES)
    M, r = draw(st.integers(0, 6)), draw(st.one_of(st.none(), SIZES))
    a = cases.ffn(torch.float64, S=S, T=T, d=d, F=F, gated=draw(st.booleans()), biased=draw(st.booleans()), alone=False)
    if draw(st.booleans()):
        cases.packed(a, [draw(st.integers(0, 5)) for _ in range(S)])
    indexed = draw(st.booleans())
    R = draw(st.integers(0 if S == 0 else 1, 4)) if indexed else S
    cases.memory(a, R=R, M=M, r=r, positions=draw(st.booleans()), same=draw(st.booleans()))
    if indexed:
        a["visual_index"] = torch.tensor([draw(st.integers(-1, R - 1)) for _ in range(S)], dtype=torch.int64)
    if draw(st.booleans()):
        a["visual_lengths"] = torch.tensor([draw(st.integers(0, M)) for _ in range(R)], dtype=torch.int32)
    a["activation"] = draw(st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"]))
    a["visual_scale"] = draw(st.sampled_from([1.0, 0.1, -2.0, 0.0]))
    return a


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(problems())
def test_any_problem(a: cases.Arguments) -> None:
    yardstick.check(fused_ffn, a)
