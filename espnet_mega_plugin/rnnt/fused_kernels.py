"""What lies between the matrix products of the fused loss, as Triton kernels for CUDA devices.

`fused.py` says what is computed. The products are the library's; around them, for a tile of cells, forward is
`hidden`, product, `kernels.row_statistics`, and at the end of all tiles `kernels.lattice`; backward is `hidden`,
product, `kernels.gradient` in place over the logits, three products, and `sums`, which multiplies by the activation's
derivative and sums over u into the rows of enc, over t into those of dec. Each of their rows is one program's and a
tile's launch waits for the one before, so no sum is atomic and a step's numbers are the same whenever it is repeated.
`exceeding` marks the cells that backward has to compute.

Activations are formulas where `FORMULAS` has them, all of ESPnet's among them, and PyTorch's operations elsewhere.

B utterances, T frames, U labels, V classes, J channels of the joint space, N = T + U diagonals; R rows, one for each
cell of a tile. A cell is its place in (B, T, U+1), 64 bits wide, as all offsets that count rows are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from espnet_mega_plugin.once import once_differentiable
from espnet_mega_plugin.rnnt import fused, kernels

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "The fused loss's kernels need Triton (pip install triton); the method 'wavefront' does not."
    ) from error

ESPNET = "espnet2.asr_transducer.activation."
TORCH = "torch.nn.modules.activation."
# Modules, by the name of their class, as a formula of `activated` and its two constants; None: not as it is set up.
FORMULAS: dict[str, Callable[[torch.nn.Module], tuple[str, float, float] | None]] = {
    TORCH + "Tanh": lambda _: ("tanh", 0.0, 0.0),
    TORCH + "ReLU": lambda _: ("clip", 0.0, float("inf")),
    TORCH + "Hardtanh": lambda module: ("clip", float(module.min_val), float(module.max_val)),
    TORCH + "LeakyReLU": lambda module: ("leaky", float(module.negative_slope), 0.0),
    TORCH + "SELU": lambda _: ("elu", 1.6732632423543772, 1.0507009873554805),
    TORCH + "SiLU": lambda _: ("swish", 1.0, 0.0),
    TORCH + "Mish": lambda _: ("mish", 0.0, 0.0),
    "torch.nn.modules.linear.Identity": lambda _: ("identity", 0.0, 0.0),
    ESPNET + "Swish": lambda module: ("swish", float(max(module.beta, 1.0)), 0.0),
    ESPNET + "Mish": lambda module: ("mish", 0.0, 0.0) if type(module.mish) is torch.nn.Mish else None,
    ESPNET + "Smish": lambda module: ("smish", float(module.alpha), float(module.beta)),
    ESPNET + "FTSwish": lambda module: ("ftswish", float(module.threshold), float(module.mean_shift)),
}
FUNCTIONS = (torch.tanh, torch.nn.functional.tanh)  # those that are given as such


def formula(activation: Callable[[Tensor], Tensor]) -> tuple[str, float, float] | None:
    """The formula of `activated` that is this activation, with its constants; None: PyTorch computes it."""
    if any(activation is function for function in FUNCTIONS):
        return "tanh", 0.0, 0.0
    kind = type(activation)
    found = FORMULAS.get(f"{kind.__module__}.{kind.__qualname__}")
    return found and found(activation)


class Costs(torch.autograd.Function):
    """`fused._Costs` with kernels: -log P of each utterance. (B,)"""

    @staticmethod
    def forward(ctx, enc, dec, weight, bias, labels, frame_lengths, label_lengths, options, *parameters):
        if enc.device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ValueError(
                f"method 'triton' needs enc on a CUDA device; got {enc.device}. There, choose 'wavefront' or 'auto'."
            )
        joint = _Joint(enc, dec, weight, bias, options)
        (B, T, _), U1, V = enc.shape, joint.U1, len(weight)
        targets = tuple(x.contiguous() for x in (labels, frame_lengths, label_lengths))
        cells = fused.where(fused.inside(B, T, U1, frame_lengths, label_lengths), options.count)
        most, total, at_blank, at_label = kernels.planes(joint.weight, B, T, U1, joint.sums)
        sizes, columns = (T, U1, V, options.blank, T + U1 - 1), kernels.columns(V)
        with torch.cuda.device_of(enc), torch.autocast(enc.device.type, enabled=False):
            for tile in cells.split(joint.rows_of_a_tile):
                logits = joint.logits(joint.hidden(tile))
                kernels.row_statistics[(len(tile),)](
                    logits, tile, *targets, most, total, at_blank, at_label, *sizes, COLUMNS=columns
                )
            log_prob = kernels.walk(at_blank, at_label, *targets[1:], options.wanted)
            if options.wanted:
                by_blank, by_label = at_blank, at_label.mul_(1 + options.fastemit_lambda)
                if options.threshold:
                    kept = _exceed(options.threshold, cells, by_blank, by_label, *targets[1:], T)
                    cells = cells[fused.where(kept)]
                planes = most, total, by_blank, by_label
                ctx.save_for_backward(enc, dec, weight, bias, cells, *targets, *planes, *parameters)
                ctx.options = options
        return -log_prob

    @staticmethod
    @once_differentiable()
    def backward(ctx, saved, grad_costs):
        enc, dec, weight, bias, cells, *others = saved
        targets, planes, parameters = others[:3], others[3:7], others[7:]
        options = ctx.options
        joint = _Joint(enc, dec, weight, bias, options)
        (_, T, _), U1, V = enc.shape, joint.U1, len(weight)
        scale = grad_costs.to(joint.sums).contiguous()
        sizes, columns = (T, U1, V, options.blank, T + U1 - 1), kernels.columns(V)

        def to_logits(tile: Tensor, hidden: Tensor) -> Tensor:
            grad = joint.logits(hidden)
            kernels.gradient[(len(tile),)](
                *(grad, grad, tile, *targets, *planes, scale, *sizes, float(options.threshold)),
                COLUMNS=columns,
                TINY=torch.finfo(joint.sums).tiny,
            )
            return grad

        totals = _Gradients(joint, cells, ctx.needs_input_grad[:4], parameters, ctx.needs_input_grad[8:])
        with torch.cuda.device_of(enc), torch.autocast(enc.device.type, enabled=False):
            for start in range(0, len(cells), joint.rows_of_a_tile):
                totals.add(cells[start : start + joint.rows_of_a_tile], to_logits)
        return *totals.like(enc, dec, weight, bias), None, None, None, None, *totals.of_parameters


class _Joint(fused.Joint):
    """The joint network on chosen cells, its activation by formula where there is one."""

    def __init__(self, enc: Tensor, dec: Tensor, weight: Tensor, bias: Tensor | None, options: fused.Options):
        super().__init__(enc, dec, weight, bias, options)
        self.enc, self.dec = self.enc.contiguous(), self.dec.contiguous()
        self.formula = formula(self.activation)
        if self.formula:
            self.rows = self.weight.new_empty(self.rows_of_a_tile, enc.shape[2])

    def hidden(self, cells: Tensor) -> Tensor:
        """activation(enc + dec). (R, J); overwritten by the next call where there is a formula."""
        if self.formula is None:
            return super().hidden(cells)
        R, J = len(cells), self.enc.shape[1]
        channels = min(256, triton.next_power_of_2(J))
        rows = 2048 // channels
        hidden[(triton.cdiv(R, rows), triton.cdiv(J, channels))](
            *(self.enc, self.dec, cells, self.rows, self.T, self.U1, J, R, *self.formula),
            ROWS=rows,
            CHANNELS=channels,
        )
        return self.rows[:R]

    def hidden_and_derivative(self, cells: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Callable]:
        """As `fused.Joint` has it, but with a formula the derivative is left to `sums`."""
        if self.formula is None:
            return super().hidden_and_derivative(cells, parameters)
        return self.hidden(cells), lambda grad: (grad,)


class _Gradients(fused.Gradients):
    """Sums over tiles, those over the cells of a row of enc or dec by `sums`."""

    def __init__(self, joint: _Joint, cells: Tensor, *wanted):
        super().__init__(joint, *wanted)
        # of each cell of (B, T, U+1): its place among those that are computed, -1 for the others
        self.place = cells.new_full((len(joint.enc) * joint.U1,), -1)
        self.place.scatter_(0, cells, torch.arange(len(cells), device=cells.device))

    def add_to_rows(self, cells: Tensor, to_hidden: Tensor) -> None:
        joint = self.joint
        R, J = to_hidden.shape
        channels = min(128, triton.next_power_of_2(J))
        named = joint.formula or ("identity", 0.0, 0.0)
        to_hidden = to_hidden.contiguous()
        for total, over_frames in ((self.enc, False), (self.dec, True)):
            if total is not None:
                sums[(len(total), triton.cdiv(J, channels))](
                    *(to_hidden, joint.enc, joint.dec, cells, self.place, total, joint.T, joint.U1, J, R),
                    *named,
                    OVER_FRAMES=over_frames,
                    ITEMS=items(joint.sums.itemsize, named[0]),
                    CHANNELS=channels,
                )


def items(itemsize: int, formula: str) -> int:
    """Cells that `sums` takes at once, of this many bytes a number: as many as the registers hold.

    In float32, that is; in float64 some formulas spill up to 12 bytes or need 144 registers a thread.
    """
    return (32 if formula == "smish" else 64) // itemsize  # the longest


def _exceed(threshold, cells, by_blank, by_label, frame_lengths, label_lengths, T) -> Tensor:
    """Whether a cell's posterior does. (R,) bool"""
    R, (_, N, U1) = len(cells), by_blank.shape
    found = torch.empty_like(cells, dtype=torch.bool)
    exceeding[(triton.cdiv(R, 256),)](
        *(found, cells, by_blank, by_label, frame_lengths, label_lengths, T, U1, N, R, float(threshold)), ROWS=256
    )
    return found


