"""What a gradient that has none of its own must do to a loss that hangs on it."""

import pytest
import torch
from torch import Tensor


def assert_no_penalty(loss: Tensor, *sources: Tensor) -> None:
    """The gradient to the first of them is no part of another loss, whichever of them that one is differentiated by."""
    (gradient,) = torch.autograd.grad(loss.sum(), sources[0], create_graph=True)
    assert gradient.requires_grad
    penalised = loss.sum() + gradient.square().sum()
    for source in sources:
        with pytest.raises(RuntimeError, match="A gradient of a gradient was asked for"):
            torch.autograd.grad(penalised, source, retain_graph=True)
