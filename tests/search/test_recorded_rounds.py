"""Rounds that are recorded and replayed find what they find when they run as they are.

On a CPU, with fixed shapes and in place of CUDA graphs their double (`replayed.py`): the operations of one round again
and again on the same tensors, whatever the host has decided since.
"""

import logging
import random
import weakref

import pytest
import torch
from espnet2.lm.seq_rnn_lm import SequentialRNNLM
from espnet2.lm.transformer_lm import TransformerLM
from random_tree import RandomTree
from replayed import Replayed
from rounds import Rounds
from search_problems import MEGA, assert_same, fixed_shapes, network_problem, random_options, tabled_problem

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.recording import RUNS, CudaGraphs
from espnet_mega_plugin.search.algorithm import Algorithm
from espnet_mega_plugin.search.language_model import scorer_of_lm
from espnet_mega_plugin.search.phrases import PhraseScorer
from espnet_mega_plugin.search.scorer import Fusion
from espnet_mega_plugin.search.search import BatchedSearch
from espnet_mega_plugin.search.tree import LabelTree

every_search = pytest.mark.parametrize("search_type", ["greedy", "maes", "tsd"])


class Recorder:
    """Counts what is recorded and replayed; runs a round as often as a CUDA graph needs before it is recorded."""

    def __init__(self, runs: int = RUNS):
        self.runs, self.recorded, self.replayed = runs, 0, 0

    def __call__(self, run):
        for _ in range(self.runs - 1):
            run()
        self.recorded += 1
        self._kept = Replayed(run)
        return self

    def replay(self):
        self.replayed += 1
        self._kept.replay()


def recorded(problem, options: dict, recorder=None, fusion=None) -> tuple[list, Recorder]:
    """N-best lists of all utterances, and what was recorded."""
    search = problem.search(options)
    search.fusion = () if fusion is None else (fusion,)
    recorder = recorder or Recorder()
    search.recorder_for = lambda device: recorder
    with fixed_shapes():
        return search(problem.encoder_out, torch.tensor(problem.lengths)), recorder


def small_beam(search_type: str, V: int) -> dict:
    return random_options(search_type, V, beam_size=2) | {"nstep": 2, "expansion_beta": 1, "max_sym_exp": 3}


@every_search
@pytest.mark.parametrize("kind", [*MEGA, "lstm", "gru", "stateless"])
def test_replaying_changes_nothing(kind, search_type):
    problem = network_problem(kind, [23, 0, 41, 1])
    options = small_beam(search_type, problem.V)
    found, recorder = recorded(problem, options)
    assert_same(found, problem.found(options))
    assert 0 < recorder.recorded < recorder.replayed


@every_search
def test_however_often_a_round_runs_before_it_is_recorded(search_type):
    problem = network_problem("simple", [17, 30])
    options = small_beam(search_type, problem.V)
    want = problem.found(options)
    for runs in range(1, RUNS + 1):
        assert_same(recorded(problem, options, Recorder(runs))[0], want)


@every_search
def test_long_utterances_move_what_is_kept_and_need_more_room(search_type, monkeypatch):
    """Little is recorded again: when there is more room, not when what is kept has moved."""
    moved, grown = [], []
    compact, grow = LabelTree._compact_nodes, LabelTree._grow
    monkeypatch.setattr(LabelTree, "_compact_nodes", lambda self, *given: moved.append(1) or compact(self, *given))
    monkeypatch.setattr(LabelTree, "_grow", lambda self, *given: grown.append(1) or grow(self, *given))
    rounds = Rounds(1, 10)
    for _ in rounds:
        problem = network_problem("simple", [330, 90])
        options = small_beam(search_type, problem.V)
        want = problem.found(options)
        moved.clear()
        grown.clear()
        found, recorder = recorded(problem, options)
        assert_same(found, want)
        # the record of labels (traces) grows by itself, to twice its room
        assert recorder.recorded <= len(grown) + 8
        rounds.enough = bool(moved) and recorder.replayed > 2 * recorder.recorded


def test_there_is_room_for_the_most_that_rounds_can_take(monkeypatch):
    """Labels alone are probable, each as much as any other: with tsd all hypotheses take new ones all the time."""
    fullest = []
    replayed = Algorithm._replayed_round

    def looked_at(search):
        replayed(search)
        fullest.append(int(search.tree.node_count.max()) / (search.tree.nodes - search.tree.spare))
        fullest.append(int(search.tree.leaf_count.max()) / (search.tree.leaves - search.tree.spare))
        fullest.append(search.traces.used / search.traces.room)

    monkeypatch.setattr(Algorithm, "_replayed_round", looked_at)
    problem = network_problem("stateless", [3, 19], V=12)
    with torch.no_grad():
        problem.joint.lin_out.weight.mul_(0.1)
        problem.joint.lin_out.bias[0] = -20.0
    options = {"search_type": "tsd", "beam_size": 11, "max_sym_exp": 9, "nbest": 8}
    want = problem.found(options)
    fullest.clear()
    assert_same(recorded(problem, options)[0], want)
    assert max(fullest) == 1


