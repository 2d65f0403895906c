"""Backward passes whose gradients have no gradient: asking for one raises, and never gives a part of it in silence.

torch's own `once_differentiable` raises only where the gradient that comes in requires one, which a loss's 1 does not,
and only on the way to that: of a loss with a gradient penalty it leaves the penalty's part out.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def saved_tensors(ctx) -> tuple[Tensor | None, ...]:
    return ctx.saved_tensors


def once_differentiable(unpack: Callable[..., tuple[Tensor | None, ...]] = saved_tensors) -> Callable:
    """Decorate ``backward(ctx, saved, *grads)``, which returns a tuple and is not recorded.

    Under ``create_graph=True`` every gradient hangs on what forward saved, which has to hold each input that may
    require a gradient, or else an output; differentiating it raises a RuntimeError.

    Args:
        unpack: gives ``saved`` of ctx. Once a backward: under activation checkpointing a second time is an error.
    """

    def decorate(backward: Callable) -> Callable:
        name = f"{backward.__module__}.{backward.__qualname__}"

        @functools.wraps(backward)
        def unrecorded(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = unpack(ctx)
            with torch.no_grad():
                found = backward(ctx, saved, *grads)
            if not torch.is_grad_enabled():
                return found
            depends_on = [x for x in (*saved, *grads) if isinstance(x, Tensor) and x.requires_grad]
            ended = iter(_Ended.apply(name, len(depends_on), *depends_on, *(x for x in found if x is not None)))
            return tuple(None if x is None else next(ended) for x in found)

        return unrecorded

    return decorate


class _Ended(torch.autograd.Function):
    """Gradients as they are, and what they depend on, so that no way to that goes past the error."""

    @staticmethod
    def forward(ctx, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.detach() for x in tensors[count:])  # no views, so they may be written over

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"A gradient of a gradient was asked for (a gradient penalty, a Hessian), and those of {ctx.name} cannot "
            "be differentiated. Of the losses, rnnt_loss can with method='reference'."
        )
