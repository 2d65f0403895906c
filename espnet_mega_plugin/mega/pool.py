"""Label prefixes of a whole batch of utterances: keys and values in one pool, attention along a tree of prefixes.

A *node* is a prefix: its last label's keys and values are stored once, at the node, however many prefixes go on from
it. A new prefix attends to the nodes above it, so all new prefixes of an utterance are one product with that
utterance's pool, in which all but each one's ancestors is hidden. The moving average is stored by *leaf*, of which
there are few: it is only needed where a prefix is extended.

    scores = Q K' + bias(depth of the new - depth of the node), hidden off the line of ancestors
    o      = softmax(scores) V

This is the `LabelScorer` of the batched search (`search/scorer.py` says what rows and a tree are). B utterances,
N nodes, M leaves, R new prefixes, D block size, H EMA heads, S query/key size, E value size.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espnet_mega_plugin.mega.block import softmax
from espnet_mega_plugin.mega.precision import at_least_float32
from espnet_mega_plugin.mega.step import Constants, step

if TYPE_CHECKING:
    from espnet_mega_plugin.mega.network import MegaNetwork


class MegaPool:
    def __init__(self, network: MegaNetwork, constants: Constants):
        """
        Args:
            constants: of the weights as they are now; a network whose weights change needs a new pool.
        """
        self.network, self.constants = network, constants
        weight = network.embed.weight
        self.exact = at_least_float32(weight.dtype)
        blocks, D = network.num_blocks, network.output_size
        width = network.mega_att_k_size + network.mega_att_v_size
        self.keys_values = weight.new_zeros(blocks, 0, 0, width)  # (blocks, B, N, S + E)
        if network.truncation_length is None:
            self.ema = weight.new_zeros(blocks, 0, 0, network.mega_ema_num_heads, D, dtype=self.exact)
        else:
            self.inputs = weight.new_zeros(blocks, 0, 0, D, dtype=self.exact)  # (blocks, B, N, D)

    @property
    def reach(self) -> int | None:
        """How many labels, its own among them, a prefix looks at; None: all."""
        network = self.network
        attended = network.attention_window if network.chunk_size <= 0 else network.chunk_size
        # without truncation the average looks at no label: it has a state
        return None if attended is None else max(attended, network.truncation_length or 0)

    @property
    def bytes(self) -> int:
        held = [self.keys_values, self.ema if self.network.truncation_length is None else self.inputs]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        self.keys_values = _larger(self.keys_values, utterances, nodes)
        if self.network.truncation_length is None:
            self.ema = _larger(self.ema, utterances, leaves)
        else:
            self.inputs = _larger(self.inputs, utterances, nodes)

    @torch.no_grad()
    def extend(self, rows, tree) -> Tensor:
        """The decoder's output after each new prefix. (R, D)"""
        network = self.network
        padding = None
        if network.pad_idx != 0:  # a search never takes label 0, which is blank, but in front
            padding = (rows.label == network.pad_idx) & (rows.parent >= 0)
        past = _PoolPast(self, rows, tree)
        out, fresh = step(network, self.constants, rows.label, padding, past)
        if network.truncation_length is None:
            _put(self.ema, _index(self.ema, rows.utterance, rows.leaf, rows.valid), torch.stack(fresh.ema))
        else:
            _put(self.inputs, _index(self.inputs, rows.utterance, rows.node, rows.valid), torch.stack(fresh.inputs))
        return out

    def move_nodes(self, kept: Tensor) -> None:
        _move(self.keys_values, kept)
        if self.network.truncation_length is not None:
            _move(self.inputs, kept)

    def move_leaves(self, kept: Tensor) -> None:
        if self.network.truncation_length is None:
            _move(self.ema, kept)


