"""The torch backend: the two branches in plain PyTorch, for any dtype and device."""

from memvp_kernels.backends.torch.eager import backward, forward, unsupported

__all__ = ["backward", "forward", "unsupported"]
