"""The pruned RNN-T loss in four functions, with k2's names, arguments and meaning; k2 itself is not needed.

    simple_loss, (px_grad, py_grad) = rnnt_loss_smoothed(lm, am, symbols, blank, boundary=boundary, return_grad=True)
    ranges = get_rnnt_prune_ranges(px_grad, py_grad, boundary, s_range=5)
    am_pruned, lm_pruned = do_rnnt_pruning(enc, dec, ranges)
    pruned_loss = rnnt_loss_pruned(joint(am_pruned, lm_pruned), symbols, ranges, blank, boundary)

The first loss belongs to a joint network that merely adds; where its paths go, the second looks at R rows of each frame
instead of all S+1. Source: Kuang et al. 2022 (arXiv:2206.13236); delay penalty: Kang et al. 2022 (arXiv:2211.00490).
Sums over classes are float32 (float64 for float64 inputs and in the simple loss), the lattice is float64.

k2's letters: B utterances, T frames, S labels (U elsewhere), C classes (V elsewhere), R = s_range rows kept a frame;
px are scores of labels, py scores of the blank, which k2 calls the termination symbol. ``boundary`` is (B, 4): for each
utterance 0, 0, its labels, its frames; None stands for 0, 0, S, T. k2 lets paths begin elsewhere, we do not. It may
lie on the CPU whatever the device of the others; then no function waits for a device.
"""

from typing import Literal

import torch
from torch import Tensor

from espnet_mega_plugin.once import once_differentiable
from espnet_mega_plugin.rnnt import arguments, topologies, wavefront
from espnet_mega_plugin.rnnt.topologies import TOPOLOGIES
from espnet_mega_plugin.rnnt.wavefront import accumulator

NAMES = {
    "acts": "the logits",
    "labels": "symbols",
    "act_lens": "boundary[:, 3]",
    "label_lens": "boundary[:, 2]",
    "blank": "termination_symbol",
}
Type = Literal["regular", "modified", "constrained"]


