"""The label tree against Python tuples: what a scorer kept of a prefix is found where the tree says it is.

The scorer here (`SequenceScorer`) keeps the label sequences themselves where a real one keeps tensors. A search is
played at random: utterances begin, hypotheses are extended twice a frame and chosen, places are moved, room grows,
utterances end and others begin in their places.
"""

import random

import pytest
import torch
from rounds import Rounds
from search_oracles import SequenceScorer

from espnet_mega_plugin.search.tree import FEW, LEAVES, NODES, START, LabelTree

UTTERANCES, BEAM, WIDTH, LABELS, FRAMES = 3, 4, 5, 2, 60
CPU = torch.device("cpu")


def assert_tree_is_of_sequences(tree: LabelTree, scorer: SequenceScorer, started: list[bool]) -> None:
    for b in range(UTTERANCES):
        if not started[b]:
            continue
        sequences = scorer.nodes[b][: int(tree.node_count[b])]
        place = {sequence: i for i, sequence in enumerate(sequences)}
        assert None not in place and len(place) == len(sequences)  # one node for each
        assert place[()] == START
        for i, sequence in enumerate(sequences):
            ancestors = {place[sequence[:n]] for n in range(len(sequence) + 1) if sequence[:n] in place}
            assert set(tree.lineage[b, i].nonzero()[:, 0].tolist()) == ancestors
            assert int(tree.depth[b, i]) == len(sequence)
            if sequence:
                assert int(tree.label[b, i]) == sequence[-1]
                assert int(tree.parent[b, i]) == place.get(sequence[:-1], -2)
            if tree.leaf[b, i] >= 0:
                assert scorer.leaves[b][tree.leaf[b, i]] == sequence


def assert_needed_prefixes_are_there(tree, scorer, hypotheses, reach) -> None:
    """Each hypothesis with a leaf; of those above it all that another one could become, or a scorer looks back at."""
    for b, of_utterance in enumerate(hypotheses):
        count = int(tree.node_count[b])
        place = {sequence: i for i, sequence in enumerate(scorer.nodes[b][:count])}
        shallowest = min(map(len, of_utterance), default=0)
        for sequence in of_utterance:
            assert tree.leaf[b, place[sequence]] >= 0
            back = len(sequence) + 1 if reach is None else reach
            first = min(shallowest, len(sequence) + 1 - back)
            assert all(sequence[:n] in place for n in range(max(0, first), len(sequence)))


