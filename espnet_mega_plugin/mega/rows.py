"""Rows of tensors that are lent one at a time and come back by themselves.

A table holds several tensors whose second dimension counts the rows; it grows by doubling. Whoever holds a `Row` owns
that place in all of them; when the last reference to it goes, the place is free for the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Row:
    """One lent place of a table."""

    __slots__ = ("index", "table")

    def __init__(self, table: Table, index: int):
        self.table, self.index = table, index

    def __del__(self):
        self.table.free.append(self.index)  # one append: safe from any thread, at any time


class Table:
    FIRST = 64  # rows a table starts with
    KEPT = 2048  # rows an empty table keeps for the next utterance: twice what a decoder remembers

    def __init__(self, *shapes: tuple[int, tuple[int, ...], torch.dtype], device: torch.device):
        """
        Args:
            shapes: of each tensor: what stands before and after the rows, and the dtype.
        """
        self.shapes, self.device = shapes, device
        self.tensors: list[Tensor] = []
        self.size = 0
        self.free: list[int] = []

    @property
    def lent(self) -> int:
        return self.size - len(self.free)

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def lend(self, count: int) -> list[Row]:
        while len(self.free) < count:
            self._grow()
        return [Row(self, self.free.pop()) for _ in range(count)]

    def shrink(self) -> None:
        """Give the memory back where no row is lent and a long utterance made it large."""
        if self.lent == 0 and self.size > self.KEPT:
            self.tensors, self.size, self.free = [], 0, []

    @torch.no_grad()
    def _grow(self) -> None:
        size = max(self.FIRST, 2 * self.size)
        # Normal tensors, also when asked for in inference mode: a later call outside of it writes into them. Zeros: a
        # row that is hidden from a softmax still meets a weight of 0, and 0 * NaN is NaN.
        with torch.inference_mode(False):
            grown = [
                torch.zeros(before, size, *after, dtype=dtype, device=self.device)
                for before, after, dtype in self.shapes
            ]
        for old, new in zip(self.tensors, grown, strict=False):
            new[:, : self.size] = old
        # in this order: a reader in another thread meets tensors that hold all rows it knows
        self.tensors = grown
        # the smallest index last, to be lent first
        self.free[:0] = range(size - 1, self.size - 1, -1)
        self.size = size
