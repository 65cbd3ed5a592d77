"""Cases of the Hopper kernels: tensors, the launch over them, and what each of its results must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from tests import tolerance
from tests.csrc.emulate_gemm import Gemm

ACTIVATE = tolerance._ACTIVATIONS
_GUARD = 7.0  # around a result: nothing may write there


class Result:
    """A place for a result inside of a larger tensor, whose rows start at multiples of 16 bytes."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        pages, rows, columns = shape if len(shape) == 3 else (1, *shape)
        # Pages follow one another, so only a matrix can have guards in its rows.
        padding = 8 + -columns % 8 if len(shape) == 2 else 0
        self._all = torch.full((pages * rows + 2, columns + padding), _GUARD, dtype=dtype)
        whole = self._all[1:-1].view(pages, rows, columns + padding)
        self.tensor = whole if len(shape) == 3 else whole[0, :, :columns]
        self.tensor.fill_(float("nan"))

    def check_guards(self) -> None:
        self.tensor.fill_(_GUARD)
        assert bool((self._all == _GUARD).all()), "written outside of the result"


@dataclass
class GemmCase:
    """A launch, its results by name with (float64's, PyTorch's own in the dtype, a few orders of the same sums)."""

    gemm: Gemm
    results: dict[str, tuple[Result, Tensor, list[Tensor]]]

    def check(self) -> None:
        for name, (result, exact, theirs) in self.results.items():
            tolerance.assert_within_twice(result.tensor, exact, theirs, name)
            result.check_guards()


class Draw:
    """Tensors of one case, from its seed; sums over any of them have variance of about 1."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Contiguous rows, of which those of a matrix start at multiples of 16 bytes."""
        *front, columns = shape
        whole = torch.randn(*front, columns + -columns % 8, generator=self._generator) * scale
        return whole.to(dtype or self.dtype)[..., :columns]

    def weight(self, rows: int, columns: int) -> Tensor:
        return self(rows, columns, scale=columns**-0.5)

    def bias(self, kind: str | None, size: int) -> Tensor | None:
        """None, or of the case's dtype ("same"), or float32 ("wide")."""
        return None if kind is None else self(size, dtype=torch.float32 if kind == "wide" else self.dtype)


#: left rightᵀ + bias, however somebody computes it.
Multiply = Callable[..., Tensor]


