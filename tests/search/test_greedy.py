"""Greedy by label looping: the best token again and again, which is mAES with one hypothesis and one candidate."""

import random

import plain
import pytest
import torch
from search_oracles import SequenceScorer
from search_problems import WINDOWS, assert_same, assert_same_nbest, network_problem, random_lengths, tabled_problem

from espnet_mega_plugin.search.scorer import Fusion


def test_it_is_the_loop_over_best_tokens():
    for _ in range(40):
        problem = tabled_problem(random_lengths(4, longest=12))
        options = {"search_type": "greedy", "nstep": random.randint(1, 4), "nbest": 3}
        lists = problem.found(options, window=random.choice(WINDOWS))
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert_same_nbest(nbest, plain.search(log_probs, T, options))


def test_it_is_maes_with_one_candidate():
    for _ in range(10):
        problem = tabled_problem(random_lengths(3))
        nstep = random.randint(1, 3)
        gamma = random.choice((0.0, 2.3, 50.0))
        maes = {"search_type": "maes", "beam_size": 1, "expansion_beta": 0, "expansion_gamma": gamma, "nstep": nstep}
        assert_same(problem.found({"search_type": "greedy", "nstep": nstep}), problem.found(maes))


def test_beam_options_are_not_its_business():
    problem = tabled_problem([5, 3])
    want = problem.found({"search_type": "greedy"})
    assert_same(problem.found({"search_type": "greedy", "beam_size": 100, "expansion_beta": 50}), want)


def test_what_is_fused_changes_no_label_and_that_is_said(caplog):
    """And of mAES no label that lies behind its candidates."""
    logits = [0.0, -5.0, -1.0, -9.0]
    problem = tabled_problem([3], V=4, table=lambda t, labels: logits)
    likes = SequenceScorer(lambda sequences: torch.tensor([[0.0, 8.0, 8.0, 8.0]] * len(sequences)))
    likes.largest = 8.0
    fusion = Fusion(likes, 1.0)
    for options in ({"search_type": "greedy"}, {"search_type": "maes", "beam_size": 2, "expansion_gamma": 0.5}):
        assert [one.yseq for one in problem.found(options, fusion=fusion)[0]] == [[0]]
    found = problem.found({"search_type": "maes", "beam_size": 2, "expansion_gamma": 2.3}, fusion=fusion)
    assert set(found[0][0].yseq[1:]) == {2}  # within gamma; 1 would be no worse with the bonus, but is not looked at
    said = [message for message in caplog.messages if message.startswith("search_type greedy takes the most probable")]
    assert len(said) == 1
    caplog.clear()
    problem.found({"search_type": "greedy"})
    assert not caplog.messages


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_label_that_always_wins_is_taken_most_times_a_frame(most):
    problem = tabled_problem([4], V=3, peak=1.0, table=lambda t, labels: [-40.0, -41.0, 0.0])
    [[found]] = problem.found({"search_type": "greedy", "nstep": most})
    assert found.yseq == [0] + [2] * 4 * most
    assert found.frames == [t for t in range(4) for _ in range(most)]
    assert found.score == pytest.approx(-160.0)


def test_over_a_network_each_prefix_is_scored_once():
    problem = network_problem("simple", [12, 7, 9])
    scored = []
    make = problem.decoder.label_scorer

    def counted():
        scorer = make()
        extend = scorer.extend
        scorer.extend = lambda rows, tree: (scored.append(len(rows.label)), extend(rows, tree))[1]
        return scorer

    problem.decoder.label_scorer = counted
    lists = problem.found({"search_type": "greedy"})
    assert sum(scored) == sum(len(one.yseq) for [one] in lists)
