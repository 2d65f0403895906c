"""What every batched search obeys, over ESPnet's prediction networks, the plugin's, and tables."""

import logging
import math
import random

import plain
import pytest
import torch
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
from rounds import Rounds
from search_oracles import SequenceScorer, log_probability, random_table
from search_problems import (
    DECODERS,
    MEGA,
    SEARCH_TYPES,
    WINDOWS,
    assert_same,
    assert_same_nbest,
    fixed_shapes,
    most_labels_a_frame,
    network_problem,
    outputs_of,
    random_lengths,
    random_options,
    tabled_problem,
)

from espnet_mega_plugin.rnnt.loss import rnnt_loss
from espnet_mega_plugin.search.scorer import Fusion

every_search = pytest.mark.parametrize("search_type", SEARCH_TYPES)


# --- against other searches -------------------------------------------------------------------------------------------


@every_search
@pytest.mark.parametrize("kind", DECODERS)
def test_it_is_the_plain_search_over_forward(kind, search_type):
    """The plain one runs the prediction network over each whole prefix, as in training."""
    if (kind, search_type) == ("stateless", "alsd"):
        pytest.skip("many label sequences have the same score in any order of their pairs")
    problem = network_problem(kind, [0, 4, 7])
    options = random_options(search_type, problem.V, beam_size=3) | {"nstep": 1 + (kind != "stateless")}
    lists = problem.found(options, window=random.choice(WINDOWS))
    for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
        assert_same_nbest(nbest, plain.search(log_probs, T, options))


@every_search
@pytest.mark.parametrize("kind", [*MEGA, "stateless"])
@torch.no_grad()
def test_it_is_espnets_search(kind, search_type):
    """Of alsd where that gives hypotheses that came to the end. ESPnet's RNN decoder cannot search in float64."""
    T = 9
    while True:
        problem = network_problem(kind, [T])
        if search_type == "alsd":
            problem.joint.lin_out.bias.data[0] += 4.0  # or it rarely is right
        options = random_options(search_type, problem.V, beam_size=3)
        if kind == "stateless" and "nstep" in options:
            options["nstep"] = 1
        ends = [plain.alsd(problem.log_probs[0], T, 3, options.get("u_max", 0), finish=finish) for finish in (0, 1)]
        if search_type != "alsd" or ends[0] == ends[1]:
            break
    theirs = dict(options)
    if search_type == "greedy":
        options["nbest"] = theirs["nbest"] = 1
        theirs |= {"search_type": "maes", "beam_size": 1, "expansion_beta": 0}
    want = BeamSearchTransducer(problem.decoder, problem.joint, **theirs)(problem.utterance(0))
    [got] = problem.found(options)
    assert [one.yseq for one in got] == [one.yseq for one in want]
    assert [one.score for one in got] == pytest.approx([float(one.score) for one in want], rel=1e-9, abs=1e-9)


@every_search
def test_score_norm_and_nbest_are_espnets(search_type):
    for score_norm in (False, True):
        problem = tabled_problem([8], V=6, peak=1.0)
        options = random_options(search_type, problem.V, beam_size=4) | {"score_norm": score_norm}
        full = plain.search(problem.log_probs[0], 8, options | {"nbest": 1000})
        for nbest in (1, 2, 1000):
            [got] = problem.found(options | {"nbest": nbest})
            assert_same_nbest(got, full[:nbest])
        key = [one.score / (len(one.labels) + 1 if score_norm else 1) for one in full]
        assert key == sorted(key, reverse=True)


# --- scores -----------------------------------------------------------------------------------------------------------


@every_search
def test_no_score_is_above_the_true_one(search_type):
    """Probability is lost by pruning, never made; and each entry has ended, is there once, and is in its place."""
    for _ in range(12):
        problem = tabled_problem(random_lengths(3))
        options = random_options(search_type, problem.V) | {"nbest": 1000}
        most = most_labels_a_frame(options)
        for nbest, T, log_probs in zip(problem.found(options), problem.lengths, problem.log_probs, strict=True):
            assert 1 <= len(nbest) and len({tuple(one.yseq) for one in nbest}) == len(nbest)
            assert [one.score for one in nbest] == sorted((one.score for one in nbest), reverse=True)
            for one in nbest:
                assert one.score <= log_probability(log_probs, T, tuple(one.yseq[1:]), most) + 1e-9


@every_search
@pytest.mark.parametrize("kind", ["simple", "chunk", "lstm"])
@torch.no_grad()
def test_no_score_is_above_the_loss(kind, search_type):
    problem = network_problem(kind, [6, 9])
    options = random_options(search_type, problem.V, beam_size=4) | {"nbest": 1000}
    for b, nbest in enumerate(problem.found(options)):
        for one in nbest:
            outputs = outputs_of(problem.decoder)(torch.tensor([one.yseq]))
            logits = problem.joint(problem.utterance(b)[None, :, None], outputs[:, None])
            T, U = torch.tensor([problem.lengths[b]]), torch.tensor([len(one.yseq) - 1])
            [cost] = rnnt_loss(logits, torch.tensor([one.yseq])[:, 1:], T, U, reduction="none")
            assert one.score <= -float(cost) + 1e-9


