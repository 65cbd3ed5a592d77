"""Lets PyPI's torchvision, whose kernels are built for CUDA, be imported beside a torch for CPUs; on the PYTHONPATH of serving.py's engines.

vLLM's LLaVA imports torchvision and calls none of its kernels. The import only wants these two to be declared.
"""

import sys
from importlib.abc import MetaPathFinder


class _Declare(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision" and not hasattr(self, "library"):
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for kernel in ("nms", "qnms"):
                self.library.define(f"{kernel}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Declare())
