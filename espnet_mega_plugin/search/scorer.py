"""What the search asks of whatever scores label prefixes: a prediction network, a language model, a list of phrases.

A *node* is a label prefix of one utterance of the batch, counted from 0 in each utterance. A *leaf* is a numbered place
for what it takes to go on from a node (an LSTM's state, a language model's scores): only nodes that some hypothesis may
extend hold one. Which node and leaf a prefix gets, and when they are used for another one, the search decides
(`tree.py`); a scorer keeps its tensors by these two numbers and moves them when it is told.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from espnet_mega_plugin.search.tree import LabelTree


class Rows(NamedTuple):
    """New prefixes, each a known one (its parent) and one more label. All (R,) int64.

    None is another one's parent. A place of the batch is used again for another utterance, which then begins with a
    start row: nothing the place held before may be read.
    """

    utterance: Tensor  # place in the batch
    node: Tensor  # place of the new prefix
    leaf: Tensor  # where to keep what goes on from it
    parent: Tensor  # node of the prefix without its last label; -1: the start, before the first label
    parent_leaf: Tensor  # -1 at the start
    label: Tensor  # the new label; blank at the start
    valid: Tensor | None = None  # (R,) bool, where shapes are fixed: rows that are false are thrown away, write nothing


class LabelScorer(Protocol):
    """A scorer may have `recordable`: true where `extend`, with fixed shapes and as long as `reserve` is not called,
    does the same operations on the same tensors each time, so that they can be recorded (`recording.py`)."""

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        """Make room for so many places; called again with larger numbers, what is there stays."""

    def extend(self, rows: Rows, tree: LabelTree) -> Tensor:
        """Score new prefixes and remember them.

        Returns:
            of a prediction network: its output. (R, D)
            of the others: what each next label would add, log-probability or bonus. (R, V)
        """

    def move_nodes(self, kept: Tensor) -> None:
        """Place i of utterance b now holds what was at kept[b, i]; 0 where it holds nothing. (B, n) int64"""

    def move_leaves(self, kept: Tensor) -> None:
        """Likewise. (B, m) int64"""


@dataclass(frozen=True)
class Fusion:
    """A scorer whose weighted score is added to each label a hypothesis takes, never to blank.

    The scorer may have `largest`, the most a label can be given (0, as for log-probabilities, if it has not),
    `final(utterance, leaf)`, added once where the utterance ends ((R,), (R,) -> (R,)), and `fresh()`, which gives the
    same scorer with nothing remembered: each search has one of its own. Without it the scorer is copied whole.
    A weight below 0 takes a score away; mAES then leaves no label out by its bound and takes longer. TypeError,
    ValueError: it is no finite number.
    """

    scorer: LabelScorer
    weight: float = 1.0

    def __post_init__(self):
        check_weight("weight", self.weight)

    @property
    def largest(self) -> float:
        if self.weight < 0:
            return math.inf  # nothing says how improbable a label can be
        return max(0.0, self.weight * getattr(self.scorer, "largest", 0.0))

    def opened(self) -> Fusion:
        """The same for one search, which nothing else uses."""
        fresh = getattr(self.scorer, "fresh", None)
        return Fusion(copy.deepcopy(self.scorer) if fresh is None else fresh(), self.weight)


def check_weight(name: str, weight: float) -> None:
    """
    Raises:
        TypeError, ValueError: it is no finite number.
    """
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(f"{name} must be a number; got {weight!r}.")
    if not math.isfinite(weight):
        raise ValueError(f"{name} must be finite, as 0.5; got {weight!r}.")


def all_fusions(fusion: Fusion | Sequence[Fusion] | None) -> tuple[Fusion, ...]:
    """One, several or none, as a tuple.

    Raises:
        TypeError: something else is among them.
    """
    fusions = () if fusion is None else (fusion,) if isinstance(fusion, Fusion) else tuple(fusion)
    for one in fusions:
        if not isinstance(one, Fusion):
            raise TypeError(
                f"fusion holds Fusion(scorer, weight) entries; got {type(one).__name__}: wrap the scorer in Fusion."
            )
    return fusions
