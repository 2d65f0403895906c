"""Phrases that a search is to prefer: names, places, terms, each with a weight.

What a finished hypothesis gets, to the last digit of the arithmetic:

    the sum over all phrases of  weight * number of labels * number of places where the phrase stands in the hypothesis

Places may overlap and lie within each other, and each counts: with "a b" and "b a" in the list, "a b a" has both; with
"a b c" and "b c", "a b c" has both; with "a a" alone, "a a a" has it twice. Equal phrases are one with the sum of their
weights. `per label`, a phrase of one weight gains the same however long it is.

On the way the search shall see a phrase before it is complete. So a hypothesis also has on loan what its end promises:
the largest weight * labels matched, never below 0, of the phrases that begin with that end. Each label that leads on
raises it by the weight; where the match breaks, the label that breaks it gets a negative score, which gives back what
was on loan and no shorter match has; where the phrase is complete, the loan is redeemed; what is left at the end of the
utterance `final` gives back. A phrase that lies in another one (as "b c" above) is paid in full where it is complete,
beside the loan on the longer one. A negative weight is never lent: it is taken all at once.

The loan at a node of the trie and its fail link is the usual bonus of a context graph (Aho and Corasick 1975).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from operator import index
from pathlib import Path

import torch
from torch import Tensor

from espnet_mega_plugin.search.trie import Trie, TrieScorer

Phrase = tuple[Sequence[int], float]  # labels, weight for each of them

LARGEST = torch.finfo(torch.float32).max  # what a search may add to a score


def read_phrases(
    path: str | Path,
    tokenize: Callable[[str], Sequence[int]],
    unknown: int | None = None,
    weight: float = 1.0,
) -> list[Phrase]:
    """Reads a list of phrases: one a line, UTF-8, if wanted a tab and its weight behind it. Empty lines do not count.

    Args:
        tokenize: text to labels, as the model's transcripts were.
        unknown: the label `tokenize` gives for what the model has no token for; None: it raises an error itself.
        weight: of phrases without one; nats a label.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a weight is no number or too large, or a phrase is nothing, or has what is no token; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected phrases, one a line, weight behind a tab.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}).") from error
    phrases = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            text, tab, given = line.partition("\t")
            where = f"{path}:{number}"
            value = _weight(given.strip(), where) if tab else weight
            labels = _labels(text.strip(), tokenize, unknown, where)
            if abs(value) * len(labels) > LARGEST:
                raise ValueError(f"{where}: a weight of {value:g} for {len(labels)} labels is more than float32 holds.")
            phrases.append((labels, value))
    return phrases


def _weight(given: str, where: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: behind the tab stands {given!r}; expected the phrase's weight, a finite number.")
    return value


def _labels(text: str, tokenize: Callable[[str], Sequence[int]], unknown: int | None, where: str) -> list[int]:
    labels = [index(label) for label in tokenize(text)] if text else []
    if not labels:
        raise ValueError(f"{where}: {text!r} has no tokens; expected a phrase.")
    if unknown in labels:
        raise ValueError(
            f"{where}: {text!r} has something the model has no token for (label {unknown} at place "
            f"{labels.index(unknown) + 1} of {len(labels)}). Write it as the transcripts do, or leave it out."
        )
    return labels


class PhraseScorer(TrieScorer):
    """What each next label gains or loses by phrases; see the top of the file.

    Args:
        phrases: labels and weight of each, as `read_phrases` gives. A phrase of weight 0 is none.
        vocab_size: V.
        dtype: of the scores.

    Attributes:
        largest: the most one label can gain.

    Raises:
        ValueError: a phrase has no labels or others than 1 to V - 1, or its weight is not a finite number; the weights
            add up to more than `dtype` holds.
    """

    def __init__(
        self,
        phrases: Sequence[Phrase],
        vocab_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        sequences, weights = _table(phrases, vocab_size)
        trie = Trie(sequences, vocab_size)
        nodes = len(trie.parent)
        weight = torch.zeros(nodes, dtype=torch.float64).index_add_(0, trie.end, weights)
        paid, loan = torch.zeros_like(weight), _promised(trie, weight)
        for level in trie.levels:
            paid[level] = weight[level] * trie.depth[level] + paid[trie.fail[level]]
            loan[level] = torch.maximum(loan[level], loan[trie.fail[level]])
        gain = paid[1:] + loan[1:] - loan[trie.parent[1:]]
        if not bool(torch.cat((gain, loan)).to(dtype).isfinite().all()):
            raise ValueError(f"phrases: the weights add up to more than {dtype} holds; take smaller ones.")
        super().__init__(trie, gain, loan[trie.fail] - loan, 0.0, dtype, device)
        # a label that its node has no arc for gains what the fail node's arc gains, less what is given back
        self.largest = max(0.0, float(self._gain.max()))
        self._loan = loan.to(device, dtype)

    def final(self, utterance: Tensor, leaf: Tensor) -> Tensor:
        """Gives back what is on loan for a phrase that is not complete. (R,), (R,) -> (R,)"""
        return -self._loan[self._state[utterance, leaf]]


def _table(phrases: Sequence[Phrase], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Labels of the phrases that weigh something, filled up with -1 behind them, and weights. (N, longest), (N,)"""
    sequences, weights = [], []
    for place, (labels, weight) in enumerate(phrases):
        labels = [index(label) for label in labels]
        if not labels or min(labels) < 1 or max(labels) >= vocab_size:
            raise ValueError(
                f"phrases[{place}] has the labels {labels}; expected at least one, each from 1 to {vocab_size - 1} "
                f"(0 is blank)."
            )
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"phrases[{place}] has the weight {weight!r}; expected a finite number.")
        if weight:
            sequences.append(labels)
            weights.append(float(weight))
    longest = max(map(len, sequences), default=0)
    filled = [labels + [-1] * (longest - len(labels)) for labels in sequences]
    return torch.tensor(filled, dtype=torch.long).view(len(filled), longest), torch.tensor(weights, dtype=torch.float64)


def _promised(trie: Trie, weight: Tensor) -> Tensor:
    """The largest weight * depth of the phrases that lead on from each node, 0 if that is more. (nodes,)"""
    beyond = torch.zeros_like(weight)
    for level in reversed(trie.levels):
        beyond.scatter_reduce_(0, trie.parent[level], torch.maximum(beyond[level], weight[level]), "amax")
    return beyond * trie.depth