def rnnt_loss_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: Type = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
    *,
    check: bool | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """The loss of a joint network that adds ``lm`` and ``am``; (B, T, S+1, C) is never built.

    Its log-probabilities are mixed with those of two simpler models, which keeps them from becoming sharp before
    encoder or decoder have learnt something: one sees ``lm`` alone, one ``am`` and how frequent classes are in ``lm``.

    A cell's sum over classes is one of products of exponentials, in float64 for every type: right down to e**-700 of
    the product of the largest ones of ``lm`` and ``am``, and cut off there.

    Args:
        lm: decoder output as logits. (B, S+1, C), finite in padding, too
        am: encoder output as logits. (B, T, C), finite in padding, too
        symbols: labels; what lies beyond an utterance's length is not read. (B, S)
        termination_symbol: the blank's class, -1 for the last one.
        lm_only_scale, am_only_scale: shares of the simpler models, 0 to 1 together.
        boundary: lengths. (B, 4)
        rnnt_type: see `topologies.py`.
        delay_penalty: d rewards early labels: d times the number of frames to the utterance's middle is added.
        reduction: "none" gives (B,), "mean" over the utterances and "sum" a number.
        return_grad: also give the posteriors of label and blank arcs, for `get_rnnt_prune_ranges`: px_grad
            (B, S, T+1), or (B, S, T) unless regular, and py_grad (B, S+1, T).
        check: whether the values of symbols and boundary are checked, as in `rnnt_loss`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    _options(rnnt_type, delay_penalty, reduction)
    arguments.number("lm_only_scale", lm_only_scale)
    arguments.number("am_only_scale", am_only_scale)
    if lm_only_scale + am_only_scale > 1:
        raise ValueError(
            f"lm_only_scale and am_only_scale must be 1 at most together; got {lm_only_scale} and {am_only_scale}."
        )
    _three_dimensions(lm=lm, am=am)
    for name, value in (("lm", lm), ("am", am)):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point; got {value.dtype}.")
    (B, T, C), S1 = am.shape, lm.shape[1]
    if lm.shape != (B, S1, C):
        raise ValueError(f"lm must be (B, S+1, C) with B = {B} and C = {C} as in am; got {tuple(lm.shape)}.")
    given = _problem((B, T, S1, C), am, symbols, boundary, termination_symbol, check)
    with torch.autocast(am.device.type, enabled=False):
        dtype = accumulator(torch.promote_types(am.dtype, lm.dtype))
        blank, label = _smoothed_scores(lm.to(dtype), am.to(dtype), given, lm_only_scale, am_only_scale)
        return _loss(blank, label, given, rnnt_type, delay_penalty, reduction, return_grad)


def get_rnnt_prune_ranges(px_grad: Tensor, py_grad: Tensor, boundary: Tensor | None, s_range: int) -> Tensor:
    """Which R rows (labels written so far) to keep in each frame: those that carry most. (B, T, R) int64

    Consecutive, from row 0 in the first frame to the last row in the last frame, and as far from frame to frame as
    keeps paths whole: by less than R rows, by 1 at most unless regular. R is ``s_range``, more where an utterance has
    so many labels a frame that no path would fit, and at most S + 1: a size, so the host has to know the lengths, and
    waits for the device of ``boundary`` unless that is the CPU.

    Args:
        px_grad, py_grad: posteriors, from ``return_grad``.
        boundary: lengths. (B, 4)
        s_range: rows to keep, from 1 up.
    """
    _three_dimensions(px_grad=px_grad, py_grad=py_grad)
    (B, S, T1), (_, S1, T) = px_grad.shape, py_grad.shape
    if py_grad.shape != (B, S + 1, T) or T1 not in (T, T + 1):
        raise ValueError(
            f"px_grad must be (B, S, T + 1) or (B, S, T) and py_grad (B, S + 1, T); got {tuple(px_grad.shape)} and "
            f"{tuple(py_grad.shape)}."
        )
    if isinstance(s_range, bool) or not isinstance(s_range, int) or s_range < 1:
        raise ValueError(f"s_range must be an int from 1 up; got {s_range!r}.")
    given, boundary = boundary, _boundary(boundary, B, S, T)
    if given is not None and given.device.type == "cpu":
        lengths = given[:, 2:]
        if ((lengths < 0) | (lengths > torch.tensor([S, T]))).any():
            raise ValueError(f"boundary must hold 0 to S = {S} labels and 0 to T = {T} frames; got {lengths.tolist()}.")
    R = min(max(s_range, _fewest_rows(boundary)), S1)
    labels, frames = arguments.moved(boundary, py_grad.device)[:, 2:].split(1, 1)
    # posterior of the R rows' blanks, less what enters their first row within the frame
    kept = py_grad.unfold(1, R, 1).sum(-1)  # (B, S+2-R, T)
    kept[:, 1:] -= px_grad[:, : S1 - R, :T]
    first = kept.argmax(1)
    t = torch.arange(T, device=first.device)
    first = torch.where(t < frames - 1, first, (labels - R + 1).clamp(min=0))
    first = _without_jumps(first, 1 if T1 == T else R - 1)
    return first[..., None] + torch.arange(R, device=first.device)


def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder and decoder outputs of the cells that are kept, ready to be added. Both (B, T, R, C)

    Args:
        am: encoder output. (B, T, C)
        lm: decoder output. (B, S+1, C)
        ranges: from `get_rnnt_prune_ranges`. (B, T, R)
    """
    _three_dimensions(am=am, lm=lm, ranges=ranges)
    (B, T, C), (_, S1, D) = am.shape, lm.shape
    if ranges.shape[:2] != (B, T) or lm.shape[0] != B:
        raise ValueError(
            f"ranges must be (B, T, R) and lm (B, S+1, C) with (B, T) = {(B, T)} as in am; got {tuple(ranges.shape)} "
            f"and {tuple(lm.shape)}."
        )
    _rows_exist(ranges, S1)
    rows = torch.arange(B, device=ranges.device)[:, None, None] * S1 + ranges
    # not a gather from lm expanded over the frames: its gradient would be of that size
    picked = lm.reshape(B * S1, D).index_select(0, rows.reshape(-1)).view(*ranges.shape, D)
    return am[:, :, None].expand(B, T, ranges.shape[2], C), picked


