"""Figures by arithmetic: docs/distributed.md by the formulas that tests/models/parallel holds to small models, docs/performance.md by its own."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT
from tests.models.parallel.counts import Message, Preset, held, messages

PAGE = (ROOT / "docs" / "distributed.md").read_text()
MODELS = {
    "7B": Preset(4096, 11008, 32, 32, 32, 32000, slots=320, vision_width=1024, projector_width=128),
    "13B": Preset(5120, 13824, 40, 40, 40, 32000, slots=400, vision_width=1024, projector_width=128),
    "70B": Preset(8192, 28672, 64, 8, 80, 32000, slots=400, vision_width=1024, projector_width=128),
}
OF_THE_MEMORY = ("adapter's gradients", "gradient of the cores", "gradient of p^k, p^v", "gradient of the basis")
ROWS = re.findall(r"^\| (7B|13B|70B) \| (DDP|FSDP2|TP) \| (.*) \|$", PAGE, re.MULTILINE)


def _sent(message: Message) -> float:
    """Bytes that one GPU sends, by a ring algorithm."""
    passes = 2 if message.kind == "all-reduce" else 1
    return passes * (message.group - 1) / message.group * message.payload * message.times


@pytest.mark.parametrize(("model", "mode", "figures"), ROWS, ids=lambda value: value.split(" ")[0])
def test_a_training_step(model: str, mode: str, figures: str) -> None:
    """On 8 GPUs, 4 sequences of 512 tokens for each; the ranks of a tensor-parallel group run those of all."""
    preset, sequences = MODELS[model], 4 * (8 if mode == "TP" else 1)
    bytes_ = held(preset, mode.lower(), 8, rows=sequences * 512)
    sent = messages(preset, mode.lower(), 8, sequences=sequences, length=512)
    found = [
        bytes_["base"] / 1e9,
        (bytes_["adapter"] + bytes_["activations"]) / 1e9,
        sum(message.times for message in sent),
        sum(map(_sent, sent)) / 1e9,
        sum(_sent(message) for message in sent if message.what in OF_THE_MEMORY) / 1e6,
    ]
    assert [float(f"{number:.3g}") for number in found] == [float(figure) for figure in figures.split(" | ")]


def test_the_table_and_the_sentences_below_it() -> None:
    assert len(ROWS) == 7
    presets = MODELS.values()
    assert all(f"{p.nf4_bytes() / 1e9:.3g} GB" in PAGE for p in presets)
    assert all(f"{p.image_bytes() / 1e3:.3g} KB" in PAGE for p in presets)
    caches = "{:.3g}, {:.3g} or {:.0f} MB".format(*(p.prompt_bytes() / 1e6 for p in presets))
    assert caches in re.sub(r"\s+", " ", PAGE)
    p = MODELS["7B"]
    free = 80e9 - 2 * p.base
    assert f"{int(free // p.image_bytes()):,} images as cores and {int(free // p.prompt_bytes())} in the prompt" in PAGE


def test_what_an_image_costs() -> None:
    """Of one FFN of LLaMA-7B in 16 bits: text alone, factored, and with Kv and Vv in memory."""
    p = MODELS["7B"]
    d, m, r, weights = p.width, p.slots, p.rank, 3 * p.pairs * p.width
    wide = 2 * (r + m) * d  # [W; p^k] and [W; p^v]
    rows = [
        [2 * n / 1e6 for n in (weights, weights + wide + 2 * m * r, weights + 2 * m * d)],
        [2 * n / 1e6 for n in (weights, weights + wide + m * r, weights + 2 * m * d)],
        [2 * n / 1e6 for n in (weights, weights + wide + 64 * m * r, weights + 64 * 2 * m * d)],
    ]
    page = (ROOT / "docs" / "performance.md").read_text()
    for row in rows:
        assert " | ".join(f"{number:.1f}" for number in row) + " |" in page, row
    assert f"| – | {2 * m * r / 1e3:.0f} | {4 * m * d / 1e3:,.0f} |" in page
