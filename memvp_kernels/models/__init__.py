"""MemVP for Hugging Face language models: an image becomes key-value pairs of the model's feed-forward layers.

Needs the ``transformers`` extra; :func:`memvp_kernels.fused_ffn` itself does not.
"""

from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.model import MemVPModel

__all__ = ["MemVPConfig", "MemVPModel"]
