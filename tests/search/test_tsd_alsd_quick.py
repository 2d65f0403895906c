"""tsd and alsd are ESPnet's own, utterance by utterance, in float64; where ESPnet's alsd is wrong they are the plain loop.

Each search runs with shapes as they come and with fixed ones, as on a GPU.
"""

import contextlib
import logging
import random

import plain
import pytest
import torch
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
from espnet2.asr_transducer.joint_network import JointNetwork
from rounds import Rounds
from search_oracles import SequenceScorer
from search_problems import (
    assert_same,
    assert_same_nbest,
    fixed_shapes,
    network_problem,
    random_lengths,
    random_options,
    tabled_problem,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.search.scorer import Fusion
from espnet_mega_plugin.search.search import BatchedSearch

SHAPES = (contextlib.nullcontext, fixed_shapes)
WEIGHT = 0.5  # of a fusion
both = pytest.mark.parametrize("search_type", ["tsd", "alsd"])


def by_espnet(problem, options, b):
    search = BeamSearchTransducer(problem.decoder, problem.joint, **options)
    with torch.no_grad():
        return search(problem.utterance(b))


def is_espnets_fault(options, T, hypotheses):
    """What alsd finds has u_max labels at most; what has more has not come to the last frame."""
    most = min(options.get("u_max", T * 10), T - 1)
    return options["search_type"] == "alsd" and (T == 1 or any(len(one.yseq) - 1 > most for one in hypotheses))


@both
def test_is_espnets_search_of_each_utterance_alone(search_type):
    right = wrong = 0
    networks = ("simple", 2.0), ("rotary-truncated", 5.0), ("simple", 8.0)
    rounds = Rounds(least=len(networks))  # with a drawn u_max ESPnet's alsd may be wrong
    for n in rounds:
        kind, blank = networks[n % len(networks)]
        problem = network_problem(kind, random_lengths(4))
        with torch.no_grad():
            problem.joint.lin_out.bias[0] += blank
        for _ in range(3):
            options = random_options(search_type, problem.V)
            found = [problem.found(options)]
            with fixed_shapes():
                found.append(problem.found(options))
            assert_same(*found)
            b = problem.lengths.index(max(problem.lengths))
            assert_same(problem.search(options)(problem.utterance(b)[None]), found[0][b : b + 1])
            for b, T in enumerate(problem.lengths):
                want = by_espnet(problem, options, b)
                if is_espnets_fault(options, T, want):
                    wrong += 1
                    assert_same_nbest(found[0][b], plain.search(problem.log_probs[b], T, options))
                else:
                    right += 1
                    want = [plain.Hypothesis(one.score, tuple(one.yseq[1:])) for one in want]
                    assert_same_nbest(found[0][b], want, traces=False)
        rounds.enough = right > 5
    print(f"ESPnet's is right {right} times, wrong {wrong} times")


class PickyScorer(SequenceScorer):
    """Gives each label a number for the labels before it, and something for the last label at the end.

    The numbers are small multiples of 1/8, which any floating-point type can add.
    """

    largest = 1.0

    def __init__(self, V):
        super().__init__(lambda sequences: torch.tensor([self.bonus(labels) for labels in sequences]))
        self.V = V

    def fresh(self):
        return self  # so that what it has seen can be asked for after its only search

    def bonus(self, labels):
        return [0.0] + [((7 * k + 3 * sum(labels) + len(labels)) % 17 - 8) / 8 for k in range(1, self.V)]

    def at_end(self, labels):
        return (labels[-1] % 3) / 4 if labels else -0.5

    def added(self, labels):
        return [WEIGHT * bonus for bonus in self.bonus(labels)]

    def added_at_end(self, labels):
        return WEIGHT * self.at_end(labels)

    def final(self, utterance, leaf):
        held = [self.leaves[b][at] for b, at in zip(utterance.tolist(), leaf.tolist(), strict=True)]
        return torch.tensor([self.at_end(labels or ()) for labels in held])


@both
@pytest.mark.parametrize("shapes", SHAPES, ids=["", "fixed"])
def test_fusion_and_full_trees(search_type, shapes):
    """Long utterances, so that prefixes are cleared away; the scorer itself sees to what it is promised."""
    rounds = Rounds(least=3)
    for _ in rounds:
        problem = tabled_problem([27, 1, 0, 19], peak=random.choice((0.3, 1.0)))
        options = random_options(search_type, problem.V) | {"nbest": 4}
        scorer = PickyScorer(problem.V)
        with shapes():
            found = problem.found(options, fusion=Fusion(scorer, WEIGHT))
        rounds.enough |= bool(scorer.seen["nodes moved"] or scorer.seen["leaves moved"])
        for b, T in enumerate(problem.lengths):
            assert_same_nbest(
                found[b], plain.search(problem.log_probs[b], T, options, scorer.added, scorer.added_at_end)
            )


@pytest.mark.parametrize("shapes", SHAPES, ids=["", "fixed"])
def test_a_stream_is_the_whole(shapes):
    problem = tabled_problem([17, 9, 1, 23])
    options = random_options("tsd", problem.V) | {"nbest": 5}
    with shapes():
        streams, open_, got = problem.search(options).streams(), {}, [None] * 4
        waiting = list(range(4))
        while waiting or open_:
            if waiting and random.random() < 0.4:
                b = waiting.pop()
                open_[streams.open()] = [b, 0]
            pushed = {}
            for stream, (b, at) in open_.items():
                if random.random() < 0.7:
                    pushed[stream] = problem.utterance(b)[at : at + random.randint(0, 6)]
                    open_[stream][1] += len(pushed[stream])
            streams.push(pushed)
            for stream, (b, at) in list(open_.items()):
                assert_same_nbest(streams.partial(stream), plain.search(problem.log_probs[b], at, options))
                if at == problem.lengths[b]:
                    got[b] = streams.close(stream)
                    del open_[stream]
    assert_same(got, problem.found(options))


def test_says_what_u_max_cuts_off(caplog):
    caplog.set_level(logging.WARNING)
    likes_labels = tabled_problem([9, 6, 1], V=3, table=lambda t, labels: [-6.0, -0.5, -1.0])
    likes_labels.found({"search_type": "alsd", "beam_size": 2, "u_max": 2})
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "of 2 of 3 utterances" in warning and "u_max = 2" in warning and "blank alone" in warning

    caplog.clear()
    two_labels = tabled_problem(
        [9, 2, 7], V=3, table=lambda t, labels: [-0.1, -4.0, -4.0] if len(labels) == 2 else [-2.0, -0.3, -3.0]
    )
    two_labels.found({"search_type": "alsd", "beam_size": 2, "u_max": 2})
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "of 2 of 3 utterances has u_max = 2 labels" in warning
    caplog.clear()
    two_labels.found({"search_type": "alsd", "beam_size": 2, "u_max": 3})
    assert not caplog.records


@both
@torch.no_grad()
def test_a_step_does_not_wait_for_the_device(search_type):
    """A fake CUDA tensor refuses to say what it holds, or how many of something there are."""
    with FakeTensorMode(), torch.device("cuda"):
        decoder = MEGADecoder(7, 12, 10, 6, 14, num_heads=2, num_blocks=2)
        options = {"beam_size": 3, "search_type": search_type}
        search = BatchedSearch(decoder, JointNetwork(7, 5, 12, 16), **options)._search(2, torch.device("cuda"))
        search.start(torch.ones(2, dtype=torch.bool))
        search.frames.set(search.joint.frames(torch.randn(2, 8, 5)), torch.full((2,), 8))
        search.tree._grow(64, 64)  # what the host sees to between the steps
        search.traces._grow(64)
        search._rounds_ahead = 3
        for i in range(3):
            search._round() if search_type == "tsd" else search._step(i, torch.full((2,), 15))
        assert search.hypotheses.score.is_cuda
