"""The standard loss as three Triton kernels for CUDA devices: the logits are read once forward, once backward at most.

`row_statistics` reduces each row to its log-sum-exp and the log-probabilities of blank and next label. `lattice` walks
the diagonals of one utterance: forward it keeps, for each cell, the share of its probability that came by the blank
arc, backward it deals out the posterior by these shares, without another exponential. Scores are relative to the best
of their diagonal, whose sum is compensated, so float32 is enough (float64 for float64 logits). `gradient` writes the
rows that carry posterior and fills the others with zeros, unread.

Planes of the lattice are stored by diagonals: cell (t, u) at (t + u, u), so that a diagonal is read in one piece.
B utterances, T frames, U labels, V classes, N = T + U diagonals; a row is the V logits of one cell. Offsets that count
rows or logits have 64 bits. Importing this needs Triton; `TRITON_INTERPRET=1` before that runs it on CPU tensors.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espnet_mega_plugin.rnnt import wavefront
from espnet_mega_plugin.rnnt.wavefront import THRESHOLD, accumulator, may_overwrite

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "The loss's kernels need Triton (pip install triton); the method 'wavefront' does not."
    ) from error

INF = tl.constexpr(float("inf"))
MOST_CLASSES_AT_ONCE = 1024


def triton_rnnt_loss(
    logits: Tensor,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    blank: int = 0,
    fastemit_lambda: float = 0.0,
    *,
    inplace: bool = True,
    threshold: float | None = None,
) -> Tensor:
    """-log P of each utterance. (B,) float64 for float64 logits, else float32

    Equal to `wavefront.costs`, whose arguments these are, in the precision of the logits' accumulator; nothing waits
    for the device. Logits that are not contiguous are copied.

    Raises:
        ValueError: the logits are on a device that Triton does not run on.
    """
    if logits.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"method 'triton' needs logits on a CUDA device; got {logits.device}. There, choose 'wavefront' or 'auto'."
        )
    if threshold is None:
        threshold = THRESHOLD[accumulator(logits.dtype)]
    wanted = torch.is_grad_enabled() and logits.requires_grad
    options = (blank, fastemit_lambda, inplace and wanted and may_overwrite(logits), float(threshold))
    return _Costs.apply(logits, labels, frame_lengths, label_lengths, options, wanted)


class _Costs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, frame_lengths, label_lengths, options, wanted):
        blank, fastemit_lambda, inplace, threshold = options
        B, T, U1, V = logits.shape
        N, dtype = T + U1 - 1, accumulator(logits.dtype)
        rows = logits.contiguous()
        targets = labels.contiguous(), frame_lengths.contiguous(), label_lengths.contiguous()
        lse = rows.new_empty(B, T, U1, dtype=dtype)
        at_blank, at_label = (rows.new_empty(B, N, U1, dtype=dtype) for _ in range(2))
        stay = rows.new_empty((B, N, U1) if wanted else 1, dtype=dtype)
        log_prob = rows.new_empty(B, dtype=dtype)
        with torch.cuda.device_of(rows):
            columns = _columns(V)
            row_statistics[(B * T * U1,)](rows, *targets, lse, at_blank, at_label, T, U1, V, blank, N, COLUMNS=columns)
            width = max(2, triton.next_power_of_2(U1))
            lattice[(B,)](
                at_blank,
                at_label,
                stay,
                *targets[1:],
                log_prob,
                U1,
                N,
                WIDTH=width,
                WANTED=wanted,
                num_warps=_warps(width),
            )
        if wanted:
            # in the places of the scores there are now the arcs' posteriors
            by_blank, by_label = at_blank, at_label.mul_(1 + fastemit_lambda)
            ctx.save_for_backward(logits, *targets, lse, by_blank, by_label)
            ctx.blank, ctx.inplace, ctx.threshold = blank, inplace, threshold
        return -log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_costs):
        logits, *targets, lse, by_blank, by_label = wavefront.saved_tensors(ctx)
        B, T, U1, V = logits.shape
        logits = logits.detach()
        rows = logits.contiguous()
        grad = rows if ctx.inplace else torch.empty_like(rows)
        scale = grad_costs.to(lse.dtype).contiguous()
        planes = (lse, by_blank, by_label, scale)
        with torch.cuda.device_of(rows):
            gradient[(B * T * U1,)](
                rows, grad, *targets, *planes, T, U1, V, ctx.blank, T + U1 - 1, ctx.threshold, COLUMNS=_columns(V)
            )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)  # autograd does not see what kernels write
        return grad, None, None, None, None, None


def _columns(V: int) -> int:
    return min(MOST_CLASSES_AT_ONCE, triton.next_power_of_2(V))


def _warps(width: int) -> int:
    return min(16, max(1, width // 32))


# Lengths differ from batch to batch: no kernel is compiled for special values of them.
@triton.jit(do_not_specialize=["T", "U1", "blank", "N"])
def row_statistics(
    logits, labels, frame_lengths, label_lengths, lse, at_blank, at_label, T, U1, V, blank, N, COLUMNS: tl.constexpr
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    u = row % U1
    t = (row // U1) % T
    b = row // U1 // T
    U = tl.load(label_lengths + b)
    if (t < tl.load(frame_lengths + b)) & (u <= U):
        dtype: tl.constexpr = lse.dtype.element_ty
        first = logits + row * V
        most = tl.full((), -INF, dtype)
        total = tl.zeros((), dtype)
        for start in range(0, V, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            part = tl.load(first + k, mask=k < V, other=-INF).to(dtype)
            higher = tl.maximum(most, tl.max(part, 0))
            shift = tl.where(higher == -INF, 0.0, higher)  # nothing but masked classes so far
            total = total * tl.exp(most - shift) + tl.sum(tl.exp(part - shift), 0)
            most = higher
        found = most + tl.log(total)
        tl.store(lse + row, found)
        place = (b * N + t + u) * U1 + u
        tl.store(at_blank + place, tl.load(first + blank).to(dtype) - found)
        if u < U:
            label = tl.load(labels + b * (U1 - 1) + u)
            tl.store(at_label + place, tl.load(first + label).to(dtype) - found)


@triton.jit(do_not_specialize=["U1", "N"])
def lattice(
    at_blank,
    at_label,
    stay,
    frame_lengths,
    label_lengths,
    log_prob,
    U1,
    N,
    WIDTH: tl.constexpr,
    WANTED: tl.constexpr,
):
    """One utterance a program. Where WANTED, the scores' planes hold the arcs' posteriors at the end."""
    b = tl.program_id(0).to(tl.int64)
    T = tl.load(frame_lengths + b).to(tl.int32)
    U = tl.load(label_lengths + b).to(tl.int32)
    dtype: tl.constexpr = at_blank.dtype.element_ty
    u = tl.arange(0, WIDTH)
    before = tl.maximum(u - 1, 0)
    after = tl.minimum(u + 1, WIDTH - 1)
    start = b * N * U1
    last = T + U - 1

    # of diagonal n, relative to its best
    score = tl.where(u == 0, 0.0, -INF).to(dtype)
    bests = tl.zeros((), dtype)
    lost = tl.zeros((), dtype)  # what their sum has lost to rounding
    for n in range(1, last + 1):
        t = n - u
        came_by_blank = (t >= 1) & (t < T) & (u <= U)
        came_by_label = (t >= 0) & (t < T) & (u >= 1) & (u <= U)
        place = start + (n - 1) * U1 + u
        by_blank = score + tl.load(at_blank + place, mask=came_by_blank, other=-INF)
        by_label = tl.gather(score, before, 0) + tl.load(at_label + place - 1, mask=came_by_label, other=-INF)
        most = tl.maximum(by_blank, by_label)
        most = tl.where(most == -INF, 0.0, most)
        by_blank = tl.exp(by_blank - most)
        both = by_blank + tl.exp(by_label - most)
        if WANTED:
            tl.store(stay + place + U1, tl.where(both == 0.0, 0.0, by_blank / both), mask=u <= U)
        score = tl.log(both) + most
        best = tl.max(score, 0)
        best = tl.where(best == -INF, 0.0, best)
        score -= best
        best -= lost
        summed = bests + best
        lost = (summed - bests) - best
        bests = summed

    end = start + last * U1 + U
    total = bests + tl.sum(tl.where(u == U, score, 0.0), 0) + tl.load(at_blank + end)
    tl.store(log_prob + b, total)
    if WANTED:
        tl.debug_barrier()  # nobody reads scores any more
        whole = tl.where(total == -INF, 0.0, total - total + 1.0)  # 0 without a path, NaN is NaN
        share = tl.where(u == U, whole, 0.0)
        tl.store(at_blank + end, whole)
        for i in range(0, last):
            n = last - i
            t = n - u
            inside = (t >= 0) & (t < T) & (u <= U)
            place = start + (n - 1) * U1 + u
            stayed = tl.load(stay + place + U1, mask=inside, other=0.0)
            by_blank = tl.where(inside & (t >= 1), share * stayed, 0.0)
            by_label = tl.where(inside & (u >= 1), share * (1.0 - stayed), 0.0)
            tl.store(at_blank + place, by_blank, mask=inside & (t >= 1))
            tl.store(at_label + place - 1, by_label, mask=inside & (u >= 1))
            share = by_blank + tl.where(u < WIDTH - 1, tl.gather(by_label, after, 0), 0.0)


@triton.jit(do_not_specialize=["T", "U1", "blank", "N"])
def gradient(
    logits,
    grad,
    labels,
    frame_lengths,
    label_lengths,
    lse,
    by_blank,
    by_label,
    scale,
    T,
    U1,
    V,
    blank,
    N,
    threshold,
    COLUMNS: tl.constexpr,
):
    """One row a program; ``grad`` may be the logits themselves."""
    row = tl.program_id(0).to(tl.int64)
    u = row % U1
    t = (row // U1) % T
    b = row // U1 // T
    frames = tl.load(frame_lengths + b)
    U = tl.load(label_lengths + b)
    place = (b * N + t + u) * U1 + u
    inside = (t < frames) & (u <= U)
    blank_leads_on = inside & ((t + 1 < frames) | (u == U))
    blank_share = tl.load(by_blank + place, mask=blank_leads_on, other=0.0)
    label_share = tl.load(by_label + place, mask=inside & (u < U), other=0.0)
    share = blank_share + label_share
    if share <= threshold:
        for start in range(0, V, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            tl.store(grad + row * V + k, tl.zeros((COLUMNS,), grad.dtype.element_ty), mask=k < V)
    else:  # a NaN, too
        dtype: tl.constexpr = lse.dtype.element_ty
        shift = tl.load(lse + row)
        factor = tl.load(scale + b)
        label = tl.load(labels + b * (U1 - 1) + u, mask=u < U, other=-1)
        for start in range(0, V, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            part = tl.load(logits + row * V + k, mask=k < V, other=-INF).to(dtype)
            part = tl.exp(part - shift) * share
            part -= tl.where(k == blank, blank_share, 0.0) + tl.where(k == label, label_share, 0.0)
            tl.store(grad + row * V + k, (part * factor).to(grad.dtype.element_ty), mask=k < V)
