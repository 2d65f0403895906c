"""What is known of each prefix that may be extended: the prediction network's answer and what fusion adds.

B utterances, M leaves, R new prefixes, J joint space, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espnet_mega_plugin.search.joint import Joint
from espnet_mega_plugin.search.leaves import larger
from espnet_mega_plugin.search.scorer import Fusion, LabelScorer, Rows
from espnet_mega_plugin.search.tree import LabelTree, put


class Predictions:
    """Several scorers as one; the tree of a search has this one alone."""

    def __init__(self, decoder: LabelScorer, joint: Joint, fusion: Sequence[Fusion] = ()):
        self._decoder, self._joint, self._fusion = decoder, joint, tuple(fused.opened() for fused in fusion)
        self._scorers = [decoder, *(fused.scorer for fused in self._fusion)]
        self._room = 0, 0
        self.projected: Tensor | None = None  # of the decoder's output, into the joint space. (B, M, J)
        self.bonus: Tensor | None = None  # weighted and summed over fusions; None without any. (B, M, V)

    @property
    def largest(self) -> float:
        """The most that fusion can add to one label."""
        return sum(fused.largest for fused in self._fusion)

    @property
    def not_recordable(self) -> list[str]:
        """Class names of scorers whose `extend` is not the same operations on the same tensors each time."""
        return [type(one).__name__ for one in self._scorers if not getattr(one, "recordable", False)]

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        for scorer in self._scorers:
            scorer.reserve(utterances, nodes, leaves)
        self._room = utterances, leaves
        if self.projected is not None:
            self.projected = larger(self.projected, *self._room)
        if self.bonus is not None:
            self.bonus = larger(self.bonus, *self._room)

    def extend(self, rows: Rows, tree: LabelTree) -> None:
        projected = self._joint.prefixes(self._decoder.extend(rows, tree))
        if self.projected is None:
            self.projected = larger(projected.new_zeros(0, 0, projected.shape[-1]), *self._room)
        put(self.projected, rows.utterance, rows.leaf, projected, rows.valid)
        if self._fusion:
            scores = [(fused.weight, fused.scorer.extend(rows, tree)) for fused in self._fusion]
            bonus = sum(weight * score.to(torch.promote_types(score.dtype, torch.float32)) for weight, score in scores)
            if self.bonus is None:
                self.bonus = larger(bonus.new_zeros(0, 0, bonus.shape[-1]), *self._room)
            put(self.bonus, rows.utterance, rows.leaf, bonus, rows.valid)

    def final(self, utterance: Tensor, leaf: Tensor) -> Tensor | float:
        """What fusion adds where an utterance ends. (R,), (R,) -> (R,)"""
        with_final = [fused for fused in self._fusion if hasattr(fused.scorer, "final")]
        return sum(fused.weight * fused.scorer.final(utterance, leaf).double() for fused in with_final)

    def move_nodes(self, kept: Tensor) -> None:
        for scorer in self._scorers:
            scorer.move_nodes(kept)

    def move_leaves(self, kept: Tensor) -> None:
        for scorer in self._scorers:
            scorer.move_leaves(kept)
        utterance = torch.arange(kept.shape[0], device=kept.device)[:, None]
        for table in (self.projected, self.bonus):
            if table is not None:
                table[: kept.shape[0], : kept.shape[1]] = table[utterance, kept]
