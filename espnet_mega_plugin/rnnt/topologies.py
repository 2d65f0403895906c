"""log P and the posteriors of its arcs in the lattices of k2's losses, differentiable in the arcs' scores.

    regular      a label arc stays in its frame: (t, u) to (t, u+1); the lattice of `lattice.py`
    modified     a label arc takes its frame with it: (t, u) to (t+1, u+1); at most one label a frame
    constrained  as modified, and the blank after the label is paid for: its score, at (t, u+1), is part of the arc's

A blank arc leads from (t, u) to (t+1, u), always; paths lead from (0, 0) to (T, U).
B utterances, T frames, U labels. Source: k2's mutual_information_recursion, of which this is the definition; Kuang et
al. 2022 (arXiv:2206.13236), section 2.
"""

import torch
from torch import Tensor

from espnet_mega_plugin.once import once_differentiable
from espnet_mega_plugin.rnnt import lattice
from espnet_mega_plugin.rnnt.lattice import Shares

TOPOLOGIES = ("regular", "modified", "constrained")


def shares(
    blank: Tensor, label: Tensor, frame_lengths: Tensor, label_lengths: Tensor, topology: str, posteriors: bool
) -> Shares:
    """As `lattice.shares`, in any topology: log P, and the share of P that pays each cell's blank and next label.

    In the constrained topology a label arc pays a blank, too: its posterior counts in both.
    """
    if topology == "regular":
        return lattice.shares(blank, label, frame_lengths, label_lengths, posteriors)
    if topology == "constrained":
        label = _with_next_blank(blank, label)
    found = _shares(blank, label, frame_lengths, label_lengths, posteriors)
    if topology == "constrained" and posteriors:
        found.blank[..., 1:] += found.label[..., :-1]
    return found


def log_prob(
    blank: Tensor, label: Tensor, frame_lengths: Tensor, label_lengths: Tensor, topology: str
) -> tuple[Tensor, Tensor, Tensor]:
    """log P (B,), differentiable, and the posteriors of blank and label arcs (B, T, U+1), which are not.

    What stands outside the lengths, where posteriors are 0, is never used. Without any path log P is -inf and the
    gradient 0.

    Args:
        blank: log-probability of the blank in each cell. (B, T, U+1)
        label: log-probability of the next label in each cell. (B, T, U+1)
        frame_lengths: (B,) int64, 1 to T.
        label_lengths: (B,) int64, 0 to U.
        topology: one of `TOPOLOGIES`.
    """
    if topology == "constrained":
        label = _with_next_blank(blank, label)
    return _LogProb.apply(blank, label, frame_lengths, label_lengths, topology == "regular")


def _with_next_blank(blank: Tensor, label: Tensor) -> Tensor:
    return torch.cat([label[..., :-1] + blank[..., 1:], label[..., -1:]], -1)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blank, label, frame_lengths, label_lengths, regular):
        ctx.set_materialize_grads(False)
        shares = lattice.shares if regular else _shares
        found = shares(blank.double(), label.double(), frame_lengths, label_lengths, True)
        ctx.dtype = blank.dtype
        ctx.save_for_backward(found.log_prob, found.blank, found.label)
        ctx.mark_non_differentiable(found.blank, found.label)
        return found

    @staticmethod
    @once_differentiable()
    def backward(ctx, saved, grad, *_):
        if grad is None:
            return None, None, None, None, None
        by_blank, by_label = ((plane * grad[:, None, None]).to(ctx.dtype) for plane in saved[1:])
        return by_blank, by_label, None, None, None


def _shares(blank: Tensor, label: Tensor, frame_lengths: Tensor, label_lengths: Tensor, posteriors: bool) -> Shares:
    """As `lattice.shares`, where every arc takes a frame: one frame is computed at once, from both ends."""
    B, T, U1 = blank.shape
    t, u = torch.arange(T, device=blank.device)[:, None], torch.arange(U1, device=blank.device)  # (T, 1), (U+1,)
    T_b, U_b = frame_lengths[:, None, None], label_lengths[:, None, None]
    inside = (t < T_b) & (u <= U_b)
    not_last = inside & (u < U_b)

    # arcs into row n + 1 of column u, from the start and, with u counted from the end, from the end
    n, column = torch.arange(T, device=blank.device)[:, None, None], u
    frames, labels = frame_lengths[:, None], label_lengths[:, None]  # (B, 1)
    ahead, behind = (n, column), (frames - 1 - n, labels - column)
    pick = lattice.pick
    blanks = [pick(blank, *ahead, (n < frames) & (column <= labels)), pick(blank, *behind, _ok(*behind))]
    moves = [
        pick(label, n, column - 1, (n < frames) & (column >= 1) & (column <= labels)),
        pick(label, *behind, _ok(*behind) & (column >= 1)),
    ]
    scores = lattice.path_scores(torch.cat(blanks, 1), torch.cat(moves, 1))  # (T+1, 2B, U+1)

    utterance = torch.arange(B, device=blank.device)
    total = scores[frame_lengths, utterance, label_lengths]
    if not posteriors:
        return Shares(total, None, None)
    alpha = scores[:T, :B].transpose(0, 1).contiguous()
    rest, place = (T_b - 1 - t).clamp(min=0), (U_b - u).clamp(min=0)
    beta = scores[rest, utterance[:, None, None] + B, place]  # of (t + 1, u)
    beta_next = scores[rest, utterance[:, None, None] + B, (U_b - 1 - u).clamp(min=0)]  # of (t + 1, u + 1)
    pathless = (total == -torch.inf)[:, None, None]
    by_blank = (alpha + blank + beta - total[:, None, None]).exp_().masked_fill_(~inside | pathless, 0.0)
    by_label = (alpha + label + beta_next - total[:, None, None]).exp_().masked_fill_(~not_last | pathless, 0.0)
    return Shares(total, by_blank, by_label)


def _ok(t: Tensor, u: Tensor) -> Tensor:
    return (t >= 0) & (u >= 0)
