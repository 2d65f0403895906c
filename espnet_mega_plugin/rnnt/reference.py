"""The RNN-T loss by its definition, in loops: the slow truth that every fast form is compared with.

    alpha(0, 0) = 0
    alpha(t, u) = log( exp(alpha(t-1, u) + blank(t-1, u)) + exp(alpha(t, u-1) + label(t, u-1)) )
    log P       = alpha(T-1, U) + blank(T-1, U)

The other topologies, in which a label takes its frame with it (`topologies.py`):

    alpha(t+1, u) = log( exp(alpha(t, u) + blank(t, u)) + exp(alpha(t, u-1) + label(t, u-1) [+ blank(t, u)]) )
    with the term in brackets where the topology is constrained
    log P         = alpha(T, U)

blank(t, u) and label(t, u) are log-probabilities of the blank and of label u+1 in cell (t, u).
B utterances, T frames, U labels, V classes. Source: Graves 2012 (arXiv:1211.3711), section 2.4.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def costs(
    logits: Tensor,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    blank: int = 0,
    fastemit_lambda: float = 0.0,
    dtype: torch.dtype = torch.float64,
    topology: str = "regular",
) -> Tensor:
    """-log P of each utterance, differentiable by autograd. (B,) in ``dtype``

    Args:
        logits: (B, T, U+1, V), B at least 1; converted to ``dtype`` first.
        labels: (B, U) integers; those beyond an utterance's length are not read.
        frame_lengths: (B,) integers from 1 to T.
        label_lengths: (B,) integers from 0 to U.
        blank: class of the blank.
        fastemit_lambda: weighs the gradient through label arcs by 1 + lambda; the value stays -log P.
        topology: "regular", "modified" or "constrained".
    """
    lengths = zip(frame_lengths.tolist(), label_lengths.tolist(), strict=True)
    return torch.stack(
        [
            _cost(logits[b, :T, : U + 1].to(dtype), labels[b, :U].tolist(), blank, fastemit_lambda, topology)
            for b, (T, U) in enumerate(lengths)
        ]
    )


def _cost(logits: Tensor, labels: list[int], blank: int, fastemit_lambda: float, topology: str) -> Tensor:
    T, U1, _ = logits.shape
    scores = logits.log_softmax(-1)

    def label_arc(t: int, u: int) -> Tensor:
        arc = scores[t, u, labels[u]]
        if arc == -torch.inf:
            return arc
        return arc + fastemit_lambda * (arc - arc.detach())  # nothing to the value, lambda times to the gradient

    if topology == "regular":
        log_prob = _cell_by_cell(scores[..., blank], label_arc)
    else:
        log_prob = _frame_by_frame(scores[..., blank], label_arc, topology == "constrained")
    if log_prob == -torch.inf:  # there is no path: no gradient, but a graph as always
        return torch.inf + 0 * logits.nan_to_num(0.0, 0.0, 0.0).sum()
    return -log_prob


def _cell_by_cell(blank: Tensor, label_arc: Callable[[int, int], Tensor]) -> Tensor:
    """log P where a label takes no frame. blank: (T, U+1)"""
    T, U1 = blank.shape
    alpha: dict[tuple[int, int], Tensor] = {}
    for t in range(T):
        for u in range(U1):
            arcs = []
            if t > 0:
                arcs.append(alpha[t - 1, u] + blank[t - 1, u])
            if u > 0:
                arcs.append(alpha[t, u - 1] + label_arc(t, u - 1))
            alpha[t, u] = _log_sum(arcs, blank) if arcs else blank.new_zeros(())
    return alpha[T - 1, U1 - 1] + blank[T - 1, U1 - 1]


def _frame_by_frame(blank: Tensor, label_arc: Callable[[int, int], Tensor], constrained: bool) -> Tensor:
    """log P where every arc takes a frame. blank: (T, U+1)"""
    T, U1 = blank.shape
    alpha = [blank.new_zeros(()), *[blank.new_tensor(-torch.inf)] * (U1 - 1)]
    for t in range(T):
        after = []
        for u in range(U1):
            arcs = [alpha[u] + blank[t, u]]
            if u > 0:
                arcs.append(alpha[u - 1] + label_arc(t, u - 1) + (blank[t, u] if constrained else 0.0))
            after.append(_log_sum(arcs, blank))
        alpha = after
    return alpha[-1]


def _log_sum(arcs: list[Tensor], like: Tensor) -> Tensor:
    arcs = [arc for arc in arcs if arc != -torch.inf]  # of nothing but -inf the gradient would be NaN
    return torch.stack(arcs).logsumexp(0) if arcs else like.new_tensor(-torch.inf)
