"""Which program of a launch touched which element: programs run in any order, so what one writes no other may read or write.

Interpreted programs run one after the other, which would hide that. Atomic operations are among themselves in any order, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.triton.gluon.races import Race

__all__ = ["DeviceMemory"]

_NOBODY, _SEVERAL = -1, -2


class DeviceMemory:
    """The accesses of one launch, by element of each storage."""

    def __init__(self) -> None:
        self._marks: dict[tuple[int, int], Tensor] = {}

    def access(self, tensor: Tensor, index: Tensor, write: bool, program: int, story: str) -> None:
        """An access of `program` to these elements of the tensor's storage."""
        writer, reader = self._of(tensor)
        index = index.reshape(-1)
        self._check(writer[index], program, "written", story)
        if write:
            self._check(reader[index], program, "read", story)
            writer[index] = program
            return
        before = reader[index]
        reader[index] = torch.where((before == _NOBODY) | (before == program), program, _SEVERAL)

    def _of(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor.element_size()
        if key not in self._marks:
            self._marks[key] = torch.full((2, storage.nbytes() // tensor.element_size()), _NOBODY, dtype=torch.int64)
        writer, reader = self._marks[key]
        return writer, reader

    @staticmethod
    def _check(others: Tensor, program: int, what: str, story: str) -> None:
        conflict = (others != _NOBODY) & (others != program)
        if conflict.any():
            other = int(others[conflict][0])
            name = "several programs" if other == _SEVERAL else f"program {other}"
            raise Race(f"{story}, in program {program}, of an element that is {what} by {name} in the same launch")