def rnnt_loss_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: Type = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    *,
    check: bool | None = None,
) -> Tensor:
    """The loss over the paths that stay within ``ranges``: the standard loss where these hold all rows.

    Args:
        logits: of the joint network at the cells in ``ranges``; half types are read directly. (B, T, R, C)
        ranges: from `get_rnnt_prune_ranges`. (B, T, R)
        symbols, termination_symbol, boundary, rnnt_type, delay_penalty, reduction, check: as in `rnnt_loss_smoothed`;
            those of ranges are checked, too.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    _options(rnnt_type, delay_penalty, reduction)
    if not isinstance(logits, Tensor) or logits.dim() != 4:
        raise ValueError(f"logits must be (B, T, R, C); got {_shape(logits)}.")
    _three_dimensions(ranges=ranges)
    if not isinstance(symbols, Tensor) or symbols.dim() != 2:
        raise ValueError(f"symbols must be (B, S), B = {len(logits)} as in logits; got {_shape(symbols)}.")
    (B, T, R, C), S = logits.shape, symbols.shape[1]
    if ranges.shape != (B, T, R):
        raise ValueError(f"ranges must be (B, T, R) = {(B, T, R)} as in logits; got {tuple(ranges.shape)}.")
    _rows_exist(ranges, S + 1, check)
    given = _problem((B, T, S + 1, C), logits, symbols, boundary, termination_symbol, check)
    symbols = torch.nn.functional.pad(given.labels, (0, 1), value=given.blank)
    next_symbol = symbols[:, None].expand(B, T, S + 1).gather(2, ranges)
    planes = _LogProbs.apply(logits, next_symbol, given.blank, given.frame_lengths)
    blank, label = (plane.new_full((B, T, S + 1), -torch.inf).scatter(2, ranges, plane) for plane in planes)
    return _loss(blank, label, given, rnnt_type, delay_penalty, reduction, False)


def _smoothed_scores(lm: Tensor, am: Tensor, given: arguments.Problem, lm_only: float, am_only: float):
    """Scores of blank and label arcs. Both (B, T, S+1), the last label -inf"""
    B, T, S1 = *am.shape[:2], lm.shape[1]
    symbols, blank = given.labels, given.blank
    # no log-probability knows of it, and beside a large maximum the sums below would lose digits
    am, lm = (x - x.detach().amax(2, keepdim=True) for x in (am, lm))
    # float64: in float32 nothing is left of the sum where every class is far below the maximum of am or of lm
    exp_am, exp_lm = am.double().exp(), lm.double().exp()
    tiny = torch.finfo(torch.float64).tiny
    both = 1 - lm_only - am_only
    normaliser = (exp_am @ exp_lm.mT + tiny).log().to(am.dtype)  # (B, T, S+1)
    am_label = am.gather(2, symbols[:, None].expand(B, T, S1 - 1))
    lm_label = lm[:, :-1].gather(2, symbols[..., None]).mT  # (B, 1, S)
    am_blank, lm_blank = am[..., blank, None], lm[..., blank][:, None]
    label = both * (am_label + lm_label - normaliser[..., :-1])
    blank_score = both * (am_blank + lm_blank - normaliser)
    if lm_only:
        total = lm.logsumexp(2)[:, None]  # (B, 1, S+1)
        label = label + lm_only * (lm_label - total[..., :-1])
        blank_score = blank_score + lm_only * (lm_blank - total)
    if am_only:
        frequency = (exp_lm / exp_lm.sum(2, keepdim=True)).mean((0, 1)) + tiny  # (C,)
        total = (exp_am @ frequency).log().to(am.dtype)[..., None]  # (B, T, 1)
        rarity = frequency.log().to(am.dtype)
        label = label + am_only * (am_label + rarity[symbols][:, None] - total)
        blank_score = blank_score + am_only * (am_blank + rarity[blank] - total)
    return blank_score, torch.nn.functional.pad(label, (0, 1), value=-torch.inf)


class _LogProbs(torch.autograd.Function):
    """Log-probability of the blank and of the next label in each cell, (B, T, R) float64, in one gradient tensor."""

    @staticmethod
    def forward(ctx, logits, next_symbol, blank, frame_lengths):
        dtype = accumulator(logits.dtype)
        at_blank = logits[..., blank].to(dtype)
        at_label = logits.gather(3, next_symbol[..., None])[..., 0].to(dtype)
        last_row = torch.full_like(frame_lengths, logits.shape[2] - 1)
        near, rest = wavefront.row_logsumexp(logits, torch.maximum(at_blank, at_label), frame_lengths, last_row)
        at_blank, at_label = ((x.double() - near).sub_(rest) for x in (at_blank, at_label))
        ctx.blank = blank
        ctx.save_for_backward(logits, next_symbol, near, rest, at_blank, at_label)
        return at_blank, at_label

    @staticmethod
    @once_differentiable()
    def backward(ctx, saved, by_blank, by_label):
        logits, next_symbol, near, rest, at_blank, at_label = saved
        dtype = accumulator(logits.dtype)
        share = -(by_blank + by_label)  # what p_k is weighed by
        kept = share != 0  # nothing else is read
        pivot, offset = wavefront.pivots(near.masked_fill(~kept, 0.0), rest.masked_fill(~kept, 0.0), dtype)
        shift = wavefront.exponent(share.abs().log() - offset, dtype).masked_fill_(~kept, -torch.inf)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if wavefront.lengths_are_free(logits):
            wavefront.exp_on_bands(grad, logits, shift, kept, [1.0] * len(logits), pivot)
        else:
            wavefront.exp_everywhere(grad, logits, shift, kept, torch.ones_like(share[:, :1, :1]), pivot)
        if grad.device.type != "cpu" or (share < 0).any():
            grad.mul_(share.sign()[..., None].masked_fill(~kept[..., None], 0.0).to(grad.dtype))

        def entry(log_prob: Tensor, arc: Tensor) -> Tensor:
            exact = (log_prob.exp() * share + arc).masked_fill_(~kept, 0.0).to(dtype)
            return wavefront.without_subnormals(exact).to(grad.dtype)

        # where there is no next label its place is the blank's, so the blank's entry is written last
        grad.scatter_(3, next_symbol[..., None], entry(at_label, by_label)[..., None])
        grad[..., ctx.blank] = entry(at_blank, by_blank)
        return grad, None, None, None


def _loss(blank, label, given, rnnt_type, delay_penalty, reduction, return_grad):
    B, T, _ = blank.shape
    if delay_penalty:
        t = torch.arange(T, device=blank.device)
        label = label + delay_penalty * ((given.frame_lengths.double()[:, None] - 1) / 2 - t)[..., None]
    dtype = accumulator(given.logits.dtype)
    score, by_blank, by_label = topologies.log_prob(blank, label, given.frame_lengths, given.label_lengths, rnnt_type)
    costs = -score.to(dtype)
    if given.invalid is not None:
        costs = costs * torch.where(given.invalid, torch.nan, 1.0).to(dtype)
    loss = {"none": lambda: costs, "sum": costs.sum, "mean": costs.mean}[reduction]()
    if not return_grad:
        return loss
    px_grad, py_grad = by_label[..., :-1].mT.to(dtype), by_blank.mT.to(dtype)
    if rnnt_type == "regular":
        px_grad = torch.nn.functional.pad(px_grad, (0, 1))  # no label follows the last frame
    return loss, (px_grad.contiguous(), py_grad.contiguous())


def _fewest_rows(boundary: Tensor) -> int:
    """Rows a frame that leave every utterance a path."""
    labels, frames = boundary[:, 2], boundary[:, 3]
    return int(((labels - 1).div(frames.clamp(min=1), rounding_mode="floor") + 2).max()) if len(boundary) else 1


def _without_jumps(first: Tensor, step: int) -> Tensor:
    """The nearest that neither falls nor rises by more than ``step`` from frame to frame, from 0. (B, T)"""
    slope = step * torch.arange(first.shape[1], device=first.device)
    first = _lowest_from_here_on(first)
    return slope - _lowest_from_here_on(slope - first).clamp(min=0)


def _lowest_from_here_on(x: Tensor) -> Tensor:
    return x.flip(1).cummin(1).values.flip(1)


def _problem(
    shape, like: Tensor, symbols: Tensor, boundary: Tensor | None, blank: int, check: bool | None
) -> arguments.Problem:
    B, T, S1, _ = shape
    boundary = _boundary(boundary, B, S1 - 1, T, check)
    logits = arguments.unbuilt(shape, like)
    given = arguments.problem(logits, symbols, boundary[:, 3], boundary[:, 2], blank, check, NAMES)
    if given.invalid is None:
        return given
    return given._replace(invalid=given.invalid | (arguments.moved(boundary[:, :2], like.device) != 0).any(1))


def _boundary(boundary: Tensor | None, B: int, S: int, T: int, check: bool | None = None) -> Tensor:
    if boundary is None:
        return torch.tensor([0, 0, S, T]).expand(B, 4)
    if not isinstance(boundary, Tensor) or boundary.shape != (B, 4):
        raise ValueError(f"boundary must be (B, 4) = {(B, 4)}: 0, 0, labels, frames; got {_shape(boundary)}.")
    check = boundary.device.type == "cpu" if check is None else check
    if check and (boundary[:, :2] != 0).any():
        raise ValueError(
            f"boundary must begin with 0, 0: paths begin in the first cell; got {boundary[:, :2].tolist()}."
        )
    return boundary


def _three_dimensions(**tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.dim() != 3:
            raise ValueError(f"{name} must be a tensor of three dimensions; got {_shape(value)}.")


def _rows_exist(ranges: Tensor, rows: int, check: bool | None = None) -> None:
    if ranges.dtype != torch.int64:
        raise TypeError(f"ranges must be int64; got {ranges.dtype}.")
    free = ranges.device.type == "cpu"
    if (free or check) and ranges.numel() and not 0 <= ranges.min() <= ranges.max() < rows:
        raise ValueError(f"ranges must be from 0 to S = {rows - 1}; got {int(ranges.min())} to {int(ranges.max())}.")


def _options(rnnt_type: str, delay_penalty: float, reduction: str) -> None:
    if rnnt_type not in TOPOLOGIES:
        raise ValueError(f"rnnt_type must be one of {', '.join(map(repr, TOPOLOGIES))}; got {rnnt_type!r}.")
    arguments.options(reduction, 0.0)
    arguments.number("delay_penalty", delay_penalty)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
