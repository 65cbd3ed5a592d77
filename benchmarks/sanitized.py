"""A few small calls of every backend that this machine has, forward and backward: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitized.py

Sizes are odd on purpose (tails, ragged and missing memories); outputs and gradients are compared with float64, so a silent overrun
shows twice. What they are compared with is computed on the CPU: the sanitizer sees little but the calls themselves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness.correctness import judge
from torch import Tensor

from memvp_kernels import fused_ffn, reference
from memvp_kernels.dispatch import missing

_BACKENDS = ("torch", "triton", "cuda")
_CPU = torch.device("cpu")
#: (d, F, M, r): tails everywhere; and for the decode kernel one whose rings go round more than once on a large GPU.
_ODD, _ROUND = (136, 200, 19, 24), (1024, 2816, 40, 136)


def operands(*, factored: bool, tokens: int, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Three sequences over two memories, one of them ragged; the last sequence has none. On the CPU."""
    width, pairs, slots, rank = sizes
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)

    memory = normal(2, slots, rank if factored else width)
    found: dict[str, Any] = {
        "x": normal(3, tokens, width) * width**0.5,
        "key": normal(pairs, width),
        "gate": normal(pairs, width),
        "value": normal(width, pairs).T,
        "visual_key": memory,
        "visual_value": memory,
        "key_position": normal(slots, width),
        "value_position": normal(slots, width),
        "visual_index": torch.tensor([1, 0, -1]),
        "visual_lengths": torch.tensor([slots, 11]),
    }
    return {**found, "visual_basis": normal(rank, width)} if factored else found


def results(
    function: Callable[..., Tensor],
    given: Mapping[str, Any],
    *,
    gradients: bool,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> dict[str, Tensor]:
    """Output and, where asked for, the gradient of everything that has one, on the CPU again."""
    copies: dict[int, Tensor] = {}
    for tensor in given.values():
        if id(tensor) not in copies:  # a memory that is key and value at once stays one tensor
            moved = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            copies[id(tensor)] = moved.detach().requires_grad_(gradients and tensor.is_floating_point())
    arguments = {name: copies[id(tensor)] for name, tensor in given.items()}
    with torch.set_grad_enabled(gradients):
        y = function(**arguments, **options)
    found = {"y": y.detach()}
    if gradients:
        leaves = {name: t for name, t in arguments.items() if t.requires_grad and name != "visual_value"}
        # Not the sum of y: an output that backward passes on to every weight alike would hide a wrong row.
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
        found |= zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True)
    return {name: tensor.cpu() for name, tensor in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Runs every backend that is there; 1 when one is far from float64."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", choices=_BACKENDS, default=_BACKENDS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    wrong = 0
    for backend in options.backends:
        reason = missing(backend, device)
        if reason is not None:
            print(f"{backend}: skipped, {reason}")
            continue
        for factored in (False, True):
            for tokens, sizes in ((1, _ODD), (1, _ROUND) if backend == "cuda" else (37, _ODD)):
                given, gradients = operands(factored=factored, tokens=tokens, sizes=sizes), backend != "cuda"
                exact = results(reference.ffn, given, gradients=gradients, dtype=torch.float64)
                plain = results(fused_ffn, given, gradients=gradients, backend="torch")
                outputs = results(fused_ffn, given, gradients=gradients, device=device, backend=backend)
                error, allowed = judge(outputs, plain, exact)
                verdict = "ok" if error <= allowed else "WRONG"
                wrong += verdict != "ok"
                form = "factored" if factored else "plain"
                what = f"{form}, width {sizes[0]}, {tokens} tokens each, {' '.join(outputs)}"
                print(f"{backend}: {what}: error {error:.1e}, allowed {allowed:.1e}: {verdict}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
