"""Which program of a launch touched which element: programs run in any order, so what one writes no other may read or write.

Interpreted programs run one after the other, which would hide that. Atomic operations are among themselves in any order, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.triton.gluon.races import Race

__all__ = ["DeviceMemory"]

_NOBODY, _SEVERAL = -1, -2


class DeviceMemory:
    """The accesses of one launch, by element of each storage."""

    def __init__(self) -> None:
        self._marks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def access(self, tensor: Tensor, where: Any, write: bool, program: int, story: str) -> None:
        """An access of `program` to elements of a tensor.

        Args:
            where: their indices in the tensor's storage, or ((shape, strides, offset), slices) of a view of it.
        """
        writer, reader = self._of(tensor)
        if not isinstance(where, Tensor):
            view, where = where
            writer, reader = writer.as_strided(*view), reader.as_strided(*view)
        self._check(writer[where], program, "written", story)
        if write:
            self._check(reader[where], program, "read", story)
            writer[where] = program
            return
        before = reader[where]
        if before.numel():
            several = (before != _NOBODY) & (before != program)
            reader[where] = torch.where(several, _SEVERAL, program).to(reader.dtype) if several.any() else program

    def _of(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor.element_size()
        if key not in self._marks:
            size = storage.nbytes() // tensor.element_size()
            nobody = torch.full((size,), _NOBODY, dtype=torch.int16)
            self._marks[key] = nobody, nobody.clone()
        return self._marks[key]

    @staticmethod
    def _check(others: Tensor, program: int, what: str, story: str) -> None:
        if not others.numel():
            return
        low, high = (int(o) for o in others.aminmax())
        if low == high and low in (_NOBODY, program):
            return
        conflict = (others != _NOBODY) & (others != program)
        if conflict.any():
            other = int(others[conflict][0])
            name = "several programs" if other == _SEVERAL else f"program {other}"
            raise Race(f"{story}, in program {program}, of an element that is {what} by {name} in the same launch")
