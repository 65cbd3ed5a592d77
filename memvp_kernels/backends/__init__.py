"""The backends of :func:`memvp_kernels.fused_ffn`: one problem in, the same numbers out.

Each module has `unsupported(problem)`, `forward(problem, save_hidden=, save_scores=)` and `backward(problem, grad, pre, scores,
needs)`; what is kept between the two (`pre`, `scores`) means the same in all of them. The cuda backend is forward only.
"""
