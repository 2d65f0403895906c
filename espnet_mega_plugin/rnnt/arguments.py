"""The door of the losses: everything is checked here, once, goes on in one form and leaves in one form.

B utterances, T frames, U labels, V classes.
"""

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from espnet_mega_plugin.rnnt.topologies import TOPOLOGIES

REDUCTIONS = ("none", "mean", "sum")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class Problem(NamedTuple):
    """What the methods take: lengths valid, labels beyond their length blank, all int64 on the logits' device."""

    logits: Tensor  # (B, T, U+1, V)
    labels: Tensor  # (B, U)
    frame_lengths: Tensor  # (B,)
    label_lengths: Tensor  # (B,)
    blank: int
    invalid: Tensor | None  # (B,) bool: utterances that a synchronising check would have refused; None: checked


def problem(
    acts: Tensor,
    labels: Tensor,
    act_lens: Tensor,
    label_lens: Tensor,
    blank: int,
    check: bool | None,
    names: Mapping[str, str] | None = None,
) -> Problem:
    """Refuse what is wrong with a ValueError (TypeError for a wrong type) that names the argument.

    Shapes and types are always checked, the values of lengths and labels where that costs no synchronisation (``acts``
    or all three of them on the CPU) or with ``check=True``. Otherwise the utterances at fault are marked ``invalid``.

    Args:
        names: what the caller's user calls these arguments, where it is something else; messages use it.
    """
    try:
        return _problem(acts, labels, act_lens, label_lens, blank, check)
    except (TypeError, ValueError) as error:
        if names is None:
            raise
        raise type(error)(_renamed(str(error), names)) from None


def moved(integers: Tensor, device: torch.device) -> Tensor:
    """As int64 on this device; the copy does not wait until the device has done what it still has to do."""
    return integers.to(device, torch.int64, non_blocking=device.type != "cpu")


def unbuilt(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Logits of this shape, with the type and device of ``like``, that take no memory but for one number."""
    return like.detach().new_empty(1).expand(shape)


def reduced(costs: Tensor, invalid: Tensor | None, reduction: str) -> Tensor:
    """What warp-transducer makes of the costs (B,): themselves, their sum (1,) or it divided by B (1,).

    Utterances that are ``invalid`` cost NaN.
    """
    if invalid is not None:
        costs = costs * torch.where(invalid, torch.nan, 1.0).to(costs.dtype)
    if reduction == "none":
        return costs
    total = costs.sum(0, keepdim=True)
    return total / max(1, len(costs)) if reduction == "mean" else total


def _renamed(text: str, names: Mapping[str, str]) -> str:
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    return pattern.sub(lambda found: names[found[0]], text)


def _problem(
    acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor, blank: int, check: bool | None
) -> Problem:
    blank = _shapes_and_types(acts, labels, act_lens, label_lens, blank)
    B, T, U1, V = acts.shape
    if check is None:
        check = _values_are_free(acts, labels, act_lens, label_lens)
    if check:
        # once on the CPU: a device is synchronised once for each tensor, not once for each question
        _lengths(act_lens.cpu().long(), label_lens.cpu().long(), T, U1)
        _labels(labels[:, : U1 - 1].cpu().long(), label_lens.cpu().long(), V, blank)
    labels, frames, lengths = (moved(x, acts.device) for x in (labels[:, : U1 - 1], act_lens, label_lens))
    if check:
        return Problem(acts, labels.masked_fill(_beyond(labels, lengths), blank), frames, lengths, blank, None)
    invalid = (frames < 1) | (frames > T) | (lengths < 0) | (lengths > U1 - 1)
    frames, lengths = frames.clamp(1, T), lengths.clamp(0, U1 - 1)
    beyond = _beyond(labels, lengths)
    wrong = ((labels < 0) | (labels >= V) | (labels == blank)) & ~beyond
    invalid = invalid | wrong.any(1)
    return Problem(acts, labels.masked_fill(beyond | wrong, blank), frames, lengths, blank, invalid)


def options(reduction: str, fastemit_lambda: float, threshold: float | None = None, topology: str = "regular") -> None:
    """Refuse an unknown reduction or topology, a lambda not finite or below 0, a threshold outside [0, 1)."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}; got {reduction!r}.")
    number("fastemit_lambda", fastemit_lambda)
    if threshold is not None:
        number("threshold", threshold, "None or a number from 0 to below 1", 1)
    if topology not in TOPOLOGIES:
        raise ValueError(f"topology must be one of {', '.join(map(repr, TOPOLOGIES))}; got {topology!r}.")


