"""Where a pool keeps what it knows of each utterance's prefixes, by utterance and place (a node or a leaf).

`Dense` has as many places for each utterance: shapes that are known without asking the device. `Pieces` and `Slots`
take only what is in use, because utterances of a batch differ much in how many prefixes they need: `Pieces` hold a
tensor an utterance, whose places stand one after the other as attention wants them; `Slots` share one table, whose
rows have no order.

B utterances, N places an utterance, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 16  # places by which pieces and slots grow


class Dense:
    def __init__(self, blocks: int, row: tuple[int, ...], like: Tensor):
        """
        Args:
            row: shape of what a place holds.
            like: device and dtype.
        """
        self.tensor = like.new_zeros(blocks, 0, 0, *row)  # (blocks, B, N, ...)

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def reserve(self, utterances: int, places: int) -> None:
        blocks, B, N, *row = self.tensor.shape
        if utterances > B or places > N:
            larger = self.tensor.new_zeros(blocks, max(B, utterances), max(N, places), *row)
            larger[:, :B, :N] = self.tensor
            self.tensor = larger

    def index(self, utterance: Tensor, place: Tensor, valid: Tensor | None) -> Tensor:
        """Where rows are with the utterances one after the other. (R,)"""
        places = self.tensor.shape[2]
        if valid is not None:
            place = torch.where(valid, place, places - 1)  # the last place is nobody's where there is `valid`
        return torch.add(place, utterance, alpha=places)

    def get(self, utterance: Tensor, place: Tensor) -> Tensor:
        """(R,), (R,) -> (blocks, R, ...)"""
        return self.tensor.flatten(1, 2).index_select(1, self.index(utterance, place, None))

    def put(self, utterance: Tensor, place: Tensor, value: Tensor, valid: Tensor | None) -> None:
        """(R,), (R,), (blocks, R, ...), (R,) bool"""
        blocks, B, N, *row = self.tensor.shape
        # through a view, or nothing would be kept
        whole = self.tensor.view(blocks, B * N, *row)
        whole.index_copy_(1, self.index(utterance, place, valid), value.to(whole.dtype))

    def put_in_block(self, b: int, index: Tensor, value: Tensor) -> None:
        """The same in one block. (R,) of `index`, (R, ...)"""
        B, N, *row = self.tensor.shape[1:]
        self.tensor[b].view(B * N, *row).index_copy_(0, index, value.to(self.tensor.dtype))

    def move(self, kept: Tensor) -> None:
        B, n = kept.shape
        # what all hypotheses have in common stays where it is, and that is most of it
        still = int(_still(kept).min()) if B else n
        if still == n:
            return
        utterance = torch.arange(B, device=kept.device)[:, None]
        for block in self.tensor:
            block[:B, still:n] = block[utterance, kept[:, still:]]


class Pieces:
    def __init__(self, blocks: int, row: tuple[int, ...], like: Tensor):
        self._empty, self.dtype = like.new_zeros(blocks, 0, *row), like.dtype
        self.of: list[Tensor] = []  # of each utterance. (blocks, N, ...)

    @property
    def bytes(self) -> int:
        return sum(piece.numel() * piece.element_size() for piece in self.of)

    def reserve(self, utterances: int, places: int) -> None:
        """Places are made when they are needed (`fit`)."""
        self.of += [self._empty] * (utterances - len(self.of))

    def clear(self, utterance: int) -> None:
        self.of[utterance] = self._empty

    def fit(self, utterance: int, places: int) -> None:
        """Room for so many."""
        piece = self.of[utterance]
        blocks, N, *row = piece.shape
        if places > N:
            # zeros: what is hidden from a softmax still meets a weight of 0, and 0 * NaN is NaN
            larger = piece.new_zeros(blocks, -(-places // STEP) * STEP, *row)
            larger[:, :N] = piece
            self.of[utterance] = larger

    def move(self, kept: Tensor) -> None:
        held = 1 + (kept > 0).sum(1)  # what is behind these is 0
        for utterance, (n, still) in enumerate(zip(held.tolist(), _still(kept).tolist(), strict=True)):
            piece = self.of[utterance]
            if still < n:
                piece[:, still:n] = piece[:, kept[utterance, still:n]]
            if piece.shape[1] > n + n // 8 + 2 * STEP:
                self.of[utterance] = piece[:, : n + STEP].clone()


class Slots:
    def __init__(self, blocks: int, row: tuple[int, ...], like: Tensor):
        self.tensor = like.new_zeros(blocks, 0, *row)  # (blocks, slots, ...)
        self._slot = torch.zeros(0, 0, dtype=torch.long)  # of each place, -1: none. (B, N)
        self._free: list[int] = []

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def reserve(self, utterances: int, places: int) -> None:
        B, N = self._slot.shape
        more = max(0, places - N), max(0, utterances - B)
        self._slot = torch.nn.functional.pad(self._slot, (0, more[0], 0, more[1]), value=-1)

    def get(self, utterance: Tensor, place: Tensor) -> Tensor:
        """What places hold; anything where they hold nothing. (blocks, R, ...)"""
        slot = self._slot[utterance, place].clamp(min=0)
        return self.tensor.index_select(1, slot) if self.tensor.shape[1] else self._nothing(len(slot))

    def put(self, utterance: Tensor, place: Tensor, value: Tensor, valid: None) -> None:
        """(R,), (R,), (blocks, R, ...); all rows count"""
        slot = torch.tensor(self._lent(len(place)), dtype=torch.long)
        self._slot[utterance, place] = slot
        self.tensor.index_copy_(1, slot, value.to(self.tensor.dtype))

    def clear(self, utterance: int) -> None:
        self._slot[utterance] = -1

    def move(self, kept: Tensor) -> None:
        B, n = kept.shape
        moved = self._slot[:B].gather(1, kept)
        self._slot[:B] = -1
        self._slot[:B, :1] = moved[:, :1]
        self._slot[:B, 1:n] = moved[:, 1:].masked_fill(kept[:, 1:] == 0, -1)  # those hold nothing
        in_use = self._slot >= 0
        used = int(in_use.sum())
        if self.tensor.shape[1] > 2 * used + 4 * STEP:
            self.tensor, self._free = self.tensor[:, self._slot[in_use]], []
            self._slot[in_use] = torch.arange(used)

    def _lent(self, count: int) -> list[int]:
        if len(self._free) < count:
            unused = torch.ones(self.tensor.shape[1], dtype=torch.bool)
            unused[self._slot[self._slot >= 0]] = False
            self._free = unused.nonzero().flatten().tolist()
        if len(self._free) < count:
            slots = self.tensor.shape[1]
            more = -(-max(count - len(self._free), slots // 8) // STEP) * STEP
            self.tensor = torch.cat([self.tensor, self._nothing(more)], 1)
            self._free += range(slots, slots + more)
        lent, self._free = self._free[:count], self._free[count:]
        return lent

    def _nothing(self, count: int) -> Tensor:
        blocks, _, *row = self.tensor.shape
        return self.tensor.new_zeros(blocks, count, *row)


def _still(kept: Tensor) -> Tensor:
    """How many places at the front of each utterance keep what they hold, or hold nothing. (B, n) -> (B,)"""
    return ((kept == torch.arange(kept.shape[1], device=kept.device)) | (kept == 0)).cumprod(1).sum(1)
