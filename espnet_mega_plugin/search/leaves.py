"""What a scorer keeps at places of each utterance, nodes or leaves: numbers in one tensor, or Python objects in lists.

B utterances, N places of each, R new prefixes, n places that were kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from espnet_mega_plugin.search.scorer import Rows
from espnet_mega_plugin.search.tree import put


class PlaceTensor:
    """A tensor of one shape at each place, in the dtype and on the device of what is put first. (B, N, *shape)"""

    def __init__(self, *shape: int):
        self._shape, self._room, self.table = shape, (0, 0), None

    def reserve(self, utterances: int, places: int) -> None:
        self._room = utterances, places
        if self.table is not None:
            self.table = larger(self.table, *self._room)

    def put(self, rows: Rows, place: Tensor, value: Tensor) -> None:
        """Where rows count, `place` of their utterances holds this from now on. (R,), (R, *shape)"""
        if self.table is None:
            self.table = larger(value.new_zeros(0, 0, *self._shape), *self._room)
        put(self.table, rows.utterance, place, value, rows.valid)

    def of_parents(self, rows: Rows, like: Tensor) -> Tensor:
        """What is at the leaves of the parents, in the dtype of `like`; zeros before the first label. (R, *shape)"""
        if self.table is None:  # nothing but starts
            return like.new_zeros(len(rows.leaf), *self._shape)
        held = self.table[rows.utterance, rows.parent_leaf.clamp(min=0)]
        start = (rows.parent < 0).view(-1, *(1 for _ in self._shape))
        return held.masked_fill(start, 0).to(like.dtype)

    def move(self, kept: Tensor) -> None:
        """Place i of utterance b now holds what was at kept[b, i]. (B, n)"""
        if self.table is not None:
            B, n = kept.shape
            utterance = torch.arange(B, device=kept.device)[:, None]
            self.table[:B, :n] = self.table[utterance, kept]


class NewPrefix(NamedTuple):
    row: int  # among the rows asked for
    utterance: int
    leaf: int
    before: Any  # what its parent holds; None at the start
    label: int


class LeafObjects:
    """Any object at each leaf, for scorers that work on one prefix after the other.

    Reads the rows from the device: on a GPU every call waits for it.
    """

    def __init__(self):
        self._held: list[list[Any]] = []  # of each utterance and leaf

    def reserve(self, utterances: int, leaves: int) -> None:
        self._held += [[] for _ in range(utterances - len(self._held))]
        for held in self._held:
            held += [None] * (leaves - len(held))

    def of_parents(self, rows: Rows) -> list[NewPrefix]:
        """The rows that count, each with what its parent holds. At a start, what its utterance held is let go."""
        columns = (rows.utterance, rows.leaf, rows.parent, rows.parent_leaf, rows.label)
        table = torch.stack(columns, 1).tolist()
        counts = [True] * len(table) if rows.valid is None else rows.valid.tolist()
        new = []
        for row, (utterance, leaf, parent, parent_leaf, label) in enumerate(table):
            if counts[row]:
                held = self._held[utterance]
                if parent < 0:
                    held[:] = [None] * len(held)
                new.append(NewPrefix(row, utterance, leaf, None if parent < 0 else held[parent_leaf], label))
        return new

    def put(self, prefix: NewPrefix, value: Any) -> None:
        self._held[prefix.utterance][prefix.leaf] = value

    def move(self, kept: Tensor) -> None:
        """Leaf i of utterance b now holds what was at kept[b, i]. (B, n)"""
        for held, places in zip(self._held, kept.tolist(), strict=False):
            held[:] = [held[place] for place in places] + [None] * (len(held) - len(places))


def larger(table: Tensor, utterances: int, places: int) -> Tensor:
    """The same with room for so many, zeros where nothing was; the table itself where there is room. (B, N, ...)"""
    B, N, *row = table.shape
    if B >= utterances and N >= places:
        return table
    out = table.new_zeros(max(B, utterances), max(N, places), *row)
    out[:B, :N] = table
    return out


def own(state: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies of a state's tensors, or one prefix would keep alive those of all that were scored together with it.

    Args:
        state: tensors in lists, tuples and dicts; anything else stays what it is.
        dtype: of the floating-point ones; None: as they are.
    """
    if isinstance(state, Tensor):
        return state.to(dtype if dtype is not None and state.is_floating_point() else state.dtype, copy=True)
    if type(state) in (list, tuple):
        return type(state)(own(part, dtype) for part in state)
    if type(state) is dict:
        return {name: own(part, dtype) for name, part in state.items()}
    return state


def labels_of(rows: Rows) -> Tensor:
    """Their labels, 0 for rows that do not count. (R,)"""
    return rows.label if rows.valid is None else rows.label.masked_fill(~rows.valid, 0)
