"""mAES: the plain one is ESPnet's, unpruned it is the brute-force sum, and the batched one is the plain one."""

import contextlib
import random

import plain
import pytest
import torch
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
from search_oracles import every_sequence, log_probability, numbered_frames, over_alignments, random_table
from search_problems import (
    WINDOWS,
    assert_same,
    assert_same_nbest,
    fixed_shapes,
    network_problem,
    random_lengths,
    random_options,
    tabled_problem,
)

from espnet_mega_plugin.search import maes


def test_the_brute_force_sum_is_that_over_alignments():
    table = random_table(V=3, peak=1.0, blank=0.0, seed=random.randrange(2**31))
    for T in (0, 1, 2, 3):
        for most in (1, 2, None):
            for labels in every_sequence(3, 3):
                expected = over_alignments(table, T, labels, most)
                assert log_probability(table, T, labels, most) == pytest.approx(expected, abs=1e-12)


def test_plain_search_is_espnets():
    for _ in range(25):
        problem = tabled_problem([random.randint(0, 6)])
        options = random_options("maes", problem.V)
        theirs = BeamSearchTransducer(problem.decoder, problem.joint, **options)(problem.utterance(0))
        ours = plain.search(problem.log_probs[0], problem.lengths[0], options)
        assert_same_nbest(theirs, ours, traces=False)


@pytest.mark.parametrize(("T", "nstep"), [(3, 2), (2, 3), (1, 3), (4, 1)])
def test_unpruned_plain_search_is_the_brute_force_sum(T, nstep):
    table = random_table(V=3, peak=1.0, blank=0.0, seed=random.randrange(2**31))
    found = plain.maes(table, T, beam_size=1000, nstep=nstep, expansion_gamma=1e5, expansion_beta=0)
    assert_is_every_sequence(found, table, T, nstep)


def assert_is_every_sequence(found, table, T, nstep):
    scores = {one.labels: one.score for one in found}
    assert len(scores) == len(found)
    expected = {labels: log_probability(table, T, labels, nstep) for labels in every_sequence(3, T * nstep)}
    assert scores.keys() == expected.keys()
    assert [scores[labels] for labels in expected] == pytest.approx(list(expected.values()), abs=1e-9)


def test_unpruned_batched_search_is_the_brute_force_sum():
    """The vocabulary has to be as large as the beam; all but two labels are out of the question."""
    small = random_table(V=3, peak=1.0, blank=0.0, seed=random.randrange(2**31))
    impossible = [-1e9] * 128
    lengths = [3, 2, 3]
    problem = tabled_problem(lengths, V=131, peak=1.0, table=lambda t, labels: [*small(t, labels), *impossible])
    options = {"search_type": "maes", "beam_size": 127, "expansion_beta": 2, "nbest": 1000, "nstep": 2}
    lists = problem.found(options, expansion_gamma=1e5)
    first = numbered_frames(lengths)[2]
    for nbest, T, start in zip(lists, lengths, first, strict=True):
        found = [plain.Hypothesis(one.score, tuple(one.yseq[1:])) for one in nbest]
        assert_is_every_sequence(found, lambda t, labels, start=start: small(start + t, labels), T, 2)


def test_batched_search_is_the_plain_one():
    for _ in range(40):
        problem = tabled_problem(random_lengths(3))
        options = random_options("maes", problem.V)
        lists = problem.found(options, window=random.choice(WINDOWS))
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert_same_nbest(nbest, plain.search(log_probs, T, options))


def test_labels_scored_in_turns_lose_nothing():
    """So many labels are left at a frame that the most probable ones are scored first; the seed is one with which a
    label that adds to one of these was dropped."""
    random.seed(66)
    problem = tabled_problem(random_lengths(3, longest=6), V=7, peak=random.choice((1.0, 2.0, 4.0)))
    options = {"search_type": "maes", "beam_size": 4, "nstep": 2, "expansion_gamma": 10.0, "expansion_beta": 3}
    for nbest, T, log_probs in zip(
        problem.found(options | {"nbest": 4}), problem.lengths, problem.log_probs, strict=True
    ):
        assert_same_nbest(nbest, plain.search(log_probs, T, options | {"nbest": 4}))


