"""GPUs as the cost models know them: what each chip can do at most, and what share of it a kernel reaches.

:mod:`memvp_kernels.dispatch` chooses a backend by these numbers, and the Triton backend its tiles. Nothing is timed at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

__all__ = ["RATES", "Chip", "Rates", "chip_of"]

_KIB = 1024


@dataclass(frozen=True, eq=False)  # one object per chip (see `chip_of`), so that it hashes fast as a key
class Chip:
    """Peaks of one GPU.

    Attributes:
        architecture: compute capability, 80 … 121.
        multiprocessors: how many run a grid.
        shared_memory: bytes that one block may have.
        tensor: 16-bit FLOP per clock and multiprocessor on the tensor cores, dense.
        cuda: float32 FLOP per clock and multiprocessor outside the tensor cores.
        l2: bytes per clock that L2 delivers to one multiprocessor.
        memory: bytes per clock of device memory for the whole chip.
        clock: GHz.
    """

    architecture: int
    multiprocessors: int
    shared_memory: int
    tensor: int
    cuda: int
    l2: int
    memory: int
    clock: float

    @property
    def family(self) -> str:
        """The matrix instruction that `tl.dot` becomes: "mma", "wgmma" or "tcgen05"."""
        return {90: "wgmma", 100: "tcgen05", 103: "tcgen05"}.get(self.architecture, "mma")

    @property
    def has_pdl(self) -> bool:
        """Whether a launch may begin while the one before it ends (programmatic dependent launch): Hopper and sm_100, 103.

        Not sm_120 and 121, where capture into a CUDA graph was reported to fail; csrc/common/launch.h has the same rule.
        """
        return self.architecture // 10 in (9, 10)

    def seconds(self, cycles: float) -> float:
        return cycles / (self.clock * 1e9)

    def cycles(self, seconds: float) -> float:
        return seconds * self.clock * 1e9


# Data sheets, but for Hopper's clock: what an H200 was measured to hold in a large product (790 TFLOP/s).
_CHIPS = {
    80: Chip(80, 108, 163 * _KIB, 2048, 128, 64, 1100, 1.41),
    86: Chip(86, 84, 99 * _KIB, 512, 256, 48, 500, 1.7),
    87: Chip(87, 16, 163 * _KIB, 1024, 256, 48, 200, 1.3),
    89: Chip(89, 128, 99 * _KIB, 1024, 256, 48, 400, 2.5),
    90: Chip(90, 132, 227 * _KIB, 4096, 256, 64, 2900, 1.46),
    100: Chip(100, 148, 227 * _KIB, 8192, 256, 64, 4000, 1.85),
    103: Chip(103, 148, 227 * _KIB, 8192, 256, 64, 4000, 1.85),
    120: Chip(120, 170, 99 * _KIB, 1024, 256, 48, 700, 2.4),
    121: Chip(121, 48, 99 * _KIB, 1024, 256, 48, 120, 2.4),
}


@cache
def chip_of(architecture: int, multiprocessors: int | None = None) -> Chip:
    """The chip of a compute capability; one not listed counts as the nearest older one, whose code it can run."""
    known = max((a for a in _CHIPS if a <= architecture), default=min(_CHIPS))
    return replace(_CHIPS[known], multiprocessors=multiprocessors or _CHIPS[known].multiprocessors)


class Rates(NamedTuple):
    """Shares of a chip's peak that kernels reach, and seconds of a launch.

    Attributes:
        wgmma, tcgen05, mma: a pipelined `tl.dot` loop in 16 bits, by the instruction that it becomes. With what a tile costs beside
            its loop, Hopper's comes to 0.90 of cuBLAS, within the published range (plain pointers 0.40 to 0.87).
        pointer: the same on Hopper without TMA.
        ieee: a float32 `tl.dot` outside the tensor cores.
        cublas: cuBLAS's persistent kernels, which load the next tile and store the last one beside the products. Gives the
            790 TFLOP/s that an H200 was measured at for a bfloat16 product of 8192 x 8192 x 8192; taken for every chip.
        fused, decode, hopper: whole steps of the Triton kernels, the decode kernel (built for bandwidth; shared memory bounds its tensor
            cores) and the CUDA kernels for Hopper (published for such kernels: 1.02 to 1.07 of cuBLAS).
        elementwise: of the memory's bandwidth, in a pass over the pre-activations.
        streaming, streaming_eager, streaming_decode: of the memory's bandwidth, while weights stream past a few tokens: in the Triton
            kernels, in PyTorch's and in the decode kernel.
        launch: seconds between two kernels of a full stream, drain of the one and start of the other.
        launch_pdl: the same where the second may begin before the first has ended.
        launch_host: seconds that the host needs for a launch, where the stream is not full.
    """

    wgmma: float = 0.95  # assumed
    tcgen05: float = 0.80  # assumed
    mma: float = 0.95  # assumed
    pointer: float = 0.68  # assumed
    ieee: float = 0.42  # assumed
    cublas: float = 1.03  # measured on an H200
    fused: float = 0.90  # assumed
    decode: float = 0.44  # assumed
    hopper: float = 1.0  # assumed
    elementwise: float = 0.90  # assumed
    streaming: float = 0.70  # assumed
    streaming_eager: float = 0.75  # assumed
    streaming_decode: float = 0.90  # assumed
    launch: float = 2e-6  # assumed
    launch_pdl: float = 1e-6  # assumed
    launch_host: float = 4e-6  # assumed


RATES = Rates()