# --- batches ----------------------------------------------------------------------------------------------------------


@every_search
def test_neighbours_order_and_padding_change_nothing(search_type):
    """What is behind an utterance is NaN in all these tests; here it is something else as well."""
    for problem in (tabled_problem([7, 0, 9, 1, 5]), network_problem("simple", [7, 0, 9, 1, 5])):
        search = problem.search(random_options(search_type, problem.V) | {"nbest": 3, "nstep": 2})
        lengths = torch.tensor(problem.lengths)
        batch = search(problem.encoder_out, lengths)
        alone = [search(problem.utterance(b)[None])[0] for b in range(5)]
        assert_same(batch, alone)
        order = torch.randperm(5)
        assert_same(search(problem.encoder_out[order], lengths[order]), [alone[b] for b in order])
        longer = torch.nn.functional.pad(problem.encoder_out, (0, 0, 0, 4), value=torch.inf)
        assert_same(search(longer, lengths.int()), alone)


@every_search
def test_empty_utterances_and_batches(search_type):
    problem = tabled_problem([0, 0, 1], V=4, peak=1.0)
    search = problem.search(random_options(search_type, 4))
    assert search(problem.encoder_out[:0], torch.tensor([], dtype=torch.long)) == []
    nothing = search(problem.encoder_out[:2, :0])
    assert [[(one.yseq, one.score, one.frames, one.logps) for one in nbest] for nbest in nothing] == [
        [([0], 0.0, [], [])]
    ] * 2


@every_search
def test_a_search_remembers_nothing(search_type):
    """Neither of another call, nor of another search over the same networks, nor of weights that were there before."""
    problem, other = network_problem("simple", [9, 4]), network_problem("simple", [9, 4], seed=1)
    options = random_options(search_type, problem.V)
    search = problem.search(options)
    before = search(problem.encoder_out, torch.tensor(problem.lengths))
    problem.search(options | {"beam_size": 2})(other.encoder_out, torch.tensor(other.lengths))
    assert_same(search(problem.encoder_out, torch.tensor(problem.lengths)), before)
    problem.decoder.load_state_dict(other.decoder.state_dict())
    problem.joint.load_state_dict(other.joint.state_dict())
    assert_same(search(other.encoder_out, torch.tensor(other.lengths)), other.found(options))


@every_search
@pytest.mark.parametrize("kind", [*MEGA, "lstm"])
def test_fixed_shapes_change_nothing(kind, search_type):
    problem = network_problem(kind, [6, 0, 4])
    options = random_options(search_type, problem.V, beam_size=2) | {"nstep": 2, "expansion_beta": 1}
    as_they_come = problem.found(options, window=3)
    with fixed_shapes():
        assert_same(problem.found(options, window=3), as_they_come)


@every_search
def test_long_utterances_move_what_is_kept(search_type):
    """So many labels that nodes and leaves are given up and moved, and one utterance ends long before the other."""
    rounds = Rounds()
    for _ in rounds:
        problem = tabled_problem([60, 25], V=5, peak=2.0, table=random_table(5, 2.0, -1.0, random.randrange(2**31)))
        scorer = SequenceScorer(problem.decoder.numbered)
        problem.decoder.label_scorer = lambda scorer=scorer: scorer
        options = random_options(search_type, 5, beam_size=3) | {"u_max": 50}
        lists = problem.found(options)
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert_same_nbest(nbest, plain.search(log_probs, T, options))
        rounds.enough = bool(scorer.seen["nodes moved"] or scorer.seen["leaves moved"])


# --- fusion -----------------------------------------------------------------------------------------------------------


class Bonus(SequenceScorer):
    """What a table adds to each next label, and at the end for the last one."""

    def __init__(self, V, seed, largest, scale=1.0):
        self.table = random_table(V, 1.0, 0.0, seed)
        self.largest, self.scale = largest, scale
        super().__init__(lambda sequences: torch.tensor([self.of(labels) for labels in sequences], dtype=torch.float64))

    def of(self, labels):
        return [min(self.scale * (value + 1.0), self.largest) for value in self.table(0, labels)]

    def at_end(self, labels):
        return -0.1 * len(labels)

    def final(self, utterance, leaf):
        held = [self.leaves[b][i] or () for b, i in zip(utterance.tolist(), leaf.tolist(), strict=True)]
        return torch.tensor([self.at_end(labels) for labels in held], dtype=torch.float64)


