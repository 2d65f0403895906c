"""Fused scores by enumeration: all alignments of each label sequence, and what the scorers add along its labels."""

import random

import plain
import pytest
import torch
from espnet2.lm.seq_rnn_lm import SequentialRNNLM
from espnet2.lm.transformer_lm import TransformerLM
from search_oracles import every_sequence, log_probability, numbered_frames, random_table
from search_problems import assert_same_nbest, network_problem, random_lengths, random_options, tabled_problem
from test_search_laws import Bonus

from espnet_mega_plugin.search.language_model import scorer_of_lm
from espnet_mega_plugin.search.scorer import Fusion

V = 3


def added(bonus, labels: tuple[int, ...]) -> float:
    return sum(bonus(labels[:u])[labels[u]] for u in range(len(labels)))


@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize(("search_type", "T"), [("maes", 3), ("tsd", 3), ("alsd", 3)])
def test_a_fused_score_is_the_sum_over_alignments_and_the_bonuses_of_the_labels(search_type, T, scale):
    table, given = (random_table(V, 1.0, 0.0, random.randrange(2**31)) for _ in range(2))

    def bonus(labels):
        return [scale * value for value in given(0, labels)]

    options = {
        "maes": {"nstep": 2, "expansion_gamma": 1e5, "expansion_beta": 0},
        "tsd": {"max_sym_exp": 3},
        "alsd": {"u_max": 50},
    }[search_type]
    found = getattr(plain, search_type)(table, T, beam_size=10000, **options, bonus=bonus)
    # alsd: no more labels than frames less one, as many of them at a frame as there are
    longest, most = (T - 1, None) if search_type == "alsd" else (2 * T, 2)
    expected = {
        labels: log_probability(table, T, labels, most) + added(bonus, labels) for labels in every_sequence(V, longest)
    }
    assert {one.labels: one.score for one in found} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("weight", [0.5, -0.5])
@pytest.mark.parametrize("search_type", ["maes", "tsd", "alsd"])
def test_unpruned_batched_search_with_scorers_is_the_enumeration(search_type, weight):
    """The vocabulary has to be as large as the beam; all but two labels are out of the question."""
    small = random_table(V, 1.0, 0.0, random.randrange(2**31))
    lengths, impossible = [3, 2, 3], [-1e9] * 128
    problem = tabled_problem(lengths, V=131, peak=1.0, table=lambda t, labels: [*small(t, labels), *impossible])
    one, other = (Bonus(131, random.randrange(2**31), largest=0.5) for _ in range(2))

    def bonus(labels):
        return [0.8 * a + weight * b for a, b in zip(one.of(labels), other.of(labels), strict=True)]

    options = {"search_type": search_type, "beam_size": 127, "expansion_beta": 2, "nbest": 1000}
    options |= {"nstep": 2, "max_sym_exp": 3, "u_max": 50}
    fusion = [Fusion(one, 0.8), Fusion(other, weight)]
    lists = problem.found(options, expansion_gamma=1e5, fusion=fusion)
    first = numbered_frames(lengths)[2]
    for nbest, T, start in zip(lists, lengths, first, strict=True):
        longest, most = (T - 1, None) if search_type == "alsd" else (2 * T, 2)
        expected = {
            labels: log_probability(lambda t, k, start=start: small(start + t, k), T, labels, most)
            + added(bonus, labels)
            + (0.8 + weight) * one.at_end(labels)
            for labels in every_sequence(V, longest)
        }
        found = {
            tuple(one.yseq[1:]): one.score for one in nbest if one.score > -1e8
        }  # tsd and alsd take impossible ones
        assert found == pytest.approx(expected, abs=1e-9)


LMS = {
    "lstm": lambda V: SequentialRNNLM(V, unit=6, nlayers=2),
    "transformer": lambda V: TransformerLM(V, pos_enc="sinusoidal", embed_unit=8, att_unit=8, head=2, unit=8, layer=2),
}


@pytest.mark.parametrize("name", LMS)
@pytest.mark.parametrize("search_type", ["maes", "tsd", "alsd"])
@torch.no_grad()
def test_a_language_model_in_a_search_scores_as_over_whole_prefixes(search_type, name, seed):
    problem = network_problem("simple", random_lengths(3, longest=7), seed=seed)
    lm = LMS[name](problem.V).double().eval()
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.7)

    def bonus(labels):
        # <sos> is the last token; ESPnet's forward is that over the whole sequence
        scores = lm(torch.tensor([[problem.V - 1, *labels]]), None)[0][0, -1]
        return (0.6 * torch.log_softmax(scores, -1)).tolist()

    options = random_options(search_type, problem.V)
    lists = problem.found(options, fusion=[Fusion(scorer_of_lm(lm, problem.V), 0.6)])
    without = problem.found(options)
    for nbest, alone, T, log_probs in zip(lists, without, problem.lengths, problem.log_probs, strict=True):
        assert_same_nbest(nbest, plain.search(log_probs, T, options, bonus))
        assert all(len(one.yseq) == 1 or one.score not in [h.score for h in alone] for one in nbest)
