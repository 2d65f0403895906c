"""The fast RNN-T loss in plain PyTorch: the logits are read once forward and, where it matters, once backward.

Forward: log-sum-exp of every row in tiles that stay in the cache, then the lattice (`topologies.py`) on planes that are
V times smaller. Backward: with the posteriors of the two arcs out of a cell, its gradient is

    dL/dz_k = p_k w - 1[k = blank] blank_share - 1[k = label] (1 + lambda) label_share,
    w       = blank_share + (1 + lambda) label_share

as warp-transducer has it (FastEmit: Yu et al. 2020, arXiv:2010.11148). Cells whose w is at most `threshold` get exact
zeros and are not read. The gradient takes the place of the logits where nobody is hurt by it: `may_overwrite`.

B utterances, T frames, U labels, V classes; a row is the V logits of one cell. Offsets are torch's, 64 bits wide.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from espnet_mega_plugin.once import once_differentiable
from espnet_mega_plugin.processor import runs_mkl_well
from espnet_mega_plugin.rnnt.topologies import shares

# On the CPU a tile is written and read several times over; each thread's share of it has to stay in a core's cache.
CPU_TILE_BYTES = 1 << 19
# On other devices a tile has to fill the device, and what is made of it has to stay small beside the logits.
DEVICE_TILE_BYTES = 1 << 26

# Posteriors too small to change a gradient of these types by more than their rounding does (float32: the error against
# float64 is the same for 1e-8 to 1e-30; tests/rnnt/test_loss_laws.py).
THRESHOLD = {torch.float32: 1e-9, torch.float64: 1e-18}

# Logits up to this are far from what overflows or vanishes in a float32 sum of exponentials
SMALL = 40.0
# A shift as large as a row's log-sum-exp is rounded, and its exponential with it: float32, 16 to 32: by 7e-7 at most
LARGE = {torch.float32: 16.0, torch.float64: 1e6}

Tile = tuple[slice, slice, slice]  # utterances, frames, rows


class Base(NamedTuple):
    """A base for the exponentials: exp(x) = base ** (per_nat x)."""

    per_nat: dict[torch.dtype, float]  # as these types have it
    power_: Callable[[Tensor], Tensor]  # base ** x, in place
    log_: Callable[[Tensor], Tensor]


TWO = Base(
    {torch.float32: torch.tensor(math.log2(math.e)).item(), torch.float64: math.log2(math.e)},
    torch.Tensor.exp2_,
    torch.Tensor.log2_,
)
E = Base({torch.float32: 1.0, torch.float64: 1.0}, torch.Tensor.exp_, torch.Tensor.log_)


@functools.cache
def base(device: str) -> Base:
    """The one whose power is quicker. torch's exp is MKL's, which is made for Intel's processors; its exp2 is SLEEF's.

    On an AMD EPYC exp is the slower one, on an Intel Xeon the quicker (torch 2.12, one thread). With either, a factor
    and a shift cost one pass, as the product and the sum are one rounded instruction.
    """
    return E if device == "cpu" and runs_mkl_well() else TWO


def costs(
    logits: Tensor,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    blank: int = 0,
    fastemit_lambda: float = 0.0,
    *,
    inplace: bool = True,
    threshold: float | None = None,
    topology: str = "regular",
) -> Tensor:
    """-log P of each utterance. (B,) float64 for float64 logits, else float32

    Args: as `reference.costs`, but labels beyond an utterance's length have to be classes, too.
        inplace: whether backward writes the gradient over the logits where `may_overwrite` allows it.
        threshold: posterior up to which the gradient of a cell is zero. None: as `THRESHOLD` has it.
        topology: one of `topologies.TOPOLOGIES`.
    """
    if threshold is None:
        threshold = THRESHOLD[accumulator(logits.dtype)]
    wanted = torch.is_grad_enabled() and logits.requires_grad
    options = (blank, fastemit_lambda, inplace and wanted and may_overwrite(logits), threshold, topology)
    return _Costs.apply(logits, labels, frame_lengths, label_lengths, options, wanted)


def may_overwrite(logits: Tensor) -> bool:
    """Whether backward may write over these logits. Where another operation needs them nonetheless, autograd raises.

    Not where they are a leaf or look into one, nor where elements share memory; not where the operation they come from
    needs them in its backward (softmax, tanh, …) or is one of Python's, which may keep or look into anything; not where
    they are a part of a larger tensor, whose other parts share the version counter; not under saved-tensor hooks
    (activation checkpointing), where autograd compares no versions.
    """
    whole = logits if logits._base is None else logits._base
    made_by = logits.grad_fn, whole.grad_fn
    return (
        not whole.is_leaf
        and not logits.is_leaf
        and logits.is_contiguous()
        and logits.numel() == whole.numel()
        and not any(hasattr(type(one), "_saved_result") or isinstance(one, BackwardCFunction) for one in made_by)
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def lengths_are_free(logits: Tensor) -> bool:
    """Whether the loops may go by lengths and posteriors; on other devices reading them would synchronise."""
    return logits.device.type == "cpu"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type sums of this type are made in, which is also the type of the result."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_tensors(ctx) -> tuple[Tensor, ...]:
    """What forward saved; where the logits among it were overwritten since, an error that says by what."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "The logits of rnnt_loss were overwritten before its backward: by a first backward (the gradient takes "
            "their place where they are no leaf) or by another in-place operation. To run backward twice or to use "
            "the same logits in two losses, call rnnt_loss with inplace=False."
        ) from error


