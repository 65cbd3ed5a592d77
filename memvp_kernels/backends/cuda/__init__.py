"""The CUDA C++ backend in bfloat16 and float16: decode, and on Hopper training and prefill.

`decode` launches csrc/decode for a handful of tokens, at the speed of reading the weights once. `gemm` launches csrc/hopper for the large
products of any number of tokens, and the Triton backend's kernels for the rest. `extension` is the compiled code.
"""

from __future__ import annotations

from memvp_kernels.backends.cuda.decode import override_form
from memvp_kernels.backends.cuda.extension import Status, status

__all__ = ["Status", "override_form", "status"]
