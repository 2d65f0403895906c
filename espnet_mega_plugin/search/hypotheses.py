"""What a search hands out, and the record of how each hypothesis came about."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Hypothesis:
    """One entry of an n-best list; `score` and `yseq` are those of ESPnet's `Hypothesis`.

    Times and label scores belong to the most probable of the alignments that were summed into `score`.
    """

    score: float  # log-probability of the labels, fusion included
    yseq: list[int]  # the labels, behind the start label 0
    frames: list[int] = field(default_factory=list)  # encoder frame at which each label was taken, from 0
    logps: list[float] = field(default_factory=list)  # log-probability of each label where it was taken, without fusion


class Traces:
    """How hypotheses took their labels: an entry a label, pointing at the one before it. B utterances, C at once."""

    def __init__(self, utterances: int, device: torch.device):
        self.device, self.utterances, self.room, self.used = device, utterances, 0, 0
        self.before = self.label = self.frame = torch.zeros(utterances, 0, dtype=torch.long, device=device)
        self.logp = torch.zeros(utterances, 0, dtype=torch.float64, device=device)

    def add(self, before: Tensor, label: Tensor, frame: Tensor, logp: Tensor) -> Tensor:
        """Enter one label each; any may go unused. -1 stands before the first. All (B, C); -> entry (B, C)"""
        C = label.shape[1]
        if self.used + C > self.room:
            self._grow(max(256, 2 * self.room, self.used + C))
        here = slice(self.used, self.used + C)
        self.before[:, here], self.label[:, here], self.frame[:, here] = before, label, frame
        self.logp[:, here] = logp
        entry = torch.arange(self.used, self.used + C, device=self.device).expand(self.utterances, C)
        self.used += C
        return entry

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

    def read(self, utterance: int, scores: list[float], entries: list[int]) -> list[Hypothesis]:
        """The hypotheses of one utterance that end with these entries."""
        before, label, frame = (t[utterance, : self.used].tolist() for t in (self.before, self.label, self.frame))
        logp = self.logp[utterance, : self.used].tolist()
        hypotheses = []
        for score, entry in zip(scores, entries, strict=True):
            path = []
            while entry >= 0:
                path.append(entry)
                entry = before[entry]
            path.reverse()
            hypotheses.append(
                Hypothesis(score, [0, *(label[e] for e in path)], [frame[e] for e in path], [logp[e] for e in path])
            )
        return hypotheses