class _Costs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, frame_lengths, label_lengths, options, wanted):
        blank, fastemit_lambda, inplace, threshold, topology = options
        dtype = accumulator(logits.dtype)
        at_blank = logits[..., blank].to(dtype)
        at_label = torch.full_like(at_blank, -torch.inf)
        at_label[..., :-1] = logits[:, :, :-1].gather(3, _label_index(labels, logits.shape))[..., 0]
        # On a trained model's path the blank or the next label has almost all of the probability.
        near, rest = row_logsumexp(logits, torch.maximum(at_blank, at_label), frame_lengths, label_lengths)
        at_blank, at_label = ((x.double() - near).sub_(rest) for x in (at_blank, at_label))
        log_prob, by_blank, by_label = shares(at_blank, at_label, frame_lengths, label_lengths, topology, wanted)
        if wanted:
            by_label.mul_(1 + fastemit_lambda)
            weight = by_blank + by_label
            dropped = weight <= threshold  # a NaN stays
            pivot, offset = pivots(near.masked_fill_(dropped, 0.0), rest.masked_fill_(dropped, 0.0), dtype)
            # p_k w = exp(logit - pivot - offset); nothing is left at +inf
            offset = offset.sub_(weight.log()).masked_fill_(dropped, torch.inf)
            at_blank.exp_().mul_(weight).sub_(by_blank).masked_fill_(dropped, 0.0)
            at_label.exp_().mul_(weight).sub_(by_label).masked_fill_(dropped, 0.0)
            ctx.save_for_backward(logits, labels, offset, at_blank, at_label, pivot)
            ctx.blank, ctx.inplace = blank, inplace
        return (-log_prob).to(dtype)

    @staticmethod
    @once_differentiable(saved_tensors)
    def backward(ctx, saved, grad_costs):
        logits, labels, offset, at_blank, at_label, pivot = saved
        logits = logits.detach()
        grad = logits if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        dtype = accumulator(logits.dtype)
        scale = grad_costs.double()[:, None, None]
        kept = offset != torch.inf
        shift = exponent(scale.abs().log() - offset, dtype).masked_fill_(~kept, -torch.inf)
        if lengths_are_free(logits):
            exp_on_bands(grad, logits, shift, kept, grad_costs.tolist(), pivot)
        else:
            exp_everywhere(grad, logits, shift, kept, scale.sign(), pivot)
        at_blank, at_label = (
            without_subnormals((entry * scale).masked_fill_(~kept, 0.0).to(dtype)) for entry in (at_blank, at_label)
        )
        # Where the next label is padding its place is the blank's, so the blank's entry is written last.
        places = _places_of_labels(labels, grad)
        grad.view(-1)[places] = at_label[..., :-1].to(grad.dtype)  # scatter_ would copy a half type to float32
        grad[..., ctx.blank] = at_blank.to(grad.dtype)
        return grad, None, None, None, None, None


def _places_of_labels(labels: Tensor, grad: Tensor) -> Tensor:
    """Where each cell's next label is in the flattened gradient. (B, T, U)"""
    B, T, U1, V = grad.shape
    rows = torch.arange(B * T * U1, device=grad.device).view(B, T, U1)[..., :-1] * V
    return rows + labels[:, None, :]


def _label_index(labels: Tensor, shape: torch.Size) -> Tensor:
    B, T, U1, _ = shape
    return labels[:, None, :, None].expand(B, T, U1 - 1, 1)


