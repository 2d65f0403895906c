"""The standard loss as three Triton kernels for CUDA devices: the logits are read once forward, once backward at most.

`row_statistics` reduces each row to its maximum, the sum of exponentials relative to it (log-sum-exp as one number
would lose digits where logits are large) and the log-probabilities of blank and next label. `lattice` walks the
diagonals of one utterance: forward it keeps, for each cell, the share of its probability that came by the blank arc,
backward it deals out the posterior by these shares, without another exponential. Scores are relative to the best of
their diagonal, whose sum is compensated, so float32 is enough (float64 for float64 logits). `gradient` writes the rows
that carry posterior and fills the others with zeros, unread. The first and the last take whole logits or, given
``cells``, a tile of the rows of these: that is for the loss fused with the joint network (`fused_kernels.py`).

Planes of the lattice are stored by diagonals: cell (t, u) at (t + u, u), so that a diagonal is read in one piece.
B utterances, T frames, U labels, V classes, N = T + U diagonals; a row is the V logits of one cell. Offsets that count
rows or logits have 64 bits. Importing this needs Triton; `TRITON_INTERPRET=1` before that runs it on CPU tensors.
"""

import torch
from torch import Tensor

from espnet_mega_plugin.once import once_differentiable
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
        most, total, at_blank, at_label = planes(rows, B, T, U1, dtype)
        with torch.cuda.device_of(rows):
            row_statistics[(B * T * U1,)](
                rows, None, *targets, most, total, at_blank, at_label, T, U1, V, blank, N, COLUMNS=columns(V)
            )
            log_prob = walk(at_blank, at_label, *targets[1:], wanted)
        if wanted:
            by_blank, by_label = at_blank, at_label.mul_(1 + fastemit_lambda)
            ctx.save_for_backward(logits, *targets, most, total, by_blank, by_label)
            ctx.blank, ctx.inplace, ctx.threshold = blank, inplace, threshold
        return -log_prob

    @staticmethod
    @once_differentiable(wavefront.saved_tensors)
    def backward(ctx, saved, grad_costs):
        logits, *targets, most, total, by_blank, by_label = saved
        B, T, U1, V = logits.shape
        logits = logits.detach()
        rows = logits.contiguous()
        grad = rows if ctx.inplace else torch.empty_like(rows)
        scale = grad_costs.to(most.dtype).contiguous()
        sizes = T, U1, V, ctx.blank, T + U1 - 1
        with torch.cuda.device_of(rows):
            gradient[(B * T * U1,)](
                *(rows, grad, None, *targets, most, total, by_blank, by_label, scale, *sizes, ctx.threshold),
                COLUMNS=columns(V),
                TINY=torch.finfo(most.dtype).tiny,
            )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)  # autograd does not see what kernels write
        return grad, None, None, None, None, None