def language_model(kind: str, V: int, pos_enc: str | None = None) -> torch.nn.Module:
    torch.manual_seed(3)
    if kind == "lstm":
        return SequentialRNNLM(V, unit=5, nlayers=2).double().eval()
    lm = TransformerLM(V, pos_enc=pos_enc, embed_unit=6, att_unit=8, head=2, unit=10, layer=2)
    return lm.double().eval()


@every_search
@pytest.mark.parametrize("kind", ["lstm", "transformer", "phrases"])
def test_with_what_is_fused(kind, search_type):
    problem = network_problem("simple", [21, 8])
    options = small_beam(search_type, problem.V)
    if kind == "phrases":
        phrases = [((1, 2), 0.7), ((3,), 0.4), ((1, 3, 2), 1.1)]
        fusion = Fusion(PhraseScorer(phrases, problem.V, dtype=torch.float64))
    else:
        fusion = Fusion(scorer_of_lm(language_model(kind, problem.V), problem.V), 0.6)
    search = problem.search(options)
    search.fusion = (fusion,)
    want = search(problem.encoder_out, torch.tensor(problem.lengths))
    found, recorder = recorded(problem, options, fusion=fusion)
    assert_same(found, want)
    assert recorder.recorded


@every_search
def test_under_autocast(search_type):
    problem = network_problem("simple", [9, 0, 14], V=9)
    problem.decoder.float(), problem.joint.float()
    problem.encoder_out = problem.encoder_out.float()
    options = small_beam(search_type, problem.V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with fixed_shapes():
            want = problem.found(options)
        found, recorder = recorded(problem, options)
        assert torch.is_autocast_cache_enabled()
    assert_same(found, want)
    assert recorder.recorded


def test_a_search_that_is_made_again_with_more_room_is_recorded_again(monkeypatch):
    rounds = Rounds()
    for _ in rounds:
        problem = network_problem("simple", [9, 0, 14], V=9)
        with torch.no_grad():
            problem.joint.lin_out.weight.mul_(0.1)  # flat posteriors: more labels than there are places
        options = {"search_type": "maes", "beam_size": 2, "nstep": 2, "expansion_gamma": 9.0, "expansion_beta": 3}
        search = problem.search(options)
        want = search(problem.encoder_out, torch.tensor(problem.lengths))
        recorder = Recorder()
        search.recorder_for = lambda device, recorder=recorder: recorder
        with fixed_shapes(room_for_all=False):
            assert_same(search(problem.encoder_out, torch.tensor(problem.lengths)), want)
        rounds.enough = recorder.recorded > 1


@every_search
def test_what_cannot_be_recorded_is_said_once_and_runs_as_it_is(search_type, caplog):
    caplog.set_level(logging.WARNING, "espnet_mega_plugin")
    problem = tabled_problem([9, 4])
    options = small_beam(search_type, problem.V)
    want = problem.found(options)
    search = problem.search(options)
    recorder = Recorder()
    search.recorder_for = lambda device: recorder
    with fixed_shapes():
        for _ in range(2):
            assert_same(search(problem.encoder_out, torch.tensor(problem.lengths)), want)
    assert not recorder.recorded
    (warning,) = [record.getMessage() for record in caplog.records if "not recorded" in record.getMessage()]
    assert "one by one" in warning


def test_the_switch(monkeypatch):
    problem = network_problem("stateless", [3])

    def of(**options):
        return BatchedSearch(problem.decoder, problem.joint, 2, **options).recorder_for

    assert of() is None and of(cuda_graphs=True) is CudaGraphs
    monkeypatch.setenv("ESPNET_MEGA_PLUGIN_CUDA_GRAPHS", "1")
    assert of() is CudaGraphs and of(cuda_graphs=False) is None
    monkeypatch.setenv("ESPNET_MEGA_PLUGIN_CUDA_GRAPHS", "yes")
    with pytest.raises(ValueError, match="must be 0 or 1"):
        of()
    with pytest.raises(TypeError, match="cuda_graphs"):
        of(cuda_graphs=1)


def test_on_a_cpu_no_cuda_graph_is_made(seed):
    random.seed(seed)
    problem = network_problem("simple", [9, 4])
    options = small_beam("maes", problem.V)
    search = problem.search(options | {"cuda_graphs": True})
    assert_same(search(problem.encoder_out, torch.tensor(problem.lengths)), problem.found(options))


def test_tables_that_a_recorded_round_reads_stay_while_other_searches_have_longer_ones_made(seed):
    """A graph reads them where they are. The position biases of MEGA, the positions of a Transformer LM."""
    decoder = MEGADecoder(7, 12, 10, 6, 14, num_blocks=1).eval()
    lm = language_model("transformer", 7, "sinusoidal")
    place = lm.encoder.embed[-1]
    for scorer, table, longer in (
        (
            decoder.label_scorer(),
            lambda scorer: scorer.constants.bias(decoder, 1),
            lambda s: s.constants.bias(decoder, 999),
        ),
        (scorer_of_lm(lm, 7), lambda _: place.pe, lambda _: place.extend_pe(torch.zeros(1, 2 * place.pe.shape[1]))),
    ):
        for _ in RandomTree(scorer, 7, seed, fixed_shapes=True).grow(5):
            pass
        read = weakref.ref(table(scorer))
        longer(scorer)
        assert read() is not None and table(scorer) is not read()
