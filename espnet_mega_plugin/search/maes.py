"""Modified adaptive expansion search (mAES), exact, for a batch of utterances that each go at their own pace.

The algorithm (Kim et al. 2020, "Accelerating RNN transducer inference via adaptive expansion search", and ESPnet's
`modified_adaptive_expansion_search`): at each frame, up to `nstep` times, a hypothesis may end the frame with blank or
take a label, whichever of its `beam_size + expansion_beta` most probable tokens lie within `expansion_gamma` of the
best; after the last time blank is forced. Equal label sequences are summed, and the `beam_size` best go on.

Three things make it fast and change nothing but rounding:

1. *Window.* A frame at which no label matters only adds blank's log-probability. The next W frames are looked at
   together, and all such frames up to the first other one are done at once. No label matters where blank is the most
   probable token of every hypothesis and no label is within gamma of it, or where the bound below rules them all out.
2. *Each prefix once.* Prefixes are nodes of a tree; one that is there is not scored again.
3. *Bound.* Of the sequences that have ended the frame, let the beam-th best have log-probability s, and m = s -
   log(nstep + 1). A label below m cannot lead to anything that enters the beam: all paths through it end below m,
   there are at most nstep + 1 of them for one sequence, and s only rises. Where no other candidate is a prefix of what
   it leads to, nor the other way round, its paths are all there are, and s itself is the bound. It may only not be
   dropped if it could add to a sequence that does enter: one that it is a prefix of, or that is a prefix of it. Where
   many more labels than `beam_size` are left, the most probable ones are scored first: those that can end the frame
   raise s for the others.

B utterances, H hypotheses, C candidates, K tokens a hypothesis may take, W frames, V tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from espnet_mega_plugin.search.algorithm import Algorithm
from espnet_mega_plugin.search.beam import Hypotheses, best, joined, merged, packed
from espnet_mega_plugin.search.frames import Frames
from espnet_mega_plugin.search.joint import Joint
from espnet_mega_plugin.search.predictions import Predictions
from espnet_mega_plugin.search.tree import LabelTree

ROUNDING = 1e-4  # nats the bound leaves for float32 sums
# Rows of a prediction network of 13 million parameters that take as long as one more call of it: on one CPU thread a
# call of 5 rows takes 7 ms, 100 rows 0.4 ms each (bench_decoder.py)
MANY = 20


class Taken(NamedTuple):
    """Hypotheses about to take a label. All (B, C)"""

    score: Tensor  # with the label
    node: Tensor  # before it
    entry: Tensor  # before it
    there: Tensor  # bool
    label: Tensor
    logp: Tensor  # the label's log-probability, without fusion
    known: Tensor  # node after the label, -1 where the tree has none

    def picked(self, index: Tensor) -> Taken:
        return Taken(*(t.gather(1, index) for t in self))


class Maes(Algorithm):
    """One search over a batch; `advance` goes on as far as the frames reach."""

    def __init__(
        self,
        joint: Joint,
        predictions: Predictions,
        tree: LabelTree,
        frames: Frames,
        beam_size: int,
        nstep: int,
        expansion_gamma: float,
        expansion_beta: int,
        window: int,
        places: int | None = None,
    ):
        """
        Args:
            places: with fixed shapes, labels that may be taken at once in an utterance, the most probable ones; where
                there were more, `short_of_places` says so. None: beam_size * (beam_size + expansion_beta).
        """
        super().__init__(joint, predictions, tree, frames, beam_size)
        self.nstep, self.gamma, self.window = nstep, expansion_gamma, window
        self.tokens = beam_size + expansion_beta
        self.most = None
        if tree.fixed_shapes:
            self.most = beam_size * self.tokens if places is None else places
        self._short = torch.zeros((), dtype=torch.bool, device=tree.device)

    def short_of_places(self) -> int | None:
        """How many places another attempt should have, where labels were left out for want of them; else None."""
        if self.most is None or not bool(self._short):  # waits for a GPU
            return None
        return min(4 * self.most, self.beam_size * self.tokens**self.nstep)

    @property
    def _most_a_round(self) -> int:
        return 2 * self.tokens if self.most is None else self.most * self.nstep

    def _round(self) -> None:
        """The next frames with nothing but blank, and the first other one."""
        busy, log_probs = self._skip_blank_frames()
        if not self.tree.fixed_shapes:
            if not bool(busy.any()):
                return
            self._make_room(self._most_a_round)
        ended = self._expand(self.hypotheses, busy, log_probs)
        together = merged(ended, look=not self.tree.fixed_shapes)
        self._go_on_with(best(together, self.beam_size).where(busy, self.hypotheses))
        self.frames.at += busy

    # --- frames with nothing but blank

    def _skip_blank_frames(self) -> tuple[Tensor, Tensor]:
        """Go on to the first frame at which a label may be taken.

        Returns:
            busy: utterances that have such a frame within the window. (B,) bool
            log_probs: at that frame, of the hypotheses that are there, those of busy utterances, in order. (R, V);
                with fixed shapes of all places. (B * H, V)
        """
        frames, hypotheses = self.frames, self.hypotheses
        ahead, in_time = frames.ahead(self.window)
        there = in_time[:, :, None] & hypotheses.there[:, None]  # (B, W, H)
        pairs = ahead[:, :, None] + self._projected(hypotheses.node)[:, None]  # (B, W, H, J)
        log_probs = self.joint(pairs.flatten(0, 2) if self.tree.fixed_shapes else pairs[there])
        blank, label = log_probs[:, 0], log_probs[:, 1:].amax(-1)
        quiet = blank >= label if self.tokens == 1 else (label < blank - self.gamma)
        loud, blank, label = (self._unpacked(rows, there) for rows in (~quiet, blank.double(), label.double()))
        if self.tree.fixed_shapes:
            row = torch.arange(len(log_probs), device=log_probs.device).view(there.shape)
        else:
            row = self._rows(there)
        if self.tokens > 1:
            loud &= ~self._ruled_out(loud, blank, label, log_probs, row)[..., None]

        passed = (~loud.any(-1) & in_time).cumprod(1).bool()  # (B, W)
        blank = torch.where(passed[..., None], blank, 0.0).sum(1)
        self._go_on_with(hypotheses._replace(score=hypotheses.score + blank))
        number = passed.sum(1)
        frames.at += number
        busy = (number < self.window) & frames.left
        row = row.gather(1, number.clamp(max=self.window - 1)[:, None, None].expand(-1, 1, row.shape[2]))[:, 0]
        if not self.tree.fixed_shapes:
            row = row[hypotheses.there & busy[:, None]]
        return busy, log_probs[row.flatten()]

    def _ruled_out(self, loud: Tensor, blank: Tensor, label: Tensor, log_probs: Tensor, row: Tensor) -> Tensor:
        """Frames of a window at which the bound leaves no label, if the frames before it are passed by blank.

        Args:
            loud: hypotheses that may take a label; only frames that have one are looked at. (B, W, H) bool
            blank, label: log-probabilities of blank and of the most probable label. (B, W, H)
            log_probs, row: of all tokens, and each hypothesis' row in it. (R, V), (B, W, H)

        Returns:
            (B, W) bool; where a hypothesis is not there, what is said of its utterance means nothing unless false
        """
        hypotheses = self.hypotheses
        # no row at all: scores that were no numbers ended the last utterances
        if hypotheses.there.shape[1] < self.beam_size or not len(log_probs):
            return torch.zeros(blank.shape[:2], dtype=torch.bool, device=blank.device)
        after = hypotheses.score[:, None] + blank.cumsum(1)
        least = after.amin(-1) - self._margin
        after_label = after - blank + label + self.predictions.largest
        hopeless = ((after_label < least[..., None]) & hypotheses.there[:, None]).all(-1)
        if not self.tree.fixed_shapes and not bool((hopeless & loud.any(-1)).any()):
            return hopeless
        within, next_label = self._prefixes()
        # a label that leads to another hypothesis adds to that one's score, however small it is; without such a label
        # every candidate is the only one on its way
        paths = log_probs[row[..., None], next_label[:, None]]  # (B, W, H, H)
        adds = within[:, None] & (paths >= (torch.maximum(blank, label) - self.gamma)[..., None])
        return hopeless & ~adds.flatten(2).any(-1)

    def _prefixes(self) -> tuple[Tensor, Tensor]:
        """Which hypotheses another one goes on from, and by which label. [h, i]: h before i. (B, H, H) bool, int64"""
        tree, there, n = self.tree, self.hypotheses.there, self.tree.used_nodes
        node = torch.where(there, self.hypotheses.node, 0)  # where none is, an old number, perhaps beyond those in use
        lineage = tree.lineage[self._utterance, node, :n]  # (B, H, N)
        within = lineage.gather(2, node[:, None].expand(-1, node.shape[1], -1)).transpose(1, 2)
        within = within & (node[:, :, None] != node[:, None]) & there[:, :, None] & there[:, None]
        if not tree.fixed_shapes and not bool(within.any()):
            return within, torch.zeros_like(within, dtype=torch.long)
        child = lineage[:, None] & (tree.parent[:, None, :n] == node[..., None])[:, :, None]  # (B, H, H, N)
        return within, tree.label[:, :n].gather(1, child.to(torch.uint8).argmax(-1).flatten(1)).view_as(within)

    @property
    def _margin(self) -> float:
        """Nats below the last hypothesis in the beam that a label alone on its way cannot make good."""
        return ROUNDING + self.nstep * self.predictions.largest

    # --- a frame at which labels are taken

    def _expand(self, hypotheses: Hypotheses, busy: Tensor, log_probs: Tensor) -> Hypotheses:
        """One frame of some utterances.

        Args:
            hypotheses: at its beginning.
            busy: which utterances. (B,) bool
            log_probs: of their hypotheses at this frame, as `_skip_blank_frames` gives them.

        Returns:
            ended: all that have ended the frame, equal ones not summed.
        """
        ended = []
        hypotheses = hypotheses._replace(there=hypotheses.there & busy[:, None])
        for n in range(self.nstep):
            by_blank, taken = self._take(hypotheses, log_probs)
            ended.append(by_blank)
            if taken is not None:
                taken = self._drop_hopeless(ended, taken)
            if taken is None:
                return joined(ended)
            is_last = n == self.nstep - 1
            if self._many(taken):
                hypotheses, log_probs = self._take_on_by_turns(ended, taken, is_last)
            else:
                hypotheses, log_probs = self._take_on(taken)
        return joined([*ended, self._end(hypotheses, log_probs)])

    def _end(self, hypotheses: Hypotheses, log_probs: Tensor) -> Hypotheses:
        """All of them, after blank."""
        return hypotheses._replace(score=hypotheses.score + self._blank(hypotheses, log_probs))

    def _many(self, taken: Taken) -> bool:
        """Whether so many labels are left that a second call of the prediction network may save more than it costs."""
        if self.tree.fixed_shapes:
            return False
        return int((taken.there.sum(1) - self.beam_size).clamp(min=0).sum()) >= MANY

    def _take_on_by_turns(self, ended: list[Hypotheses], taken: Taken, is_last: bool) -> tuple[Hypotheses, Tensor]:
        """As `_take_on`, the `beam_size` most probable first; of the others those that may still matter after that."""
        order = torch.argsort(taken.score.masked_fill(~taken.there, -math.inf), dim=1, descending=True, stable=True)
        first, others = (taken.picked(index) for index in (order[:, : self.beam_size], order[:, self.beam_size :]))
        hypotheses, log_probs = self._take_on(first)
        can_end = self._end(hypotheses, log_probs) if is_last else self._take(hypotheses, log_probs)[0]
        others = self._drop_hopeless([*ended, can_end], others, None if is_last else hypotheses)
        if others is None:
            return hypotheses, log_probs
        more, more_log_probs = self._take_on(others)
        rows = [self._rows(hypotheses.there), self._rows(more.there) + len(log_probs)]
        both = joined([hypotheses, more])
        return both, torch.cat([log_probs, more_log_probs])[torch.cat(rows, 1)[both.there]]

    def _rows(self, there: Tensor) -> Tensor:
        """The number of each one's row among those that are there."""
        return (there.flatten().cumsum(0) - 1).view(there.shape)

    def _take(self, hypotheses: Hypotheses, log_probs: Tensor) -> tuple[Hypotheses, Taken | None]:
        """What the hypotheses may do next: end the frame, or take a label, if there is any to take."""
        there = hypotheses.there
        (B, H), K = there.shape, self.tokens
        value, token = log_probs.topk(K, -1)
        value, token = self._unpacked(value.double(), there), self._unpacked(token, there)
        score = hypotheses.score[..., None] + value
        kept = there[..., None] & (score >= score[..., :1] - self.gamma)
        is_blank = kept & (token == 0)
        blank_score = torch.where(is_blank, score, 0.0).sum(-1)
        by_blank = hypotheses._replace(score=blank_score, there=is_blank.any(-1))

        kept = (kept & (token != 0)).flatten(1)
        if self.most is not None:
            self._short |= (kept.sum(1) > self.most).any()
        index = packed(kept, self.most, score.flatten(1))
        if index is None:
            index = torch.arange(H * K, device=kept.device).expand(B, -1)
        if index.shape[1] == 0:
            return by_blank, None
        label, logp = token.flatten(1).gather(1, index), value.flatten(1).gather(1, index)
        source = index // K
        taken = hypotheses.picked(source, kept.gather(1, index))
        score = score.flatten(1).gather(1, index)
        if self.predictions.bonus is not None:
            leaf = self.tree.leaf.gather(1, taken.node).clamp(min=0)
            score = score + self.predictions.bonus[self._utterance, leaf, label].double()
        known = torch.where(taken.there, self.tree.find(taken.node, label), -1)
        return by_blank, Taken(score, taken.node, taken.entry, taken.there, label, logp, known)

    def _drop_hopeless(self, ended: list[Hypotheses], taken: Taken, others: Hypotheses | None = None) -> Taken | None:
        """Leave out what the bound rules out (top of the file); None where that is all.

        Args:
            others: that have taken their labels already and may take more at this frame.
        """
        ended, lineage, known = joined(ended), self.tree.lineage, taken.known
        if not self.tree.fixed_shapes and int(ended.there.sum(1).max()) < self.beam_size:
            return taken
        final = best(merged(ended, look=not self.tree.fixed_shapes), self.beam_size)
        if final.there.shape[1] < self.beam_size:
            return taken
        least_alone = final.score[:, -1:] - self._margin
        least = least_alone - math.log(self.nstep + 1)
        hopeless = taken.there & final.there[:, -1:] & (taken.score < least_alone)
        if not self.tree.fixed_shapes and not bool(hopeless.any()):
            return taken
        b, is_known = self._utterance[..., None], known >= 0
        of_others = lineage[b, ended.node[:, None], known.clamp(min=0)[..., None]] & ended.there[:, None]
        of_others = of_others.any(-1) & is_known
        if others is not None:
            above = lineage[b, taken.node[..., None], others.node[:, None]]
            below = lineage[b, others.node[:, None], known.clamp(min=0)[..., None]] & is_known[..., None]
            of_others |= ((above | below) & others.there[:, None]).any(-1)
        # [c, d]: candidate d is a prefix of candidate c; then either way
        comparable = lineage[b, taken.node[..., None], known.clamp(min=0)[:, None]] & is_known[:, None]
        comparable = (comparable | comparable.transpose(1, 2)) & taken.there[:, None]
        hopeless &= ~comparable.any(-1) | (taken.score < least)
        hopeful = taken.there & ~hopeless
        kept = hopeful | (taken.there & (of_others | (comparable & hopeful[:, None]).any(-1)))
        taken = taken._replace(there=kept)
        index = None if self.tree.fixed_shapes else packed(kept)
        if index is None:
            return taken
        return taken.picked(index) if index.shape[1] else None

    def _take_on(self, taken: Taken) -> tuple[Hypotheses, Tensor]:
        """The hypotheses with their new labels, and their log_probs at this frame; prefixes that are new are scored."""
        tree, C = self.tree, taken.label.shape[1]
        if not tree.fixed_shapes:
            tree.reserve(C, C)
        node, rows = tree.add(taken.there, taken.node, taken.label, taken.known)
        if len(rows.node):
            self.predictions.extend(rows, tree)
        entry = self.traces.add(taken.entry, taken.label, self.frames.now()[:, None], taken.logp)
        hypotheses = Hypotheses(taken.score, node, entry, taken.there)
        return hypotheses, self._log_probs(hypotheses, self.frames.ahead(1)[0])
