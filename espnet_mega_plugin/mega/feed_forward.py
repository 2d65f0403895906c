"""The feed-forward half of a layer: Norm(x + W2 phi(W1 x)), dropout after both projections.

With `pre_norm` x + W2 phi(W1 Norm(x)).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class NormalizedPositionwiseFeedForward(nn.Module):
    def __init__(
        self,
        size: int,
        hidden_size: int,
        activation: nn.Module,
        normalization: nn.Module,
        dropout_rate: float,
        pre_norm: bool = False,
    ):
        super().__init__()
        self.linear1 = nn.Linear(size, hidden_size)
        self.linear2 = nn.Linear(hidden_size, size)
        self.activation = activation
        self.normalization = normalization
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout_rate)
        for linear in (self.linear1, self.linear2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        hidden = self.dropout(self.activation(self.linear1(self._entered(x))))
        return self._left(self.dropout(self.linear2(hidden)) + x)

    def extend(self, x: Tensor, linear: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__) -> Tensor:
        """As forward, without dropout in any mode: scoring is never random. `linear` runs a layer on its input."""
        return self._left(linear(self.linear2, self.activation(linear(self.linear1, self._entered(x)))) + x)

    def _entered(self, x: Tensor) -> Tensor:
        return self.normalization(x) if self.pre_norm else x

    def _left(self, x: Tensor) -> Tensor:
        return x if self.pre_norm else self.normalization(x)