def exactly(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(left.double(), right.double(), None if bias is None else bias.double())


def in_order(seed: int) -> Multiply:
    """PyTorch's own product in the operands' dtype, with the terms of its sums in another order."""

    def multiply(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        order = torch.randperm(left.shape[1], generator=torch.Generator().manual_seed(seed))
        return functional.linear(left[:, order], right[:, order], None if bias is None else bias.to(left.dtype))

    return multiply


def hidden_case(
    N: int, F: int, d: int, *, M: int = 0, dtype: torch.dtype = torch.bfloat16, seed: int = 0, activation: str = "silu", gated: bool = True,
    bias: str | None = None, keep: str = "hidden pre", multiprocessors: int = 2, cluster: int = 0, warpgroups: int = 0,
) -> GemmCase:  # fmt: skip
    """keep: which of "hidden" and "pre" are stored."""
    draw = Draw(dtype, seed)
    x, key, gate = draw(N, d), draw.weight(F, d), draw.weight(F, d) if gated else None
    key_bias, gate_bias = draw.bias(bias, F), draw.bias(bias, F) if gated else None
    memory = draw.weight(M, d) if M else None
    hidden = Result(N, F, dtype=dtype) if "hidden" in keep else None
    pre = Result(1 + gated, N, F, dtype=dtype) if "pre" in keep else None
    columns = Result(N, M, dtype=dtype) if M else None

    def compute(multiply: Multiply) -> tuple[Tensor | None, ...]:
        branches = (
            [multiply(x, key, key_bias)] if gate is None else [multiply(x, gate, gate_bias), multiply(x, key, key_bias)]
        )
        hidden = ACTIVATE[activation](branches[0]) * (branches[1] if gated else 1)
        return hidden, torch.stack(branches), None if memory is None else multiply(x, memory)

    gemm = Gemm(
        "hidden", F, [(x, key.T)], activation=activation, gate=gate, bias=key_bias, gate_bias=gate_bias, result=_tensor(hidden), pre=_tensor(pre),
        shared=memory, shared_result=_tensor(columns), multiprocessors=multiprocessors, cluster=cluster, warpgroups=warpgroups,
    )  # fmt: skip
    return _case(gemm, {"hidden": hidden, "pre": pre, "columns": columns}, compute)


def output_case(
    N: int, d: int, depths: tuple[int, ...], *, across: str = "++-", dtype: torch.dtype = torch.bfloat16, seed: int = 0, bias: str | None = None,
    residual: str | None = None, multiprocessors: int = 2, cluster: int = 0, warpgroups: int = 0,
) -> GemmCase:  # fmt: skip
    """across: of each product, "+" with right (K, d) as it lies, "-" its transpose. residual: None, "other" or "in place"."""
    draw = Draw(dtype, seed)
    lefts = [draw(N, K) for K in depths]
    rights = [draw.weight(d, K) for K in depths]  # (d, K): what a product's columns are
    bias_ = draw.bias(bias, d)
    start = draw(N, d) if residual else None
    y = Result(N, d, dtype=dtype)
    if residual == "in place" and start is not None:
        y.tensor.copy_(start)

    def compute(multiply: Multiply) -> tuple[Tensor | None, ...]:
        y = multiply(torch.cat(lefts, 1), torch.cat(rights, 1), bias_)
        return (y if start is None else y + start.to(y.dtype),)

    products = [
        (left, right.T.contiguous() if form == "+" else right.T) for left, right, form in zip(lefts, rights, across, strict=False)
    ]  # fmt: skip
    gemm = Gemm(
        "output", d, products, bias=bias_, residual=y.tensor if residual == "in place" else start, result=y.tensor,
        multiprocessors=multiprocessors, cluster=cluster, warpgroups=warpgroups,
    )  # fmt: skip
    return _case(gemm, {"y": y}, compute)


def dhidden_case(
    N: int, F: int, d: int, *, M: int = 0, dtype: torch.dtype = torch.bfloat16, seed: int = 0, activation: str = "silu", gated: bool = True,
    across: bool = False, in_place: bool = False, multiprocessors: int = 2, cluster: int = 0, warpgroups: int = 0,
) -> GemmCase:  # fmt: skip
    """across: value (F, d) as the transpose of contiguous (d, F), the layout of a model's down projection."""
    draw = Draw(dtype, seed)
    dy, value, pre = draw(N, d), draw.weight(F, d), draw(1 + gated, N, F)
    memory = draw.weight(M, d) if M else None
    dpre = Result(1 + gated, N, F, dtype=dtype)
    columns = Result(N, M, dtype=dtype) if M else None
    if in_place:
        dpre.tensor.copy_(pre)

    def compute(multiply: Multiply) -> tuple[Tensor | None, ...]:
        dhidden = multiply(dy, value)
        leaf = pre.to(dhidden.dtype).requires_grad_()
        hidden = ACTIVATE[activation](leaf[0]) * (leaf[1] if gated else 1)
        (gradient,) = torch.autograd.grad(hidden, leaf, dhidden)
        return gradient, None if memory is None else multiply(dy, memory)

    right = value.T.contiguous() if across else value.T
    gemm = Gemm(
        "dhidden", F, [(dy, right)], activation=activation, pre=dpre.tensor if in_place else pre, dpre=dpre.tensor, shared=memory,
        shared_result=_tensor(columns), multiprocessors=multiprocessors, cluster=cluster, warpgroups=warpgroups,
    )  # fmt: skip
    return _case(gemm, {"dpre": dpre, "columns": columns}, compute)


def columns_case(kind: str, N: int, d: int, M: int) -> GemmCase:
    """The columns of a shared memory, and nothing beside them."""
    draw = Draw(torch.bfloat16, 0)
    left, memory, columns = draw(N, d), draw.weight(M, d), Result(N, M, dtype=torch.bfloat16)
    gemm = Gemm(kind, 0, [(left, None)], shared=memory, shared_result=columns.tensor)
    return _case(gemm, {"columns": columns}, lambda multiply: (multiply(left, memory),))


def _tensor(result: Result | None) -> Tensor | None:
    return None if result is None else result.tensor


def _case(
    gemm: Gemm, results: dict[str, Result | None], compute: Callable[[Multiply], tuple[Tensor | None, ...]]
) -> GemmCase:
    """compute(how to multiply) gives what the results must be, in their order."""
    exact, *own = (compute(multiply) for multiply in (exactly, in_order(1), in_order(2), in_order(3)))
    wanted = {}
    for i, (name, result) in enumerate(results.items()):
        if result is not None:
            wanted[name] = result, exact[i], [of_one[i] for of_one in own]
    return GemmCase(gemm, wanted)
