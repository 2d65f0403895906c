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
from espnet_mega_plugin.mega.places import Dense, Pieces, Slots
from espnet_mega_plugin.mega.precision import at_least_float32
from espnet_mega_plugin.mega.step import Constants, step

if TYPE_CHECKING:
    from espnet_mega_plugin.mega.network import MegaNetwork

LARGEST = torch.finfo(torch.float16).max


class MegaPool:
    recordable = True

    def __init__(self, network: MegaNetwork, constants: Constants):
        """
        Args:
            constants: of the weights as they are now; a network whose weights change needs a new pool.
        """
        self.network, self.constants = network, constants
        self.exact = at_least_float32(network.embed.weight.dtype)
        self._room = 0, 0, 0  # utterances, nodes, leaves
        # Made for the first rows, whose form tells which: dense where shapes are fixed
        self.keys_values: Dense | Pieces | None = None  # by node. (S + E,)
        self.ema: Dense | Slots | None = None  # by leaf, without a truncation length. (H, D)
        self.inputs: Dense | Slots | None = None  # by node, with one. (D,)
        self.biases: Tensor | None = None  # what the last step took of the constants

    @property
    def reach(self) -> int | None:
        """How many labels, its own among them, a prefix looks at; None: all."""
        network = self.network
        attended = network.attention_window if network.chunk_size <= 0 else network.chunk_size
        # without truncation the average looks at no label: it has a state
        return None if attended is None else max(attended, network.truncation_length or 0)

    @property
    def bytes(self) -> int:
        return sum(held.bytes for held in (self.keys_values, self.ema, self.inputs) if held is not None)

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        self._room = utterances, nodes, leaves
        for held, places in ((self.keys_values, nodes), (self.ema, leaves), (self.inputs, nodes)):
            if held is not None:
                held.reserve(utterances, places)

    def _open(self, fixed_shapes: bool) -> None:
        network, weight = self.network, self.network.embed.weight
        exact = weight.new_empty(0, dtype=self.exact)
        width = network.mega_att_k_size + network.mega_att_v_size
        ordered, any_order = (Dense, Dense) if fixed_shapes else (Pieces, Slots)
        self.keys_values = ordered(network.num_blocks, (width,), weight)
        if network.truncation_length is None:
            self.ema = any_order(network.num_blocks, (network.mega_ema_num_heads, network.output_size), exact)
        else:
            self.inputs = any_order(network.num_blocks, (network.output_size,), exact)
        self.reserve(*self._room)

    @torch.no_grad()
    def extend(self, rows, tree) -> Tensor:
        """The decoder's output after each new prefix. (R, D)"""
        network, labels = self.network, rows.label
        if self.keys_values is None:
            self._open(fixed_shapes=rows.valid is not None)
        if rows.valid is not None:  # what does not count may be no label
            labels = labels.masked_fill(~rows.valid, 0)
        padding = None
        if network.pad_idx != 0:  # a search never takes label 0, which is blank, but in front
            padding = (labels == network.pad_idx) & (rows.parent >= 0)
        past = (_PiecesPast if rows.valid is None else _DensePast)(self, rows, tree)
        out, fresh = step(network, self.constants, labels, padding, past)
        if self.inputs is not None:
            self.inputs.put(rows.utterance, rows.node, fresh.inputs, rows.valid)
        else:
            self.ema.put(rows.utterance, rows.leaf, fresh.ema, rows.valid)
        return out

    def clear(self, utterance: int) -> None:
        for held in (self.keys_values, self.ema, self.inputs):
            if held is not None:
                held.clear(utterance)

    def move_nodes(self, kept: Tensor) -> None:
        for held in (self.keys_values, self.inputs):
            if held is not None:
                held.move(kept)

    def move_leaves(self, kept: Tensor) -> None:
        if self.ema is not None:
            self.ema.move(kept)


