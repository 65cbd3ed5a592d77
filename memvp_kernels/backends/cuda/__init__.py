"""The CUDA C++ backend: decode, a handful of tokens in bfloat16 or float16, at the speed of reading the weights once.

`decode` fills the parameters of csrc/decode/ffn_decode.h and launches; `extension` is the compiled code and what is known of it.
"""

from __future__ import annotations

from memvp_kernels.backends.cuda.decode import forward, is_fast, override_form, unsupported
from memvp_kernels.backends.cuda.extension import Status, status

__all__ = ["Status", "forward", "is_fast", "override_form", "status", "unsupported"]
