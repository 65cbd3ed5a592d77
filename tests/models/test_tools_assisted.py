"""Assisted decoding: the draft changes no token, an ordinary one is handed no memory, and a MemVPModel reads the image."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import MemVPModel
from tests.models.tiny import CONFIG, ENCODER_DECODERS, KINDS, features, language_model, tokens, with_memory
from tests.models.tools import fails_before

_NEW = 12


def _base(family: str, seed: int = 0, narrow: bool = False) -> Any:
    """Weights so large that greedy text depends on the image."""
    base = language_model(family, seed)
    if narrow:
        config = base.config
        if family in ENCODER_DECODERS:
            config.update({"d_model": 16, "decoder_ffn_dim": 20, "d_ff": 20})
        else:
            config.update({"hidden_size": 16, "intermediate_size": 20})
        base = type(base)(config).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "shared" not in name:
                parameter.mul_(4)
    return base


def _text(model: Any, seed: int = 3, **options: Any) -> Tensor:
    options = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0, **options}
    if isinstance(model, MemVPModel):
        options.setdefault("image_features", features(6, seed=seed))
    ids = tokens(1)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def _wrapped(base: Any) -> MemVPModel:
    return with_memory(base, dataclasses.replace(CONFIG, feature_scale=5.0))


DRAFTS = {
    "ordinary": lambda family: _base(family, 1),
    "ordinary, narrow": lambda family: _base(family, 1, narrow=True),
    "with memory": lambda family: _wrapped(_base(family, 1)),
    "with memory, narrow": lambda family: _wrapped(_base(family, 1, narrow=True)),
}


def _param(family: str, *more: str) -> Any:
    """T5's cache can't be cropped while it is empty, in older versions."""
    return pytest.param(family, *more, marks=[fails_before(transformers="5.23")] if family.startswith("t5") else [])


@pytest.mark.parametrize(
    ("family", "draft"),
    [
        *(_param(family, draft) for family in KINDS for draft in ("ordinary", "with memory, narrow")),
        *(_param(family, draft) for family in ("llama", "t5") for draft in ("ordinary, narrow", "with memory")),
    ],
)
def test_a_draft_changes_no_token(family: str, draft: str) -> None:
    model = _wrapped(_base(family))
    assistant: Any = DRAFTS[draft](family)
    wanted = [_text(model, seed) for seed in (3, 44)]
    assert not torch.equal(*wanted), "the image makes no difference"
    for seed, text in zip((3, 44), wanted, strict=True):
        assert torch.equal(_text(model, seed, assistant_model=assistant), text)


def _target_forwards(model: MemVPModel, **options: Any) -> int:
    runs: list[int] = []
    top = model.language_model
    handle = top.register_forward_hook(lambda *_: runs.append(1))
    _text(model, **options)
    handle.remove()
    return len(runs)


@pytest.mark.parametrize("family", [_param("llama"), _param("t5"), _param("bart")])
def test_a_draft_with_memory_sees_the_image(family: str) -> None:
    """A draft that is the model's equal guesses right with the image, and wrong without it."""
    model, equal = _wrapped(_base(family)), _wrapped(_base(family))
    equal.generation_config.assistant_confidence_threshold = 0.0
    with_image = _target_forwards(model, assistant_model=equal)
    without = _target_forwards(model, assistant_model=equal.language_model)
    assert with_image < without <= _NEW, (with_image, without)
    with model.disable_memory():
        plain = _text(model, assistant_model=equal)
    assert torch.equal(plain, _text(_base(family)))


def test_drafts_of_other_kinds() -> None:
    """Early exit, where the model drafts for itself, and an ordinary model whose draft is a MemVPModel."""
    model = _wrapped(_base("llama"))
    assert torch.equal(_text(model, assistant_early_exit=1), _text(model))
    base = _base("llama", 2)
    assert torch.equal(_text(base, assistant_model=_wrapped(_base("llama", 1))), _text(base))


def test_a_core_is_no_image_to_another_model() -> None:
    model, draft = _wrapped(_base("llama")), _wrapped(_base("llama", 1))
    core = model.encode_images(features(6))
    with pytest.raises(
        ValueError, match=r"visual_core: wanted image_features or pixel_values beside an assistant_model"
    ):
        _text(model, image_features=None, visual_core=core, assistant_model=draft)
    wanted = _text(model)
    got = _text(model, image_features=None, visual_core=core, assistant_model=draft.language_model)
    assert torch.equal(got, wanted)
