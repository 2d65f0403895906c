"""What a module's weights are, also in a replica that DataParallel has made: there they are plain tensors."""

import torch
from torch import Tensor, nn


def own_parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """Those of the module itself, by name; in a replica torch keeps them in a place of its own."""
    return getattr(module, "_former_parameters", None) or module._parameters


def device_of(module: nn.Module) -> torch.device:
    """Where the first of its weights is."""
    of_each = (own_parameters(one).values() for one in module.modules())
    return next(weight.device for own in of_each for weight in own if weight is not None)
