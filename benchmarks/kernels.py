"""Each kernel, and the operator's training forward and backward, against its roofline bound, bare cuBLAS and Liger.

    python benchmarks/kernels.py                          # picks shapes for the device
    python benchmarks/kernels.py --preset llama-7b --batch 16 --text-length 512

The bound is counted in roofline.py from peaks measured in the same run. The row "matmul" times the bare matrix products (without
activation or memory): a fused kernel does more than that, and is good when it is no slower.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import kernel_cases
import relatives_cases
import torch
from ffn_case import memory_per_image, too_big
from measure import Built, Candidate, Case, Truth, run
from options import Setting, parser, settle
from plots import plot_program
from roofline import Count, FFNShape, ffn_backward, ffn_forward
from rows import COLUMNS, show
from timing import tensor_bytes
from torch import Tensor
from variants import Variant, exact_ffn, truths, variants
from workload import Adapter, Weights, hidden_states

CPU = {"batch": (4,), "text_length": (64,), "visual_tokens": (256,)}
CUDA = {"batch": (16, 1), "text_length": (512,), "visual_tokens": (256,)}

_COLUMNS = {
    name: text
    for name, text in COLUMNS.items()
    if name not in ("speedup_vs_prompt", "speedup_vs_text", "image_mb", "error", "verdict")
}
_COLUMNS |= {"speedup_vs_matmul": "× matmul", "tflops": "TFLOP/s", "gbs": "GB/s", "host_us": "host µs"}
_COLUMNS |= {"first_call_s": "first call s", "error": "error", "verdict": ""}

Outputs = dict[str, Tensor]


class Problem:
    """Operands of one training FFN, every one that a variant differentiates being a leaf."""

    def __init__(self, setting: Setting, *, sequences: int, text_length: int, visual_tokens: int) -> None:
        device, dtype, preset = setting.device, setting.dtype, setting.preset
        sizes = {"sequences": sequences, "tokens": text_length, "visual_tokens": visual_tokens}
        self.setting, self.shape = setting, FFNShape.of(preset, **sizes, element=setting.element)
        adapter = Adapter(preset, slots=self.shape.slots, device=device)
        self.factors = adapter.factors(adapter.batch(sequences, visual_tokens), dtype=dtype).map(Tensor.detach)
        self.weights = Weights.random(preset, device=device, dtype=dtype, seed=0)
        make = functools.partial(hidden_states, sequences, text_length, preset.width, device=device, dtype=dtype)
        self.x, self.grad = make(), make(offset=5000)

    def outputs(self, variant: Variant, *, exact: bool = False) -> Outputs:
        """Output and gradients, the memory materialized or bound within; exact: of the float64 definition."""
        dtype = torch.float64 if exact else self.x.dtype
        x = self.x.to(dtype, copy=True).requires_grad_()
        factors = self.factors.map(lambda t: t.to(dtype, copy=True).requires_grad_())
        if exact:
            y = exact_ffn(x, self.weights, factors if variant.has_memory else None)
        else:
            bound = variant.bind(self.weights, variant.share(factors)) if variant.has_memory else None
            y = variant.step(x, self.weights, bound, 0.0)
        leaves = {"x": x}
        if variant.has_memory:
            leaves |= {name: t for name, t in vars(factors).items() if isinstance(t, Tensor)}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.grad.to(dtype))
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def leaves(self, variant: Variant) -> tuple[Tensor, object, list[Tensor]]:
        """x, what the variant reads, and what its backward differentiates: no work of the projector is timed."""
        x = self.x.clone().requires_grad_()
        if not variant.has_memory:
            return x, None, [x]
        shared = variant.share(self.factors)
        tensors = [t.requires_grad_() for t in vars(shared).values() if isinstance(t, Tensor)]
        return x, variant.bind(self.weights, shared), [x, *tensors]

    def build(self, variant: Variant, *, backward: bool) -> Built:
        """The forward that keeps what the backward needs, or the backward alone, weights frozen."""
        x, bound, leaves = self.leaves(variant)
        forward = functools.partial(variant.step, x, self.weights, bound, 0.0)
        held = tensor_bytes(self.weights, x, bound)

        def outputs() -> Outputs:
            found = self.outputs(variant)
            return found if backward else {"y": found["y"]}

        if not backward:
            return Built(outputs, [forward], held, graph=False)
        y = forward()
        call = functools.partial(torch.autograd.grad, y, leaves, self.grad, retain_graph=True)
        return Built(outputs, [call], held + tensor_bytes(self.grad), graph=False)

    def products(self, *, backward: bool) -> Built:
        """The bare matrix products of either pass, into buffers of their own."""
        w, x = self.weights, (self.grad if backward else self.x).flatten(0, 1)
        hidden = torch.empty(x.shape[0], w.key.shape[0], dtype=x.dtype, device=x.device)
        y = torch.empty_like(x)

        def call() -> Tensor:
            torch.mm(x, w.value.T if backward else w.gate.T, out=hidden)
            if backward:
                return torch.mm(hidden, w.gate, out=y).addmm_(hidden, w.key)
            torch.mm(x, w.key.T, out=hidden)
            return torch.mm(hidden, w.value, out=y)

        return Built(lambda: {"y": call().clone()}, [call], tensor_bytes(w, x), graph=False)


def candidates(setting: Setting, *, backward: bool, **sizes: int) -> list[Candidate]:
    """The operator as autograd calls it, against the bare matrix products that it can't do without."""
    problem = Problem(setting, **sizes)
    shape = problem.shape

    def count(form: str) -> Count:
        return ffn_backward(form, shape) if backward else ffn_forward(form, shape, training=True)

    known = truths(setting.device, problem.outputs, functools.partial(problem.outputs, exact=True))

    def truth(form: str) -> Truth:
        found = known(form)
        names = found.exact if backward else ["y"]
        return Truth({n: found.plain[n] for n in names}, {n: found.exact[n] for n in names})

    def of_products() -> Truth:
        plain = problem.products(backward=backward).outputs()
        return Truth(plain, {name: t.double() for name, t in plain.items()})

    note = "the matrix products alone (torch.mm): no activation, no memory; its error is not judged"
    found = [
        Candidate(
            "matmul", functools.partial(problem.products, backward=backward), of_products, count("text"), note=note
        )
    ]
    for variant in variants(setting.device, compiled=setting.compiled).values():
        if variant.form != "prompt" and setting.wants(variant.name):
            size = memory_per_image(variant.form, setting, slots=shape.slots)
            big = too_big(3 * shape.sequences * size, setting.device) if variant.form == "concatenated" else None
            build = functools.partial(problem.build, variant, backward=backward)
            missing = variant.missing(setting.device) or big
            found.append(
                Candidate(
                    variant.name, build, functools.partial(truth, variant.form), count(variant.form), missing=missing
                )
            )
    return found


