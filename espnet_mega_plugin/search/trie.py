"""Scores that depend on the longest known end of a prefix: what n-gram models and lists of phrases have in common.

Both are a trie of label sequences. A prefix is in the state that is its longest end to be found in the trie. An arc of
the trie gives its label a score; a label without an arc is scored by the state's fail node, the next shorter end of the
same prefix, plus what the step to it costs; the root scores every label.

All of it is in sorted tables, so that many prefixes are scored at once and no step looks at a prefix or a node in
Python. V labels, A arcs, A + 1 nodes, R prefixes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from espnet_mega_plugin.search.scorer import Rows
from espnet_mega_plugin.search.tree import LabelTree, put

ROOT = 0


class Trie:
    """Node 0 is the root; the others stand in order of depth, then parent, then label. Arc a leads to node a + 1.

    Args:
        sequences: filled up with -1 behind their ends; none is empty. (N, longest)
        labels: V.

    Attributes:
        key: parent * V + label of each arc, ascending. (A,)
        parent, label, depth: of each node. (A + 1,)
        fail: the node of the longest proper end of a node's labels that has one. (A + 1,)
        levels: the nodes of depth 1, 2 and so on.
        end: node of each sequence. (N,)
    """

    def __init__(self, sequences: Tensor, labels: int):
        self.labels = labels
        self.end = torch.full((len(sequences),), ROOT)
        self.levels: list[slice] = []
        keys, nodes = [torch.empty(0, dtype=torch.long)], 1
        for column in sequences.T:
            longer = column >= 0
            key, arc = (self.end[longer] * labels + column[longer]).unique(return_inverse=True)
            self.end[longer] = nodes + arc
            self.levels.append(slice(nodes, nodes + len(key)))
            keys.append(key)
            nodes += len(key)
        self.key = torch.cat(keys)
        self.parent = torch.cat((torch.tensor([ROOT]), self.key // labels))
        self.label = torch.cat((torch.tensor([-1]), self.key % labels))
        self.depth = torch.zeros(nodes, dtype=torch.long)
        for depth, level in enumerate(self.levels, 1):
            self.depth[level] = depth
        self.fail = torch.full((nodes,), ROOT)
        for level in self.levels[1:]:
            self.fail[level] = self._longest_end(self.fail[self.parent[level]], self.label[level])

    def _longest_end(self, node: Tensor, label: Tensor) -> Tensor:
        """The longest end of (node, label) that is a node."""
        reached, open_ = torch.full_like(node, ROOT), torch.ones_like(node, dtype=torch.bool)
        while open_.any():
            key = node * self.labels + label
            arc = torch.searchsorted(self.key, key).clamp(max=len(self.key) - 1)
            hit = open_ & (self.key[arc] == key)
            reached = torch.where(hit, arc + 1, reached)
            open_ &= ~hit & (node != ROOT)
            node = self.fail[node]
        return reached


class TrieScorer:
    """A LabelScorer that keeps one number a leaf, the prefix's state.

    Args:
        trie: of the sequences.
        gain: score of each arc; NaN: it only leads on, its label is scored by a shorter end. (A,)
        fall: added when a node leaves a label to its fail node. (A + 1,)
        otherwise: score of a label the root has no arc for.
        start: state of the empty prefix.
        columns: label of the trie for each of the model's, where they are not the same. (V,)
    """

    largest = 0.0
    reach = 0  # labels back that nodes are looked at
    recordable = True

    def __init__(
        self,
        trie: Trie,
        gain: Tensor,
        fall: Tensor,
        otherwise: float,
        dtype: torch.dtype,
        device: torch.device | str,
        start: int = ROOT,
        columns: Tensor | None = None,
    ):
        self.device = torch.device(device)
        self._labels, W = trie.labels, trie.labels
        # one more arc behind the last: nothing has its key, and what it scores goes to a column that is cut off
        spare = torch.full((1,), W)
        self._key = torch.cat((trie.key, torch.tensor([torch.iinfo(torch.long).max]))).to(device)
        self._column = torch.cat((torch.where(gain.isnan(), W, trie.label[1:]), spare)).to(device)
        self._gain = torch.cat((gain.nan_to_num(), torch.zeros(1))).to(device, dtype)
        root = torch.full((W + 1,), otherwise, dtype=gain.dtype)
        first = trie.levels[0] if trie.levels else slice(1, 1)
        given = ~gain[: first.stop - 1].isnan()
        root[trie.label[first][given]] = gain[: first.stop - 1][given]
        self._root = root.to(device, dtype)

        count = torch.bincount(trie.parent[1:], minlength=len(trie.parent))
        count[ROOT] = 0  # the root's arcs are in its row
        home, fail = _without_idle(trie, (count > 0) | (fall != 0))
        self._home, self._fail, self._start = home.to(device), fail.to(device), int(home[start])
        self._fall = fall.to(device, dtype)
        self._first = (torch.cumsum(torch.bincount(trie.parent[1:], minlength=len(count)), 0)).roll(1)
        self._first[ROOT] = 0
        self._first, self._count = self._first.to(device), count.to(device)
        self._widest = int(count.max())
        self._chain = _longest_chain(trie, home, fail)
        self._columns = None if columns is None else columns.to(device)
        self._state = torch.zeros(0, 0, dtype=torch.long, device=self.device)  # of each leaf. (B, M)

    def fresh(self):
        """The same for another search: shared tables, no states."""
        other = copy.copy(self)
        other._state = self._state.new_zeros(0, 0)
        return other

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        B, M = self._state.shape
        more = (0, max(0, leaves - M), 0, max(0, utterances - B))
        self._state = torch.nn.functional.pad(self._state, more)

    def extend(self, rows: Rows, tree: LabelTree) -> Tensor:
        """What each next label would add; blank, label 0, nothing. (R, V)"""
        # nothing is promised of the labels of rows that are thrown away
        label = rows.label if rows.valid is None else rows.label.masked_fill(~rows.valid, 0)
        if self._columns is not None:
            label = self._columns[label]
        before = self._state[rows.utterance, rows.parent_leaf.clamp(min=0)]
        state = torch.where(rows.parent < 0, self._start, self._step(before, label))
        put(self._state, rows.utterance, rows.leaf, state, rows.valid)
        scores = self._scores(state, tree.fixed_shapes)
        scores = scores[:, :-1] if self._columns is None else scores[:, self._columns]
        scores[:, 0] = 0
        return scores

    def move_nodes(self, kept: Tensor) -> None:
        pass  # a state is needed where a prefix may be extended: at leaves

    def move_leaves(self, kept: Tensor) -> None:
        B, m = kept.shape
        self._state[:B, :m] = self._state[:B].gather(1, kept)

    def _step(self, state: Tensor, label: Tensor) -> Tensor:
        reached, open_ = torch.full_like(state, ROOT), torch.ones_like(state, dtype=torch.bool)
        for _ in range(self._chain + 1):
            key = state * self._labels + label
            arc = torch.searchsorted(self._key, key)
            hit = open_ & (self._key[arc] == key)
            reached = torch.where(hit, arc + 1, reached)
            open_ &= ~hit
            state = self._fail[state]
        return self._home[reached]

    def _scores(self, state: Tensor, fixed_shapes: bool) -> Tensor:
        """Of every label of the trie, and a column that means nothing. (R, W + 1)"""
        chain, fallen = [state], [torch.zeros_like(state, dtype=self._fall.dtype)]
        for _ in range(self._chain):
            fallen.append(fallen[-1] + self._fall[chain[-1]])
            chain.append(self._fail[chain[-1]])
        scores = self._root + fallen[-1][:, None]
        # the longer end has the last word
        for node, paid in zip(reversed(chain[:-1]), reversed(fallen[:-1]), strict=True):
            self._write_arcs(scores, node, paid, fixed_shapes)
        return scores

    def _write_arcs(self, scores: Tensor, node: Tensor, paid: Tensor, fixed_shapes: bool) -> None:
        count = self._count[node][:, None]
        # on a GPU how many arcs these nodes have is not asked: that would be a wait for the device
        width = self._widest if fixed_shapes else int(count.max()) if len(node) else 0
        if width:
            offset = torch.arange(width, device=self.device)
            arc = torch.where(offset < count, self._first[node][:, None] + offset, len(self._key) - 1)
            scores.scatter_(1, self._column[arc], self._gain[arc] + paid[:, None])


def _without_idle(trie: Trie, busy: Tensor) -> tuple[Tensor, Tensor]:
    """Passes over nodes that have no arcs and a fall of nothing: their fail node stands for them.

    Returns:
        home: the node that stands for each. (A + 1,)
        fail: of each, one that stands for itself. (A + 1,)
    """
    home = torch.arange(len(busy))
    for level in trie.levels:
        home[level] = torch.where(busy[level], home[level], home[trie.fail[level]])
    return home, home[trie.fail]


def _longest_chain(trie: Trie, home: Tensor, fail: Tensor) -> int:
    """How many nodes at most a state passes on the way to the root, which does not count."""
    chain = torch.zeros_like(home)
    for level in trie.levels:
        chain[level] = chain[fail[level]] + 1
    return int(chain[home].max())
