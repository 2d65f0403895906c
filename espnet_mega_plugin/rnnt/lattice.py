"""The lattice under the RNN-T loss: from the scores of its arcs to log P and to the share of P that each arc carries.

Cell (t, u) has read t frames and written u labels. A blank arc leads to (t+1, u), a label arc to (t, u+1); the last
blank, out of the cell (T-1, U), ends every path. All cells with the same t + u form a diagonal and are computed at
once; the backward variable is the same recursion on the lattice turned around, so one loop computes both.

Diagonals, and not cumulative sums along the frames: arcs may score -inf, or a mask's -1e30, and differences of
cumulative sums do not survive that.

B utterances, T frames, U labels. Everything is float64: the planes are small next to the logits, and float32 would
cost three digits of the gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Shares(NamedTuple):
    """What the lattice knows of each utterance; posteriors are zero outside its lengths."""

    log_prob: Tensor  # (B,)
    blank: Tensor | None  # (B, T, U+1) posterior of the blank arc out of each cell
    label: Tensor | None  # (B, T, U+1) posterior of the label arc out of each cell


def shares(blank: Tensor, label: Tensor, frame_lengths: Tensor, label_lengths: Tensor, posteriors: bool) -> Shares:
    """log P of each utterance and, where ``posteriors`` is set, the posterior of every arc.

    An utterance without any path has log P = -inf and posteriors 0. A NaN inside the lengths makes log P and all
    posteriors of its utterance NaN. What stands outside the lengths is never used. No device is synchronised.

    Args:
        blank: log-probability of the blank in each cell. (B, T, U+1) float64
        label: log-probability of the next label in each cell. (B, T, U+1) float64
        frame_lengths: (B,) int64, 1 to T.
        label_lengths: (B,) int64, 0 to U.
        posteriors: whether a gradient will be wanted.
    """
    B, T, U1 = blank.shape
    t, u = torch.arange(T, device=blank.device)[:, None], torch.arange(U1, device=blank.device)
    last_t, last_u = (frame_lengths - 1)[:, None], label_lengths[:, None]  # (B, 1)
    end = last_t * U1 + last_u
    last_blank = blank.reshape(B, T * U1).gather(1, end).view(B, 1, 1)

    arcs = [_arcs_forward(blank, label, last_t, last_u)]
    if posteriors:
        arcs.append(_arcs_backward(blank, label, last_t, last_u))
    scores = path_scores(*(torch.cat(planes, 1) for planes in zip(*arcs, strict=True)))
    del arcs
    alpha = _off_diagonals(scores[:, :B], t, u)
    log_prob = alpha.reshape(B, T * U1).gather(1, end).view(B, 1, 1) + last_blank
    if not posteriors:
        return Shares(log_prob.view(B), None, None)

    last_t, last_u = last_t[..., None], last_u[..., None]
    beta = _off_diagonals(scores[:, B:], last_t - t, last_u - u).add_(last_blank)
    alpha.sub_(log_prob)
    pathless = log_prob == -torch.inf
    by_blank, by_label = torch.zeros_like(alpha), torch.zeros_like(alpha)
    torch.add(alpha[:, :-1], blank[:, :-1], out=by_blank[:, :-1]).add_(beta[:, 1:]).exp_()
    torch.add(alpha[..., :-1], label[..., :-1], out=by_label[..., :-1]).add_(beta[..., 1:]).exp_()
    by_blank.masked_fill_((t >= last_t) | (u > last_u) | pathless, 0.0)
    by_label.masked_fill_((t > last_t) | (u >= last_u) | pathless, 0.0)
    # the last blank is on every path
    by_blank.view(B, T * U1).scatter_(1, end, (log_prob * 0 + 1).masked_fill(pathless, 0.0).view(B, 1))
    return Shares(log_prob.view(B), by_blank, by_label)


def _arcs_forward(blank: Tensor, label: Tensor, last_t: Tensor, last_u: Tensor) -> tuple[Tensor, Tensor]:
    """Arcs into diagonal n + 1 at column u, from the start: blank from (n-u, u), label from (n+1-u, u-1)."""
    n, u = _diagonals_and_columns(blank)
    t = n - u
    return (
        pick(blank, t, u, (t >= 0) & (t < last_t) & (u <= last_u)),
        pick(label, t + 1, u - 1, (t + 1 >= 0) & (t + 1 <= last_t) & (u >= 1) & (u <= last_u)),
    )


def _arcs_backward(blank: Tensor, label: Tensor, last_t: Tensor, last_u: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the end: column v stands for u = last_u - v, n + 1 - v for the frames to go."""
    n, v = _diagonals_and_columns(blank)
    t, u = last_t - (n + 1 - v), last_u - v
    inside = (t >= 0) & (t <= last_t) & (u >= 0)
    return (
        pick(blank, t, u, inside & (t < last_t)),
        pick(label, t, u, inside & (u < last_u)),
    )


def _diagonals_and_columns(plane: Tensor) -> tuple[Tensor, Tensor]:
    _, T, U1 = plane.shape
    return torch.arange(T + U1 - 2, device=plane.device)[:, None, None], torch.arange(U1, device=plane.device)


def pick(plane: Tensor, t: Tensor, u: Tensor, ok: Tensor) -> Tensor:
    """plane[b, t, u] where ok, else -inf. Indices broadcast to (N, B, U1)."""
    B, T, U1 = plane.shape
    rows = torch.arange(B, device=plane.device)[:, None] * (T * U1)
    index = (rows + t * U1 + u).masked_fill_(~ok, 0)
    return plane.take(index).masked_fill_(~ok, -torch.inf)


def path_scores(blank: Tensor, label: Tensor) -> Tensor:
    """score(n+1, u) = log(exp(score(n, u) + blank arc) + exp(score(n, u-1) + label arc)). (N+1, rows, U1)"""
    N, rows, U1 = blank.shape
    padded = blank.new_full((N + 1, rows, U1 + 1), -torch.inf)  # a column before the first: nothing comes from there
    padded[0, :, 1] = 0.0
    here, before = padded[..., 1:], padded[..., :-1]
    for stay, move, into_by_blank, into_by_label, score in zip(
        here[:-1].unbind(), before[:-1].unbind(), blank.unbind(), label.unbind(), here[1:].unbind(), strict=True
    ):
        torch.logaddexp(into_by_blank.add_(stay), into_by_label.add_(move), out=score)
    return here


def _off_diagonals(scores: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """scores[t + u, b, u] as (B, T, U1); arbitrary where t or u lies outside the lattice."""
    N, B, U1 = scores.shape
    b = torch.arange(B, device=scores.device)[:, None, None]
    return scores[(t + u).clamp(0, N - 1), b, u.clamp(min=0)]
