"""The rates that the cost model of the large steps rests on, in one place: what a measurement would replace."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["RATES", "Rates"]


class Rates(NamedTuple):
    """Shares of a peak, and seconds of a launch. Assumed, all but `library`.

    Attributes:
        wgmma, tcgen05, mma: of a pipelined `tl.dot` loop in the chip's 16-bit tensor cores, by the instruction that it becomes. With what a
            tile costs beside its loop, Hopper's comes to 0.90 of the library's, within the published range (plain pointers 0.40 to 0.87).
        pointer: the same on Hopper without descriptors.
        ieee: of a float32 `tl.dot` outside the tensor cores.
        extension: of the loop that the CUDA extension's warps keep going; published for such kernels 1.02 to 1.07 of cuBLAS, and taken for no more than cuBLAS.
        library: of the library's persistent kernels, which load the next tile and store the last one beside the products: so that a
            bfloat16 product of 8192 x 8192 x 8192 runs at the 790 TFLOP/s that an H200 was measured at. Taken for every chip.
        elementwise: of the memory's bandwidth in a pass over the pre-activations.
        launch: seconds between two kernels of a stream that is kept full, drain of the one and start of the other.
        chained: the same where the second may begin before the first has ended.
    """

    wgmma: float = 0.95
    tcgen05: float = 0.80
    mma: float = 0.95
    pointer: float = 0.68
    ieee: float = 0.42
    extension: float = 1.03
    library: float = 1.03
    elementwise: float = 0.90
    launch: float = 2e-6
    chained: float = 1e-6


RATES = Rates()
