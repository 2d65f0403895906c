"""A search without a joint network: grows a tree of random label prefixes and says of each new one what it is.

Hypotheses take random labels, are dropped and doubled; nodes and leaves are moved to the front at random moments;
utterances end and their places begin anew.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import torch
from rounds import Rounds
from torch import Tensor

from espnet_mega_plugin.search.scorer import LabelScorer
from espnet_mega_plugin.search.tree import LabelTree


class RandomTree:
    def __init__(self, scorer: LabelScorer, vocab_size: int, seed: int, fixed_shapes: bool, utterances: int = 3):
        self.scorer, self.vocab_size, self.utterances = scorer, vocab_size, utterances
        self.random = random.Random(seed)
        self.tree = LabelTree(utterances, torch.device("cpu"), [scorer], getattr(scorer, "reach", None))
        self.tree.fixed_shapes = fixed_shapes
        # hypotheses in hand of each utterance: node and labels; the start is the empty prefix
        self.live: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in range(utterances)]
        self.count = self.longest = self.moves = 0

    def grow(self, rounds: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Each new prefix and what the scorer said of it: labels without the start label, output."""
        return self._grow(range(rounds))

    def grow_large(self, rounds: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The same, and on until there were many prefixes, long ones, and what is kept of them has been moved."""
        large = Rounds(rounds, 10 * rounds)
        for found in self._grow(large):
            yield found
            large.enough = self.count > 2 * rounds and self.longest > 4 and self.moves > 0

    def _grow(self, rounds: Iterable[int]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        yield from self._start([True] * self.utterances)
        for _ in rounds:
            if self.random.random() < 0.15:
                yield from self._start([self.random.random() < 0.4 for _ in range(self.utterances)])
            yield from self._round()

    def _noted(self, labels: tuple[int, ...], out: Tensor) -> tuple[tuple[int, ...], Tensor]:
        self.count, self.longest = self.count + 1, max(self.longest, len(labels))
        return labels, out

    def _start(self, begin: list[bool]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        rows = self.tree.start(torch.tensor(begin))
        out = self.scorer.extend(rows, self.tree)
        assert len(out) == len(rows.label)
        for b in range(self.utterances):
            if begin[b]:
                self.live[b] = [(0, ())]
        for r in range(len(out)):
            if rows.valid is None or rows.valid[r]:
                yield self._noted((), out[r])

    def _round(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        C = self.random.randint(1, 4)
        self._make_room(C)
        wanted, parent, label, prefixes = self._candidates(C)
        known = self.tree.find(parent, label)
        node, rows = self.tree.add(wanted, parent, label, known)
        out = self.scorer.extend(rows, self.tree)
        assert len(out) == len(rows.label)

        at = {(b, int(node[b, c])): prefixes[b][c] for b in range(self.utterances) for c in range(C) if wanted[b, c]}
        for r, place in enumerate(zip(rows.utterance.tolist(), rows.node.tolist(), strict=True)):
            if rows.valid is None or rows.valid[r]:
                yield self._noted(at[place], out[r])
        for b in range(self.utterances):
            taken = [(int(node[b, c]), prefixes[b][c]) for c in range(C) if wanted[b, c]]
            choice = self.live[b] + taken + taken  # the longer ones more often, or nothing grows deep
            self.live[b] = self.random.choices(choice, k=self.random.randint(1, 4))

    def _make_room(self, C: int) -> None:
        H = max(len(live) for live in self.live)
        live, wanted = (
            torch.zeros(self.utterances, H, dtype=torch.long),
            torch.zeros(self.utterances, H, dtype=torch.bool),
        )
        for b, hypotheses in enumerate(self.live):
            for h, (node, _) in enumerate(hypotheses):
                live[b, h], wanted[b, h] = node, True
        tree, nodes, leaves = self.tree, C, C
        before, before_leaves = tree.taken()
        # One more than is free: moved at moments that a search would not choose. Where little can be given up, a tree
        # grows instead.
        if tree.fixed_shapes:
            if 12 < before and tree.nodes < 400 and self.random.random() < 0.3:
                nodes = max(C, tree.nodes - before + 1)
            if 8 < before_leaves and tree.leaves < 400 and self.random.random() < 0.3:
                leaves = max(C, tree.leaves - before_leaves + 1)
        else:  # what is given up is told by how much was needed before
            for needed in ("_needed_nodes", "_needed_leaves"):
                if self.random.random() < 0.3:
                    setattr(tree, needed, -1000)
        live = tree.make_room(nodes, leaves, live, wanted)
        self.moves += tree.taken()[0] < before
        self.live = [
            [(int(live[b, h]), labels) for h, (_, labels) in enumerate(hypotheses)]
            for b, hypotheses in enumerate(self.live)
        ]

    def _candidates(self, C: int) -> tuple[Tensor, Tensor, Tensor, list[list[tuple[int, ...]]]]:
        wanted = torch.zeros(self.utterances, C, dtype=torch.bool)
        # what is not wanted holds anything
        parent, label = torch.zeros_like(wanted, dtype=torch.long), torch.full_like(wanted, -1, dtype=torch.long)
        prefixes: list[list[tuple[int, ...]]] = [[()] * C for _ in range(self.utterances)]
        for b in range(self.utterances):
            for c in range(C):
                node, labels = self.random.choice(self.live[b])
                new = (*labels, self.random.randrange(1, self.vocab_size))
                if self.random.random() < 0.8 and new not in prefixes[b]:
                    wanted[b, c], parent[b, c], label[b, c], prefixes[b][c] = True, node, new[-1], new
        return wanted, parent, label, prefixes
