"""The Triton backend: fused kernels for training and prefill, on NVIDIA GPUs from sm_80 and, interpreted, on a CPU for tests.

`forward.py` and `backward.py` say which launches make up a pass; each kernel has a file of its own with its launcher.
"""

from memvp_kernels.backends.triton.backward import backward
from memvp_kernels.backends.triton.forward import forward, unsupported

__all__ = ["backward", "forward", "unsupported"]
