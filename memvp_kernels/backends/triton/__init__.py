"""The Triton backend: fused kernels for training and prefill, on NVIDIA GPUs from sm_80 and, interpreted, on a CPU for tests."""
