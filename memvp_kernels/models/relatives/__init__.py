"""Relatives of MemVP, which put an image into the FFN as well: ADEM-VL and MemVR."""

from memvp_kernels.models.relatives.memvr import visual_retracing

__all__ = ["visual_retracing"]
