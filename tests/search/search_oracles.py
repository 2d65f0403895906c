"""What searches are compared with: probabilities given as tables, summed by brute force.

A table says what any label has for a log-probability in any frame behind any labels. ESPnet's search and the batched one
run over it without a network: `TabledDecoder`'s output is the number of a prefix, `TabledJoint` looks the two up. Frames
are numbered through the whole batch, so each utterance has frames of its own.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

import torch
from espnet2.asr_transducer.decoder.abs_decoder import AbsDecoder
from plain import BLANK, LogProbs, logadd

# --- brute force ------------------------------------------------------------------------------------------------------


def log_probability(log_probs: LogProbs, T: int, labels: tuple[int, ...], most_a_frame: int | None = None) -> float:
    """Of a label sequence, over all alignments with so many labels a frame at most."""
    U = len(labels)
    entering = [0.0] + [-math.inf] * U  # come to the frame with u labels
    for t in range(T):
        rows = [log_probs(t, labels[:u]) for u in range(U + 1)]
        here, paths = entering, []
        for _ in range((U if most_a_frame is None else min(U, most_a_frame)) + 1):
            paths.append([here[u] + rows[u][BLANK] for u in range(U + 1)])
            here = [-math.inf] + [here[u] + rows[u][labels[u]] for u in range(U)]
        entering = [logadd(masses) for masses in zip(*paths, strict=True)]
    return entering[U]


def over_alignments(log_probs: LogProbs, T: int, labels: tuple[int, ...], most_a_frame: int | None = None) -> float:
    """The same, alignment by alignment."""
    U, total = len(labels), [-math.inf]
    for counts in itertools.product(range((U if most_a_frame is None else most_a_frame) + 1), repeat=T):
        if sum(counts) != U:
            continue
        u, score = 0, 0.0
        for t, count in enumerate(counts):
            for _ in range(count):
                score += log_probs(t, labels[:u])[labels[u]]
                u += 1
            score += log_probs(t, labels[:u])[BLANK]
        total.append(score)
    return logadd(total)


def every_sequence(V: int, longest: int) -> Iterator[tuple[int, ...]]:
    for U in range(longest + 1):
        yield from itertools.product(range(1, V), repeat=U)


def log_probs_of(decoder_outputs: Callable, joint: Callable, frames: torch.Tensor) -> LogProbs:
    """From a prediction network run over whole label sequences and ESPnet's joint network. Remembers what it was asked.

    Args:
        decoder_outputs: labels with the start label (1, U+1) -> (1, U+1, D)
        frames: (T, D_enc)
    """
    outputs, rows = {}, {}

    def log_probs(t, labels):
        if labels not in outputs:
            outputs[labels] = decoder_outputs(torch.tensor([[0, *labels]]))[0, -1]
        if (t, labels) not in rows:
            logits = joint(frames[t : t + 1], outputs[labels][None])[0]
            rows[t, labels] = torch.log_softmax(logits.double(), -1).tolist()
        return rows[t, labels]

    return log_probs


# --- tables -----------------------------------------------------------------------------------------------------------


def random_table(V: int, peak: float, blank: float, seed: int) -> LogProbs:
    """Any frame behind any labels has its own normal logits.

    Args:
        peak: their spread; 0.3 is flat, 4 peaked.
        blank: added to blank's.
    """
    rows = {}

    def log_probs(t, labels):
        if (t, labels) not in rows:
            generator = random.Random(repr((seed, t, labels)))
            logits = [peak * generator.gauss(0, 1) + (blank if k == BLANK else 0.0) for k in range(V)]
            total = logadd(logits)
            rows[t, labels] = [logit - total for logit in logits]
        return rows[t, labels]

    return log_probs


def shifted(table: LogProbs, first: int) -> LogProbs:
    """The table of an utterance whose frame 0 has the number `first`."""
    return lambda t, labels: table(first + t, labels)


class Prefixes:
    """Numbers of label sequences."""

    def __init__(self):
        self.labels, self._number = [], {}

    def number(self, labels: tuple[int, ...]) -> int:
        if labels not in self._number:
            self._number[labels] = len(self.labels)
            self.labels.append(labels)
        return self._number[labels]


class TabledDecoder(AbsDecoder):
    """ESPnet's interface of a decoder, and the batched search's; its output is the prefix' number. Counts its rows."""

    def __init__(self, V: int, prefixes: Prefixes):
        super().__init__()
        self.vocab_size, self.prefixes, self.output_size, self.score_cache = V, prefixes, 1, {}
        self.calls = self.rows = 0
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))  # a decoder has a device and a dtype

    def numbered(self, sequences) -> torch.Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(sequences)
        numbers = [self.prefixes.number(tuple(labels)) for labels in sequences]
        return torch.tensor(numbers, dtype=torch.float64)[:, None]

    def forward(self, labels):
        return torch.stack([self.numbered([row[1 : u + 1] for u in range(len(row))]) for row in labels.tolist()])

    def score(self, label_sequence, states):
        return self.numbered([label_sequence[1:]]), None

    def batch_score(self, hyps):
        return self.numbered([hyp.yseq[1:] for hyp in hyps]), None

    def set_device(self, device):
        pass

    def init_state(self, batch_size):
        return None

    def select_state(self, states, idx):
        return None

    def create_batch_states(self, new_states):
        return None

    def label_scorer(self):
        return SequenceScorer(self.numbered)


