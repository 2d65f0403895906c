"""What the searches have in common.

B utterances, H hypotheses, K tokens each of them may take, C candidates, R hypotheses that are there, J joint space,
V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espnet_mega_plugin.search.beam import Hypotheses, at_start, best
from espnet_mega_plugin.search.frames import Frames
from espnet_mega_plugin.search.hypotheses import Traces
from espnet_mega_plugin.search.joint import Joint
from espnet_mega_plugin.search.predictions import Predictions
from espnet_mega_plugin.search.tree import LabelTree


class Algorithm:
    """The hypotheses of a batch; a subclass has `advance`, which goes on as far as the frames reach."""

    def __init__(self, joint: Joint, predictions: Predictions, tree: LabelTree, frames: Frames, beam_size: int):
        self.joint, self.predictions, self.tree, self.frames = joint, predictions, tree, frames
        self.beam_size = beam_size
        self.traces = Traces(tree.utterances, tree.device)
        self.hypotheses = at_start(tree.utterances, tree.device)
        self._utterance = torch.arange(tree.utterances, device=tree.device)[:, None]

    def start(self, begin: Tensor) -> None:
        """Some utterances begin. (B,) bool"""
        self.predictions.extend(self.tree.start(begin), self.tree)
        self.hypotheses = at_start(len(begin), begin.device).where(begin, self.hypotheses)

    def widen(self, utterances: int) -> None:
        """More utterances side by side; `start` them before use."""
        old = self.hypotheses
        self.tree.widen(utterances)
        self.traces.widen(utterances)
        self.frames.widen(utterances)
        self._utterance = torch.arange(utterances, device=self.tree.device)[:, None]
        more = utterances - old.score.shape[0]
        self.hypotheses = Hypotheses(*(torch.nn.functional.pad(t, (0, 0, 0, more)) for t in old))

    def short_of_places(self) -> int | None:
        """None: nothing was left out for want of places in tensors of fixed shapes."""
        return None

    def forget_traces(self) -> None:
        """Drop the record of what leads to no hypothesis any more."""
        hypotheses = self.hypotheses
        self.hypotheses = hypotheses._replace(entry=self.traces.compacted(hypotheses.entry, hypotheses.there))

    def _make_room(self, most: int) -> None:
        """For so many labels an utterance. Renumbers the nodes of `self.hypotheses`."""
        live = self.hypotheses
        # Each frame asks for much of what the one before it asked for
        node = self.tree.make_room(most, most, live.node, live.there, again=2 * most)
        self.hypotheses = live._replace(node=node)

    def _projected(self, node: Tensor) -> Tensor:
        """The prediction network's part of the joint network. (B, H) -> (B, H, J)"""
        return self.predictions.projected[self._utterance, self.tree.leaf.gather(1, node).clamp(min=0)]

    def _log_probs(self, hypotheses: Hypotheses, frame: Tensor) -> Tensor:
        """Of the hypotheses that are there, in order, or of all where shapes are fixed.

        Args:
            frame: projected, of each hypothesis or of all of an utterance. (B, H or 1, J)

        Returns:
            (R or B * H, V)
        """
        pairs = frame + self._projected(hypotheses.node)
        return self.joint(pairs.flatten(0, 1) if self.tree.fixed_shapes else pairs[hypotheses.there])

    def _blank(self, hypotheses: Hypotheses, log_probs: Tensor) -> Tensor:
        """Blank's log-probability, 0 where no hypothesis is. (B, H)"""
        return self._unpacked(log_probs[:, 0].double(), hypotheses.there)

    def _labels(self, hypotheses: Hypotheses, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The most probable labels of each hypothesis.

        Returns:
            label, its log-probability, what fusion adds to that. (B, H, K)
        """
        logp, label = log_probs[:, 1:].topk(self.beam_size, -1)
        logp, label = self._unpacked(logp.double(), hypotheses.there), self._unpacked(label + 1, hypotheses.there)
        bonus = torch.zeros_like(logp)
        if self.predictions.bonus is not None:
            leaf = self.tree.leaf.gather(1, hypotheses.node).clamp(min=0)
            bonus = self.predictions.bonus[self._utterance[..., None], leaf[..., None], label].double()
        return label, logp, bonus

    def _unpacked(self, rows: Tensor, there: Tensor) -> Tensor:
        """What there is of each row, in the rows' places; 0 elsewhere. (R, ...) -> (B, H, ...)"""
        shape = *there.shape, *rows.shape[1:]
        if not self.tree.fixed_shapes and rows.shape[0] == there.numel():
            return rows.view(shape)
        there = there.view(*there.shape, *(1 for _ in rows.shape[1:]))
        if self.tree.fixed_shapes:
            return torch.where(there, rows.view(shape), 0)
        return rows.new_zeros(shape).masked_scatter_(there, rows)

    def _chosen(self, hypotheses: Hypotheses, score: Tensor, there: Tensor) -> tuple[Hypotheses, Tensor]:
        """The best of what the hypotheses may do next.

        Args:
            score: after each step that one may take. (B, H, K)
            there: bool, likewise.

        Returns:
            chosen: with their new scores; `node` and `entry` are still those before. (B, C)
            index: of the step among the H * K. (B, C)
        """
        B, _, K = score.shape
        # The node's place holds the step's number while the best are picked
        number = torch.arange(score[0].numel(), device=score.device).expand(B, -1)
        steps = best(Hypotheses(score.flatten(1), number, number, there.flatten(1)), self.beam_size)
        chosen = hypotheses.picked(steps.node // K, steps.there)
        return chosen._replace(score=steps.score), steps.node

    def _take_on(self, chosen: Hypotheses, label: Tensor, frame: Tensor, logp: Tensor) -> Hypotheses:
        """The hypotheses with their new labels, blank being none; prefixes that are new are scored.

        Args:
            label, frame, logp: the label, the number of the frame, the log-probability without fusion. (B, C)
        """
        tree, C = self.tree, label.shape[1]
        takes = chosen.there & (label != 0)
        known = torch.where(takes, tree.find(chosen.node, label), -1)
        tree.reserve(C, C)
        node, rows = tree.add(takes, chosen.node, label, known)
        if len(rows.node):
            self.predictions.extend(rows, tree)
        entry = self.traces.add(chosen.entry, label, frame, logp)
        return chosen._replace(node=node.where(takes, chosen.node), entry=entry.where(takes, chosen.entry))
