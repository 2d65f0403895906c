"""Time-synchronous decoding (tsd) for a batch of utterances that each go at their own pace.

The algorithm (Saon et al. 2020, "Alignment-length synchronous decoding for RNN transducer", and ESPnet's
`time_sync_decoding`): at each frame every hypothesis ends the frame with blank, and every one takes each of its
`beam_size` most probable labels, of which the `beam_size` best in all go on at the same frame; that `max_sym_exp` - 1
times, and blank alone for the last. Equal label sequences that have ended the frame are summed, the best go on.

The hypotheses that are at the same frame with the same number of labels taken there never have the same labels: those
at its beginning are summed, and two that are different stay so whatever they take. What a prefix got from the
prediction network is asked for once while it is in the tree, though it is proposed at one frame after the other.

B utterances, H hypotheses, K labels each may take.
"""

from __future__ import annotations

import torch

from espnet_mega_plugin.search.algorithm import Algorithm
from espnet_mega_plugin.search.beam import Hypotheses, best, joined, merged
from espnet_mega_plugin.search.frames import Frames
from espnet_mega_plugin.search.joint import Joint
from espnet_mega_plugin.search.predictions import Predictions
from espnet_mega_plugin.search.tree import LabelTree


class Tsd(Algorithm):
    def __init__(
        self,
        joint: Joint,
        predictions: Predictions,
        tree: LabelTree,
        frames: Frames,
        beam_size: int,
        max_sym_exp: int,
    ):
        super().__init__(joint, predictions, tree, frames, beam_size)
        self.max_sym_exp = max_sym_exp

    @property
    def _most_a_round(self) -> int:
        return self.beam_size * (self.max_sym_exp - 1)

    def _round(self) -> None:
        """One frame of every utterance that has one."""
        if not self.tree.fixed_shapes:
            # Each frame asks for much of what the one before it asked for
            self._make_room(self._most_a_round, again=2 * self._most_a_round)
        live, left = self.hypotheses, self.frames.left
        here = live._replace(there=live.there & left[:, None])
        frame = self.frames.ahead(1)[0]
        ended = []
        for already in range(self.max_sym_exp):
            log_probs = self._log_probs(here, frame)
            ended.append(here._replace(score=here.score + self._blank(here, log_probs)))
            if already < self.max_sym_exp - 1:
                here = self._longer(here, log_probs)
        together = merged(joined(ended), look=not self.tree.fixed_shapes)
        self._go_on_with(best(together, self.beam_size).where(left, live))
        self.frames.at += left

    def _longer(self, hypotheses: Hypotheses, log_probs: torch.Tensor) -> Hypotheses:
        """The best of all that are one label longer."""
        label, logp, bonus = self._labels(hypotheses, log_probs)
        there = hypotheses.there[..., None].expand_as(label)
        chosen, index = self._chosen(hypotheses, hypotheses.score[..., None] + logp + bonus, there)
        label, logp = label.flatten(1).gather(1, index), logp.flatten(1).gather(1, index)
        return self._take_on(chosen, label, self.frames.now()[:, None], logp)
