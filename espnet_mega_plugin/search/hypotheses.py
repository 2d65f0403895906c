"""What a search hands out, and the record of how each hypothesis came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass
class Hypothesis:
    """One entry of an n-best list; `score` and `yseq` are those of ESPnet's `Hypothesis`.

    Times and label scores belong to one of the alignments that were summed into `score`: wherever hypotheses became
    one, that of the more probable.
    """

    score: float  # log-probability of the labels, fusion included
    yseq: list[int]  # the labels, behind the start label 0
    frames: list[int] = field(default_factory=list)  # encoder frame at which each label was taken, from 0
    logps: list[float] = field(default_factory=list)  # log-probability of each label where it was taken, without fusion


class Traces:
    """How hypotheses took their labels: an entry a label, pointing at the one before it. B utterances, C at once.

    Args:
        fixed_shapes: how many entries there are only the device knows, and room is made by `reserve` alone.
    """

    def __init__(self, utterances: int, device: torch.device, fixed_shapes: bool = False):
        self.device, self.utterances, self.room = device, utterances, 0
        self._end = torch.zeros((), dtype=torch.long, device=device) if fixed_shapes else 0
        self.before = self.label = self.frame = torch.zeros(utterances, 0, dtype=torch.long, device=device)
        self.logp = torch.zeros(utterances, 0, dtype=torch.float64, device=device)

    def add(self, before: Tensor, label: Tensor, frame: Tensor, logp: Tensor) -> Tensor:
        """Enter one label each; any may go unused. -1 stands before the first. All (B, C); -> entry (B, C)"""
        C = label.shape[1]
        if isinstance(self._end, Tensor):
            entry = here = torch.arange(C, device=self.device) + self._end
        else:
            self.reserve(C)
            entry = torch.arange(self._end, self._end + C, device=self.device)
            here = slice(self._end, self._end + C)
        self.before[:, here], self.label[:, here], self.frame[:, here] = before, label, frame
        self.logp[:, here] = logp
        self._end += C
        return entry.expand(self.utterances, C)

    @property
    def used(self) -> int:
        """Entries so far. With fixed shapes this waits for a GPU."""
        return int(self._end)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        columns = self.before, self.label, self.frame, self.logp
        return (*columns, self._end) if isinstance(self._end, Tensor) else columns

    def reserve(self, more: int) -> None:
        """Make room for so many more. May wait, as `used`."""
        used = self.used
        if used + more > self.room:
            self._grow(max(256, 2 * self.room, used + more))

    def _grow(self, room: int) -> None:
        more = (0, room - self.room)
        self.before, self.label, self.frame, self.logp = (
            torch.nn.functional.pad(t, more) for t in (self.before, self.label, self.frame, self.logp)
        )
        self.room = room

    def widen(self, utterances: int) -> None:
        more = (0, 0, 0, utterances - self.utterances)
        self.before, self.label, self.frame, self.logp = (
            torch.nn.functional.pad(t, more) for t in (self.before, self.label, self.frame, self.logp)
        )
        self.utterances = utterances

    def compacted(self, entry: Tensor, wanted: Tensor) -> Tensor:
        """Drop what is on the way to none of these entries. (B, H), (B, H) bool

        Returns:
            entry: their new numbers; -1 where none is wanted. (B, H)
        """
        had = self.used
        kept = torch.zeros(self.utterances, had + 1, dtype=torch.bool, device=self.device)
        step = torch.where(wanted, entry, -1)
        while bool((step >= 0).any()):
            kept.scatter_(1, torch.where(step >= 0, step, had), True)
            before = self.before.gather(1, step.clamp(min=0)) if had else step
            step = torch.where(step >= 0, before, -1)
        kept = kept[:, :-1]
        new = (kept.cumsum(1) - 1).clamp(min=0)
        used = int(kept.sum(1).max()) if had else 0
        old = torch.argsort(~kept, dim=1, stable=True)[:, :used]
        before = self.before.gather(1, old)
        before = torch.where(before >= 0, new.gather(1, before.clamp(min=0)), -1)
        self.before, self.label, self.frame, self.logp = (
            before,
            *(tensor.gather(1, old) for tensor in (self.label, self.frame, self.logp)),
        )
        self.room = used
        self._end += used - had
        return torch.where(wanted & (entry >= 0), new.gather(1, entry.clamp(min=0)) if new.shape[1] else entry, -1)

    def read(self, found: Mapping[int, Sequence[tuple[float, int]]]) -> list[list[Hypothesis]]:
        """The hypotheses of some utterances.

        Args:
            found: of each utterance scores, and the entries that the hypotheses with these scores end with.
        """
        columns = self.before, self.label, self.frame, self.logp
        used, index = self.used, torch.tensor(list(found), dtype=torch.long).to(self.device)
        columns = [column[index, :used].cpu().numpy() for column in columns]
        return [
            [_led_to(entry, score, *columns) for score, entry in ends]
            for ends, *columns in zip(found.values(), *columns, strict=True)
        ]


def _led_to(entry: int, score: float, before: ndarray, label: ndarray, frame: ndarray, logp: ndarray) -> Hypothesis:
    path = []
    while entry >= 0:
        path.append(entry)
        entry = int(before[entry])
    path.reverse()
    return Hypothesis(score, [0, *label[path].tolist()], frame[path].tolist(), logp[path].tolist())
