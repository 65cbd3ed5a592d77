"""A plug-in for vLLM: an image becomes memory of the FFNs and adds no token to the prompt.

vLLM finds :func:`register` through the entry point ``vllm.general_plugins``. Nothing of vLLM is imported before that.
"""

from __future__ import annotations

from memvp_kernels.serving.vllm.folder import ARCHITECTURES, save_for_vllm

__all__ = ["ARCHITECTURES", "register", "save_for_vllm"]


def register() -> None:
    """Name the model classes to vLLM; called by vLLM once in each of its processes.

    Raises:
        RuntimeError: this version of vLLM is not supported; says which versions are.
    """
    from vllm import ModelRegistry

    from memvp_kernels.serving.vllm import compat

    compat.check_version()
    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"memvp_kernels.serving.vllm.model:{name}")
