"""The four large steps for Hopper in Gluon: warp-specialised programs that stay, in 16 bits, where Triton's own pipeline leaves time.

    ring.py       stages in shared memory between the warp that loads and the warps that multiply
    walk.py       the tiles of a program
    epilogue.py   what stands between an accumulator and device memory
    columns.py    the tiles of a memory that all rows read
    hidden.py, dhidden.py, output.py     the kernels
    operands.py, steps.py                the host's side

Written for Gluon as Triton 3.6 and 3.7 have it. No GPU has run it: the interpreter of the tests and the machine code speak for it, and
the cost model leaves it alone (`roads.CHOSEN_FROM`).
"""

from memvp_kernels.backends.triton.hopper.steps import dhidden, dinput, hidden, output

__all__ = ["dhidden", "dinput", "hidden", "output"]