def cases(setting: Setting) -> Iterator[Case]:
    """The operator's two passes first, then its kernels and what MemVP's relatives add, for every combination of sizes."""

    def case(level: str, name: str, found: Callable[..., Sequence[Candidate]], size: tuple[int, int, int]) -> Case:
        sizes = dict(zip(("sequences", "text_length", "visual_tokens"), size, strict=True))
        row = setting.row(f"{name} {size[0]}×{size[1]}, image {size[2]}", size, level=level, phase=name, layers=1)
        return Case(row, functools.partial(found, setting, **sizes), host=True)

    for size in setting.sizes():
        for name in ("forward", "backward"):
            yield case("ffn", f"training {name}", functools.partial(candidates, backward=name == "backward"), size)
        for name in kernel_cases.KERNELS:
            yield case(
                "kernel",
                f"kernel {name}",
                lambda s, name=name, **sizes: kernel_cases.candidates(s, name, **sizes),
                size,
            )
        yield case("kernel", "kernel drop", relatives_cases.drop_candidates, size)
        yield case("ffn", "MemVR", relatives_cases.memvr_candidates, size)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status is 1 when a variant was wrong or broke."""
    setting = settle(parser(str(__doc__).splitlines()[0], program="kernels").parse_args(arguments), cpu=CPU, cuda=CUDA)
    results, left_out = run(setting, list(cases(setting)))
    show(results, left_out, columns=_COLUMNS)
    plot_program(results.document(), setting.plot)
    return results.exit_status


if __name__ == "__main__":
    sys.exit(main())