class _PoolPast:
    """What new prefixes go on from; takes `step.Past`'s place."""

    def __init__(self, pool: MegaPool, rows, tree):
        self.pool, self.rows = pool, rows
        network = pool.network
        at_start = rows.parent < 0
        if network.truncation_length is None:
            before = _index(pool.ema, rows.utterance, rows.parent_leaf.clamp(min=0), None)
            ema = pool.ema.flatten(1, 2).index_select(1, before)
            self.ema, self.inputs = ema.masked_fill_(at_start[:, None, None], 0.0), None
        else:
            self.ema, self.inputs = None, self._inputs_before(tree, network.truncation_length - 1)
        self.index = _index(pool.keys_values, rows.utterance, rows.node, rows.valid)

        self.nodes = n = tree.used_nodes
        if rows.valid is not None:
            self.groups = None  # as many rows of each utterance, in order
        else:
            count, held = torch.bincount(rows.utterance).tolist(), tree.node_count.tolist()
            ends = itertools.accumulate(count)
            self.groups = [(b, end - k, end, held[b]) for b, (k, end) in enumerate(zip(count, ends, strict=True)) if k]
        distance, hidden = self._seen(tree, n)
        # within n labels without gaps no distance is larger; with a reach none that is seen is
        farthest = n if pool.reach is None else max(n, pool.reach)
        table = pool.constants.bias(network, farthest)
        self.bias = table[:, distance.clamp(max=farthest - 1)].masked_fill_(hidden, float("-inf"))  # (blocks, R, n)

    def _seen(self, tree, n: int) -> tuple[Tensor, Tensor]:
        """How far each node is from each row, and which are hidden. (R, n), (R, n) bool"""
        network, (b, i) = self.pool.network, (self.rows.utterance, self.rows.node)
        place, depth = tree.depth[b, i][:, None], tree.depth[b, :n]
        distance = (place - depth).clamp(min=0)
        out_of_reach = ~tree.lineage[b, i, :n]
        if self.rows.valid is not None:
            # a row that is thrown away must not be a softmax over nothing: NaN would not stay its own
            out_of_reach = out_of_reach & self.rows.valid[:, None]
        if network.attention_window is not None:
            out_of_reach = out_of_reach | (distance >= network.attention_window)
        elif network.chunk_size > 0:
            C = network.chunk_size
            chunk = place.div(C, rounding_mode="floor") != depth.div(C, rounding_mode="floor")
            out_of_reach = out_of_reach | chunk
        if network.pad_idx != 0:
            padding = (tree.label[b, :n] == network.pad_idx) & (depth > 0)
            hidden = out_of_reach | padding
            # as in forward: where nothing but padding is in reach, that is seen
            out_of_reach = torch.where(hidden.all(-1, keepdim=True), out_of_reach, hidden)
        return distance, out_of_reach

    def _inputs_before(self, tree, count: int) -> Tensor:
        """The last block inputs above each row, zeros before the first. (blocks, R, <=count, D)"""
        b, i = self.rows.utterance, self.rows.node
        n = tree.used_nodes
        lag = tree.depth[b, i][:, None] - tree.depth[b, :n]
        count = min(count, n)
        if count == 0:
            return self.pool.inputs.new_zeros(self.pool.inputs.shape[0], len(i), 0, self.pool.inputs.shape[-1])
        above = tree.lineage[b, i, :n] & (lag >= 1) & (lag <= count)
        # each ancestor's place in the window; all others share a place more, which is cut off
        column = torch.where(above, count - lag, count)
        source = torch.full((len(i), count + 1), -1, device=lag.device)
        source.scatter_(1, column, torch.arange(n, device=lag.device).expand_as(column))
        source = source[:, :count]
        inputs = self.pool.inputs[:, b[:, None], source.clamp(min=0)]
        return inputs.masked_fill((source < 0)[..., None], 0.0)

    def attend(self, b: int, query: Tensor, key_value: Tensor, dtype: torch.dtype) -> Tensor:
        S, held, bias = query.shape[1], self.pool.keys_values[b], self.bias[b].to(dtype)
        _put(held[None], self.index, key_value[None])
        held, query = held.to(dtype), query.to(dtype)
        if self.groups is None:
            B = held.shape[0]
            bias, query = (x.view(B, -1, x.shape[-1]) for x in (bias, query))
            held = held[:, : self.nodes]
            scores = torch.baddbmm(bias, query, held[..., :S].transpose(1, 2))
            return torch.bmm(softmax(scores), held[..., S:]).flatten(0, 1)
        # One utterance after the other: each reads its own nodes alone, and many have no row in a step
        attended = query.new_empty(len(query), held.shape[-1] - S)
        for utterance, begin, end, n in self.groups:
            keys, values = held[utterance, :n, :S], held[utterance, :n, S:]
            scores = torch.addmm(bias[begin:end, :n], query[begin:end], keys.T)
            torch.mm(softmax(scores), values, out=attended[begin:end])
        return attended


def _index(tensor: Tensor, utterance: Tensor, place: Tensor, valid: Tensor | None) -> Tensor:
    """Where rows are in a tensor whose utterances stand one after the other."""
    places = tensor.shape[2]
    if valid is not None:
        place = torch.where(valid, place, places - 1)  # the last place is nobody's where there is `valid`
    return torch.add(place, utterance, alpha=places)


def _put(tensor: Tensor, index: Tensor, value: Tensor) -> None:
    """(blocks, B, places, ...), (R,), (blocks, R, ...)"""
    if value.dtype != tensor.dtype:
        value = value.to(tensor.dtype)
    if tensor.dtype == torch.float16:
        # too large for this type: that prefix is lost, but what takes its place later meets it with a weight of 0,
        # and 0 * inf is NaN
        value = torch.nan_to_num(value)
    blocks, utterances, places, *rest = tensor.shape
    tensor.view(blocks, utterances * places, *rest).index_copy_(1, index, value)  # a view, or nothing would be kept


def _larger(tensor: Tensor, utterances: int, places: int) -> Tensor:
    _, B, N, *rest = tensor.shape
    if utterances <= B and places <= N:
        return tensor
    larger = tensor.new_zeros(tensor.shape[0], max(B, utterances), max(N, places), *rest)
    larger[:, :B, :N] = tensor
    return larger


def _move(tensor: Tensor, kept: Tensor) -> None:
    B, n = kept.shape
    place = torch.arange(n, device=kept.device)
    # what all hypotheses have in common stays where it is, and that is most of it
    still = int((kept == place).all(0).cumprod(0).sum()) if B else n
    if still == n:
        return
    utterance = torch.arange(B, device=kept.device)[:, None]
    for block in tensor:
        block[:B, still:n] = block[utterance, kept[:, still:]]
