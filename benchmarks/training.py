"""Time and peak memory of a training step (forward, backward, optimizer; frozen base): visual memory against visual tokens.

    python benchmarks/training.py                         # picks shapes for the device
    python benchmarks/training.py --preset llama-7b --batch 16 --checkpointing --recompute

Trained are projector and positions, in float32, as in the paper; 10 % of the visual activations are dropped. Every variant's logits
and gradients are checked against float64, with nothing dropped, before it is timed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import quantized
import torch
import torch.nn.functional as F
from ffn_case import memory_per_image, too_big
from llama import OURS, Llama, checked_note, in_float64, in_models, memvp_model, sharing, take_gradients, use
from measure import Built, Candidate, Case, Truth, run
from options import Setting, parser, settle
from plots import plot_program
from roofline import FFNShape, ffn_backward, ffn_forward, training_step
from rows import show
from timing import tensor_bytes
from torch import Tensor, nn
from variants import Variant, exact_ffn, truths, variants
from workload import Adapter, Weights, hidden_states, text_tokens

CPU = {"batch": (2,), "text_length": (64,), "visual_tokens": (256,)}
CUDA = {"batch": (16, 4), "text_length": (64, 512), "visual_tokens": (256,)}

DROPOUT = 0.1  # on the visual activations, as in the paper
Outputs = dict[str, Tensor]


class Step:
    """What all variants of one training step share: the adapter, images, the switches, and a copy of the adapter that learns."""

    def __init__(self, setting: Setting, sequences: int, text_length: int, visual_tokens: int) -> None:
        self.setting = setting
        self.sizes = {"sequences": sequences, "tokens": text_length, "visual_tokens": visual_tokens}
        self.shape = FFNShape.of(setting.preset, **self.sizes, element=setting.element)
        self.adapter = Adapter(setting.preset, slots=self.shape.slots, device=setting.device)
        self.features = self.adapter.batch(sequences, visual_tokens)
        self.learner = copy.deepcopy(self.adapter)  # steps change it; the check's own stays as it is
        self.optimizer = optimizer_of(self.learner)

    def leaf(self, *, offset: int = 0) -> Tensor:
        """(S, T, d) hidden states."""
        s, t, d = self.shape.sequences, self.shape.tokens, self.shape.width
        return hidden_states(s, t, d, device=self.setting.device, dtype=self.setting.dtype, offset=offset)

    def candidate(
        self, variant: Variant, build: Callable[[], Built], truth: Callable[[], Truth], count: Any
    ) -> Candidate:
        memory = memory_per_image(variant.form, self.setting, slots=self.shape.slots)
        # Concatenated weights are kept for the backward, and get gradients of their size.
        size = 2 * self.shape.sequences * memory if variant.form == "concatenated" else 0
        missing = variant.missing(self.setting.device) or too_big(size, self.setting.device)
        return Candidate(variant.name, build, truth, count, missing=missing, memory_per_image=memory)


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """The paper's."""
    return torch.optim.AdamW(module.parameters(), lr=1.125e-3, betas=(0.9, 0.95), weight_decay=0.02)


