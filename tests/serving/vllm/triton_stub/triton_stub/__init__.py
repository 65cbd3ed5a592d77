"""A Triton backend for CPUs in name alone, so that vLLM takes its model runner V2 there; kernels run in Triton's interpreter."""
