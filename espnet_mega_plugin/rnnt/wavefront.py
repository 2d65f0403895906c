"""The fast RNN-T loss in plain PyTorch: the logits are read once forward and, where it matters, once backward.

Forward: log-sum-exp of every row in tiles that stay in the cache, then the lattice (`lattice.py`) on planes that are
V times smaller. Backward: with the posteriors of the two arcs out of a cell, its gradient is

    dL/dz_k = p_k w - 1[k = blank] blank_share - 1[k = label] (1 + lambda) label_share,
    w       = blank_share + (1 + lambda) label_share

as warp-transducer has it (FastEmit: Yu et al. 2020, arXiv:2010.11148). Cells whose w is at most `threshold` get exact
zeros and are not read. The gradient takes the place of the logits where nobody is hurt by it: `may_overwrite`.

B utterances, T frames, U labels, V classes; a row is the V logits of one cell. Offsets are torch's, 64 bits wide.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espnet_mega_plugin.rnnt.lattice import shares

# On the CPU a tile is written and read several times over and has to stay in a core's cache.
CPU_TILE_BYTES = 1 << 20
# On other devices a tile has to fill the device, and what is made of it has to stay small beside the logits.
DEVICE_TILE_BYTES = 1 << 26

Tile = tuple[slice, slice, slice]  # utterances, frames, rows


def costs(
    logits: Tensor,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    blank: int = 0,
    fastemit_lambda: float = 0.0,
    *,
    inplace: bool | None = None,
    threshold: float = 1e-9,
) -> Tensor:
    """-log P of each utterance. (B,) float64 for float64 logits, else float32

    Args: as `reference.costs`, but labels beyond an utterance's length have to be classes, too.
        inplace: whether backward writes the gradient over the logits; None leaves it to `may_overwrite`.
        threshold: posterior up to which the gradient of a cell is zero.
    """
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if inplace is None:
        inplace = wanted and may_overwrite(logits)
    options = (blank, fastemit_lambda, inplace, threshold)
    return _Costs.apply(logits, labels, frame_lengths, label_lengths, options, wanted)


def may_overwrite(logits: Tensor) -> bool:
    """Whether backward may write over these logits, with autograd raising where somebody else needs them.

    Not where they are a leaf or look into one; not where they are a part of a larger tensor, whose other parts share
    the version counter; not where elements share memory; and not under saved-tensor hooks (activation checkpointing),
    for which autograd does not compare versions.
    """
    base = logits._base
    return (
        not logits.is_leaf
        and logits.is_contiguous()
        and (base is None or (not base.is_leaf and base.numel() == logits.numel()))
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type sums of this type are made in, which is also the type of the result."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Costs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, frame_lengths, label_lengths, options, wanted):
        blank, fastemit_lambda, inplace, threshold = options
        lse = row_logsumexp(logits, frame_lengths, label_lengths)
        blank_scores = logits[..., blank].double() - lse
        label_scores = torch.zeros_like(lse)
        picked = logits[:, :, :-1].gather(3, _label_index(labels, logits.shape))[..., 0]
        label_scores[..., :-1] = picked.double() - lse[..., :-1]
        log_prob, by_blank, by_label = shares(blank_scores, label_scores, frame_lengths, label_lengths, wanted)
        if wanted:
            by_label.mul_(1 + fastemit_lambda)
            weight = by_blank + by_label
            dropped = weight <= threshold  # a NaN stays
            # p_k w = exp(logit - offset); nothing comes of +inf
            offset = lse.sub_(weight.log()).masked_fill_(dropped, torch.inf)
            at_blank = blank_scores.exp_().mul_(weight).sub_(by_blank).masked_fill_(dropped, 0.0)
            at_label = label_scores.exp_().mul_(weight).sub_(by_label).masked_fill_(dropped, 0.0)
            ctx.save_for_backward(logits, labels, offset, at_blank, at_label)
            ctx.blank, ctx.inplace = blank, inplace
        return (-log_prob).to(accumulator(logits.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_costs):
        logits, labels, offset, at_blank, at_label = _saved(ctx)
        logits = logits.detach()
        grad = logits if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        scale = grad_costs.double()[:, None, None]
        kept = offset != torch.inf
        offset = torch.where(kept, offset - scale.abs().log(), torch.inf).to(accumulator(logits.dtype))
        if logits.device.type == "cpu":
            _softmax_on_bands(grad, logits, offset, kept, grad_costs.tolist())
        else:
            _softmax_everywhere(grad, logits, offset, kept, scale.sign())
        # Where the next label is padding it is the blank, so the blank's entry is written last.
        index = _label_index(labels, logits.shape)
        grad[:, :, :-1].scatter_(3, index, (at_label * scale)[:, :, :-1, None].to(grad.dtype))
        grad[..., ctx.blank] = (at_blank * scale).to(grad.dtype)
        return grad, None, None, None, None, None


def _saved(ctx) -> tuple[Tensor, ...]:
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


def _label_index(labels: Tensor, shape: torch.Size) -> Tensor:
    B, T, U1, _ = shape
    return labels[:, None, :, None].expand(B, T, U1 - 1, 1)


def row_logsumexp(logits: Tensor, frame_lengths: Tensor, label_lengths: Tensor) -> Tensor:
    """log(sum(exp(logits))) over the classes, (B, T, U+1) float64; 0 outside the lengths on the CPU.

    A row that holds NaN or +inf, or -inf alone, gives NaN or inf, which makes the loss NaN.
    """
    B, T, U1, V = logits.shape
    dtype = accumulator(logits.dtype)
    if logits.device.type != "cpu":
        lse = logits.new_empty((B, T, U1), dtype=torch.float64)
        for tile in _tiles_everywhere(logits):
            lse[tile] = _shifted_logsumexp(logits[tile].to(dtype))
        return lse

    # Without the shift by the row's maximum a pass is saved; rows this does not suit are done again.
    sums = logits.new_ones((B, T, U1), dtype=dtype)
    buffer = logits.new_empty(0, dtype=dtype)
    for tile in _tiles_within(logits, frame_lengths.tolist(), label_lengths.tolist()):
        part = logits[tile]
        if part.numel() > buffer.numel():
            buffer = logits.new_empty(part.numel(), dtype=dtype)
        exps = buffer[: part.numel()].view(part.shape)
        if logits.dtype == dtype:
            torch.exp(part, out=exps)
        else:
            exps.copy_(part).exp_()
        torch.sum(exps, -1, out=sums[tile])
    unsuited = ~((sums > 1e-25) & (sums < 1e30))
    lse = sums.double().log_()
    if unsuited.any():
        for cells in unsuited.nonzero().split(max(1, CPU_TILE_BYTES // (V * dtype.itemsize))):
            cells = cells.unbind(1)
            lse[cells] = _shifted_logsumexp(logits[cells].to(dtype))
    return lse


def _shifted_logsumexp(rows: Tensor) -> Tensor:
    most = rows.amax(-1, keepdim=True)
    return (rows - most).exp_().sum(-1).double().log_().add_(most[..., 0])


def _softmax_on_bands(grad: Tensor, logits: Tensor, offset: Tensor, kept: Tensor, scale: list[float]) -> None:
    """grad = exp(logits - offset) on the band of kept rows of each frame, 0 elsewhere, where nothing is read."""
    for b, t, u in _tiles_of_bands(logits, kept):
        if u.start < u.stop:
            _softmax(grad[b, t, u], logits[b, t, u], offset[b, t, u, None])
            if scale[b.start] < 0:
                grad[b, t, u].neg_()
        grad[b, t, : u.start].zero_()
        grad[b, t, u.stop :].zero_()


def _softmax_everywhere(grad: Tensor, logits: Tensor, offset: Tensor, kept: Tensor, sign: Tensor) -> None:
    """The same without asking the device which rows are kept."""
    for tile in _tiles_everywhere(logits):
        _softmax(grad[tile], logits[tile], offset[tile][..., None])
        grad[tile].mul_(sign[tile[0], ..., None]).masked_fill_(~kept[tile][..., None], 0.0)


def _softmax(grad: Tensor, logits: Tensor, offset: Tensor) -> None:
    same = grad.dtype == offset.dtype
    values = torch.sub(logits, offset, out=grad) if same else logits - offset
    values.exp_()
    # Subnormal numbers make the matrix products behind this gradient several times slower.
    torch.threshold_(values, torch.finfo(values.dtype).tiny, 0.0)
    if not same:
        grad.copy_(values)


def _tiles_within(logits: Tensor, frame_lengths: list[int], label_lengths: list[int]) -> Iterator[Tile]:
    """Tiles of whole frames that hold every row within the lengths and none outside."""
    V = logits.shape[3]
    for b, (T, U) in enumerate(zip(frame_lengths, label_lengths, strict=True)):
        frames = max(1, CPU_TILE_BYTES // ((U + 1) * V * accumulator(logits.dtype).itemsize))
        for t in range(0, T, frames):
            yield slice(b, b + 1), slice(t, min(t + frames, T)), slice(0, U + 1)


def _tiles_of_bands(logits: Tensor, kept: Tensor) -> Iterator[Tile]:
    """Tiles that hold every frame once and every kept row; frames join a tile as long as it stays small."""
    B, T, U1, V = logits.shape
    most = max(1, CPU_TILE_BYTES // (V * accumulator(logits.dtype).itemsize))
    u = torch.arange(U1)
    first = torch.where(kept, u, U1).amin(2).tolist()
    stop = torch.where(kept, u + 1, 0).amax(2).tolist()
    for b in range(B):
        start, low, high = 0, U1, 0
        for t in range(T):
            wider = min(low, first[b][t]), max(high, stop[b][t])
            if t > start and (wider[1] - wider[0]) * (t + 1 - start) > most:
                yield slice(b, b + 1), slice(start, t), slice(low, max(low, high))
                start, wider = t, (first[b][t], stop[b][t])
            low, high = wider
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