def row_logsumexp(logits: Tensor, near: Tensor, frame_lengths: Tensor, label_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """log(sum(exp(logits))) over the classes, as near + rest. Both (B, T, U+1) float64, arbitrary outside the lengths

    Two numbers, as one loses the rest where logits are huge: beside a mask's -1e30 nothing is left of log(V).
    Rows holding NaN or +inf, or nothing but -inf, give what makes the loss NaN.

    Args:
        near: a guess at the result, for precision and speed; often a large logit of the row. (B, T, U+1)
    """
    if not lengths_are_free(logits):
        most, rest = (torch.empty_like(near, dtype=torch.float64) for _ in range(2))
        for tile in _tiles_everywhere(logits):
            most[tile], rest[tile] = _shifted_logsumexp(logits[tile].to(near.dtype))
        return most, rest

    # The guess saves the pass that looks for a row's maximum, and where all are small there is nothing to take off.
    # Rows it does not suit are done again: those that overflow, and those whose exponent had to be rounded much.
    power = base(logits.device.type)
    outside = _outside(near, frame_lengths, label_lengths)
    small = ((near.abs() < SMALL) | outside).flatten(1).all(1, keepdim=True)[..., None] & (power is E)  # (B, 1, 1)
    shift = near.masked_fill(~(near.abs() < 1e4) | small, 0.0).mul_(-power.per_nat[near.dtype])
    nothing_off = small.flatten().tolist()
    sums = torch.ones_like(near)
    buffer = near.new_empty(0)
    for b, (part, off, out) in _parts((logits, shift, sums), frame_lengths.tolist(), label_lengths.tolist()):
        if part.numel() > buffer.numel():
            buffer = near.new_empty(part.numel())
        exps = buffer[: part.numel()].view(part.shape)
        if not nothing_off[b]:
            _exp(exps, part, off)
        elif part.dtype == exps.dtype:
            torch.exp(part, out=exps)
        else:
            exps.copy_(part).exp_()
        torch.sum(exps, -1, out=out)
    most = torch.where(small, 1e30, math.exp(LARGE[torch.float32]))
    unsuited = ~((sums > 1e-25) & (sums < most))
    near = shift.double().div_(-power.per_nat[shift.dtype])
    rest = power.log_(sums.double()).div_(power.per_nat[shift.dtype])
    if unsuited.any():
        for cells in unsuited.nonzero().split(_rows_of_a_tile(logits)):
            cells = cells.unbind(1)
            near[cells], rest[cells] = _shifted_logsumexp(logits[cells].to(shift.dtype))
    return near, rest


def _shifted_logsumexp(rows: Tensor) -> tuple[Tensor, Tensor]:
    most = rows.amax(-1, keepdim=True)
    return most[..., 0].double(), (rows - most).exp_().sum(-1).double().log_()


def pivots(near: Tensor, rest: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """What to take off each row's logits before the exponential, and what is then left of near + rest. As `near`

    0 and all of it where the logits are small. None: all are.
    """
    lse = near + rest
    pivot = lse.masked_fill(~((lse.abs() > LARGE[dtype]) & lse.isfinite()), 0.0).to(dtype)
    if lengths_are_free(pivot) and not pivot.any():
        return None, lse
    return pivot, (near - pivot).add_(rest)


def exponent(shift: Tensor, dtype: torch.dtype) -> Tensor:
    """What `_exp` takes for exp(logits - pivot + shift). shift: float64, infinities stay"""
    return (shift * base(shift.device.type).per_nat[dtype]).to(dtype)


def _exp(out: Tensor, logits: Tensor, shift: Tensor, pivot: Tensor | None = None) -> None:
    """out = base ** ((logits - pivot) * per_nat + shift), shift and pivot a number for each row."""
    if logits.dtype != out.dtype:
        logits = out.copy_(logits)
    if pivot is not None:
        logits = torch.sub(logits, pivot[..., None], out=out)
    power = base(out.device.type)
    power.power_(torch.add(shift[..., None], logits, alpha=power.per_nat[out.dtype], out=out))


def without_subnormals(entries: Tensor) -> Tensor:
    return entries.masked_fill_(entries.abs() < torch.finfo(entries.dtype).tiny, 0.0)


def exp_on_bands(
    grad: Tensor, logits: Tensor, shift: Tensor, kept: Tensor, scale: list[float], pivot: Tensor | None
) -> None:
    """Fills the band of kept rows of each frame by `_exp`, the rest with zeros, where nothing is read."""
    for b, t, u in _tiles_of_bands(logits, kept):
        if u.start < u.stop:
            off = None if pivot is None else pivot[b, t, u]
            exp_without_subnormals(grad[b, t, u], logits[b, t, u], shift[b, t, u], off)
            if scale[b.start] < 0:
                grad[b, t, u].neg_()
        grad[b, t, : u.start].zero_()
        grad[b, t, u.stop :].zero_()


def exp_everywhere(
    grad: Tensor, logits: Tensor, shift: Tensor, kept: Tensor, sign: Tensor, pivot: Tensor | None
) -> None:
    """The same without asking the device which rows are kept."""
    for tile in _tiles_everywhere(logits):
        exp_without_subnormals(grad[tile], logits[tile], shift[tile], None if pivot is None else pivot[tile])
        grad[tile].mul_(sign[tile[0]][..., None]).masked_fill_(~kept[tile][..., None], 0.0)


def exp_without_subnormals(grad: Tensor, logits: Tensor, shift: Tensor, pivot: Tensor | None) -> None:
    """Subnormal numbers make the matrix products behind this gradient several times slower."""
    values = grad if grad.dtype == shift.dtype else torch.empty_like(grad, dtype=shift.dtype)
    _exp(values, logits, shift, pivot)
    torch.threshold_(values, torch.finfo(values.dtype).tiny, 0.0)
    if values is not grad:
        grad.copy_(values)


def _rows_of_a_tile(logits: Tensor) -> int:
    size = logits.shape[3] * accumulator(logits.dtype).itemsize
    return max(1, CPU_TILE_BYTES * torch.get_num_threads() // size)


def _outside(plane: Tensor, frame_lengths: Tensor, label_lengths: Tensor) -> Tensor:
    """Which cells lie outside the lengths. (B, T, U+1) bool"""
    t, u = (torch.arange(n, device=plane.device) for n in plane.shape[1:3])
    return (t[:, None] >= frame_lengths[:, None, None]) | (u > label_lengths[:, None, None])


def _parts(
    planes: tuple[Tensor, ...], frame_lengths: list[int], label_lengths: list[int]
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """An utterance and the same part of each plane, the logits first; in all every row within the lengths, no other."""
    most = _rows_of_a_tile(planes[0])
    for b, (T, U) in enumerate(zip(frame_lengths, label_lengths, strict=True)):
        of_frames = (plane[b, :T, : U + 1].split(max(1, most // (U + 1))) for plane in planes)
        for parts in zip(*of_frames, strict=True):
            if U + 1 <= most:
                yield b, parts
            else:
                yield from ((b, rows) for rows in zip(*(part.split(most, 1) for part in parts), strict=True))


def _tiles_of_bands(logits: Tensor, kept: Tensor) -> Iterator[Tile]:
    """Tiles that hold every frame once and every kept row; frames join as long as the tile stays small.

    Frames without a kept row, which may be padding, join only one another: their rows are none.
    """
    B, T, U1, _ = logits.shape
    most = _rows_of_a_tile(logits)
    u = torch.arange(U1)
    first = torch.where(kept, u, U1).amin(2).tolist()
    stop = torch.where(kept, u + 1, 0).amax(2).tolist()
    for b in range(B):
        start, low, high = 0, first[b][0], stop[b][0]
        for t in range(1, T):
            lower, higher = min(low, first[b][t]), max(high, stop[b][t])
            if (higher - lower) * (t + 1 - start) > most or (stop[b][t] == 0) != (high == 0):
                yield slice(b, b + 1), slice(start, t), slice(low, max(low, high))
                start, lower, higher = t, first[b][t], stop[b][t]
            low, high = lower, higher
        yield slice(b, b + 1), slice(start, T), slice(low, max(low, high))


def _tiles_everywhere(logits: Tensor) -> Iterator[Tile]:
    """Tiles of several utterances, or of several frames of one."""
    B, T, U1, V = logits.shape
    row = U1 * V * accumulator(logits.dtype).itemsize
    utterances = max(1, DEVICE_TILE_BYTES // (T * row))
    frames = T if utterances > 1 else max(1, DEVICE_TILE_BYTES // row)
    for b in range(0, B, utterances):
        for t in range(0, T, frames):
            yield slice(b, b + utterances), slice(t, t + frames), slice(0, U1)
