"""One MEGA block: the moving average feeds a single-head gated attention (Ma et al. 2022, section 3.2-3.4).

B batch, L labels, D block size, S query/key size, E value size, C chunk size (or all labels), W remembered labels.

    v               = phi(Wv x)                                                  (E)
    e               = EMA(x)                                                     (D)
    u | z | r | h   = Wmx e + b         sizes D, S, E, D;  u = sigmoid(u), z = phi(z), r = phi(r)
    Q, K            = z * qk_weight[0] + qk_bias[0],  z * qk_weight[1] + qk_bias[1]
    A               = softmax(Q K' / sqrt(S) + bias(distance))   over the keys the mask allows
    o               = A v                                                        (E)
    out             = Norm(x + u * (phi(h + Wh (o * r)) - x))

With `pre_norm`, as the authors' code has it for `normalize_before` (facebookresearch/mega): v and e are made of Norm(x)
instead of x, and out = x + u * (phi(h + Wh (o * r)) - x), where the gate mixes in x as it came, not normalised.

`forward` is the training pass over whole sequences (time first, in ESPnet's order of operations, so that it gives its
bits and, with the same seed, its dropout); `extend` goes on from a memory and gives the same numbers to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espnet_mega_plugin.mega.ema import MultiHeadDampedEMA
from espnet_mega_plugin.mega.position_bias import band
from espnet_mega_plugin.mega.precision import at_least_float32
from espnet_mega_plugin.mega.state import BlockMemory


@dataclass(frozen=True)
class Reach:
    """What L new labels see of W remembered ones and of each other; the same for all blocks."""

    hidden: Tensor  # (B, L, W + L) bool: the query must not see the key
    distance: Tensor  # (L, W + L) int64: query's place - key's place, 0 where negative
    kept: int  # how many of the W + L keys a later label may still see


class MegaBlock(nn.Module):
    def __init__(
        self,
        size: int,
        num_heads: int,
        qk_size: int,
        v_size: int,
        activation: nn.Module,
        normalization: nn.Module,
        position_bias: nn.Module,
        truncation_length: int | None,
        dropout_rate: float,
        att_dropout_rate: float,
        ema_dropout_rate: float,
        pre_norm: bool = False,
    ):
        super().__init__()
        self.multihead_damped_ema = MultiHeadDampedEMA(size, num_heads, activation, truncation_length)
        self.rel_pos_bias = position_bias()  # built here: its draws follow the EMA's, as in ESPnet
        self.proj_v = nn.Linear(size, v_size)
        self.proj_mx = nn.Linear(size, qk_size + v_size + 2 * size)
        self.proj_h = nn.Linear(v_size, size)
        self.qk_weight = nn.Parameter(torch.empty(2, qk_size))
        self.qk_bias = nn.Parameter(torch.empty(2, qk_size))
        self.activation = activation
        self.normalization = normalization
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout_rate)
        self.dropout_attn = nn.Dropout(att_dropout_rate)
        self.dropout_ema = nn.Dropout(ema_dropout_rate)
        self.split_sizes = [size, qk_size + v_size, size]
        self.qk_size, self.v_size = qk_size, v_size
        self.scaling = qk_size**-0.5
        for linear in (self.proj_v, self.proj_mx, self.proj_h):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.qk_weight, std=0.02)
        nn.init.zeros_(self.qk_bias)

    @torch.no_grad()
    def espnet_initialization_fn(self) -> None:
        """Keep a fresh block away from zero. ESPnet calls it after its own `init:` schemes, which zero the biases.

        The start label's embedding is zero and so are all biases: without this the first position is exactly 0
        through every block, normalisations with eps 1e-12 blow its rounding noise up to full size, and its gradient
        is NaN or 1e5. The noise below is of the size of the weights.
        """
        nn.init.normal_(self.proj_h.bias, std=0.02)

    def enter(self, x: Tensor) -> Tensor:
        """What values and the EMA are made of: the block's input, normalised with `pre_norm`."""
        return self.normalization(x) if self.pre_norm else x

    def leave(self, x: Tensor, update: Tensor, candidate: Tensor) -> Tensor:
        """The block's output: its input and the candidate, mixed by the update gate; normalised without `pre_norm`."""
        mixed = torch.addcmul(x, update, candidate - x)
        return mixed if self.pre_norm else self.normalization(mixed)

    def gates(self, averaged: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u, query, key, r, h from the EMA's output; queries and keys are made from one projection."""
        update, z_r, intermediate = self.proj_mx(averaged).split(self.split_sizes, dim=-1)
        z, r = self.activation(z_r).split([self.qk_size, self.v_size], dim=-1)
        query, key = (z.unsqueeze(-2) * self.qk_weight + self.qk_bias).unbind(-2)
        return torch.sigmoid(update), query, key, r, intermediate

    def forward(self, x: Tensor, padding: Tensor, hidden: Tensor, bands: bool = False) -> Tensor:
        """
        Args:
            x: block input. (L, B, D)
            padding: true where the label is padding. (B, L)
            hidden: true where a query must not see a key. (B, chunks, C, C), in bands (B, chunks, C, C-1 + C)
            bands: the keys of a chunk are those of its C labels and of the C - 1 before it, not of its labels alone.

        Returns:
            out: block output. (L, B, D)
        """
        L, B, _ = x.shape
        entered = self.enter(x)
        value = self.activation(self.proj_v(entered))
        averaged = self.dropout_ema(self.multihead_damped_ema(entered, padding))
        update, query, key, r, intermediate = self.gates(averaged)

        chunks, C = hidden.shape[1], hidden.shape[2]
        query, key, value = (z.transpose(0, 1) for z in (query, key, value))
        if bands:
            query, key, value = (nn.functional.pad(z, (0, 0, 0, chunks * C - L)) for z in (query, key, value))
        query, key = (z.reshape(B, chunks, C, self.qk_size) for z in (query, key))
        value = self.dropout(value.reshape(B, chunks, C, self.v_size))
        if bands:
            key, value = with_labels_before(key), with_labels_before(value)
        bias = band(self.rel_pos_bias, C) if bands else self.rel_pos_bias.matrix(C)
        # Written out, on a GPU too: of a default block's multiplications at 64 labels these two products are 2 %
        # (64 * 1,152 of 3.3 million a label), so there is next to nothing for a fused kernel to save
        scores = torch.matmul(query * self.scaling, key.transpose(2, 3)) + bias
        weights = softmax(scores.masked_fill(hidden, float("-inf")))
        attended = torch.matmul(self.dropout_attn(weights), value).view(B, chunks * C, self.v_size)[:, :L]

        candidate = self.dropout(self.activation(intermediate + self.proj_h(attended.transpose(0, 1) * r)))
        return self.leave(x, update, candidate)

    def extend(self, x: Tensor, padding: Tensor, reach: Reach, memory: BlockMemory) -> tuple[Tensor, BlockMemory]:
        """Go on from a memory; without dropout in any mode, so that scoring is never random.

        Args:
            x: block input of the new labels. (B, L, D)
            padding: true where a new label is padding. (B, L)
            reach: what the new labels see of the remembered and of each other.
            memory: of the labels before; not modified.

        Returns:
            out: block output. (B, L, D)
            memory: of the labels so far, as far as a later label can see them.
        """
        entered = self.enter(x)
        value = self.activation(self.proj_v(entered))
        averaged, ema, inputs = self.multihead_damped_ema.extend(entered, padding, memory.ema, memory.inputs)
        update, query, key, r, intermediate = self.gates(averaged)

        keys = torch.cat([memory.keys.to(key.dtype), key], 1)  # (B, W + L, S)
        values = torch.cat([memory.values.to(value.dtype), value], 1)
        bias = self.rel_pos_bias.by_distance(keys.shape[1])[reach.distance]  # (L, W + L)
        scores = torch.matmul(query * self.scaling, keys.transpose(1, 2)) + bias
        attended = torch.matmul(softmax(scores.masked_fill(reach.hidden, float("-inf"))), values)

        candidate = self.activation(intermediate + self.proj_h(attended * r))
        out = self.leave(x, update, candidate)
        first = keys.shape[1] - reach.kept
        return out, BlockMemory(ema, keys[:, first:], values[:, first:], inputs)


def with_labels_before(z: Tensor) -> Tensor:
    """Each chunk behind the C - 1 labels before it, zeros before the first. (B, chunks, C, n) -> (.., C-1 + C, n)"""
    before = nn.functional.pad(z[:, :-1, 1:], (0, 0, 0, 0, 1, 0))
    return torch.cat([before, z], 2)


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in float32 or better, returned in the dtype of `scores`."""
    return torch.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(scores.dtype)
