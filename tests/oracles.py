"""Brute force: what tests and benchmarks compare with. Nothing here is fast, shares code with the package, or is clever.

Letters: T frames, U labels, V classes.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

# ---- RNN-T loss: every alignment, one by one ------------------------------------------------------------------------


def alignments(T: int, U: int) -> Iterator[list[tuple[int, int, bool]]]:
    """Every path through the lattice as its cells (t, u) with whether a label leaves there; the last arc is a blank."""
    for chosen in itertools.combinations(range(T - 1 + U), U):
        t = u = 0
        path = []
        for step in range(T - 1 + U):
            path.append((t, u, step in chosen))
            t, u = (t, u + 1) if step in chosen else (t + 1, u)
        yield [*path, (t, u, False)]


def alignment_scores(logits: Tensor, labels: list[int], blank: int) -> tuple[list[list[tuple[int, int, bool]]], Tensor]:
    """All paths of one utterance and the log-probability of each. logits (T, U+1, V)"""
    T, U1, _ = logits.shape
    scores = logits.double().log_softmax(-1)
    paths = list(alignments(T, U1 - 1))
    totals = [sum(scores[t, u, labels[u] if is_label else blank] for t, u, is_label in path) for path in paths]
    return paths, torch.stack(totals)


def sum_over_alignments(logits: Tensor, labels: list[int], blank: int) -> Tensor:
    """-log P of one utterance, differentiable. logits (T, U+1, V), labels of length U"""
    return -alignment_scores(logits, labels, blank)[1].logsumexp(0)


def fastemit_gradient(logits: Tensor, labels: list[int], blank: int, fastemit_lambda: float) -> Tensor:
    """Gradient to the logits: p_k (by_blank + (1 + lambda) by_label) less the arcs' own shares. (T, U+1, V)

    The shares by_blank and by_label are summed up path by path.
    """
    T, U1, V = logits.shape
    paths, totals = alignment_scores(logits, labels, blank)
    by_blank, by_label = torch.zeros(T, U1, dtype=torch.float64), torch.zeros(T, U1, dtype=torch.float64)
    for path, share in zip(paths, totals.softmax(0), strict=True):
        for t, u, is_label in path:
            (by_label if is_label else by_blank)[t, u] += share
    by_label *= 1 + fastemit_lambda
    gradient = logits.double().softmax(-1) * (by_blank + by_label)[..., None]
    gradient[..., blank] -= by_blank
    for u, label in enumerate(labels):
        gradient[:, u, label] -= by_label[:, u]
    return gradient


# ---- k2's lattices: every path, one by one --------------------------------------------------------------------------


def one_arc_a_frame(T: int, U: int) -> Iterator[list[tuple[int, int, bool]]]:
    """Every way to write U labels in T frames of one arc each, as its cells (t, u) with whether a label leaves there."""
    for chosen in itertools.combinations(range(T), U):
        yield [(t, sum(c < t for c in chosen), t in chosen) for t in range(T)]


def sum_over_paths(blank: Tensor, label: Tensor, topology: str) -> Tensor:
    """log P of one utterance, differentiable; -inf without paths. blank (T, U+1), label (T, U)"""
    T, U1 = blank.shape
    totals = []
    for path in alignments(T, U1 - 1) if topology == "regular" else one_arc_a_frame(T, U1 - 1):
        total = blank.new_zeros(())
        for t, u, is_label in path:
            total = total + (label[t, u] if is_label else blank[t, u])
            if is_label and topology == "constrained":  # and goes on to the next frame by a blank
                total = total + blank[t, u + 1]
        totals.append(total)
    return torch.stack(totals).logsumexp(0) if totals else blank.new_full((), -torch.inf)


def smoothed_scores(
    lm: Tensor, am: Tensor, labels: list[int], blank: int, lm_only: float, am_only: float, frequency: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of blank (T, U+1) and label (T, U) of one utterance: a mixture of three models' log-probabilities.

    lm (U+1, V), am (T, V); frequency (V,) of the classes.
    """
    mixture = (
        (1 - lm_only - am_only) * (am[:, None] + lm).log_softmax(-1)
        + lm_only * lm.log_softmax(-1)
        + am_only * (am + frequency.log()).log_softmax(-1)[:, None]
    )
    at_label = [mixture[:, u, label] for u, label in enumerate(labels)]
    return mixture[..., blank], torch.stack(at_label, 1) if at_label else mixture[:, :0, blank]
