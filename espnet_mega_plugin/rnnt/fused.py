"""Joint network and RNN-T loss in one: the logits (B, T, U+1, V) are never built, neither forward nor backward.

    logits[b, t, u] = activation(enc[b, t] + dec[b, u]) @ weight.T + bias

Forward: for tiles of cells the logits are computed, reduced to three numbers a cell (log-sum-exp, blank, next label)
and forgotten; the lattice (`topologies.py`) turns these into posteriors. Backward: logits are computed again, for those
cells alone whose posterior exceeds `threshold`. Where a share f of the cells does, that is 2 + 6 f products of
(cells, J, V) against 6 with materialised logits: fewer as soon as f is under two thirds, as at random weights, and a
third of them once the model knows where its labels are. On CUDA, kernels take over what lies between the products
(`fused_kernels.py`); what is here runs on any device.

B utterances, T frames, U labels, V classes, J channels of the joint space; R rows, one for each cell of a tile.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from espnet_mega_plugin.once import once_differentiable
from espnet_mega_plugin.rnnt import arguments, wavefront
from espnet_mega_plugin.rnnt.loss import fastest
from espnet_mega_plugin.rnnt.topologies import shares
from espnet_mega_plugin.rnnt.wavefront import accumulator

# A tile's logits. On the CPU they go through the cache once more after the product.
CPU_TILE_BYTES = 1 << 22
# A GPU has to be filled: there a tile, hidden rows included, takes a 16th of the logits' bytes, within these limits.
DEVICE_TILE_BYTES = 1 << 26, 1 << 28
FEWEST_ROWS = 256  # below this the products get slower
# Cells up to this posterior are not computed in backward. float32: they hold 3e-8 of all posteriors at most, and the
# gradient's own rounding is ten times that.
THRESHOLD = {torch.float32: 1e-8, torch.float64: 1e-18}
NAMES = {"acts": "the logits", "act_lens": "frame_lengths", "label_lens": "label_lengths"}


def fused_rnnt_loss(
    enc: Tensor,
    dec: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    frame_lengths: Tensor,
    label_lengths: Tensor,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
    blank: int = 0,
    reduction: str = "mean",
    fastemit_lambda: float = 0.001,
    threshold: float | None = None,
    *,
    method: str = "auto",
    check: bool | None = None,
    topology: str = "regular",
) -> Tensor:
    """`rnnt_loss` of the joint network's logits, in a fraction of their memory.

    Under autocast the products are made in its type, as torch's linear layer does; sums over classes, the lattice and
    sums over tiles stay float32 (float64 for float64 inputs). Every input that requires a gradient gets one, and
    backward may run again on a retained graph.

    On a GPU the host waits for the device where the size of a product hangs on numbers that only the device has: once
    for how many cells lie within the lengths, unless both lengths are given on the CPU, and, where there will be a
    backward, once for how many cells it has to compute, unless ``threshold`` is 0.

    Args:
        enc: encoder output, projected to the joint space. (B, T, J)
        dec: decoder output, projected to the joint space. (B, U+1, J)
        weight: of the output layer. (V, J)
        bias: of the output layer, or None. (V,)
        labels: (B, U) integers. What lies beyond an utterance's length is not read; columns beyond U are ignored.
        frame_lengths: (B,) integers, 1 to T
        label_lengths: (B,) integers, 0 to U
        activation: any function or module that treats every element alike and always in the same way (no dropout);
            a module's parameters are trained, too.
        blank, reduction, fastemit_lambda, check, topology: as in `rnnt_loss`.
        threshold: cells whose posterior is at most this give no gradient and are not computed in backward. None: 1e-8,
            and 1e-18 for float64; 0 keeps all.
        method: what lies between the products: "wavefront" (plain PyTorch, any device), "triton" (kernels for CUDA
            devices) or "auto": "triton" on CUDA where Triton and a C compiler are found, else "wavefront".

    Returns:
        as `rnnt_loss`: (1,), or (B,) with reduction "none".

    Raises:
        TypeError, ValueError: an argument is not as above, or "triton" is asked for elsewhere than on CUDA; the message
            names it.
        ImportError: "triton" is asked for and Triton is not installed.
    """
    arguments.options(reduction, fastemit_lambda, threshold, topology)
    arguments.method(method, METHODS, topology)
    _shapes_and_types(enc, dec, weight, bias, activation)
    logits = arguments.unbuilt((*enc.shape[:2], dec.shape[1], len(weight)), enc)
    given = arguments.problem(logits, labels, frame_lengths, label_lengths, blank, check, NAMES)
    parameters = activation.parameters() if isinstance(activation, torch.nn.Module) else ()
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    inputs = [x for x in (enc, dec, weight, bias, *parameters) if x is not None]
    if len(enc):
        dtype = _product_type(enc, dec, weight)
        options = Options(
            activation,
            given.blank,
            fastemit_lambda,
            THRESHOLD[accumulator(dtype)] if threshold is None else threshold,
            dtype,
            topology,
            wanted=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
            count=_count(frame_lengths, label_lengths, logits),
        )
        compute = METHODS[fastest(enc.device, topology) if method == "auto" else method]
        costs = compute(enc, dec, weight, bias, *given[1:4], options, *parameters)
    else:
        costs = (enc.sum((1, 2)) + 0 * sum(x.sum() for x in inputs)).to(accumulator(_product_type(enc, dec, weight)))
    return arguments.reduced(costs, given.invalid, reduction)


class Options(NamedTuple):
    activation: Callable[[Tensor], Tensor]
    blank: int
    fastemit_lambda: float
    threshold: float
    dtype: torch.dtype  # of the products
    topology: str
    wanted: bool  # whether there will be a backward
    count: int | None  # of the cells within the lengths; None: to be asked of the tensors


def _wavefront(*problem) -> Tensor:
    return _Costs.apply(*problem)


def _triton(*problem) -> Tensor:
    from espnet_mega_plugin.rnnt.fused_kernels import Costs

    return Costs.apply(*problem)


METHODS = {"wavefront": _wavefront, "triton": _triton}


class _Costs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, enc, dec, weight, bias, labels, frame_lengths, label_lengths, options, *parameters):
        B, T, U1 = *enc.shape[:2], dec.shape[1]
        joint = Joint(enc, dec, weight, bias, options)
        labels = torch.nn.functional.pad(labels, (0, 1), value=options.blank)  # (B, U+1): the last row has no next one
        cells = where(inside(B, T, U1, frame_lengths, label_lengths), options.count)
        planes = [torch.zeros(B, T, U1, dtype=torch.float64, device=enc.device) for _ in range(4)]
        with torch.autocast(enc.device.type, enabled=False):
            for tile in cells.split(joint.rows_of_a_tile):
                found = _statistics(
                    joint.logits(joint.hidden(tile)), labels.view(-1)[joint.dec_row(tile)], options.blank
                )
                for plane, values in zip(planes, found, strict=True):
                    plane.view(-1)[tile] = values
        log_prob, by_blank, by_label = shares(
            *planes[2:], frame_lengths, label_lengths, options.topology, options.wanted
        )
        if options.wanted:
            by_label.mul_(1 + options.fastemit_lambda)
            share = by_blank + by_label
            if options.threshold or wavefront.lengths_are_free(enc):
                cells = where(~(share <= options.threshold))  # a NaN stays
            of_cells = (plane.view(-1)[cells] for plane in (*planes, by_blank, by_label, share))
            near, rest, at_blank, at_label, by_blank, by_label, share = of_cells
            pivot, offset = wavefront.pivots(near, rest, joint.sums)
            # p_k share = exp(logit - pivot - offset); nothing is left at +inf
            offset = offset.sub_(share.log())
            at_blank.exp_().mul_(share).sub_(by_blank)
            at_label.exp_().mul_(share).sub_(by_label)
            next_label = labels.view(-1)[joint.dec_row(cells)]
            of_cells = cells, offset, at_blank, at_label, next_label, pivot
            ctx.save_for_backward(enc, dec, weight, bias, *of_cells, *parameters)
            ctx.options = options
        return (-log_prob).to(accumulator(options.dtype))

    @staticmethod
    @once_differentiable()
    def backward(ctx, saved, grad_costs):
        enc, dec, weight, bias, *of_cells = saved
        cells, offset, at_blank, at_label, next_label, pivot, *parameters = of_cells
        joint = Joint(enc, dec, weight, bias, ctx.options)
        scale = grad_costs.double()[joint.utterance(cells)]
        tile = joint.rows_of_a_tile
        sign = scale.sign() if scale.device.type != "cpu" or (scale < 0).any() else None
        rows = _Rows(
            cells,
            wavefront.exponent(scale.abs().log() - offset, joint.sums),
            (at_blank * scale).to(joint.sums),
            (at_label * scale).to(joint.sums),
            next_label,
            pivot,
        )
        sums = Gradients(joint, ctx.needs_input_grad[:4], parameters, ctx.needs_input_grad[8:])
        with torch.autocast(enc.device.type, enabled=False):
            for start in range(0, len(cells), tile):
                part = slice(start, start + tile)
                chosen = _Rows(*(None if x is None else x[part] for x in rows)), None if sign is None else sign[part]
                sums.add(chosen[0].cells, lambda _, hidden, chosen=chosen: _gradient_to_logits(joint, hidden, *chosen))
        return *sums.like(enc, dec, weight, bias), None, None, None, None, *sums.of_parameters


class _Rows(NamedTuple):
    """What backward knows of each cell before it computes its logits."""

    cells: Tensor  # (R,) places in (B, T, U+1)
    shift: Tensor  # (R,) `wavefront.exponent`: gradient to a logit, but for the next two
    at_blank: Tensor  # (R,) gradient to the blank's logit
    at_label: Tensor  # (R,) gradient to the next label's logit
    next_label: Tensor  # (R,) the blank where there is none
    pivot: Tensor | None  # (R,) None: zeros


class Joint:
    """The joint network on chosen cells."""

    def __init__(self, enc: Tensor, dec: Tensor, weight: Tensor, bias: Tensor | None, options: Options):
        (B, self.T, J), (_, self.U1, _) = enc.shape, dec.shape
        common = torch.promote_types(enc.dtype, dec.dtype)  # as a sum of both has it
        self.enc = enc.detach().reshape(B * self.T, J).to(common)
        self.dec = dec.detach().reshape(B * self.U1, J).to(common)
        self.weight = weight.detach().to(options.dtype)
        self.bias = None if bias is None else bias.detach().to(options.dtype)
        self.activation, self.blank = options.activation, options.blank
        self.tanh = type(self.activation) is torch.nn.Tanh or self.activation in (
            torch.tanh,
            torch.nn.functional.tanh,
        )
        self.sums = accumulator(options.dtype)
        self.rows_of_a_tile = min(max(FEWEST_ROWS, self._rows_that_fit(B * self.T * self.U1)), B * self.T * self.U1)
        # fresh memory costs more than what is done in it
        self.buffer = self.weight.new_empty(self.rows_of_a_tile, len(weight))

    def _rows_that_fit(self, cells: int) -> int:
        V, J = self.weight.shape
        if self.weight.device.type == "cpu":
            return CPU_TILE_BYTES * torch.get_num_threads() // (V * self.sums.itemsize)
        fewest, most = DEVICE_TILE_BYTES
        size = self.weight.dtype.itemsize
        rows = min(max(fewest, cells * V * size // 16), most) // ((V + 2 * J) * size)  # hidden rows and their gradient
        return rows - rows % 16  # every tile begins where wide loads may

    def utterance(self, cells: Tensor) -> Tensor:
        return cells // (self.T * self.U1)

    def enc_row(self, cells: Tensor) -> Tensor:
        return cells // self.U1

    def dec_row(self, cells: Tensor) -> Tensor:
        return self.utterance(cells) * self.U1 + cells % self.U1

    def hidden(self, cells: Tensor) -> Tensor:
        """activation(enc + dec). (R, J)"""
        summed = self.enc.index_select(0, self.enc_row(cells)).add_(self.dec.index_select(0, self.dec_row(cells)))
        if self.tanh:
            return _tanh_(summed)
        shape, hidden = summed.shape, self.activation(summed)
        if hidden.shape != shape:
            raise ValueError(
                f"activation must give as many channels as it takes: {tuple(shape)} for {len(cells)} cells; "
                f"got {tuple(hidden.shape)} from {self.activation!r:.80}."
            )
        return hidden

    def hidden_and_derivative(self, cells: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Callable]:
        """The same and a function from its gradient to those of enc + dec and of the activation's parameters."""
        if self.tanh:
            hidden = self.hidden(cells)
            return hidden, lambda grad: (grad.addcmul_(grad, hidden.square_(), value=-1),)
        with torch.enable_grad():
            # the rows are the leaf, not the sum: an activation may work in place
            rows = self.enc.index_select(0, self.enc_row(cells)).requires_grad_()
            hidden = self.activation(rows + self.dec.index_select(0, self.dec_row(cells)))
        wanted = (rows, *parameters)  # a module may have parameters that it does not use
        return hidden.detach(), lambda grad: torch.autograd.grad(hidden, wanted, grad, allow_unused=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, V), overwritten by the next call."""
        hidden, out = hidden.to(self.weight.dtype), self.buffer[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


class Gradients:
    """Sums, over tiles, of the gradients to what the joint network is made of; None for those nobody wants."""

    def __init__(self, joint: Joint, wanted: tuple[bool, ...], parameters: list[Tensor], trained: tuple[bool, ...]):
        self.joint = joint
        self.enc, self.dec, self.weight, self.bias = (
            torch.zeros_like(source, dtype=joint.sums, memory_format=torch.contiguous_format) if want else None
            for source, want in zip((joint.enc, joint.dec, joint.weight, joint.bias), wanted, strict=True)
        )
        self.parameters = [parameter for parameter, want in zip(parameters, trained, strict=True) if want]
        self.of_parameters = [torch.zeros_like(parameter) for parameter in self.parameters]

    def add(self, cells: Tensor, to_logits: Callable[[Tensor, Tensor], Tensor]) -> None:
        """A tile; ``to_logits`` makes the gradient to its logits of cells and hidden rows."""
        hidden, derivative = self.joint.hidden_and_derivative(cells, self.parameters)
        grad = to_logits(cells, hidden)
        if self.bias is not None:
            self.bias.add_(grad.sum(0, dtype=self.bias.dtype))
        if self.weight is not None:
            _add_product(self.weight, grad.t(), hidden.to(grad.dtype))
        if self.enc is None and self.dec is None and not self.parameters:
            return
        summed, *others = derivative((grad @ self.joint.weight).to(hidden.dtype))
        self.add_to_rows(cells, summed)
        for total, part in zip(self.of_parameters, others, strict=True):
            if part is not None:
                total.add_(part)

    def add_to_rows(self, cells: Tensor, summed: Tensor) -> None:
        """The gradient to enc + dec to those of the rows of enc and dec that were summed. (R, J)"""
        summed = summed.to(self.joint.sums)
        if self.enc is not None:
            self.enc.index_add_(0, self.joint.enc_row(cells), summed)
        if self.dec is not None:
            self.dec.index_add_(0, self.joint.dec_row(cells), summed)

    def like(self, *inputs: Tensor | None) -> list[Tensor | None]:
        """The sums as the gradients to enc, dec, weight and bias: in their shapes and types."""
        totals = zip((self.enc, self.dec, self.weight, self.bias), inputs, strict=True)
        return [None if total is None else total.view_as(source).to(source.dtype) for total, source in totals]


def _statistics(logits: Tensor, next_label: Tensor, blank: int) -> tuple[Tensor, ...]:
    """log-sum-exp as `wavefront.row_logsumexp` has it, log-probability of blank and next label. Four (R,) float64"""
    R, V = logits.shape
    at_blank, at_label = (x.to(accumulator(logits.dtype)) for x in (logits[:, blank], _at(logits, next_label)))
    guess = torch.maximum(at_blank, at_label).view(1, R, 1)
    one = torch.tensor([R]), torch.tensor([0])  # one utterance of R frames without labels
    near, rest = (x.view(R) for x in wavefront.row_logsumexp(logits.view(1, R, 1, V), guess, *one))
    return near, rest, (at_blank.double() - near).sub_(rest), (at_label.double() - near).sub_(rest)


def _gradient_to_logits(joint: Joint, hidden: Tensor, rows: _Rows, sign: Tensor | None) -> Tensor:
    """(R, V) in the type of the products, without subnormal numbers: they would make the next products slow.

    But for float16: it is cut where float32 is, whose smallest number float16 has no room for. Its own subnormals
    stay, as they are most of what small gradients have there.
    """
    logits = joint.logits(hidden)
    grad = logits if logits.dtype == joint.sums else torch.empty_like(logits, dtype=joint.sums)
    wavefront.exp_without_subnormals(grad, logits, rows.shift, rows.pivot)
    if sign is not None:
        grad.mul_(sign[:, None])
    # where there is no next label its place is the blank's, so the blank's entry is written last
    grad.scatter_(1, rows.next_label[:, None], wavefront.without_subnormals(rows.at_label)[:, None])
    grad[:, joint.blank] = wavefront.without_subnormals(rows.at_blank)
    return grad if grad is logits else logits.copy_(grad)


def _at(rows: Tensor, column: Tensor) -> Tensor:
    return rows.gather(1, column[:, None])[:, 0]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _tanh_(x: Tensor) -> Tensor:
    """In place. On the CPU torch's float32 tanh takes 2.6 ns a number, its sigmoid 0.4 (AMD EPYC, torch 2.12).

    The error, 1e-7 of 1, is that of the numbers next to 1: too much where there are none.
    """
    fast = x.dtype == torch.float32 and x.device.type == "cpu"
    if fast and torch.linalg.vector_norm(x) > 0.1 * math.sqrt(x.numel()):
        return x.mul_(2).sigmoid_().mul_(2).sub_(1)
    return x.tanh_()


def inside(B: int, T: int, U1: int, frame_lengths: Tensor, label_lengths: Tensor) -> Tensor:
    """Which cells lie within the lengths. (B, T, U+1)"""
    t, u = torch.arange(T, device=frame_lengths.device), torch.arange(U1, device=label_lengths.device)
    return (t[:, None] < frame_lengths[:, None, None]) & (u <= label_lengths[:, None, None])


def where(cells: Tensor, count: int | None = None) -> Tensor:
    """Places of those that are True, ``count`` of them: without it a device is waited for."""
    cells = cells.view(-1)
    return (cells.nonzero() if count is None else cells.nonzero_static(size=count))[:, 0]


def _count(frame_lengths: Tensor, label_lengths: Tensor, logits: Tensor) -> int | None:
    """How many cells lie within the lengths, where these are on the CPU and the logits would not be."""
    if wavefront.lengths_are_free(logits) or any(x.device.type != "cpu" for x in (frame_lengths, label_lengths)):
        return None
    _, T, U1, _ = logits.shape
    return int((frame_lengths.long().clamp(1, T) * (label_lengths.long().clamp(0, U1 - 1) + 1)).sum())


def _shapes_and_types(enc, dec, weight, bias, activation) -> None:
    tensors = {"enc": (enc, 3), "dec": (dec, 3), "weight": (weight, 2), "bias": (bias, 1)}
    if bias is None:
        del tensors["bias"]
    for name, (value, dims) in tensors.items():
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating point torch.Tensor; got {got}.")
        if value.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions; got {tuple(value.shape)}.")
    if not callable(activation):
        raise TypeError(f"activation must be a function or module; got {type(activation).__name__}.")
    if not isinstance(activation, torch.nn.Module) and _trains_something(activation, enc):
        raise TypeError(
            f"activation is a function of something that is trained; got {activation!r:.80}. Nothing would train it: "
            f"give the module that holds the parameters."
        )
    (B, _, J), (V, _) = enc.shape, weight.shape
    if dec.shape[0] != B or dec.shape[2] != J:
        raise ValueError(
            f"dec must be (B, U+1, J) with B = {B} and J = {J} as in enc {tuple(enc.shape)}; got {tuple(dec.shape)}. "
            "Both are projected to the joint space before."
        )
    if weight.shape[1] != J:
        raise ValueError(f"weight must be (V, J) with J = {J} as in enc {tuple(enc.shape)}; got {tuple(weight.shape)}.")
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias must be (V,) = ({V},) as weight {tuple(weight.shape)} has it; got {tuple(bias.shape)}.")


def _trains_something(function: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    with torch.enable_grad():
        return function(like.new_zeros(1, like.shape[2])).requires_grad


def _product_type(enc: Tensor, dec: Tensor, weight: Tensor) -> torch.dtype:
    dtype = torch.promote_types(torch.promote_types(enc.dtype, dec.dtype), weight.dtype)
    device = enc.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device)
    return dtype
