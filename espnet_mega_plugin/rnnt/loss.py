"""RNN-T loss with FastEmit: warp-transducer's names, order, defaults and result shapes, on any device and float type.

The value is -log P(labels | acts), always; FastEmit weighs the gradient through label arcs by 1 + lambda and leaves
the value alone. Source: Graves 2012 (arXiv:1211.3711); FastEmit: Yu et al. 2020 (arXiv:2010.11148).

B utterances, T frames, U labels, V classes.
"""

import functools
import os
import shutil

import torch
from torch import Tensor

from espnet_mega_plugin.rnnt import arguments, reference, wavefront


def _reference(logits, labels, frame_lengths, label_lengths, blank, fastemit_lambda, *, inplace, threshold, topology):
    found = reference.costs(logits, labels, frame_lengths, label_lengths, blank, fastemit_lambda, topology=topology)
    return found.to(wavefront.accumulator(logits.dtype))


def _triton(*problem, topology, **options):
    from espnet_mega_plugin.rnnt.kernels import triton_rnnt_loss

    return triton_rnnt_loss(*problem, **options)


METHODS = {"reference": _reference, "wavefront": wavefront.costs, "triton": _triton}


def fastest(device: torch.device, topology: str = "regular") -> str:
    """What the method "auto" stands for on this device."""
    return "triton" if device.type == "cuda" and topology == "regular" and _triton_runs() else "wavefront"


@functools.cache
def _triton_runs() -> bool:
    """Whether Triton imports and finds the C compiler with which it builds what launches a kernel."""
    try:
        import espnet_mega_plugin.rnnt.kernels  # noqa: F401
    except ImportError:
        return False
    return bool(os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc"))))


def rnnt_loss(
    acts: Tensor,
    labels: Tensor,
    act_lens: Tensor,
    label_lens: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    fastemit_lambda: float = 0.001,
    *,
    method: str = "auto",
    inplace: bool = True,
    threshold: float | None = None,
    check: bool | None = None,
    topology: str = "regular",
) -> Tensor:
    """-log P of the labels, summed over all alignments.

    Args:
        acts: logits, not normalised. (B, T, U+1, V) float16, bfloat16, float32 or float64; any strides
        labels: (B, U) integers. What lies beyond an utterance's length is not read; columns beyond U are ignored.
        act_lens: frames of each utterance. (B,) integers, 1 to T
        label_lens: labels of each utterance. (B,) integers, 0 to U
        blank: class of the blank; -1 is the last class. No label may be equal to it.
        reduction: "none" gives the costs (B,), "sum" their sum (1,), "mean" the sum divided by B (1,).
            An empty batch gives (0,), 0 and 0.
        fastemit_lambda: weight of FastEmit in the gradient, from 0 up.
        method: "wavefront" (plain PyTorch, any device), "triton" (kernels for CUDA devices), "reference" (loops,
            float64) or "auto": "triton" on CUDA where Triton and a C compiler are found, else "wavefront".
        inplace: whether backward may write the gradient over ``acts``, which saves a tensor of their size. It does so
            where they are contiguous, no leaf and no part of a larger tensor, and not under activation checkpointing
            (`wavefront.may_overwrite`). A second backward, or another operation's that needs them, then raises.
            Nothing raises where detached views of them (``acts.detach()``, ``acts.data``) are read after backward:
            these hold the gradient then.
        threshold: cells whose posterior is at most this get a gradient of exactly 0. None: 1e-9, and 1e-18 for
            float64, below the gradient's own rounding; 0 keeps all.
        check: whether the values of labels and lengths are checked. None: where this needs no synchronisation with
            the device, so always on the CPU. Unchecked, an utterance at fault has a NaN loss and gradient.
        topology: "regular", the RNN transducer's; "constrained", of its alignments those with one label a frame at
            most; "modified", where a label takes its frame with it and no blank follows (k2's names; `topologies.py`).
            The method "triton" knows the regular one alone.

    Returns:
        float64 for float64 ``acts``, else float32. A NaN or +inf among an utterance's logits makes its cost NaN.
        Logits of -inf are masks; labels that no alignment can spell cost +inf and give no gradient.

    Raises:
        TypeError, ValueError: an argument is not as above, or "triton" is asked for elsewhere than on CUDA; the message
            names it.
        ImportError: "triton" is asked for and Triton is not installed.
    """
    arguments.options(reduction, fastemit_lambda, threshold, topology)
    arguments.method(method, METHODS, topology)
    given = arguments.problem(acts, labels, act_lens, label_lens, blank, check)
    if len(acts):
        compute = METHODS[fastest(acts.device, topology) if method == "auto" else method]
        costs = compute(*given[:5], fastemit_lambda, inplace=inplace, threshold=threshold, topology=topology)
    else:
        costs = acts.sum((1, 2, 3)).to(wavefront.accumulator(acts.dtype))
    return arguments.reduced(costs, given.invalid, reduction)


class RNNTLoss(torch.nn.Module):
    """`rnnt_loss` as a module: warp-transducer's arguments in its order, then by name those that are ours."""

    def __init__(
        self,
        blank: int = 0,
        fastemit_lambda: float = 0.001,
        reduction: str = "mean",
        *,
        method: str = "auto",
        inplace: bool = True,
        threshold: float | None = None,
        check: bool | None = None,
        topology: str = "regular",
    ):
        super().__init__()
        arguments.options(reduction, fastemit_lambda, threshold, topology)
        arguments.blank_alone(blank)
        arguments.method(method, METHODS, topology)
        self.blank = blank
        self.fastemit_lambda = fastemit_lambda
        self.reduction = reduction
        self.options = {
            "method": method,
            "inplace": inplace,
            "threshold": threshold,
            "check": check,
            "topology": topology,
        }

    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        return rnnt_loss(
            acts, labels, act_lens, label_lens, self.blank, self.reduction, self.fastemit_lambda, **self.options
        )

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"blank={self.blank}, fastemit_lambda={self.fastemit_lambda}, reduction={self.reduction!r}{options}"
