"""One new label for each of B hypotheses: the flat form of `MegaNetwork.extend`, in tensors alone.

What the hypotheses share of their past is attended to once for all of them, as one matrix product. So the cost of a
step hardly grows with the history of a beam. What a hypothesis has of its own is either shown to all, hidden from the
others (`Together`: fewest operations where it is little), or gathered for it alone (`Past`):

    scores = [Q Ks' | q Ko' | q k'] + bias      shared (P), own (T), the label itself (1)
    o      = softmax(scores) [Vs | Vo | v]

B hypotheses, P shared and T own labels, U labels of all hypotheses, D block size, N EMA heads, S query/key size,
E value size.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from espnet_mega_plugin.mega.block import softmax
from espnet_mega_plugin.mega.ema import Coefficients
from espnet_mega_plugin.mega.packed import PackedLayers
from espnet_mega_plugin.mega.precision import autocast_dtype, without_autocast

if TYPE_CHECKING:
    from espnet_mega_plugin.mega.network import MegaNetwork


_serial = itertools.count()


class Past(NamedTuple):
    """What the new labels go on from; one entry a block in front."""

    ema: Tensor | None  # None with a truncation length. (blocks, B, N, D)
    inputs: Tensor | None  # with a truncation length K: the last inputs, zeros before the first. (blocks, B, <K, D)
    shared: Tensor  # keys | values all hypotheses see. (blocks, P, S + E)
    own: Tensor  # keys | values each sees of its own. (blocks, B, T, S + E)
    bias: Tensor  # position bias; -inf where a hypothesis does not see a label. (blocks, B, P + T + 1)

    def attend(self, b: int, query: Tensor, key_value: Tensor, dtype: torch.dtype) -> Tensor:
        """What block b's attention gives for the new labels. (B, S), (B, S + E) -> (B, E) in that dtype"""
        S = query.shape[1]
        key, value = key_value[:, :S], key_value[:, S:].to(dtype)
        return _attend(query, key, value, self.shared[b], self.own[b], self.bias[b])


class Together(NamedTuple):
    """The same where all hypotheses look at one table of labels, each at its own ones."""

    ema: Tensor | None
    inputs: Tensor | None
    labels: Tensor  # keys | values, the last B the new labels', which a step writes. (blocks, U + B, S + E)
    bias: Tensor  # -inf where a hypothesis does not see a label. (blocks, B, U + B)

    def attend(self, b: int, query: Tensor, key_value: Tensor, dtype: torch.dtype) -> Tensor:
        labels, S = self.labels[b], query.shape[1]
        labels[labels.shape[0] - query.shape[0] :] = key_value  # len() would fix the size of an exported graph
        scores = torch.addmm(self.bias[b].to(query.dtype), query, labels[:, :S].T.to(query.dtype))
        return softmax(scores).to(dtype) @ labels[:, S:].to(dtype)


class Fresh(NamedTuple):
    """What the new labels leave behind."""

    ema: Tensor  # (blocks, B, N, D)
    inputs: Tensor | None  # with a truncation length. (blocks, B, D)
    keys_values: Tensor  # (blocks, B, S + E)


class Constants:
    """What every step needs of the weights and only the weights decide."""

    def __init__(self, network: MegaNetwork):
        weight = network.embed.weight
        self.serial = next(_serial)
        # Where numbers end at 65,504, labels that are hidden may be infinite, and 0 * inf is NaN
        self.half = torch.float16 in (weight.dtype, autocast_dtype(weight.device))
        with without_autocast(weight.device):
            # heads before channels: a sum over the few heads then runs along the channels
            self.ema: list[Coefficients] = [
                Coefficients(*(c.T.contiguous() for c in block.multihead_damped_ema.coefficients()))
                for block, _ in network.mega_blocks
            ]
        self.decay = torch.stack([coefficients.decay for coefficients in self.ema])[:, None]  # (blocks, 1, N, D)
        # queries and keys are one projection times these plus those; queries in their final scale. (2, S) each
        scale = [block.qk_weight.new_tensor([[block.scaling], [1.0]]) for block, _ in network.mega_blocks]
        self.query_key = [
            (block.qk_weight * s, block.qk_bias * s) for (block, _), s in zip(network.mega_blocks, scale, strict=True)
        ]
        self.linear = PackedLayers(network)
        # Longer each time more is asked for; set whole, because threads share it
        self._bias: tuple[Tensor, Tensor] | None = None

    def bias(self, network: MegaNetwork, distances: int) -> Tensor:
        """Position bias of each block for the distances 0 .. at least distances - 1, and -inf at last: what is not
        seen. (blocks, > distances)"""
        return self._biases(network, distances)[0]

    def bias_of_a_line(self, network: MegaNetwork, distances: int) -> Tensor:
        """The same for the distances from distances - 1 down to 0: of labels one after the other, the new one at last.
        (blocks, distances)"""
        backwards = self._biases(network, distances)[1]
        return backwards[:, backwards.shape[1] - distances :]

    def _biases(self, network: MegaNetwork, distances: int) -> tuple[Tensor, Tensor]:
        biases = self._bias
        if biases is None or distances > biases[1].shape[1]:
            by_block = [block.rel_pos_bias.by_distance(max(64, 2 * distances)) for block, _ in network.mega_blocks]
            table = torch.stack(by_block)
            self._bias = biases = torch.nn.functional.pad(table, (0, 1), value=float("-inf")), table.flip(1)
        return biases


