"""The encoder's frames a search has in hand, and where in them each utterance is.

B utterances, F frames there is room for, J joint space.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Frames:
    def __init__(self, utterances: int, device: torch.device):
        self.device = device
        self.projected: Tensor | None = None  # (B, F, J)
        zeros = torch.zeros(utterances, dtype=torch.long, device=device)
        self.count, self.at, self.first = zeros, zeros.clone(), zeros.clone()  # held; the next one; number of place 0
        self._place = torch.arange(utterances, device=device)[:, None]

    @property
    def left(self) -> Tensor:
        """Whether an utterance has frames to go. (B,) bool"""
        return self.at < self.count

    def set(self, projected: Tensor, count: Tensor) -> None:
        """All frames of all utterances. (B, F, J), (B,)"""
        self.projected, self.count = projected, count
        self.at, self.first = torch.zeros_like(count), torch.zeros_like(count)

    def append(self, projected: Tensor, count: Tensor) -> None:
        """More frames of each utterance; those done with make room. (B, n, J), (B,)"""
        rest = self.count - self.at
        room, n = int((rest + count).max()), projected.shape[1]
        held = projected.new_zeros(len(rest), max(1, room), projected.shape[2])
        if self.projected is not None and self.projected.shape[1]:
            place = torch.arange(held.shape[1], device=self.device)
            old = (self.at[:, None] + place).clamp(max=self.projected.shape[1] - 1)
            held = torch.where((place < rest[:, None])[..., None], self.projected[self._place, old], held)
        new = torch.arange(n, device=self.device).expand(len(rest), n)
        taken = new < count[:, None]
        b, i = taken.nonzero(as_tuple=True)
        held[b, rest[b] + i] = projected[b, i]
        self.projected, self.count, self.first, self.at = held, rest + count, self.first + self.at, rest * 0

    def restart(self, begin: Tensor) -> None:
        """Utterances that begin anew, without frames. (B,) bool"""
        for number in (self.count, self.at, self.first):
            number.masked_fill_(begin, 0)

    def widen(self, utterances: int) -> None:
        more = utterances - len(self.count)
        pad = torch.nn.functional.pad
        self.count, self.at, self.first = (pad(number, (0, more)) for number in (self.count, self.at, self.first))
        if self.projected is not None:
            self.projected = pad(self.projected, (0, 0, 0, 0, 0, more))
        self._place = torch.arange(utterances, device=self.device)[:, None]

    def ahead(self, window: int) -> tuple[Tensor, Tensor]:
        """The next frames of each utterance, and which of them are there. (B, W, J), (B, W) bool"""
        place = self.at[:, None] + torch.arange(window, device=self.device)
        there = place < self.count[:, None]
        return self.projected[self._place, place.clamp(max=self.projected.shape[1] - 1)], there

    def now(self) -> Tensor:
        """The next frame's number in its utterance. (B,)"""
        return self.first + self.at