@every_search
@pytest.mark.parametrize(
    ("largest", "weight"), [(0.0, 0.5), (0.7, 0.5), (0.0, -0.5)], ids=["penalties", "bonuses", "taken away"]
)
def test_fusion_is_that_of_the_plain_search(search_type, largest, weight):
    for _ in range(4):
        problem = tabled_problem(random_lengths(3, longest=6))
        options = random_options(search_type, problem.V)
        one, other = (Bonus(problem.V, random.randrange(2**31), largest) for _ in range(2))

        def bonus(labels, one=one, other=other):
            return [0.8 * a + weight * b for a, b in zip(one.of(labels), other.of(labels), strict=True)]

        def final(labels, one=one, other=other):
            return 0.8 * one.at_end(labels) + weight * other.at_end(labels)

        lists = problem.found(options, fusion=[Fusion(one, 0.8), Fusion(other, weight)])
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert_same_nbest(nbest, plain.search(log_probs, T, options, bonus, final))


def test_the_bound_of_maes_counts_what_may_be_taken_away():
    """More than what parts the candidates, and so many of these that the bound would leave some out."""
    for _ in range(40):
        problem = tabled_problem(random_lengths(3, longest=6))
        options = random_options("maes", problem.V)
        options |= {"nbest": 50, "expansion_gamma": 8.0, "nstep": random.choice((2, 3))}
        one = Bonus(problem.V, random.randrange(2**31), largest=0.0, scale=3.0)

        def bonus(labels, one=one):
            return [-added for added in one.of(labels)]

        def final(labels, one=one):
            return -one.at_end(labels)

        lists = problem.found(options, fusion=Fusion(one, -1.0))
        for nbest, T, log_probs in zip(lists, problem.lengths, problem.log_probs, strict=True):
            assert_same_nbest(nbest, plain.search(log_probs, T, options, bonus, final))


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_a_bonus_makes_an_improbable_label_before_it_good(weight):
    """Behind label 1, far below the beam, label 2 has a bonus that brings both in."""
    problem = tabled_problem([1], V=4, peak=1.0, table=lambda t, labels: [-0.1, -3.0, -3.0, -9.0])
    scorer = SequenceScorer(
        lambda sequences: torch.tensor([[0, 0, 8 * weight * (labels == (1,)), 0] for labels in sequences])
    )
    scorer.largest = 8.0 if weight > 0 else 0.0
    options = {"search_type": "maes", "beam_size": 1, "nstep": 2, "expansion_gamma": 8.0, "expansion_beta": 2}
    [[found]] = problem.found(options, fusion=Fusion(scorer, weight))
    assert found.yseq == [0, 1, 2]
    assert found.score == pytest.approx(-3.0 - 3.0 + 8.0 - 0.1, abs=0.02)  # the rows of the table sum to 1.004


# --- an end in bounded time -------------------------------------------------------------------------------------------

ADVERSARIAL = {  # logits of blank and three labels, where ESPnet's searches go on for ever or raise
    "a label saturates": [-40.0, 40.0, -40.0, -40.0],
    "blank saturates": [40.0, -40.0, -40.0, -40.0],
    "constant": [0.0, 0.0, 0.0, 0.0],
    "blank impossible": [-math.inf, 0.0, 1.0, 2.0],
    "one label possible": [-math.inf, 0.0, -math.inf, -math.inf],
    "blank alone possible": [0.0, -math.inf, -math.inf, -math.inf],
}


@every_search
@pytest.mark.parametrize("logits", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("shapes", ["cpu", "fixed"])
def test_it_ends_whatever_the_scores(search_type, logits, shapes):
    T = 5
    for beam_size in (1, 3):
        problem = tabled_problem([T, 2], V=4, table=lambda t, labels: logits)
        options = random_options(search_type, 4, beam_size)
        if shapes == "fixed":
            with fixed_shapes():
                lists = problem.found(options)
        else:
            lists = problem.found(options)
        most = most_labels_a_frame(options) or T
        assert problem.decoder.calls <= 2 * T * (most + 1)
        for nbest, length in zip(lists, problem.lengths, strict=True):
            assert 1 <= len(nbest) <= options["nbest"]
            assert len({tuple(one.yseq) for one in nbest}) == len(nbest)
            for one in nbest:
                assert not math.isnan(one.score)
                assert len(one.yseq) - 1 <= length * most


@every_search
@pytest.mark.parametrize("shapes", ["cpu", "fixed"])
def test_scores_that_are_no_numbers_end_one_utterance_alone(search_type, shapes, caplog):
    problem = tabled_problem([6, 6, 6])
    search = problem.search(random_options(search_type, problem.V))
    want = search(problem.encoder_out)
    broken = problem.encoder_out.clone()
    broken[1, 3:] = math.nan
    caplog.set_level(logging.WARNING)
    if shapes == "fixed":
        with fixed_shapes():
            got = search(broken)
    else:
        got = search(broken)
    assert got[1] == []
    assert_same([got[0], got[2]], [want[0], want[2]])
    assert "utterance 1 of the batch are not numbers" in caplog.text


@every_search
@pytest.mark.parametrize("beam_size", [1, 2])
def test_the_only_utterance_ends_where_its_scores_are_no_numbers(search_type, beam_size, caplog):
    problem = tabled_problem([9])
    broken = problem.encoder_out.clone()
    broken[0, 2:] = math.nan
    assert problem.search(random_options(search_type, problem.V, beam_size))(broken) == [[]]
    assert "not numbers" in caplog.text
