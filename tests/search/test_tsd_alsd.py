"""tsd and alsd: the plain ones are ESPnet's where that is right, unpruned they are the brute-force sum, and the batched
ones are the plain ones."""

import random
from contextlib import nullcontext

import plain
import pytest
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
from rounds import Rounds
from search_oracles import every_sequence, log_probability, random_table
from search_problems import (
    WINDOWS,
    assert_same,
    assert_same_nbest,
    fixed_shapes,
    random_lengths,
    random_options,
    tabled_problem,
)


@pytest.mark.parametrize("search_type", ["tsd", "alsd"])
def test_plain_search_is_espnets(search_type):
    """Of alsd the raw lists, with hypotheses that never came to the last frame."""
    for _ in range(20):
        problem = tabled_problem([random.randint(2, 7)])
        T, log_probs, options = problem.lengths[0], problem.log_probs[0], random_options(search_type, problem.V)
        theirs = BeamSearchTransducer(problem.decoder, problem.joint, **options)(problem.utterance(0))
        if search_type == "alsd":
            raw = plain.alsd(log_probs, T, options["beam_size"], options["u_max"], finish=False)
            ours = plain.n_best(raw, options["nbest"])
        else:
            ours = plain.search(log_probs, T, options)
        assert_same_nbest(theirs, ours, traces=False)


@pytest.mark.parametrize(("T", "most"), [(3, 2), (2, 3), (1, 2), (4, 1)])
def test_unpruned_tsd_is_the_brute_force_sum(T, most):
    table = random_table(V=3, peak=1.0, blank=0.0, seed=random.randrange(2**31))
    found = {one.labels: one.score for one in plain.tsd(table, T, beam_size=1000, max_sym_exp=most + 1)}
    expected = {labels: log_probability(table, T, labels, most) for labels in every_sequence(3, T * most)}
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("T", "u_max", "longest"), [(4, 50, 3), (4, 2, 2), (3, 3, 2), (1, 50, 1), (1, 0, 0), (2, 0, 0)]
)
def test_unpruned_alsd_is_the_brute_force_sum(T, u_max, longest):
    """As many labels at a frame as there may be in all."""
    table = random_table(V=3, peak=1.0, blank=0.0, seed=random.randrange(2**31))
    found = {one.labels: one.score for one in plain.alsd(table, T, beam_size=10000, u_max=u_max)}
    expected = {labels: log_probability(table, T, labels) for labels in every_sequence(3, longest)}
    assert found == pytest.approx(expected, abs=1e-9)


def test_plain_alsd_finishes_what_espnets_leaves_unfinished():
    unfinished = 0
    for _ in range(40):
        T, beam_size = random.randint(2, 6), random.randint(1, 2)
        table = random_table(V=4, peak=1.0, blank=-1.0, seed=random.randrange(2**31))
        raw = {one.labels: one.score for one in plain.alsd(table, T, beam_size, 50, finish=False)}
        for one in plain.alsd(table, T, beam_size, 50):
            assert one.score <= log_probability(table, T, one.labels) + 1e-9
            unfinished += raw[one.labels] > log_probability(table, T, one.labels) + 1e-9
    assert unfinished


@pytest.mark.parametrize("search_type", ["tsd", "alsd"])
def test_batched_search_is_the_plain_one(search_type):
    for _ in range(40):
        problem = tabled_problem(random_lengths(3))
        options = random_options(search_type, problem.V)
        lists = problem.found(options, window=random.choice(WINDOWS))
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert_same_nbest(nbest, plain.search(log_probs, T, options))


@pytest.mark.parametrize("search_type", ["tsd", "alsd"])
def test_fixed_shapes_change_nothing(search_type, caplog):
    for _ in range(8):
        problem = tabled_problem(random_lengths(3, longest=6))
        options = random_options(search_type, problem.V)
        as_they_come = problem.found(options)
        said = caplog.messages
        caplog.clear()
        with fixed_shapes():
            assert_same(problem.found(options), as_they_come)
        assert caplog.messages == said  # what u_max has cut off, and what it left unfinished
        caplog.clear()


@pytest.mark.parametrize("shapes", [nullcontext, fixed_shapes])
def test_alsd_says_how_many_utterances_u_max_has_cut_off_or_left_unfinished(shapes, caplog):
    rounds, said = Rounds(least=25), set()
    for _ in rounds:
        problem = tabled_problem(random_lengths(3, longest=6), V=6)
        beam_size, u_max, full, unfinished = random.randint(2, 5), random.randint(0, 3), 0, 0
        for T, log_probs in zip(problem.lengths, problem.log_probs, strict=True):
            ends = [plain.alsd(log_probs, T, beam_size, u_max, finish=finish) for finish in (True, False)]
            ended = ends[0] == ends[1]  # blanks to the end would cost something
            unfinished += T > 0 and not ended
            longest = len(max(ends[0], key=lambda one: one.score).labels)
            full += T > 0 and ended and longest >= u_max and u_max < T - 1
        caplog.clear()
        with shapes():
            problem.found({"search_type": "alsd", "beam_size": beam_size, "u_max": u_max})
        expected = [("the result of", full), ("nothing had come to the end of", unfinished)]
        expected = [f"alsd: {what} {count} of 3" for what, count in expected if count]
        assert [message[: len(start)] for message, start in zip(caplog.messages, expected, strict=True)] == expected
        said |= {"full"} if full else set()
        said |= {"unfinished"} if unfinished else set()
        rounds.enough = len(said) == 2


@pytest.mark.parametrize(("u_max", "advice"), [(2, "Raise u_max, or search with maes."), (50, "Search with maes.")])
def test_alsd_advises_to_raise_u_max_where_that_helps(u_max, advice, caplog):
    """Labels alone are likely; their results have more of them than u_max, one a step."""
    problem = tabled_problem([4], V=3, table=lambda t, labels: [-40.0, 0.0, -1.0])
    [nbest] = problem.found({"search_type": "alsd", "beam_size": 1, "u_max": u_max})
    assert len(nbest[0].yseq) - 1 == 4 + min(u_max, 3)
    [said] = caplog.messages
    assert said.endswith(f"their results go on from there by blank alone. {advice}")


def test_each_prefix_is_scored_once_where_espnet_scores_hypotheses_at_each_frame():
    problem = tabled_problem([30], V=6, peak=2.0)
    options = {"search_type": "tsd", "beam_size": 4}
    problem.found(options)
    rows = problem.decoder.rows
    BeamSearchTransducer(problem.decoder, problem.joint, **options)(problem.utterance(0))
    theirs = problem.decoder.rows - rows
    assert rows < theirs / 1.3