@triton.jit
def activated(x, FORMULA: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    zero = tl.zeros_like(x)  # a constant alone, in tl.where, would be float32
    if FORMULA == "tanh":
        by_sigmoid = 2.0 * tl.sigmoid(2.0 * x) - 1.0
        if x.dtype == tl.float64:
            x = by_sigmoid
        else:  # its error is 1e-7 of 1; next to 0 the series has 2e-10 of the number itself
            q = x * x
            series = x * (1.0 + q * (-0.33333333 + q * (0.13333333 + q * -0.053968254)))
            x = tl.where(q < 0.01, series, by_sigmoid)
    elif FORMULA == "clip":
        x = tl.where(x < A, zero + A, tl.where(x > B, zero + B, x))  # a NaN stays
    elif FORMULA == "leaky":
        x = tl.where(x > 0.0, x, A * x)
    elif FORMULA == "elu":
        x = B * tl.where(x > 0.0, x, A * (tl.exp(x) - 1.0))
    elif FORMULA == "swish":
        x = A * x * tl.sigmoid(x)
    elif FORMULA == "mish":
        e = tl.exp(tl.minimum(x, 20.0))  # tanh(log(1 + e)) = n / (n + 2), n = e (e + 2)
        n = e * (e + 2.0)
        x = x * (n / (n + 2.0))
    elif FORMULA == "smish":
        y = 1.0 + tl.sigmoid(B * x)  # tanh(log(y))
        x = A * x * ((y * y - 1.0) / (y * y + 1.0))
    elif FORMULA == "ftswish":
        y = x * tl.sigmoid(x) + A
        x = tl.where(y >= 0.0, y, zero + tl.full((), A, tl.float32)) - B  # ESPnet's constant is a float32 here
    else:
        tl.static_assert(FORMULA == "identity")
    return x


@triton.jit
def derivative(x, FORMULA: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Of `activated`; where that has a corner, what PyTorch takes."""
    zero = tl.zeros_like(x)
    if FORMULA == "tanh":
        s = tl.sigmoid(2.0 * x)
        x = 4.0 * s * (1.0 - s)
    elif FORMULA == "clip":
        x = tl.where((x > A) & (x < B), zero + 1.0, zero)
    elif FORMULA == "leaky":
        x = tl.where(x > 0.0, zero + 1.0, zero + A)
    elif FORMULA == "elu":
        x = B * tl.where(x > 0.0, 1.0, A * tl.exp(x))
    elif FORMULA == "swish":
        s = tl.sigmoid(x)
        x = A * s * (1.0 + x * (1.0 - s))
    elif FORMULA == "mish":
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        tanh = n / (n + 2.0)
        x = tanh + x * (1.0 - tanh * tanh) * tl.sigmoid(x)
    elif FORMULA == "smish":
        s = tl.sigmoid(B * x)
        y = 1.0 + s
        tanh = (y * y - 1.0) / (y * y + 1.0)
        x = A * (tanh + x * (1.0 - tanh * tanh) / y * B * s * (1.0 - s))
    elif FORMULA == "ftswish":
        s = tl.sigmoid(x)
        x = tl.where(x * s + A >= 0.0, s * (1.0 + x * (1.0 - s)), 0.0)
    else:
        tl.static_assert(FORMULA == "identity")
        x = zero + 1.0
    return x


# Lengths and the number of rows differ from batch to batch: no kernel is compiled for special values of them.
@triton.jit(do_not_specialize=["T", "U1", "R"])
def hidden(
    enc,
    dec,
    cells,
    out,
    T,
    U1,
    J,
    R,
    FORMULA: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """ROWS cells and CHANNELS channels a program. Sums of half types are not rounded before the activation."""
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cell = tl.load(cells + row, mask=row < R, other=0)
    k = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = (row < R)[:, None] & (k < J)[None, :]
    enc_row = cell // U1
    dec_row = enc_row // T * U1 + cell % U1
    x = tl.load(enc + (enc_row * J)[:, None] + k[None, :], mask=here, other=0.0).to(dtype)
    x += tl.load(dec + (dec_row * J)[:, None] + k[None, :], mask=here, other=0.0).to(dtype)
    x = activated(x, FORMULA, A, B)
    tl.store(out + (row * J)[:, None] + k[None, :], x.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["T", "U1", "R"])
def sums(
    to_hidden,
    enc,
    dec,
    cells,
    place,
    total,
    T,
    U1,
    J,
    R,
    FORMULA: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    OVER_FRAMES: tl.constexpr,
    ITEMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One row of enc a program (OVER_FRAMES: of dec): total += sum over its cells of to_hidden * derivative."""
    dtype: tl.constexpr = total.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if OVER_FRAMES:
        b = row // U1
        corner, stride, count = b * T * U1 + row % U1, U1, T
    else:
        b = row // T
        corner, stride, count = row * U1, 1, U1
    # cells are in order: of this row's, only those from begin to end lie in the tile; most rows have none and end here
    first = tl.load(cells)
    last = tl.load(cells + (tl.cast(R, tl.int64) - 1))
    begin = tl.minimum(tl.maximum(first - corner, 0) // stride, count).to(tl.int32)
    end = tl.where(last < corner, 0, tl.minimum((last - corner) // stride + 1, count)).to(tl.int32)
    if begin < end:
        start = tl.load(place + first)
        k = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        if OVER_FRAMES:
            own = tl.load(dec + row * J + k, mask=k < J, other=0.0).to(dtype)
        else:
            own = tl.load(enc + row * J + k, mask=k < J, other=0.0).to(dtype)
        found = tl.zeros((CHANNELS,), dtype)
        for item in range(begin, end, ITEMS):
            i = (item + tl.arange(0, ITEMS)).to(tl.int64)
            at = tl.load(place + corner + i * stride, mask=i < end, other=-1) - start
            here = (at >= 0)[:, None] & (k < J)[None, :]
            part = tl.load(to_hidden + (at * J)[:, None] + k[None, :], mask=here, other=0.0).to(dtype)
            if FORMULA != "identity":
                if OVER_FRAMES:
                    other = enc + ((b * T + i) * J)[:, None]
                else:
                    other = dec + ((b * U1 + i) * J)[:, None]
                x = own[None, :] + tl.load(other + k[None, :], mask=here, other=0.0).to(dtype)
                part = tl.where(here, part * derivative(x, FORMULA, A, B), 0.0)  # own may be padding, a NaN
            found += tl.sum(part, 0)
        here = total + row * J + k
        tl.store(here, tl.load(here, mask=k < J, other=0.0) + found, mask=k < J)


@triton.jit(do_not_specialize=["T", "U1", "N", "R"])
def exceeding(
    found, cells, by_blank, by_label, frame_lengths, label_lengths, T, U1, N, R, threshold, ROWS: tl.constexpr
):
    """Whether the posterior of each cell does, ROWS of them a program. A NaN does."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cell = tl.load(cells + row, mask=row < R, other=0)
    u = cell % U1
    t = (cell // U1) % T
    b = cell // U1 // T
    frames, U = tl.load(frame_lengths + b), tl.load(label_lengths + b)
    by_blank, by_label = kernels.posteriors(by_blank, by_label, b, t, u, frames, U, U1, N)
    below = by_blank + by_label <= threshold
    tl.store(found + row, below == 0, mask=row < R)
