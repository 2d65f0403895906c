"""Activation functions by ESPnet's names and arguments, as plain modules (picklable, no state).

Each gives the numbers of `espnet2.asr_transducer.activation`, also where that departs from the paper it names:
`mish` ignores its two softplus arguments, and `ftswish` compares with 0 after the threshold was added, so that
0 <= x*sigmoid(x) < -threshold is cut as well. Checkpoints were trained with these numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FTSwish(nn.Module):
    """Flatten-T swish (arXiv:1812.06247), as ESPnet computes it."""

    def __init__(self, threshold: float, mean_shift: float):
        super().__init__()
        self.threshold, self.mean_shift = threshold, mean_shift

    def forward(self, x: Tensor) -> Tensor:
        shifted = x * torch.sigmoid(x) + self.threshold
        return torch.where(shifted >= 0, shifted, self.threshold) - self.mean_shift


class Smish(nn.Module):
    """alpha*x * tanh(log(1 + sigmoid(beta*x))); a parameter that is not positive counts as 1, as in ESPnet."""

    def __init__(self, alpha: float, beta: float):
        super().__init__()
        self.alpha = alpha if alpha > 0 else 1
        self.beta = beta if beta > 0 else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x * torch.tanh(torch.log(1 + torch.sigmoid(self.beta * x)))


class ESwish(nn.Module):
    """beta*x * sigmoid(x) (arXiv:1801.07145)."""

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return self.beta * x * torch.sigmoid(x)


# Argument names and defaults of ESPnet's get_activation; what each activation reads of them.
DEFAULTS = {
    "ftswish_threshold": -0.2,
    "ftswish_mean_shift": 0.0,
    "hardtanh_min_val": -1,
    "hardtanh_max_val": 1,
    "leakyrelu_neg_slope": 0.01,
    "smish_alpha": 1.0,
    "smish_beta": 1.0,
    "softplus_beta": 1.0,
    "softplus_threshold": 20,
    "swish_beta": 1.0,
}
BUILDERS = {
    "ftswish": lambda a: FTSwish(a["ftswish_threshold"], a["ftswish_mean_shift"]),
    "hardtanh": lambda a: nn.Hardtanh(a["hardtanh_min_val"], a["hardtanh_max_val"]),
    "leaky_relu": lambda a: nn.LeakyReLU(a["leakyrelu_neg_slope"]),
    "mish": lambda a: nn.Mish(),
    "relu": lambda a: nn.ReLU(),
    "selu": lambda a: nn.SELU(),
    "smish": lambda a: Smish(a["smish_alpha"], a["smish_beta"]),
    "swish": lambda a: ESwish(a["swish_beta"]) if a["swish_beta"] > 1 else nn.SiLU(),
    "tanh": lambda a: nn.Tanh(),
    "identity": lambda a: nn.Identity(),
}


def build_activation(activation_type: str, **arguments) -> nn.Module:
    """The activation of that name. Arguments are ESPnet's `activation_args`; checked in `arguments.py`."""
    return BUILDERS[activation_type]({**DEFAULTS, **arguments})