def update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def gradients(adapter: Adapter) -> Outputs:
    """Of what the adapter trains; then forgets them. A text-only step gives none."""
    found = {name: p.grad.detach().clone() for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad(set_to_none=True)
    return found


def trained_bytes(adapter: Adapter) -> int:
    """Parameters and AdamW's two moments; the gradients appear within the step."""
    return 3 * tensor_bytes(*adapter.parameters())


def ffn_candidates(setting: Setting, size: tuple[int, int, int], *, recompute: bool) -> list[Candidate]:
    """One FFN's training step: gradients of its input and of everything that the adapter trains."""
    step = Step(setting, *size)
    features, text_length, dtype = step.features, step.shape.tokens, setting.dtype
    weights = Weights.random(setting.preset, device=setting.device, dtype=dtype, seed=0)
    x, grad = step.leaf(), step.leaf(offset=5000)

    def forward(variant: Variant, adapter: Adapter, x: Tensor, dropout: float) -> Tensor:
        """(S, T, d): the text's rows of the output."""
        if variant.form == "prompt":
            x = torch.cat([adapter.project(features).to(dtype), x], dim=1)
        bound = None
        if variant.has_memory:
            bound = variant.bind(weights, variant.share(adapter.factors(features, dtype=dtype)))
        return variant.step(x, weights, bound, dropout)[:, -text_length:]

    def outputs(variant: Variant) -> Outputs:
        leaf = x.clone().requires_grad_()
        y = forward(variant, step.adapter, leaf, 0.0)
        torch.autograd.backward(y, grad)
        return {"y": y.detach(), "x": leaf.grad, **gradients(step.adapter)}  # type: ignore[dict-item]

    def exact(variant: Variant) -> Outputs:
        wide = copy.deepcopy(step.adapter).double()
        leaf = rows = x.double().requires_grad_()
        if variant.form == "prompt":
            rows = torch.cat([wide.project(features.double()), leaf], dim=1)
        factors = wide.factors(features.double(), dtype=torch.float64) if variant.has_memory else None
        y = exact_ffn(rows, weights, factors)[:, -text_length:]
        torch.autograd.backward(y, grad.double())
        return {"y": y.detach(), "x": leaf.grad, **gradients(wide)}  # type: ignore[dict-item]

    truth = truths(setting.device, outputs, exact)

    def build(variant: Variant) -> Built:
        leaf = x.clone().requires_grad_()

        def call() -> None:
            torch.autograd.backward(forward(variant, step.learner, leaf, DROPOUT), grad)
            update(step.optimizer)
            leaf.grad = None

        held = tensor_bytes(weights, x, grad) + trained_bytes(step.adapter)
        return Built(functools.partial(outputs, variant), [call], held, graph=False)

    return [
        step.candidate(
            variant,
            functools.partial(build, variant),
            functools.partial(truth, variant.form),
            ffn_forward(variant.form, step.shape, training=True) + ffn_backward(variant.form, step.shape),
        )
        for variant in variants(setting.device, compiled=setting.compiled, recompute=recompute).values()
        if setting.wants(variant.name)
    ]


class ModelStep(Step):
    """A whole model's training step: cross entropy of the text, gradients of the adapter, AdamW."""

    def __init__(
        self, setting: Setting, llama: Llama, size: tuple[int, int, int], *, recompute: bool, checkpointing: bool
    ) -> None:
        super().__init__(setting, *size)
        self.llama, self.recompute, self.checkpointing = llama, recompute, checkpointing
        s, t = self.shape.sequences, self.shape.tokens
        self.tokens = text_tokens(s, t, setting.preset.vocabulary).to(setting.device)
        if checkpointing:
            for model in (llama.whole, llama.checked, llama.exact):
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
                model.disable_input_require_grads()  # frozen embeddings need no gradient here
                model.train()  # checkpointing happens in training mode alone; nothing else differs

    def loss(self, variant: Variant, model: Any, adapter: Adapter, dropout: float) -> tuple[Tensor, Tensor]:
        """The loss and the text's logits of a variant in the given LlamaForCausalLM."""
        dtype = model.lm_head.weight.dtype
        embedded = model.model.embed_tokens(self.tokens)
        features = self.features.to(adapter.fc1_weight.dtype)
        shared = variant.share(adapter.factors(features, dtype=dtype)) if variant.has_memory else None
        if variant.form == "prompt":
            embedded = torch.cat([adapter.project(features).to(dtype), embedded], dim=1)
        elif variant.form == "text":  # nothing is trained, but the backward passes through every layer all the same
            embedded = embedded.detach().requires_grad_()
        use(model, variant, shared, dropout)
        inputs = {"inputs_embeds": embedded, "logits_to_keep": self.shape.tokens, "use_cache": False}
        if dtype != torch.float64:
            found = model(**inputs, labels=self.tokens)
            return found.loss, found.logits
        logits = model(**inputs).logits  # transformers' own loss rounds to float32
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten()), logits

    def outputs(self, variant: Variant, model: Any, adapter: Adapter) -> Outputs:
        """Logits and gradients with nothing dropped. Not the loss: one number can be right by luck."""
        value, logits = self.loss(variant, model, adapter, 0.0)
        torch.autograd.backward(value)
        return {"logits": logits.detach(), **gradients(adapter)}

    def build(self, variant: Variant) -> Built:
        def call() -> None:
            torch.autograd.backward(self.loss(variant, self.llama.whole, self.learner, DROPOUT)[0])
            update(self.optimizer)

        outputs = functools.partial(self.outputs, variant, self.llama.checked, self.adapter)
        held = tensor_bytes(*self.llama.whole.parameters()) + trained_bytes(self.adapter)
        return Built(outputs, [call], held, graph=False)

    def memvp(self, base: Any) -> tuple[Any, Callable[[bool], tuple[Tensor, Tensor]]]:
        """MemVPModel on the base, and its loss and logits with or without dropout."""
        model = memvp_model(base, self.adapter, recompute=self.recompute)
        if self.checkpointing:
            model.activation_checkpointing_enable()

        def loss(dropout: bool) -> tuple[Tensor, Tensor]:
            model.train()
            model.memory.train(dropout)
            found = model(input_ids=self.tokens, image_features=self.features, labels=self.tokens, use_cache=False)
            return found.loss, found.logits

        return model, loss

    def build_memvp(self, change: Callable[[Any], None] = lambda base: None) -> Built:
        """A step of MemVPModel; `change` is made to its base first."""

        def base_of(base: Any) -> Any:
            own = sharing(base)
            change(own)
            return own

        def outputs() -> Outputs:
            model, loss = self.memvp(base_of(self.llama.checked))
            value, logits = loss(False)
            torch.autograd.backward(value)
            return {"logits": logits.detach(), **take_gradients(model)}

        base = base_of(self.llama.whole)
        model, loss = self.memvp(base)
        optimizer = optimizer_of(model.memory)

        def call() -> None:
            torch.autograd.backward(loss(True)[0])
            update(optimizer)

        return Built(outputs, [call], quantized.base_bytes(base) + trained_bytes(self.adapter), graph=False)


