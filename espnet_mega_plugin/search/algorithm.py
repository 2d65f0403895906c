"""What the searches have in common.

On a GPU nothing may hang on numbers that only the device knows, or the host would wait for it at each of them. There
shapes are fixed (`LabelTree.fixed_shapes`), every EVERY rounds the host asks what was taken and makes room for as many
more, and in between a round does the same operations on the same tensors: it can be recorded (`recording.py`).

B utterances, H hypotheses, K tokens each of them may take, C candidates, R hypotheses that are there, J joint space,
V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espnet_mega_plugin.recording import RUNS, Recorded, Recorder, casting_anew
from espnet_mega_plugin.search.beam import Hypotheses, at_start, best
from espnet_mega_plugin.search.frames import Frames
from espnet_mega_plugin.search.hypotheses import Traces
from espnet_mega_plugin.search.joint import Joint
from espnet_mega_plugin.search.predictions import Predictions
from espnet_mega_plugin.search.tree import LabelTree

EVERY = 4  # rounds between two waits for a GPU; room for the most they can take has to be there


class Algorithm:
    """The hypotheses of a batch; a subclass has `_round` and `_most_a_round`, or an `advance` of its own."""

    def __init__(self, joint: Joint, predictions: Predictions, tree: LabelTree, frames: Frames, beam_size: int):
        self.joint, self.predictions, self.tree, self.frames = joint, predictions, tree, frames
        self.beam_size = beam_size
        self.traces = Traces(tree.utterances, tree.device, tree.fixed_shapes)
        self.hypotheses = at_start(tree.utterances, tree.device)
        self._utterance = torch.arange(tree.utterances, device=tree.device)[:, None]
        self.recorder: Recorder | None = None  # what records rounds of fixed shapes; None: they run as they are
        self._recorded: Recorded | None = None
        self._recorded_on: tuple | None = None
        self._rounds_ahead = 0  # that room was made for

    def start(self, begin: Tensor) -> None:
        """Some utterances begin. (B,) bool"""
        self.predictions.extend(self.tree.start(begin), self.tree)
        start = at_start(len(begin), begin.device)
        if self.tree.fixed_shapes:
            start = start.widened(self.beam_size)
        self._go_on_with(start.where(begin, self.hypotheses))

    @torch.no_grad()
    def advance(self) -> None:
        """Go through all frames there are."""
        # Whole EVERYs: no room is left over that was made for rounds to come, and may be given up between two calls
        every, rounds = EVERY if self.tree.fixed_shapes else 1, 0
        self._rounds_ahead = 0  # as it is; but an error may have ended the last call
        while rounds % every or bool(self.frames.left.any()):
            if self.tree.fixed_shapes:
                self._make_room(self._most_a_round)
            self._replayed_round() if self.recorder is not None else self._round()
            rounds += 1

    def _round(self) -> None:
        """One step of the search; with fixed shapes room has been made for `_most_a_round` labels an utterance."""
        raise NotImplementedError

    @property
    def _most_a_round(self) -> int:
        raise NotImplementedError

    def _replayed_round(self) -> None:
        """A round as it was recorded, while what it works on stays where it was."""
        if self._recorded_on == self._places():
            self._recorded.replay()
            return

        def run() -> None:
            with casting_anew():
                self._round()

        self._recorded = None  # gives its memory back before another one is recorded
        self._recorded = self.recorder(run)
        self._recorded_on = self._places()

    def _places(self) -> tuple:
        """Where all is that a round changes or that others may replace. What scorers keep moves when the tree grows."""
        tree, frames = self.tree, self.frames
        held = [*self.hypotheses, *self.traces.tensors, frames.projected, frames.count, frames.at, frames.first]
        held += [tree.parent, tree.label, tree.depth, tree.leaf, tree.owner, tree.lineage]
        held += [tree.node_count, tree.leaf_count, self.predictions.projected, self.predictions.bonus]
        return tuple((tensor.data_ptr(), tensor.shape) for tensor in held if tensor is not None)

    def _go_on_with(self, hypotheses: Hypotheses) -> None:
        """With fixed shapes they are written to where the last ones stand."""
        if not self.tree.fixed_shapes or hypotheses.score.shape != self.hypotheses.score.shape:
            self.hypotheses = hypotheses
            return
        for held, new in zip(self.hypotheses, hypotheses, strict=True):
            if held is not new:
                held.copy_(new)

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
        self._go_on_with(hypotheses._replace(entry=self.traces.compacted(hypotheses.entry, hypotheses.there)))

    def _make_room(self, most: int, again: int = 0) -> None:
        """For so many labels an utterance in a round; with fixed shapes for those of the next rounds, too. Renumbers
        the nodes of `self.hypotheses`.

        Args:
            again: as of `LabelTree.make_room`.
        """
        if self.tree.fixed_shapes:
            if self._rounds_ahead:
                self._rounds_ahead -= 1
                return
            self._rounds_ahead = EVERY - 1
            # a round that is recorded is run RUNS times, and each time goes on
            most *= EVERY if self.recorder is None else EVERY + RUNS - 1
            self.traces.reserve(most)
        live = self.hypotheses
        self._go_on_with(live._replace(node=self.tree.make_room(most, most, live.node, live.there, again)))

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
        if not tree.fixed_shapes:
            tree.reserve(C, C)
        node, rows = tree.add(takes, chosen.node, label, known)
        if len(rows.node):
            self.predictions.extend(rows, tree)
        entry = self.traces.add(chosen.entry, label, frame, logp)
        return chosen._replace(node=node.where(takes, chosen.node), entry=entry.where(takes, chosen.entry))
