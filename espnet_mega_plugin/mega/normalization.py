"""The four normalisations of ESPnet's transducer, by name; parameters are named as in its checkpoints.

D is the last dimension, over which all of them normalise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espnet_mega_plugin.mega.precision import at_least_float32


class BasicNorm(nn.Module):
    """x / sqrt(mean(x^2) + exp(eps)); eps is learnt (icefall's BasicNorm)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(eps).log())

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps.exp()) ** -0.5


class RMSNorm(nn.Module):
    """scale * x / (rms(x) + eps) (arXiv:1910.07467); with 0 < partial < 1 the rms is that of the first share of D."""

    def __init__(self, size: int, eps: float, partial: float):
        super().__init__()
        self.eps = eps
        self.measured = int(size * partial) if 0 < partial < 1 else size
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        rms = x[..., : self.measured].norm(2, dim=-1, keepdim=True) * self.measured**-0.5
        return self.scale * (x / (rms + self.eps))


class ScaleNorm(nn.Module):
    """scale * x / max(|x|, eps) with one learnt scale (arXiv:1910.05895)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.tensor(size**0.5))

    def forward(self, x: Tensor) -> Tensor:
        # float32 for the half types: scale / eps is beyond float16, and infinity times a row of zeros is NaN
        wide = x.to(at_least_float32(x.dtype))
        return (wide * (self.scale / torch.norm(wide, dim=-1, keepdim=True).clamp(min=self.eps))).to(x.dtype)


# eps where `normalization_args` gives none: ESPnet's values
EPS = {"basic_norm": 0.25, "layer_norm": 1e-12, "rms_norm": 1e-5, "scale_norm": 1e-5}


def build_normalization(
    normalization_type: str, size: int, eps: float | None = None, partial: float | None = None
) -> nn.Module:
    """The normalisation of that name over `size` values. `partial` is read by rms_norm alone."""
    eps = EPS[normalization_type] if eps is None else eps
    if normalization_type == "basic_norm":
        return BasicNorm(size, eps)
    if normalization_type == "layer_norm":
        return nn.LayerNorm(size, eps=eps)
    if normalization_type == "rms_norm":
        return RMSNorm(size, eps, -1.0 if partial is None else partial)
    return ScaleNorm(size, eps)