def planes(like: Tensor, B: int, T: int, U1: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `row_statistics` fills: maxima and sums (B, T, U+1), scores of blank and next label (B, N, U+1)."""
    shapes = 2 * ((B, T, U1),) + 2 * ((B, T + U1 - 1, U1),)
    return tuple(like.new_empty(shape, dtype=dtype) for shape in shapes)


def walk(at_blank: Tensor, at_label: Tensor, frame_lengths: Tensor, label_lengths: Tensor, wanted: bool) -> Tensor:
    """log P of each utterance. Where ``wanted``, the arcs' posteriors take the place of their scores. (B,)"""
    B, N, U1 = at_blank.shape
    stay, log_prob = at_blank.new_empty((B, N, U1) if wanted else 1), at_blank.new_empty(B)
    width = max(2, triton.next_power_of_2(U1))
    lattice[(B,)](
        *(at_blank, at_label, stay, frame_lengths, label_lengths, log_prob, U1, N),
        WIDTH=width,
        WANTED=wanted,
        num_warps=_warps(width),
    )
    return log_prob


def columns(V: int) -> int:
    return min(MOST_CLASSES_AT_ONCE, triton.next_power_of_2(V))


def _warps(width: int) -> int:
    """For rows padded to this width; above 4096, U from 4096 up, some of a thread's numbers spill into memory."""
    return min(16, max(1, width // 32))


# Lengths differ from batch to batch: no kernel is compiled for special values of them.
@triton.jit(do_not_specialize=["T", "U1", "blank", "N"])
def row_statistics(
    logits,
    cells,
    labels,
    frame_lengths,
    label_lengths,
    most,
    total,
    at_blank,
    at_label,
    T,
    U1,
    V,
    blank,
    N,
    COLUMNS: tl.constexpr,
):
    """One row a program; ``cells`` are those that the rows belong to, None where each cell has its row."""
    row = tl.program_id(0).to(tl.int64)
    if cells is None:
        cell = row
    else:
        cell = tl.load(cells + row)
    u = cell % U1
    t = (cell // U1) % T
    b = cell // U1 // T
    U = tl.load(label_lengths + b)
    if (t < tl.load(frame_lengths + b)) & (u <= U):
        dtype: tl.constexpr = most.dtype.element_ty
        first = logits + row * V
        highest = tl.full((), -INF, dtype)
        summed = tl.zeros((), dtype)
        for start in range(0, V, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            part = tl.load(first + k, mask=k < V, other=-INF).to(dtype)
            higher = tl.maximum(highest, tl.max(part, 0))
            shift = tl.where(higher == -INF, 0.0, higher)  # nothing but masked classes so far
            summed = summed * tl.exp(highest - shift) + tl.sum(tl.exp(part - shift), 0)
            highest = higher
        tl.store(most + cell, highest)
        tl.store(total + cell, summed)
        place = (b * N + t + u) * U1 + u
        rest = tl.log(summed)
        tl.store(at_blank + place, (tl.load(first + blank).to(dtype) - highest) - rest)
        if u < U:
            label = tl.load(labels + b * (U1 - 1) + u)
            tl.store(at_label + place, (tl.load(first + label).to(dtype) - highest) - rest)


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


@triton.jit
def posteriors(by_blank, by_label, b, t, u, frames, U, U1, N):
    """Of the arcs out of cell (t, u): its blank and its label arc, 0 where it has none."""
    place = (b * N + t + u) * U1 + u
    inside = (t < frames) & (u <= U)
    blank_share = tl.load(by_blank + place, mask=inside & ((t + 1 < frames) | (u == U)), other=0.0)
    label_share = tl.load(by_label + place, mask=inside & (u < U), other=0.0)
    return blank_share, label_share


@triton.jit(do_not_specialize=["T", "U1", "blank", "N"])
def gradient(
    logits,
    grad,
    cells,
    labels,
    frame_lengths,
    label_lengths,
    most,
    total,
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
    TINY: tl.constexpr,
):
    """One row a program, as in `row_statistics`; ``grad`` may be the logits themselves. Below TINY it is 0."""
    row = tl.program_id(0).to(tl.int64)
    if cells is None:
        cell = row
    else:
        cell = tl.load(cells + row)
    u = cell % U1
    t = (cell // U1) % T
    b = cell // U1 // T
    U = tl.load(label_lengths + b)
    blank_share, label_share = posteriors(by_blank, by_label, b, t, u, tl.load(frame_lengths + b), U, U1, N)
    share = blank_share + label_share
    if share <= threshold:
        for start in range(0, V, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            tl.store(grad + row * V + k, tl.zeros((COLUMNS,), grad.dtype.element_ty), mask=k < V)
    else:  # a NaN, too
        dtype: tl.constexpr = most.dtype.element_ty
        highest = tl.load(most + cell)
        weight = share / tl.load(total + cell)
        factor = tl.load(scale + b)
        label = tl.load(labels + b * (U1 - 1) + u, mask=u < U, other=-1)
        for start in range(0, V, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            part = tl.load(logits + row * V + k, mask=k < V, other=-INF).to(dtype)
            part = tl.exp(part - highest) * weight
            part -= tl.where(k == blank, blank_share, 0.0) + tl.where(k == label, label_share, 0.0)
            part *= factor
            part = tl.where(tl.abs(part) < TINY, 0.0, part)
            tl.store(grad + row * V + k, part.to(grad.dtype.element_ty), mask=k < V)
