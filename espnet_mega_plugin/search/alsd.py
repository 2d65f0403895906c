"""Alignment-length synchronous decoding (alsd) for a batch of whole utterances.

The algorithm (Saon et al. 2020, "Alignment-length synchronous decoding for RNN transducer", and ESPnet's
`align_length_sync_decoding`): after i steps, each blank or a label, a hypothesis with u labels is at frame i - u. Each
takes blank and each of its `beam_size` most probable labels; the `beam_size` best in all go on, equal label sequences
summed. One that takes blank at the last frame is a result. There are T + u_max steps, so these results have u_max
labels at most; u_max is no more than T - 1.

Two things are not ESPnet's. Where nothing has come to the last frame, its search returns hypotheses that have not, with
the scores of a part of the utterance: here they go on by blank alone until they have. Those may have more labels than
u_max, up to one a step. And an utterance of one frame may have a label.

B utterances, F frames, T of them an utterance's, H hypotheses, K labels each may take.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from espnet_mega_plugin.search.algorithm import Algorithm
from espnet_mega_plugin.search.beam import Hypotheses, joined, merged, packed
from espnet_mega_plugin.search.frames import Frames
from espnet_mega_plugin.search.joint import Joint
from espnet_mega_plugin.search.predictions import Predictions
from espnet_mega_plugin.search.tree import LabelTree

_log = logging.getLogger("espnet_mega_plugin")


class Alsd(Algorithm):
    """All utterances begin together and have all their frames when `advance` is called."""

    def __init__(
        self,
        joint: Joint,
        predictions: Predictions,
        tree: LabelTree,
        frames: Frames,
        beam_size: int,
        u_max: int,
    ):
        super().__init__(joint, predictions, tree, frames, beam_size)
        self.u_max = u_max
        self.results = self.hypotheses  # scores with what fusion adds at the end; their nodes mean nothing

    @torch.no_grad()
    def advance(self) -> None:
        """Search the utterances from beginning to end; then `results` are there."""
        T = self.frames.count
        steps = torch.where(T > 0, T + (T - 1).clamp(min=1).clamp(max=self.u_max), 0)
        # the one time a GPU is waited for before the search is through
        fewest, most = torch.stack((T.amin(), steps.amax())).tolist()
        nothing = self.hypotheses._replace(there=torch.zeros_like(self.hypotheses.there))
        results, taken = [nothing], [0] * nothing.there.shape[1]
        for i in range(most):
            ended = self._step(i, steps)
            # before step T - 1 nothing ends
            if i >= fewest - 1 and (self.tree.fixed_shapes or bool(ended.there.any())):
                results.append(ended)
                taken += [i + 1] * ended.there.shape[1]
        self._hand_out(joined(results), torch.tensor(taken, device=T.device), steps)

    def _step(self, i: int, steps: Tensor) -> Hypotheses:
        """Each utterance's step i, if it has one.

        Args:
            steps: how many each has. (B,)

        Returns:
            ended: what has come to its end by it. (B, H)
        """
        # Each step asks for much of what the one before it asked for
        self._make_room(self.beam_size, again=2 * self.beam_size)
        live, T, going = self.hypotheses, self.frames.count[:, None], i < steps
        at = i - self.tree.depth.gather(1, live.node)
        here = live._replace(there=live.there & (at < T) & going[:, None])
        log_probs = self._log_probs(here, self._frames(at))
        by_blank = here._replace(score=here.score + self._blank(here, log_probs))
        ended = self._with_end(by_blank._replace(there=here.there & (at == T - 1)))

        label, logp, bonus = self._labels(here, log_probs)
        score = torch.cat((by_blank.score[..., None], here.score[..., None] + logp + bonus), 2)
        label, logp = (torch.nn.functional.pad(t, (1, 0)) for t in (label, logp))  # blank in front
        chosen, index = self._chosen(here, score, here.there[..., None].expand_as(score))
        label, logp = label.flatten(1).gather(1, index), logp.flatten(1).gather(1, index)
        longer = self._take_on(chosen, label, at.gather(1, index // score.shape[2]), logp)
        self.hypotheses = merged(longer, look=not self.tree.fixed_shapes).where(going, live)
        return ended

    def _frames(self, at: Tensor) -> Tensor:
        """Frames by their numbers. (B, H) -> (B, H, J)"""
        projected = self.frames.projected
        return projected[self._utterance, at.clamp(0, projected.shape[1] - 1)]

    def _with_end(self, hypotheses: Hypotheses) -> Hypotheses:
        """With what fusion adds where an utterance ends; asked while the prefixes are in the tree."""
        leaf = self.tree.leaf.gather(1, hypotheses.node).clamp(min=0)
        bonus = self.predictions.final(self._utterance.expand_as(leaf).flatten(), leaf.flatten())
        if isinstance(bonus, Tensor):
            hypotheses = hypotheses._replace(score=hypotheses.score + bonus.view_as(leaf))
        return hypotheses

    # --- the end -----------------------------------------------------------------------------------------------------

    def _hand_out(self, results: Hypotheses, taken: Tensor, steps: Tensor) -> None:
        """Choose what each utterance has for results, and say what u_max has cut off.

        Args:
            taken: steps of the results in each column. (C,)
            steps: of each utterance. (B,)
        """
        T, found = self.frames.count, results.there.any(1)
        likeliest = results.score.masked_fill(~results.there, -torch.inf).argmax(1)
        full = found & (taken[likeliest] - T >= self.u_max) & (self.u_max < T - 1)
        unfinished = ~found & (T > 0)
        raisable = unfinished & (self.u_max < T - 1)
        counts = full.sum(), unfinished.sum(), raisable.sum(), found.all()
        full, unfinished, raisable, all_found = torch.stack(counts).tolist()
        if not all_found:
            results = results.where(found, self._with_end(self._ended_by_blank(steps)))
        index = packed(results.there)
        self.results = results if index is None else results.picked(index, results.there.gather(1, index))
        if full:
            _log.warning(
                "alsd: the result of %d of %d utterances has u_max = %d labels and may lack more. Raise u_max.",
                *(full, len(T), self.u_max),
            )
        if unfinished:
            _log.warning(
                "alsd: nothing had come to the end of %d of %d utterances after T + u_max steps, of u_max = %d and no "
                "more than T - 1; their results go on from there by blank alone. %s with maes.",
                *(unfinished, len(T), self.u_max, "Raise u_max, or search" if raisable else "Search"),
            )

    def _ended_by_blank(self, steps: Tensor) -> Hypotheses:
        """The hypotheses in hand at the ends of their utterances, nothing but blank taken."""
        hypotheses, T = self.hypotheses, self.frames.count[:, None]
        at = steps[:, None] - self.tree.depth.gather(1, hypotheses.node)
        score = hypotheses.score
        for _ in range(int((T - at).masked_fill(~hypotheses.there, 0).amax())):
            here = hypotheses._replace(there=hypotheses.there & (at < T))
            score = score + self._blank(here, self._log_probs(here, self._frames(at)))
            at = at + 1
        return hypotheses._replace(score=score)
