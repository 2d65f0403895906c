"""The hypotheses of a batch of utterances side by side. B utterances, H places, C candidates."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Hypotheses(NamedTuple):
    """Some hypotheses of each utterance. All (B, H)."""

    score: Tensor  # log-probability, float64
    node: Tensor  # label prefix (`tree.py`)
    entry: Tensor  # last entry of the record (`hypotheses.Traces`), -1 before the first label
    there: Tensor  # bool; what stands in the other places means nothing

    def picked(self, index: Tensor, there: Tensor) -> Hypotheses:
        """Those at an index. (B, H')"""
        return Hypotheses(*(t.gather(1, index) for t in self[:3]), there)

    def where(self, mine: Tensor, other: Hypotheses) -> Hypotheses:
        """These for some utterances, the other's for the rest; both are filled up to the same number. (B,) bool"""
        width = max(self.score.shape[1], other.score.shape[1])
        pairs = zip(self.widened(width), other.widened(width), strict=True)
        return Hypotheses(*(torch.where(mine[:, None], a, b) for a, b in pairs))

    def widened(self, width: int) -> Hypotheses:
        more = width - self.score.shape[1]
        if more == 0:
            return self
        return Hypotheses(*(torch.nn.functional.pad(t, (0, more)) for t in self))


def at_start(utterances: int, device: torch.device) -> Hypotheses:
    """One hypothesis an utterance: no label yet."""
    shape = utterances, 1
    return Hypotheses(
        torch.zeros(shape, dtype=torch.float64, device=device),
        torch.zeros(shape, dtype=torch.long, device=device),
        torch.full(shape, -1, device=device),
        torch.ones(shape, dtype=torch.bool, device=device),
    )


def joined(parts: list[Hypotheses]) -> Hypotheses:
    return parts[0] if len(parts) == 1 else Hypotheses(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))


def merged(hypotheses: Hypotheses, look: bool = True) -> Hypotheses:
    """Equal label sequences become one with the sum of their probabilities; it keeps the likeliest one's record.

    It stands where the first of them stood; the others' places become empty.

    Args:
        look: whether to see first if any are equal; that waits for a GPU.
    """
    score, node, entry, there = hypotheses
    same = (node[:, :, None] == node[:, None]) & there[:, None] & there[:, :, None]  # (B, C, C)
    if look and not (same.sum(-1) > 1).any():
        return hypotheses
    alone = score.masked_fill(~there, -math.inf)
    scores = torch.where(same, alone[:, None], -math.inf)
    # probability 0 is more than what is not the same
    likeliest = torch.where(same, scores.clamp(min=torch.finfo(scores.dtype).min), scores).argmax(-1)
    earlier = same.tril(-1).any(-1)
    return Hypotheses(scores.logsumexp(-1), node, entry.gather(1, likeliest), there & ~earlier)


def best(hypotheses: Hypotheses, count: int) -> Hypotheses:
    """The most probable ones, in order."""
    count = min(count, hypotheses.score.shape[1])
    # an empty place comes after a hypothesis of probability 0
    key = torch.where(hypotheses.there, hypotheses.score.clamp(min=torch.finfo(torch.float64).min), -math.inf)
    _, index = torch.sort(key, dim=1, descending=True, stable=True)
    index = index[:, :count]
    return hypotheses.picked(index, hypotheses.there.gather(1, index))


def packed(there: Tensor, most: int | None = None, key: Tensor | None = None) -> Tensor | None:
    """Where the candidates of each utterance are, so that no more columns are carried than needed.

    Args:
        there: (B, C) bool
        most: so many columns whatever there is (fixed shapes), those with the largest key; None: as many as needed.

    Returns:
        index: (B, C'); None where all columns are needed.
    """
    C = there.shape[1]
    if most is None:
        need = int(there.sum(1).max()) if there.numel() else 0
        return None if need == C else torch.argsort(~there, dim=1, stable=True)[:, :need]
    if most >= C:
        return None
    return torch.sort(key.masked_fill(~there, -math.inf), dim=1, descending=True, stable=True)[1][:, :most]