def step(
    network: MegaNetwork, constants: Constants, labels: Tensor, padding: Tensor | None, past: Past | Together
) -> tuple[Tensor, Fresh]:
    """Go on by one label for each hypothesis, without dropout.

    Args:
        labels: the new label of each. (B,) int64
        padding: true where it is padding; None where none is. (B,) bool
        past: what they go on from; a third form of it is a pool's (`pool.py`).

    Returns:
        out: decoder output. (B, D)
        fresh: what to remember of the new labels.
    """
    x = network.embed(labels)
    # decayed here for all blocks at once; each then adds its input where the state stands
    ema = [None] * len(network.mega_blocks) if past.ema is None else past.ema * constants.decay
    states, inputs, keys_values = [], [], []
    for b, (block, feed_forward) in enumerate(network.mega_blocks):
        x, state, seen, key_value = _block(block, constants, b, x, padding, past, ema[b])
        x = feed_forward.extend(x, constants.linear)
        states.append(state)
        inputs.append(seen)
        keys_values.append(key_value)
    ema, inputs = (torch.stack(states), torch.stack(inputs)) if past.ema is None else (ema, None)
    return network.final_norm(x), Fresh(ema, inputs, torch.stack(keys_values))


def _block(block, constants: Constants, b: int, x: Tensor, padding: Tensor | None, past, decayed: Tensor | None):
    linear = constants.linear
    entered = block.enter(x)
    value = block.activation(linear(block.proj_v, entered))
    before = past.inputs[b] if decayed is None else decayed
    averaged, state, seen = _average(block.multihead_damped_ema, constants.ema[b], entered, padding, before)
    update, z_r, intermediate = linear(block.proj_mx, averaged).split(block.split_sizes, dim=-1)
    update, z_r = torch.sigmoid(update), block.activation(z_r)
    z, r = z_r[:, : block.qk_size], z_r[:, block.qk_size :]
    weight, bias = constants.query_key[b]
    query, key = torch.addcmul(bias, z.unsqueeze(1), weight).unbind(1)
    key_value = torch.cat([key, value.to(key.dtype)], 1)
    attended = past.attend(b, query, key_value, value.dtype)
    x = block.leave(x, update, block.activation(intermediate + linear(block.proj_h, attended * r)))
    return x, state, seen, key_value


def _average(ema, coefficients: Coefficients, x: Tensor, padding: Tensor | None, before: Tensor):
    """The average with the new label, the state after it, the input as the average sees it.

    Args:
        before: the decayed state, which becomes the new one (B, N, D); with a truncation length the last inputs.
            (B, <K, D)
    """
    weight, decay, project = coefficients
    with without_autocast(x.device):
        seen = x.to(torch.promote_types(x.dtype, decay.dtype))
        if padding is not None:
            seen = seen.masked_fill(padding[:, None], 0.0)
        if ema.truncation_length is None:
            state = before.addcmul_(weight, seen.unsqueeze(1))
        else:
            window = torch.cat([before, seen[:, None]], 1)
            lag = torch.arange(window.shape[1] - 1, -1, -1, device=x.device)
            state = torch.einsum("bkd,knd->bnd", window, weight * decay ** lag[:, None, None])
        y = (state * project).sum(1).to(x.dtype)
    return ema.activation(torch.addcmul(y, x, ema.residual_weight)), state, seen


def _attend(query: Tensor, key: Tensor, value: Tensor, shared: Tensor, own: Tensor, bias: Tensor) -> Tensor:
    S, P, T = key.shape[1], shared.shape[0], own.shape[1]
    shared, own = shared.to(value.dtype), own.to(value.dtype)
    scores = [query @ shared[:, :S].T.to(query.dtype)] if P else []
    if T:
        scores.append(torch.bmm(own[..., :S].to(query.dtype), query.unsqueeze(2)).squeeze(2))
    scores.append((query * key).sum(1, keepdim=True))
    weights = softmax((torch.cat(scores, 1) if len(scores) > 1 else scores[0]) + bias).to(value.dtype)
    attended = weights[:, -1:] * value
    if P:
        attended = torch.addmm(attended, weights[:, :P], shared[:, S:])
    if T:
        attended = torch.baddbmm(attended.unsqueeze(1), weights[:, None, P:-1], own[..., S:]).squeeze(1)
    return attended
