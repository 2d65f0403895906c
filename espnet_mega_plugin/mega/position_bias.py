"""Relative position bias of the attention: a number for each distance d = (query's place) - (key's place) >= 0.

Both kinds offer the same two methods:
    matrix(L)         bias for all pairs of L labels, in ESPnet's order of operations    (L, L)
    by_distance(n)    bias for the distances 0 .. n-1                                    (n,)
so that matrix(L)[i, j] == by_distance(L)[i - j] for j <= i. `band` lays out either for queries that see a window.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from espnet_mega_plugin.mega.precision import at_least_float32, without_autocast


class RelativePositionBias(nn.Module):
    """`simple`: one learnt number a distance.

    The checkpoint holds 2M-1 numbers; the first M belong to the distances M-1 .. 0, the rest to keys after the
    query, which a causal decoder never reads.
    """

    def __init__(self, max_positions: int):
        super().__init__()
        self.max_positions = max_positions
        self.relative_position_bias = nn.Parameter(torch.empty(2 * max_positions - 1))
        nn.init.normal_(self.relative_position_bias, std=0.02)

    def matrix(self, length: int) -> Tensor:
        if length > self.max_positions:
            raise ValueError(
                f"Length {length} is too long for the maximum number of allowed positions {self.max_positions} "
                f"(decoder_conf max_positions). Train with a larger max_positions, with rel_pos_bias_type: rotary "
                f"(no limit), with a chunk_size or with an attention_window of at most max_positions."
            )
        first = self.max_positions - length
        near = self.relative_position_bias[first : first + 2 * length - 1]
        # Rows of 2L numbers, cut anew into rows of 2L - 1: each row stands one place further right than the one above
        rows = nn.functional.pad(near, (0, 1)).expand(length, -1).reshape(-1)[: length * (2 * length - 1)]
        return rows.view(length, 2 * length - 1)[:, length - 1 :]

    def by_distance(self, count: int) -> Tensor:
        """Distances beyond the table use its last entry, so that decoding outlives `max_positions`."""
        near = self.relative_position_bias[: self.max_positions].flip(0)[:count]
        return torch.cat([near, near[-1:].expand(count - near.shape[0])]) if count > near.shape[0] else near


class RotaryRelativePositionBias(nn.Module):
    """`rotary`: two learnt vectors, turned by their places and multiplied. No limit of length.

    Source: facebookresearch/mega, RotaryRelativePositionalBias. The angles are computed where they are used:
    ESPnet's tables keep the precision of an earlier half() and are in no checkpoint.
    """

    max_positions = None

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.alpha = nn.Parameter(torch.empty(1, size))
        self.beta = nn.Parameter(torch.empty(1, size))
        self.register_buffer("_pe", torch.zeros(1))  # unused; ESPnet's checkpoints hold it
        nn.init.normal_(self.alpha, std=0.02)
        nn.init.normal_(self.beta, std=0.02)

    def _angles(self, count: int) -> Tensor:
        """Angle of each place and pair of channels, float32 or better. (count, size / 2)"""
        exact = at_least_float32(self.alpha.dtype)
        half = self.size // 2
        speed = torch.exp(torch.arange(half, dtype=exact, device=self.alpha.device) * -(math.log(10000) / half))
        return torch.arange(count, dtype=exact, device=self.alpha.device)[:, None] * speed

    @staticmethod
    def _turned(vector: Tensor, angles: Tensor) -> Tensor:
        first, second = vector.to(angles.dtype).expand(angles.shape[0], -1).chunk(2, dim=-1)
        sin, cos = torch.sin(angles), torch.cos(angles)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)

    def matrix(self, length: int) -> Tensor:
        with without_autocast(self.alpha.device):
            angles = self._angles(length)
            bias = torch.einsum("mk,nk->mn", self._turned(self.alpha, angles), self._turned(self.beta, angles))
            return bias.to(self.alpha.dtype)

    def by_distance(self, count: int) -> Tensor:
        with without_autocast(self.alpha.device):
            # the key stands at 0, the query at d
            bias = self._turned(self.alpha, self._angles(count)) @ self.beta[0].to(at_least_float32(self.alpha.dtype))
            return bias.to(self.alpha.dtype)


def band(bias: nn.Module, window: int) -> Tensor:
    """Bias of `window` queries to the keys of their own places and of the window - 1 before; 0 outside the window.

    Returns:
        band[i, j] = by_distance(window)[i + window - 1 - j]. (window, window-1 + window)
    """
    near = nn.functional.pad(bias.by_distance(window).flip(0), (window - 1, window - 1))
    return near.unfold(0, 2 * window - 1, 1).flip(0)  # each row stands one place further right than the one above


def build_position_bias(rel_pos_bias_type: str, qk_size: int, max_positions: int) -> nn.Module:
    return RotaryRelativePositionBias(qk_size) if rel_pos_bias_type == "rotary" else RelativePositionBias(max_positions)