@pytest.mark.parametrize("fixed", [False, True])
def test_what_the_bound_leaves_out_is_missed_by_nobody(fixed):
    """Long utterances, mostly blank, gamma wide open: nearly all labels are ruled out, a few narrowly not."""
    for _ in range(40 if fixed else 80):
        V = random.randint(3, 5)
        beam = random.randint(2, V - 1)
        peak = random.choice((1.0, 2.0))
        table = random_table(V, peak, random.choice((1.0, 2.0, 3.0)), random.randrange(2**31))
        problem = tabled_problem([random.randint(8, 16), random.randint(1, 16)], V=V, table=table)
        options = {"search_type": "maes", "beam_size": beam, "nstep": random.randint(1, 3), "nbest": beam}
        options |= {"expansion_gamma": random.choice((3.0, 6.0, 10.0)), "expansion_beta": V - beam}
        window = random.choice(WINDOWS)
        with fixed_shapes() if fixed else contextlib.nullcontext():
            lists = problem.found(options, window=window)
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert_same_nbest(nbest, plain.search(log_probs, T, options))


def test_two_paths_that_would_fall_out_by_themselves_stay_in_together():
    """The seed is one with which two candidates, one a prefix of the other, lie just below the beam and their sum in
    it."""
    problem = tabled_problem([13], V=3, table=random_table(3, peak=1.0, blank=2.0, seed=776429620))
    options = {"search_type": "maes", "beam_size": 2, "nstep": 2, "nbest": 2}
    options |= {"expansion_gamma": 10.0, "expansion_beta": 1}
    (nbest,) = problem.found(options)
    assert_same_nbest(nbest, plain.search(problem.log_probs[0], problem.lengths[0], options))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stateless", "lstm", "window"])
def test_places_without_a_hypothesis_are_not_looked_at(kind):
    """Their nodes may be beyond those in use after what is out of reach was cleared away; the seed is one with which
    they were."""
    problem = network_problem(kind, [66, 1, 0, 67], seed=11)
    options = {"search_type": "maes", "beam_size": 3, "nstep": 2, "nbest": 3, "expansion_beta": 1}
    options |= {"expansion_gamma": 0.3}
    lists = problem.found(options)
    for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
        assert_same_nbest(nbest, plain.search(log_probs, T, options))


@pytest.mark.parametrize("gamma", [2.3, 10.0])
def test_fixed_shapes_change_nothing(gamma):
    for _ in range(12):
        problem = tabled_problem(random_lengths(3, longest=6))
        options = random_options("maes", problem.V, beam_size=2)
        options |= {"expansion_gamma": gamma, "expansion_beta": random.randint(0, 1)}
        as_they_come = problem.found(options, window=3)
        with fixed_shapes():
            assert_same(problem.found(options, window=3), as_they_come)


def test_places_of_a_gpu_may_lose_probability_and_never_make_any():
    for _ in range(8):
        problem = tabled_problem(random_lengths(3, longest=6))
        options = random_options("maes", problem.V) | {"nbest": 10}
        with fixed_shapes(room_for_all=False):
            lists = problem.found(options)
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert nbest
            for one in nbest:
                assert one.score <= log_probability(log_probs, T, tuple(one.yseq[1:]), options["nstep"]) + 1e-9


def test_rows_of_the_prediction_network_do_not_grow_with_gamma(monkeypatch):
    """What the bound is for: ESPnet's mAES scores every candidate, many of them over and over."""
    monkeypatch.setattr(maes, "MANY", 1)  # rows are what counts here, not calls
    rows, theirs = {}, {}
    for gamma in (2.3, 10.0):
        problem = tabled_problem([30], V=8, table=random_table(8, peak=3.0, blank=6.0, seed=0))
        options = {"search_type": "maes", "beam_size": 4, "nstep": 2, "expansion_gamma": gamma, "expansion_beta": 2}
        problem.found(options)
        rows[gamma] = problem.decoder.rows
        BeamSearchTransducer(problem.decoder, problem.joint, **options)(problem.utterance(0))
        theirs[gamma] = problem.decoder.rows - rows[gamma]
    assert rows[2.3] < theirs[2.3] and rows[10.0] < 3 * rows[2.3] and theirs[10.0] > 8 * rows[10.0]