def padded(of_utterances: list[list[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of each utterance, rubbish where there are fewer, and where they stand. (B, width), (B, width)"""
    wanted = torch.tensor([[i < len(row) for i in range(width)] for row in of_utterances])
    rubbish = (-1, 0, 1, 2, 3)
    values = torch.tensor([row + random.choices(rubbish, k=width - len(row)) for row in of_utterances])
    return values, wanted


class Play:
    """A search whose choices are random and made by sequence, so that they do not hang on the tree's numbers."""

    def __init__(self, fixed_shapes: bool, reach: int | None):
        self.scorer = SequenceScorer()
        self.tree = LabelTree(UTTERANCES, CPU, [self.scorer], reach)
        self.tree.fixed_shapes = fixed_shapes
        self.reach = reach
        self.started = [False] * UTTERANCES
        self.hypotheses = [{} for _ in range(UTTERANCES)]  # sequence -> node

    def begin(self, which: list[bool]) -> None:
        rows = self.tree.start(torch.tensor(which))
        assert self.scorer.extend(rows, self.tree) == [(b, ()) for b in range(UTTERANCES) if which[b]]
        for b in range(UTTERANCES):
            if which[b]:
                self.started[b], self.hypotheses[b] = True, {(): START}

    def make_room(self) -> None:
        # hypotheses stand in any order; places of the beam without one hold rubbish
        nodes, wanted = padded([list(some.values()) for some in self.hypotheses], BEAM)
        # with fixed shapes what is asked for decides when something is given up: not always both at once
        more_nodes, more_leaves = (random.choice((WIDTH, 5 * WIDTH)) for _ in range(2))
        moved = self.tree.make_room(more_nodes, more_leaves, nodes, wanted)
        taken_nodes, taken_leaves = self.tree.taken()
        assert taken_nodes + more_nodes <= self.tree.nodes - self.tree.spare
        assert taken_leaves + more_leaves <= self.tree.leaves - self.tree.spare
        for b, some in enumerate(self.hypotheses):
            self.hypotheses[b] = dict(zip(some, moved[b].tolist(), strict=False))
            assert all(self.scorer.nodes[b][node] == sequence for sequence, node in self.hypotheses[b].items())
        assert_tree_is_of_sequences(self.tree, self.scorer, self.started)
        assert_needed_prefixes_are_there(self.tree, self.scorer, self.hypotheses, self.reach)

    def look_up(self, parents: list[dict]) -> None:
        """Every prefix that could be asked for: found where it is, and only then."""
        for b, some in enumerate(parents):
            place = {sequence: i for i, sequence in enumerate(self.scorer.nodes[b][: int(self.tree.node_count[b])])}
            for sequence, node in some.items():
                parent = torch.full((UTTERANCES, LABELS), -1)
                parent[b] = node
                label = torch.arange(1, LABELS + 1).expand(UTTERANCES, LABELS)
                found = self.tree.find(parent, label).tolist()
                assert found.pop(b) == [place.get((*sequence, int(k)), -1) for k in label[b]]
                assert set(sum(found, [])) <= {-1}  # no parent, no prefix

    def extend(self, parents: list[dict]) -> list[dict]:
        """Some children of these, at most WIDTH an utterance, and where the tree put them."""
        self.tree.reserve(WIDTH, WIDTH)  # for the second time in a frame
        self.look_up(parents)
        chosen = []
        for some in parents:
            children = [(sequence, k) for sequence in some for k in range(1, LABELS + 1)]
            chosen.append(random.sample(children, random.randint(0, min(WIDTH, len(children)))))
        parent, wanted = padded([[parents[b][s] for s, _ in row] for b, row in enumerate(chosen)], WIDTH)
        label, _ = padded([[k for _, k in row] for row in chosen], WIDTH)
        known = self.tree.find(parent, label)
        expected = sorted(
            (b, (*sequence, k))
            for b, row in enumerate(chosen)
            for i, (sequence, k) in enumerate(row)
            if known[b, i] < 0 or self.tree.leaf[b, known[b, i]] < 0
        )
        node, rows = self.tree.add(wanted, parent, label, known)
        assert self.scorer.extend(rows, self.tree) == expected
        assert_tree_is_of_sequences(self.tree, self.scorer, self.started)
        return [
            {(*sequence, k): int(node[b, i]) for i, (sequence, k) in enumerate(row)} for b, row in enumerate(chosen)
        ]

    def frame(self) -> None:
        self.make_room()
        once = self.extend(self.hypotheses)
        twice = self.extend(once)
        for b, some in enumerate(self.hypotheses):
            everything = {**some, **once[b], **twice[b]}
            # more long ones than short ones, or the same few prefixes would come again and again
            order = sorted(everything, key=lambda sequence: len(sequence) + random.gauss(0, 1.5), reverse=True)
            kept = random.sample(order[:BEAM], min(len(order), random.randint(1, BEAM)))
            self.hypotheses[b] = {sequence: everything[sequence] for sequence in kept}


@pytest.mark.parametrize("reach", [None, 1, 3])
@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["cpu", "fixed"])
def test_what_a_scorer_keeps_is_found_again(fixed_shapes, reach):
    play = Play(fixed_shapes, reach)
    play.begin([True, False, True])  # one place of the batch is not in use yet
    frames = Rounds(FRAMES, 10 * FRAMES)
    for _ in frames:
        if random.random() < 0.07:
            play.begin([random.random() < 0.5 for _ in range(UTTERANCES)])
        play.frame()
        frames.enough = all(play.scorer.seen.values())  # the play had all that can happen in it


def test_little_is_kept_that_is_not_needed():
    """Where counting costs nothing: a few prefixes an utterance beyond those that hypotheses stand on or go through."""
    play, most, few = Play(False, None), 0, max(FEW, UTTERANCES)
    play.begin([True] * UTTERANCES)
    frames = Rounds(FRAMES, 10 * FRAMES)
    for _ in frames:
        play.frame()
        play.make_room()
        needed = [{sequence[:n] for sequence in some for n in range(len(sequence) + 1)} for some in play.hypotheses]
        most = max(most, sum(map(len, needed)))  # needed when others were given up, which may be more than now
        assert int(play.tree.node_count.sum()) <= NODES[0] * most + NODES[1] * few
        assert int(play.tree.leaf_count.sum()) <= LEAVES[0] * BEAM * UTTERANCES + LEAVES[1] * few
        frames.enough = most > 4 * NODES[1]  # or the play was too short to tell


def test_room_made_in_advance_moves_nothing():
    play = Play(True, None)
    play.tree.reserve(2 * WIDTH * 8, 2 * WIDTH * 8)
    play.begin([True] * UTTERANCES)
    for _ in range(7):
        play.frame()
    assert not any(play.scorer.seen[what] for what in ("grown", "nodes moved", "leaves moved"))


def test_a_prefix_that_was_thrown_away_is_never_found():
    """With fixed shapes it was written to a place that nobody has, which may be somebody's when the room has grown."""
    play = Play(True, None)
    play.begin([True] * UTTERANCES)
    parent, label = torch.full((UTTERANCES, 1), START), torch.ones(UTTERANCES, 1, dtype=torch.long)
    first = play.tree.nodes
    while play.tree.nodes < 4 * first:
        play.tree.reserve(play.tree.nodes, 1)
        assert (play.tree.find(parent, label) == -1).all()
        play.tree.add(torch.zeros_like(label, dtype=torch.bool), parent, label, torch.full_like(label, -1))


def test_with_fixed_shapes_all_stays_where_it_is_until_there_is_more_room():
    play = Play(True, None)
    play.begin([True] * UTTERANCES)
    tree, seen = play.tree, play.scorer.seen
    names = ("parent", "label", "depth", "leaf", "owner", "lineage", "node_count", "leaf_count")
    frames, moved = Rounds(FRAMES, 10 * FRAMES), {"nodes moved": 0, "leaves moved": 0}
    for _ in frames:
        before, room = dict(seen), (tree.nodes, tree.leaves)
        held = {name: getattr(tree, name) for name in names}
        play.frame()
        if room == (tree.nodes, tree.leaves):
            assert [name for name in names if getattr(tree, name) is not held[name]] == []
            for what in moved:
                moved[what] += seen[what] - before[what]
        frames.enough = all(moved.values())


def test_deep_hypotheses_cost_what_they_reach_back():
    """With a reach, room is bounded however long the utterance."""
    rooms = {}
    for reach in (None, 3):
        play = Play(False, reach)
        play.begin([True] * UTTERANCES)
        for depth in range(1, 201):
            play.make_room()
            play.hypotheses = deepened(play)
            if depth in (100, 200):
                rooms[reach, depth] = play.tree.nodes
        assert len(next(iter(play.hypotheses[0]))) == 200
    assert rooms[3, 200] == rooms[3, 100] < 100 < 200 < rooms[None, 200]


def deepened(play: Play) -> list[dict]:
    """Each utterance's one hypothesis, a label longer."""
    parent = torch.tensor([[*some.values()] for some in play.hypotheses])
    label = torch.randint(1, LABELS + 1, parent.shape)
    node, rows = play.tree.add(parent >= 0, parent, label, play.tree.find(parent, label))
    play.scorer.extend(rows, play.tree)
    return [{(*next(iter(some)), int(label[b, 0])): int(node[b, 0])} for b, some in enumerate(play.hypotheses)]
