"""What the tests of other libraries' tools share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version

from tests.models.tiny import VOCABULARY

__all__ = ["tokenizer", "without_dropout"]


def tokenizer(**special: str) -> Any:
    """Words w0 to w39, whose ids are their numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2"} | special
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def without_dropout(base: Any) -> Any:
    """T5's and BART's would differ from run to run."""
    for module in base.modules():
        for name in ("p", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return base


def fails_before(*, transformers: str = "0", torch_: str = "0") -> pytest.MarkDecorator:
    """Skips where an older transformers or PyTorch itself, without this package, can't do what is tested."""
    old = Version(tf.__version__) < Version(transformers) or Version(torch.__version__) < Version(torch_)
    return pytest.mark.skipif(old, reason=f"needs transformers {transformers} and PyTorch {torch_}")
