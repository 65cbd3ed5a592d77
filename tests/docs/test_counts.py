"""Figures by arithmetic: docs/distributed.md by the formulas that tests/models/parallel holds to small models, docs/performance.md by its own."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT
from tests.models.parallel import counts

PAGE = (ROOT / "docs" / "distributed.md").read_text()
MODELS = {
    "7B": counts.Preset(4096, 11008, 32, 32, 32, 32000, slots=320, vision_width=1024, projector_width=128),
    "13B": counts.Preset(5120, 13824, 40, 40, 40, 32000, slots=400, vision_width=1024, projector_width=128),
    "70B": counts.Preset(8192, 28672, 64, 8, 80, 32000, slots=400, vision_width=1024, projector_width=128),
}
OF_THE_MEMORY = ("adapter's gradients", "gradient of the cores", "gradient of p^k, p^v", "gradient of the basis")
ROWS = re.findall(r"^\| (7B|13B|70B) \| (DDP|FSDP2|TP) \| (.*) \|$", PAGE, re.MULTILINE)


def _sent(collective: counts.Collective) -> float:
    """Bytes that one GPU sends, by a ring algorithm."""
    passes = 2 if collective.kind == "all-reduce" else 1
    return passes * (collective.group - 1) / collective.group * collective.payload * collective.times


@pytest.mark.parametrize(("model", "mode", "figures"), ROWS, ids=lambda value: value.split(" ")[0])
def test_a_training_step(model: str, mode: str, figures: str) -> None:
    preset, layout = MODELS[model], counts.Layout(mode.lower(), 8)
    held = counts.held(preset, layout, sequences=4, length=512)
    messages = list(counts.training_collectives(preset, layout, sequences=4, length=512))
    found = [
        (held["base"] + held["gathered"]) / 1e9,
        (held["adapter"] + held["activations"]) / 1e9,
        sum(message.times for message in messages),
        sum(map(_sent, messages)) / 1e9,
        sum(_sent(message) for message in messages if message.name in OF_THE_MEMORY) / 1e6,
    ]
    assert [float(f"{number:.3g}") for number in found] == [float(figure) for figure in figures.split(" | ")]


def test_the_table_and_the_sentences_below_it() -> None:
    assert len(ROWS) == 7
    bases = [f"{counts.base_bytes(preset, nf4=True) / 1e9:.3g} GB" for preset in MODELS.values()]
    assert all(base in PAGE for base in bases), bases
    images = {f"{counts.image_bytes(preset) / 1e3:.3g} KB" for preset in MODELS.values()}
    caches = [f"{counts.prompt_bytes(preset) / 1e6:.3g}" for preset in MODELS.values()]
    assert all(image in PAGE for image in images), images
    assert f"{caches[0]}, {caches[1]} or {float(caches[2]):.0f} MB" in re.sub(r"\s+", " ", PAGE)
    free = 80e9 - counts.base_bytes(MODELS["7B"])
    fitting = [int(free // counts.image_bytes(MODELS["7B"])), int(free // counts.prompt_bytes(MODELS["7B"]))]
    assert f"{fitting[0]:,} images as cores and {fitting[1]} in the prompt" in PAGE


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