class TabledJoint(torch.nn.Module):
    """ESPnet's joint network over a table. Its logits are not normalised: each row is raised by another number."""

    def __init__(self, table: LogProbs, prefixes: Prefixes, V: int):
        super().__init__()
        self.table, self.prefixes, self.V, self.rows = table, prefixes, V, 0
        self.many = 2.0**20  # more than there are frames

    def lin_enc(self, frame):
        return frame

    def lin_dec(self, prefix):
        return prefix * self.many

    def joint_activation(self, pair):
        return pair

    def lin_out(self, pairs):
        flat = pairs.reshape(-1).tolist()
        self.rows += len(flat)
        rows = [self._row(pair) for pair in flat]
        return torch.tensor(rows, dtype=torch.float64).reshape(*pairs.shape[:-1], self.V)

    def _row(self, pair: float) -> list[float]:
        if math.isnan(pair):
            return [math.nan] * self.V
        number, frame = divmod(int(pair), int(self.many))
        return [value + frame % 3 - 1.0 for value in self.table(frame, self.prefixes.labels[number])]

    def forward(self, enc_out, dec_out):
        return self.lin_out(self.joint_activation(self.lin_enc(enc_out) + self.lin_dec(dec_out)))


def tabled(table: LogProbs, V: int) -> tuple[TabledDecoder, TabledJoint]:
    prefixes = Prefixes()
    return TabledDecoder(V, prefixes), TabledJoint(table, prefixes, V)


def numbered_frames(lengths: list[int], poison: float = math.nan) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A batch for `TabledJoint`.

    Returns:
        encoder_out: the number of each frame, poison behind the utterances. (B, T, 1)
        lengths: (B,)
        first: the number of each utterance's frame 0.
    """
    first = [sum(lengths[:b]) for b in range(len(lengths))]
    encoder_out = torch.full((len(lengths), max(lengths), 1), poison, dtype=torch.float64)
    for b, (start, length) in enumerate(zip(first, lengths, strict=True)):
        encoder_out[b, :length, 0] = torch.arange(start, start + length)
    return encoder_out, torch.tensor(lengths), first


# --- a scorer that keeps label sequences ------------------------------------------------------------------------------


class SequenceScorer:
    """Keeps the label sequence of each node and of each leaf, and sees to what a search promises its scorers."""

    def __init__(self, answer: Callable | None = None):
        """
        Args:
            answer: what `extend` returns for label sequences; None: the sequences with their utterances.
        """
        self.answer = answer
        self.nodes, self.leaves = [], []
        self.seen = dict.fromkeys(("grown", "nodes moved", "leaves moved", "scored again"), 0)

    def reserve(self, utterances, nodes, leaves):
        self.seen["grown"] += bool(self.nodes)
        for kept, room in ((self.nodes, nodes), (self.leaves, leaves)):
            assert utterances >= len(kept)
            kept.extend([] for _ in range(utterances - len(kept)))
            for places in kept:
                assert room >= len(places)
                places.extend([None] * (room - len(places)))

    def extend(self, rows, tree):
        columns = [column.tolist() for column in rows[:-1]]
        assert (rows.valid is not None) == tree.fixed_shapes
        valid = [True] * len(columns[0]) if rows.valid is None else rows.valid.tolist()
        sequences, nodes, leaves = [], {}, {}
        for b, node, leaf, parent, parent_leaf, label, is_valid in zip(*columns, valid, strict=True):
            assert 0 <= b < tree.utterances and 0 <= node < tree.nodes and 0 <= leaf < tree.leaves
            sequences.append(())
            if not is_valid:
                continue
            assert node < tree.nodes - tree.spare and leaf < tree.leaves - tree.spare
            if parent < 0:
                assert (parent, parent_leaf, label, node, leaf) == (-1, -1, 0, 0, 0)
                self.nodes[b], self.leaves[b] = [None] * tree.nodes, [None] * tree.leaves
            else:
                sequences[-1] = (*self.nodes[b][parent], label)
                assert self.leaves[b][parent_leaf] == self.nodes[b][parent]
                if self.nodes[b][node] == sequences[-1]:
                    assert sequences[-1] not in self.leaves[b], "scored again, though its leaf was not given up"
                    self.seen["scored again"] += 1
            assert (b, node) not in nodes and (b, leaf) not in leaves
            nodes[b, node] = leaves[b, leaf] = sequences[-1]
        for kept, written in ((self.nodes, nodes), (self.leaves, leaves)):  # now: no row is the parent of another
            for (b, place), sequence in written.items():
                kept[b][place] = sequence
        return self.answer(sequences) if self.answer else sorted((b, labels) for (b, _), labels in nodes.items())

    def move_nodes(self, kept):
        self.seen["nodes moved"] += 1
        self.nodes = self._moved(self.nodes, kept)

    def move_leaves(self, kept):
        self.seen["leaves moved"] += 1
        self.leaves = self._moved(self.leaves, kept)

    @staticmethod
    def _moved(all_places, kept):
        assert len(kept) == len(all_places)
        for which in kept.tolist():
            while len(which) > 1 and which[-1] == 0:  # holds nothing
                which.pop()
            assert which == sorted(set(which)), f"in their order, then 0: {kept}"
        return [
            [places[old] for old in which] + [None] * (len(places) - len(which))
            for places, which in zip(all_places, kept.tolist(), strict=True)
        ]
