"""ESPnet's TransformerLM along a tree of label prefixes: keys and values of each prefix's last label once, at its node.

ESPnet's own step keeps each layer's outputs for the whole prefix of each hypothesis and makes all keys and values anew
for every label. Here a new prefix costs one label, and prefixes share what they have in common. Dropout is off.

B utterances, N nodes, R new prefixes, C of one utterance, H heads, D width of the attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espnet_mega_plugin.search.leaves import PlaceTensor, labels_of
from espnet_mega_plugin.search.scorer import LabelScorer, Rows
from espnet_mega_plugin.search.tree import LabelTree


class TreeTransformerLM(LabelScorer):
    reach = None  # labels back that nodes are looked at: all
    recordable = True

    def __init__(self, lm: nn.Module, vocab_size: int):
        self._lm, self._sos, self._layers = lm, vocab_size - 1, list(lm.encoder.encoders)
        width = self._layers[0].size
        self._keys, self._values = ([PlaceTensor(width) for _ in self._layers] for _ in range(2))

    def fresh(self) -> TreeTransformerLM:
        return TreeTransformerLM(self._lm, self._sos + 1)

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        for table in (*self._keys, *self._values):
            table.reserve(utterances, nodes)

    @torch.no_grad()
    def extend(self, rows: Rows, tree: LabelTree) -> Tensor:
        lm = self._lm
        label = torch.where(rows.parent < 0, self._sos, labels_of(rows))
        if not len(label):
            return lm.embed.weight.new_zeros(0, self._sos + 1)
        x = self._placed(lm.embed(label), tree.depth[rows.utterance, rows.node], tree.used_nodes)
        seen, groups = _seen(rows, tree), list(_groups(rows, tree))
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            normed, attention = layer.norm1(x), layer.self_attn
            keys.put(rows, rows.node, attention.linear_k(normed))
            values.put(rows, rows.node, attention.linear_v(normed))
            query = attention.linear_q(normed)
            attended = [_attend(query, keys.table, values.table, seen, group, attention.h) for group in groups]
            x = x + attention.linear_out(torch.cat(attended))
            hidden = layer.feed_forward.activation(layer.feed_forward.w_1(layer.norm2(x)))
            x = x + layer.feed_forward.w_2(hidden)
        logits = lm.decoder(lm.encoder.after_norm(x))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _placed(self, x: Tensor, position: Tensor, positions: int) -> Tensor:
        """Input of the first layer. (R, E), (R,) -> (R, D)"""
        linear, norm, _, activation, place = self._lm.encoder.embed
        x = activation(norm(linear(x)))
        if not hasattr(place, "extend_pe"):
            return x
        place.extend_pe(x.new_zeros(1, positions))  # no prefix is longer than there are nodes
        self._positions = place.pe  # a recorded round reads it where it is; another search may have it made longer
        return x * place.xscale + place.pe[0, position]

    def move_nodes(self, kept: Tensor) -> None:
        for table in (*self._keys, *self._values):
            table.move(kept)


class _Group(NamedTuple):
    """Rows that are attended to in one product."""

    rows: slice
    utterances: slice
    nodes: int


def _groups(rows: Rows, tree: LabelTree) -> Iterator[_Group]:
    if rows.valid is not None:  # as many rows of each utterance, in order
        yield _Group(slice(None), slice(0, tree.utterances), tree.used_nodes)
        return
    # Rows come in the order of their utterances. Each reads its own nodes alone, and many have no row in a step
    end, counts = 0, tree.node_count.tolist()
    for b, same in itertools.groupby(rows.utterance.tolist()):
        begin, end = end, end + sum(1 for _ in same)
        yield _Group(slice(begin, end), slice(b, b + 1), counts[b])


def _seen(rows: Rows, tree: LabelTree) -> Tensor:
    """Which nodes are on each row's line. (R, N) bool"""
    seen = tree.lineage[rows.utterance, rows.node, : tree.used_nodes]
    # a row that is thrown away sees all: a softmax over nothing is NaN, which would not stay its own
    return seen if rows.valid is None else seen | ~rows.valid[:, None]


def _attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, group: _Group, heads: int) -> Tensor:
    """What the rows of a group take from their nodes. (rows of the group, D)"""
    n, D = group.nodes, query.shape[-1]
    keys, values = keys[group.utterances, :n], values[group.utterances, :n]
    B = len(keys)
    query = query[group.rows].view(B, -1, heads, D // heads).transpose(1, 2)
    keys, values = (x.view(B, n, heads, D // heads).transpose(1, 2).to(query.dtype) for x in (keys, values))
    mask = seen[group.rows, :n].view(B, 1, -1, n)
    attended = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return attended.transpose(1, 2).reshape(-1, D)