def model_candidates(
    setting: Setting, llama: Llama, size: tuple[int, int, int], *, recompute: bool, checkpointing: bool
) -> list[Candidate]:
    """The variants of a whole model's training step."""
    step = ModelStep(setting, llama, size, recompute=recompute, checkpointing=checkpointing)

    truth = truths(
        setting.device,
        lambda variant: step.outputs(variant, llama.checked, step.adapter),
        lambda variant: step.outputs(variant, llama.exact, copy.deepcopy(step.adapter).double()),
    )

    def candidate(variant: Variant, build: Callable[[], Built]) -> Candidate:
        count = training_step(
            variant.form, setting.preset, step.shape, layers=setting.layers, checkpointing=checkpointing
        )
        found = step.candidate(variant, build, functools.partial(truth, variant.form), count)
        found.note = checked_note(setting)
        return found

    every = in_models(variants(setting.device, compiled=setting.compiled, recompute=recompute))
    found = [
        candidate(variant, functools.partial(step.build, variant)) for variant in every if setting.wants(variant.name)
    ]
    if setting.wants(OURS):
        found.append(candidate(Variant(OURS, "factored", lambda *_: None), step.build_memvp))  # type: ignore[arg-type,return-value]
    return found


def quantized_candidates(
    setting: Setting, llama: Llama, size: tuple[int, int, int], **switches: bool
) -> list[Candidate]:
    """MemVPModel on its base as it is and in 4 bits, which is judged on the matrices that those bits stand for."""
    step = ModelStep(setting, llama, size, **switches)
    own = next(found for found in model_candidates(setting, llama, size, **switches) if found.variant == OURS)

    def truth() -> Truth:
        base = sharing(llama.checked)
        quantized.quantize(base)
        same = quantized.dequantized(base, llama.checked)
        return truths(
            setting.device,
            lambda variant: step.outputs(variant, same, step.adapter),
            lambda variant: step.outputs(variant, in_float64(same), copy.deepcopy(step.adapter).double()),
        )("factored")

    note = "decoder layers in NF4, embedding and head not; its roofline counts the bytes of the other's weights"
    build = functools.partial(step.build_memvp, quantized.quantize)
    four_bits = Candidate(f"{OURS}-nf4", build, truth, own.count, missing=quantized.missing(), note=note)
    four_bits.memory_per_image = own.memory_per_image
    return [own, four_bits]


def cases(setting: Setting, *, recompute: bool, checkpointing: bool, quantized: bool) -> Iterator[Case]:
    """A model's and an FFN's step for every combination of sizes; checkpointing and 4 bits are the model's alone."""
    llama = functools.cache(lambda: Llama(setting))
    chosen = {"checkpointing": checkpointing, "recompute": recompute, "quantized": quantized}
    switches = "".join(f", {name}" for name, on in chosen.items() if on)

    def case(level: str, size: tuple[int, int, int]) -> Case:
        here = setting.at(size, level=level)

        def found() -> Sequence[Candidate]:
            if level == "ffn":
                return ffn_candidates(here, size, recompute=recompute)
            make = quantized_candidates if quantized else model_candidates
            return make(here, llama(), size, recompute=recompute, checkpointing=checkpointing)

        name = f"{level}, training step {size[0]}×{size[1]}, image {size[2]}{switches}"
        layers = 1 if level == "ffn" else setting.layers
        return Case(setting.row(name, size, level=level, phase="training", layers=layers), found)

    for size in setting.sizes():
        yield case("model", size)
        if not checkpointing and not quantized and not setting.sweep:
            yield case("ffn", size)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status is 1 when a variant was wrong or broke."""
    switches = argparse.ArgumentParser(add_help=False)
    switches.add_argument("--checkpointing", action="store_true", help="every decoder layer runs again in the backward")
    switches.add_argument("--recompute", action="store_true", help="our FFNs keep x instead of the pre-activations")
    four_bits = "MemVPModel alone, on its base as it is and on one in 4 bits (bitsandbytes)"
    switches.add_argument("--quantized", action="store_true", help=four_bits)
    chosen = vars(switches.parse_known_args(arguments)[0])
    # Files of their own, so that one run does not overwrite the other's rows.
    program = "-".join(("training", *(name for name, on in chosen.items() if on)))
    options = parser(str(__doc__).splitlines()[0], program=program, parents=(switches,), sweep=True).parse_args(
        arguments
    )
    setting = settle(options, cpu=CPU, cuda=CUDA)
    results, left_out = run(setting, list(cases(setting, **chosen)))
    show(results, left_out)
    plot_program(results.document(), setting.plot)
    return results.exit_status


if __name__ == "__main__":
    sys.exit(main())
