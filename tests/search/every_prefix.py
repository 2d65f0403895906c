"""What a scorer that adds to labels says of every short label sequence, and of the hypotheses a random tree holds."""

from __future__ import annotations

import torch
from random_tree import RandomTree
from torch import Tensor

from espnet_mega_plugin.search.scorer import LabelScorer
from espnet_mega_plugin.search.tree import START, LabelTree

Prefix = tuple[int, ...]


def every_prefix(scorer: LabelScorer, vocab_size: int, longest: int) -> dict[Prefix, tuple[Tensor, Tensor]]:
    """Scores (V,) and final () of every sequence of labels 1 to V - 1, grown in the second of two utterances."""
    tree = LabelTree(2, torch.device("cpu"), [scorer])
    scores = scorer.extend(tree.start(torch.tensor([True, True])), tree)
    final = scorer.final(torch.tensor([1]), tree.leaf[1, :1])
    found = {(): (scores[1], final[0])}
    level = {(): START}
    for _ in range(longest):
        longer = [(prefix, label) for prefix in level for label in range(1, vocab_size)]
        parent = torch.tensor([[level[prefix] for prefix, _ in longer]]).expand(2, -1)
        label = torch.tensor([[label for _, label in longer]]).expand(2, -1)
        wanted = torch.tensor([[False], [True]]).expand_as(label)
        tree.reserve(len(longer), len(longer))
        node, rows = tree.add(wanted, parent, label, tree.find(parent, label))
        scores = scorer.extend(rows, tree)
        final = scorer.final(torch.ones(len(longer), dtype=torch.long), tree.leaf[1, node[1]])
        level = {(*prefix, label): int(node[1, c]) for c, (prefix, label) in enumerate(longer)}
        found |= {prefix: (scores[c], final[c]) for c, prefix in enumerate(level)}
    return found


def finals(grown: RandomTree) -> list[tuple[Prefix, Tensor]]:
    """Every hypothesis in hand, and what its utterance would be given if it ended here."""
    places = [(b, node, labels) for b, live in enumerate(grown.live) for node, labels in live]
    utterance = torch.tensor([b for b, _, _ in places])
    leaf = grown.tree.leaf[utterance, torch.tensor([node for _, node, _ in places])]
    return [(labels, value) for (_, _, labels), value in zip(places, grown.scorer.final(utterance, leaf), strict=True)]