def method(name: str, methods: Iterable[str], topology: str) -> None:
    """Refuse an unknown method, or one that does not know the topology."""
    if name != "auto" and name not in methods:
        raise ValueError(f"method must be 'auto' or one of {', '.join(map(repr, sorted(methods)))}; got {name!r}.")
    if name == "triton" and topology != "regular":
        raise ValueError(f"method 'triton' knows the regular topology alone; got topology {topology!r}. Take 'auto'.")


def blank_alone(blank: int) -> None:
    """Refuse a blank that is wrong for every vocabulary."""
    if isinstance(blank, bool) or not isinstance(blank, Integral):
        raise TypeError(f"blank must be an int; got {type(blank).__name__}.")
    if blank < -1:
        raise ValueError(f"blank must be a class from 0 up, or -1 for the last one; got {blank}.")


def number(name: str, value: float, wanted: str = "a finite number from 0 up", below: float = math.inf) -> None:
    """Refuse what is no number, or not from 0 to ``below``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}; got {type(value).__name__}.")
    if not 0 <= value < below:
        raise ValueError(f"{name} must be {wanted}; got {value}.")


def _values_are_free(acts: Tensor, *integers: Tensor) -> bool:
    """Whether reading the integers waits for no device that would otherwise work on."""
    return acts.device.type == "cpu" or all(x.device.type == "cpu" for x in integers)


def _shapes_and_types(acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor, blank: int) -> int:
    named = {"acts": acts, "labels": labels, "act_lens": act_lens, "label_lens": label_lens}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}.")
        kinds, wanted = (_FLOATS, "floating point") if name == "acts" else (_INTEGERS, "int32 or int64")
        if value.dtype not in kinds:
            raise TypeError(f"{name} must be {wanted}; got {value.dtype}.")
    if acts.dim() != 4:
        raise ValueError(f"acts must be logits of shape (B, T, U+1, V); got {tuple(acts.shape)}.")
    B, T, U1, V = acts.shape
    if B and min(T, U1, V) < 1:
        raise ValueError(f"acts needs at least one frame, one row and one class; got (B, T, U+1, V) = {(B, T, U1, V)}.")
    if labels.dim() != 2 or labels.shape[0] != B:
        raise ValueError(f"labels must be (B, U), B = {B} as in acts {tuple(acts.shape)}; got {tuple(labels.shape)}.")
    if B and labels.shape[1] < U1 - 1:
        raise ValueError(
            f"labels must be (B, U) = {(B, U1 - 1)} to go with acts {tuple(acts.shape)}, which have one row more than "
            f"labels (the row before the first label); got {tuple(labels.shape)}."
        )
    for name in ("act_lens", "label_lens"):
        if named[name].shape != (B,):
            raise ValueError(f"{name} must be (B,) = ({B},) as in acts; got {tuple(named[name].shape)}.")
    blank_alone(blank)
    if B and not -1 <= blank < V:
        raise ValueError(f"blank must be a class from 0 to V - 1 = {V - 1}, or -1 for the last one; got {blank}.")
    return V - 1 if blank == -1 else int(blank)


def _lengths(act_lens: Tensor, label_lens: Tensor, T: int, U1: int) -> None:
    for name, lens, least, most, what in (
        ("act_lens", act_lens, 1, T, "frames of acts"),
        ("label_lens", label_lens, 0, U1 - 1, "rows of acts less one"),
    ):
        wrong = (lens < least) | (lens > most)
        if wrong.any():
            b = int(wrong.nonzero()[0])
            raise ValueError(f"{name} must be from {least} to {most} ({what}); utterance {b} has {int(lens[b])}.")


def _labels(labels: Tensor, label_lens: Tensor, V: int, blank: int) -> None:
    wrong = ((labels < 0) | (labels >= V) | (labels == blank)) & ~_beyond(labels, label_lens)
    if wrong.any():
        b, u = wrong.nonzero()[0].tolist()
        label = int(labels[b, u])
        why = "is the blank" if label == blank else f"is outside 0 to V - 1 = {V - 1}"
        raise ValueError(
            f"labels[{b}, {u}] = {label} {why}; labels within label_lens ({int(label_lens[b])} for utterance {b}) must "
            f"be classes from 0 to {V - 1} other than the blank, {blank}."
        )


def _beyond(labels: Tensor, label_lens: Tensor) -> Tensor:
    return torch.arange(labels.shape[1], device=labels.device) >= label_lens[:, None]
