"""Multi-head damped exponential moving average (Ma et al. 2022, arXiv:2209.10655, section 3.1).

B batch, L labels, D channels, N heads, K truncation length.

    h[t] = q * h[t-1] + p * expand * x[t]          (D, N) for every row of the batch, h[-1] = 0
    y[t] = sum over N of project * h[t] / sqrt(N)
    out[t] = activation(y[t] + residual * x[t])

| here        | stored parameter (ESPnet's name)   | paper  |
|-------------|------------------------------------|--------|
| p           | sigmoid(damping_factor)            | alpha  |
| q           | 1 - p * sigmoid(decay_factor)      | 1 - alpha * delta |
| expand      | ema_expansion_matrix               | beta   |
| project     | kernel_projection_matrix           | eta    |
| residual    | residual_weight                    | -      |

So ESPnet's `damping_factor` is what the paper calls alpha, its `decay_factor` what the paper calls delta; the
residual and 1/sqrt(N) are the authors' code (facebookresearch/mega), not the paper's equations.
With a truncation length the sum over the past ends after K labels: y[t] reads x[t-K+1] .. x[t].

`extend` is the definition, label by label from a state; `forward` is the same sum as one convolution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espnet_mega_plugin.mega.convolution import causal_convolution, pulse_response, same_layout_for_gradient
from espnet_mega_plugin.mega.precision import at_least_float32, without_autocast


class Coefficients(NamedTuple):
    """In float32 or better: in bfloat16 a decay of 0.999 rounds to 1."""

    weight: Tensor  # p * expand  (D, N)
    decay: Tensor  # q  (D, N)
    project: Tensor  # project / sqrt(N)  (D, N)


class MultiHeadDampedEMA(nn.Module):
    """y = EMA(x), gated by a residual and an activation. Shapes and formulas at the top of the file."""

    def __init__(self, size: int, num_heads: int, activation: nn.Module, truncation_length: int | None):
        super().__init__()
        self.damping_factor = nn.Parameter(torch.empty(size, num_heads, 1))
        self.decay_factor = nn.Parameter(torch.empty(size, num_heads, 1))
        self.ema_expansion_matrix = nn.Parameter(torch.empty(size, num_heads, 1))
        self.kernel_projection_matrix = nn.Parameter(torch.empty(size, num_heads))
        self.residual_weight = nn.Parameter(torch.empty(size))
        self.activation = activation
        self.truncation_length = truncation_length
        self.scaling = math.sqrt(1.0 / num_heads)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw as the authors' code does, in ESPnet's order."""
        nn.init.normal_(self.damping_factor, std=0.2)
        nn.init.normal_(self.decay_factor, std=0.2)
        alternating = torch.ones_like(self.ema_expansion_matrix)
        alternating[:, 1::2] = -1.0
        nn.init.normal_(self.ema_expansion_matrix, std=0.02).add_(alternating)
        nn.init.normal_(self.kernel_projection_matrix)
        nn.init.normal_(self.residual_weight)

    def coefficients(self) -> Coefficients:
        exact = at_least_float32(self.damping_factor.dtype)
        p = torch.sigmoid(self.damping_factor.to(exact))
        q = 1.0 - p * torch.sigmoid(self.decay_factor.to(exact))
        weight = p * self.ema_expansion_matrix.to(exact)
        project = self.kernel_projection_matrix.to(exact) * self.scaling
        return Coefficients(weight.squeeze(-1), q.squeeze(-1), project)

    def kernel(self, length: int) -> Tensor:
        """Response to a unit pulse, cut at the truncation length: sum over N of project * q**t * weight. (D, <=L)"""
        weight, decay, project = self.coefficients()
        # a decay that rounds to 0 would give 0 * log(0); the smallest normal number gives the same powers
        log_decay = decay.clamp(min=torch.finfo(decay.dtype).tiny).log()
        return pulse_response(weight, log_decay, project, min(length, self.truncation_length or length))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """All labels at once, as one convolution by FFT.

        One way for all lengths: the direct sum, and sums in chunks with a state between them, take longer in training
        at nearly every length (`python tests/bench/bench_ema.py`), and are not ESPnet's numbers to the bit.

        Args:
            x: block input. (L, B, D)
            padding: true where the label is padding and adds nothing to the average. (B, L)

        Returns:
            out: gated average, in the dtype of `x`. (L, B, D)
        """
        with without_autocast(x.device):
            kernel = self.kernel(x.shape[0]).to(at_least_float32(x.dtype))
            averaged = causal_convolution(x, padding, kernel, self.residual_weight)
        return same_layout_for_gradient(self.activation(averaged))

    def extend(self, x: Tensor, padding: Tensor, state: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Go on from a state: the definition, one label after another.

        Args:
            x: block input of the new labels. (B, L, D)
            padding: true where a new label is padding. (B, L)
            state: h after the labels before. (B, D, N)
            inputs: with a truncation length, the last K-1 inputs before (zeros in front of the first). (B, W, D)

        Returns:
            out: gated average. (B, L, D)
            state: h after the new labels, float32 or better. (B, D, N)
            inputs: the last K-1 inputs after the new labels; None without truncation. (B, W', D)
        """
        with without_autocast(x.device):
            coefficients = self.coefficients()
            exact = torch.promote_types(x.dtype, coefficients.decay.dtype)
            seen = x.masked_fill(padding[..., None], 0.0).to(exact)
            if self.truncation_length is None:
                y, state = self._recur(seen, state.to(exact), coefficients)
            else:
                y, state, inputs = self._recur_truncated(seen, inputs.to(exact), coefficients)
            y = y.to(x.dtype)
        return self.activation(y + x * self.residual_weight), state, inputs

    @staticmethod
    def _recur(x: Tensor, h: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
        weight, decay, project = coefficients
        y = []
        for x_t in x.unbind(1):
            h = decay * h + weight * x_t[..., None]
            y.append((h * project).sum(-1))
        return torch.stack(y, 1), h

    def _recur_truncated(self, x: Tensor, past: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
        # Summed anew from the window at each label: subtracting what leaves it would let rounding pile up.
        weight, decay, project = coefficients
        past = torch.cat([past, x], 1)
        before, K = past.shape[1] - x.shape[1], self.truncation_length
        lag = torch.arange(min(K, past.shape[1]), device=x.device)
        response = (weight * decay ** lag[:, None, None]).flip(0)  # (K, D, N), oldest first
        y = []
        for t in range(before, past.shape[1]):
            window = past[:, max(0, t + 1 - K) : t + 1]
            h = torch.einsum("bkd,kdn->bdn", window, response[response.shape[0] - window.shape[1] :])
            y.append((h * project).sum(-1))
        return torch.stack(y, 1), h, past[:, max(0, past.shape[1] - (K - 1)) :]