class _Past:
    """What new prefixes go on from; takes `step.Past`'s place."""

    def __init__(self, pool: MegaPool, rows, tree):
        self.pool, self.rows = pool, rows
        network = pool.network
        if network.truncation_length is None:
            ema = pool.ema.get(rows.utterance, rows.parent_leaf.clamp(min=0))
            self.ema, self.inputs = ema.masked_fill_((rows.parent < 0)[:, None, None], 0.0), None
        else:
            self.ema, self.inputs = None, self._inputs_before(tree, network.truncation_length - 1)
        self.nodes = n = tree.used_nodes
        distance, hidden = self._seen(tree, n)
        # within n labels without gaps no distance is larger; with a reach none that is seen is
        farthest = n if pool.reach is None else max(n, pool.reach)
        # held, because a recorded round reads it where it is, and another search may have it replaced by a longer one
        pool.biases = table = pool.constants.bias(network, farthest)
        self.bias = table[:, distance.clamp(max=farthest - 1)].masked_fill_(hidden, float("-inf"))  # (blocks, R, n)

    def _finite(self, key_value: Tensor) -> Tensor:
        """Keys and values as others may meet them."""
        if not self.pool.constants.half:
            return key_value
        # too large for float16: that prefix is lost, but all it is hidden from, and what takes its place later, meets
        # it with a weight of 0, and 0 * inf is NaN
        return key_value.nan_to_num(0.0).clamp(-LARGEST, LARGEST)

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
            inputs = self.pool.inputs.tensor
            return inputs.new_zeros(inputs.shape[0], len(i), 0, inputs.shape[-1])
        above = tree.lineage[b, i, :n] & (lag >= 1) & (lag <= count)
        # each ancestor's place in the window; all others share a place more, which is cut off
        column = torch.where(above, count - lag, count)
        source = torch.full((len(i), count + 1), -1, device=lag.device)
        source.scatter_(1, column, torch.arange(n, device=lag.device).expand_as(column))
        source = source[:, :count]
        inputs = self.pool.inputs.get(b.repeat_interleave(count), source.flatten().clamp(min=0))
        return inputs.unflatten(1, source.shape).masked_fill_((source < 0)[..., None], 0.0)


class _DensePast(_Past):
    """As many rows of each utterance, in order, whether they count or not."""

    def __init__(self, pool: MegaPool, rows, tree):
        super().__init__(pool, rows, tree)
        self.index = pool.keys_values.index(rows.utterance, rows.node, rows.valid)

    def attend(self, b: int, query: Tensor, key_value: Tensor, dtype: torch.dtype) -> Tensor:
        S, keys_values = query.shape[1], self.pool.keys_values
        keys_values.put_in_block(b, self.index, self._finite(key_value))
        held = keys_values.tensor[b, :, : self.nodes].to(dtype)
        bias, query = (x.to(dtype).view(held.shape[0], -1, x.shape[-1]) for x in (self.bias[b], query))
        scores = torch.baddbmm(bias, query, held[..., :S].transpose(1, 2))
        return torch.bmm(softmax(scores), held[..., S:]).flatten(0, 1)


class _PiecesPast(_Past):
    """Rows that count alone, in the order of their utterances: each reads its own nodes, and many have none."""

    def __init__(self, pool: MegaPool, rows, tree):
        for utterance in rows.utterance[rows.parent < 0].tolist():  # begins anew: what it held is needed no more
            pool.clear(utterance)
        super().__init__(pool, rows, tree)
        count, held = torch.bincount(rows.utterance).tolist(), tree.node_count.tolist()
        ends = itertools.accumulate(count)
        self.groups = []
        for utterance, (k, end) in enumerate(zip(count, ends, strict=True)):
            if k:
                pool.keys_values.fit(utterance, held[utterance])
                rows_of = slice(end - k, end)
                self.groups.append((utterance, rows_of, rows.node[rows_of], held[utterance]))

    def attend(self, b: int, query: Tensor, key_value: Tensor, dtype: torch.dtype) -> Tensor:
        S, bias, query = query.shape[1], self.bias[b].to(dtype), query.to(dtype)
        key_value = self._finite(key_value)
        attended = query.new_empty(len(query), key_value.shape[1] - S)
        for utterance, rows_of, node, n in self.groups:
            held = self.pool.keys_values.of[utterance][b]
            held.index_copy_(0, node, key_value[rows_of])
            held = held[:n].to(dtype)
            scores = torch.addmm(bias[rows_of, :n], query[rows_of], held[:, :S].T)
            torch.mm(softmax(scores), held[:, S:], out=attended[rows_of])
        return attended
