"""Whether the user lets float32 products round their operands to TF32."""

from __future__ import annotations

import torch

__all__ = ["tf32_allowed"]


def tf32_allowed() -> bool:
    """PyTorch's setting for products on a GPU, whichever of its two interfaces it was made with.

    ``torch.get_float32_matmul_precision`` raises once the newer one was used; the newer one also knows what the older one set.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
