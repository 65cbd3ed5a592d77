"""A few small calls of every backend that this machine has, forward and backward: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitized.py

Sizes are odd on purpose (tails, ragged and missing memories); results are compared with float64, so a silent overrun shows twice.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from harness.correctness import allowed_error, relative_error

from memvp_kernels import fused_ffn, reference
from memvp_kernels.choose import missing

_BACKENDS = ("torch", "triton", "cuda")
#: (d, F, M, r): tails everywhere; and for the decode kernel one whose rings go round more than once on a large GPU.
_ODD, _ROUND = (136, 200, 19, 24), (1024, 2816, 40, 136)


def operands(device: torch.device, *, factored: bool, tokens: int, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Three sequences over two memories, one of them ragged; the last sequence has none."""
    width, pairs, slots, rank = sizes
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, torch.bfloat16)

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
        "visual_index": torch.tensor([1, 0, -1], device=device),
        "visual_lengths": torch.tensor([slots, 11], device=device),
    }
    return {**found, "visual_basis": normal(rank, width)} if factored else found


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
                given = operands(device, factored=factored, tokens=tokens, sizes=sizes)
                exact = reference.ffn(**given)
                allowed = allowed_error(fused_ffn(**given, backend="torch"), exact)
                if backend == "cuda":
                    with torch.no_grad():
                        y = fused_ffn(**given, backend=backend)
                else:
                    leaves = {name: t.requires_grad_() for name, t in given.items() if t.is_floating_point()}
                    y = fused_ffn(**given, backend=backend)
                    torch.autograd.grad(y.sum(), list(dict.fromkeys(leaves.values())))
                error = relative_error(y, exact)
                verdict = "ok" if error <= allowed else "WRONG"
                wrong += verdict != "ok"
                form = "factored" if factored else "plain"
                print(
                    f"{backend}: {form}, width {sizes[0]}, {tokens} tokens each: error {error:.1e}, allowed {allowed:.1e}: {verdict}"
                )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
