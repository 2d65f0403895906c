"""What the decoder remembers of prefixes never gives a stale or foreign answer, and goes back when nobody needs it.

The oracle is `network.extend`, which knows nothing of prefixes, rows or caches, going on alone from each hypothesis'
own memory; where the weights never changed, also `forward` over the whole prefix.
"""

import copy
import gc
import pickle
import shutil
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from configurations import configurations, perturbed
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer, Hypothesis
from espnet2.asr_transducer.joint_network import JointNetwork
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule
from no_waiting import NoWaiting
from replayed import replaying
from replicas import replica
from torch._subclasses.fake_tensor import FakeTensorMode

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.mega import prefixes
from espnet_mega_plugin.mega.packed import PackedLayers
from espnet_mega_plugin.mega.prefix_state import PrefixState
from espnet_mega_plugin.mega.rows import Table
from espnet_mega_plugin.mega.state import MegaMemory
from espnet_mega_plugin.mega.step import Constants, Past, Together, step
from espnet_mega_plugin.search.search import BatchedSearch

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SMALL = {"block_size": 12, "linear_size": 10, "qk_size": 6, "v_size": 14, "num_heads": 2, "num_blocks": 2}
REACHES = [
    {},
    {"rel_pos_bias_type": "rotary", "truncation_length": 3},
    {"chunk_size": 3},
    {"chunk_size": 2, "truncation_length": 5},
    {"attention_window": 3, "pre_norm": True},
    {"attention_window": 1, "truncation_length": 4},
]
# What hypotheses have of their own: gathered for each; shown to all and hidden where it is little; always that
FORMS = st.sampled_from([0, prefixes.FOR_NOTHING, 10**9])
reaches = pytest.mark.parametrize("reach", REACHES, ids=lambda reach: "-".join(reach) or "full")


def decoder(vocab_size=5, seed=0, dtype=torch.float64, **options) -> MEGADecoder:
    torch.manual_seed(seed)
    return perturbed(MEGADecoder(vocab_size, **{**SMALL, "max_positions": 40, **options})).to(dtype).eval()


# -- any interleaving of calls


@dataclass
class Held:
    """A hypothesis as a search holds it, and what the oracle remembers of it."""

    labels: list[int]
    state: list
    memory: MegaMemory
    weights: int | None  # which weights made all of it; None: several


class Interleavings(RuleBasedStateMachine):
    """Random calls, resets, evictions, looks into states, changes of weights and of dtype."""

    hypotheses = Bundle("hypotheses")

    @initialize(
        target=hypotheses,
        options=st.sampled_from(REACHES),
        seed=st.integers(0, 999),
        room=st.integers(1, 6),
        for_nothing=FORMS,
        recorder_for=st.sampled_from([None, replaying]),
    )
    def build(self, options, seed, room, for_nothing, recorder_for):
        self.form = mock.patch.object(prefixes, "FOR_NOTHING", for_nothing)
        self.form.start()
        self.model = decoder(seed=seed, **options)
        self.model.prefixes.recorder_for = recorder_for
        self.model.prefixes.remembered = room  # almost everything is forgotten at once
        self.weights, self.rounding = 0, EXACT
        return self._first()

    def _first(self) -> Held:
        return Held([], self.model.init_state(1), self.model.empty_memory(1), self.weights)

    @rule(target=hypotheses)
    def start(self):
        return self._first()

    def _checked(self, hypothesis: Held, label: int, out: torch.Tensor, state: list) -> Held:
        with torch.no_grad():
            want, memory = self.model.extend(torch.tensor([[label]]), hypothesis.memory)
        torch.testing.assert_close(out, want[0, 0], check_dtype=False, **self.rounding)
        labels = [*hypothesis.labels, label]
        weights = self.weights if hypothesis.weights == self.weights else None
        if weights is not None:
            with torch.no_grad():
                torch.testing.assert_close(
                    out, self.model(torch.tensor([labels]))[0, -1], check_dtype=False, **self.rounding
                )
        return Held(labels, state, memory, weights)

    @rule(target=hypotheses, hypothesis=hypotheses, label=st.integers(0, 4))
    def score(self, hypothesis, label):
        if len(hypothesis.labels) > 12:
            return hypothesis
        out, state = self.model.score([*hypothesis.labels, label], hypothesis.state)
        return self._checked(hypothesis, label, out[0], state)

    @rule(target=hypotheses, chosen=st.lists(st.tuples(hypotheses, st.integers(0, 4)), min_size=1, max_size=5))
    def batch_score(self, chosen):
        chosen = [(hypothesis, label) for hypothesis, label in chosen if len(hypothesis.labels) <= 12]
        hyps = [Hypothesis(0.0, [*hypothesis.labels, label], hypothesis.state) for hypothesis, label in chosen]
        out, batch = self.model.batch_score(hyps)
        return multiple(
            *(
                self._checked(hypothesis, label, out[i], self.model.select_state(batch, i))
                for i, (hypothesis, label) in enumerate(chosen)
            )
        )

    @rule(target=hypotheses, chosen=st.lists(hypotheses, min_size=1, max_size=4), data=st.data())
    def through_a_batched_state(self, chosen, data):
        batch = self.model.create_batch_states([hypothesis.state for hypothesis in chosen])
        if data.draw(st.booleans()):
            batch = list(batch)
        i = data.draw(st.integers(0, len(chosen) - 1))
        one = chosen[i]
        return Held(one.labels, self.model.select_state(batch, i), one.memory, one.weights)

    @rule(hypothesis=hypotheses)
    def look(self, hypothesis):
        assert {"ema_state", "prev_key", "prev_value"} <= set(hypothesis.state[0])

    @rule(target=hypotheses, hypothesis=hypotheses)
    def copied(self, hypothesis):
        state = copy.deepcopy(hypothesis.state)
        assert type(state) is list
        return Held(hypothesis.labels, state, hypothesis.memory, hypothesis.weights)

    @rule(target=hypotheses, hypothesis=hypotheses, label=st.integers(0, 4))
    def inference(self, hypothesis, label):
        if len(hypothesis.labels) > 12:
            return hypothesis
        out, state = self.model.inference(torch.tensor([[label]]), hypothesis.state)
        return self._checked(hypothesis, label, out[0, 0].detach(), self.model.select_state(state, 0))

    @rule(_=consumes(hypotheses))
    def dropped(self, _):
        pass

    @rule()
    def reset(self):
        self.model.score_cache = {}

    @rule(seed=st.integers(0, 999), how=st.sampled_from(["load", "in place", "fused", "unseen", "replaced"]))
    def other_weights(self, seed, how):
        self.weights += 1
        torch.manual_seed(seed)
        name, parameter = list(self.model.named_parameters())[seed % 7]
        other = parameter.detach() + 0.1 * torch.randn_like(parameter)
        if how == "load":
            self.model.load_state_dict({**self.model.state_dict(), name: other})
        elif how == "in place":
            with torch.no_grad():
                parameter.copy_(other)
        elif how == "fused":
            parameter.grad = parameter.detach() - other
            torch.optim.SGD([parameter], lr=1.0, fused=True).step()
        elif how == "unseen":
            parameter.data.copy_(other)
            self.model.train(mode=self.model.training)
        else:
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, torch.nn.Parameter(other))

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def moved(self, dtype):
        if dtype != self.model.embed.weight.dtype:
            self.model.to(dtype)
            self.weights += 1
            self.rounding = {"rtol": 1e-3, "atol": 1e-3}  # states of float32 live on

    def teardown(self):
        self.form.stop()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# -- random trees of hypotheses over random configurations


@settings(max_examples=100)
@given(configuration=configurations, seed=st.integers(0, 2**31), data=st.data(), for_nothing=FORMS)
def test_a_growing_tree_of_hypotheses_is_forward(configuration, seed, data, for_nothing):
    """Hypotheses that share any part of their past, of any lengths, each scored in any company."""
    torch.manual_seed(seed)
    model = perturbed(MEGADecoder(**configuration)).double().eval()
    label = st.integers(0, configuration["vocab_size"] - 1)
    tree = [([0], model.init_state(1))]
    for _ in range(data.draw(st.integers(1, 6))):
        chosen = data.draw(st.lists(st.sampled_from(range(len(tree))), min_size=1, max_size=6))
        hyps = [Hypothesis(0.0, *tree[i]) for i in chosen]
        with mock.patch.object(prefixes, "FOR_NOTHING", for_nothing):
            out, batch = model.batch_score(hyps)
        want = [model(torch.tensor([hyp.yseq]))[0, -1] for hyp in hyps]
        torch.testing.assert_close(out, torch.stack(want).detach(), **EXACT)
        tree += [([*hyp.yseq, data.draw(label)], model.select_state(batch, i)) for i, hyp in enumerate(hyps)]


# -- what is evaluated, what is kept


class Asked:
    """The prefixes a search asks for."""

    def __init__(self, model: MEGADecoder):
        self.count = Counter()
        score, batch_score = model.score, model.batch_score
        model.score = lambda labels, state: self.count.update([tuple(labels)]) or score(labels, state)
        model.batch_score = lambda hyps: self.count.update(tuple(h.yseq) for h in hyps) or batch_score(hyps)


SEARCHES = {
    "default": {"search_type": "default"},
    "tsd": {"search_type": "tsd", "max_sym_exp": 3},
    "alsd": {"search_type": "alsd", "u_max": 9},
    "maes": {"search_type": "maes", "nstep": 2, "expansion_gamma": 2.3, "expansion_beta": 1},
}


def search(model: MEGADecoder, seed: int, search_type: str) -> BeamSearchTransducer:
    torch.manual_seed(seed)
    joint = perturbed(JointNetwork(model.vocab_size, 5, model.output_size, 8)).to(model.embed.weight.dtype).eval()
    with torch.no_grad():
        joint.lin_out.bias[0] += 3.0
    return BeamSearchTransducer(model, joint, beam_size=3, nbest=3, **SEARCHES[search_type])


@pytest.mark.parametrize("search_type", SEARCHES)
@torch.no_grad()
def test_a_search_evaluates_each_prefix_once(search_type, seed):
    model = decoder(vocab_size=7, seed=seed)
    beam, asked = search(model, seed, search_type), Asked(model)
    for utterance in range(2):
        before = model.prefixes.evaluated
        asked.count.clear()
        beam(torch.randn(11, 5, dtype=torch.float64))
        assert model.prefixes.evaluated - before == len(asked.count), utterance
    assert search_type == "maes" or asked.count.total() > len(asked.count)  # there was something to save


@reaches
def test_memory_is_linear_in_the_labels_and_goes_back(reach, seed):
    """One row a label in reach, one end a prefix remembered or held; nothing after the utterance."""
    model = decoder(**reach, max_positions=60)
    model.prefixes.remembered = 4
    labels, state = [], model.init_state(1)
    for _ in range(50):
        labels.append(0 if not labels else int(torch.randint(1, 5, ())))
        _, state = model.score(labels, state)
    tables = model.prefixes.tables
    window, chunk, cut = (reach.get(key) for key in ("attention_window", "chunk_size", "truncation_length"))
    # within the last 4 prefixes: each keeps what it can attend to or the truncated average needs
    kept = max(chunk or 0, (window or 1) - 1, (cut or 1) - 1)
    most = 50 if not (window or chunk) else kept + 4
    assert tables.ends.lent <= 4 and tables.labels.lent <= most
    model.score_cache = {}
    assert 1 <= tables.ends.lent  # the state is still held, and still good:
    with torch.no_grad():
        out, longer = model.score([*labels, 3], state)
        torch.testing.assert_close(out[0], model(torch.tensor([[*labels, 3]]))[0, -1], **EXACT)
    del state, longer, _
    model.score_cache = {}
    gc.collect()
    assert tables.ends.lent == tables.labels.lent == 0


@reaches
def test_rows_that_were_lent_before_hold_what_is_in_them_now(reach, seed):
    """Hypothesis after hypothesis without a reset, on the rows of the one dropped before."""
    model = decoder(**reach)
    model.prefixes.remembered = 1
    for _ in range(6):
        labels, state = [0], model.init_state(1)
        for _ in range(7):
            out, state = model.score(labels, state)
            with torch.no_grad():
                torch.testing.assert_close(out[0], model(torch.tensor([labels]))[0, -1], **EXACT)
            labels = [*labels, int(torch.randint(1, 5, ()))]


def test_hypotheses_share_their_past(seed):
    model = decoder()
    labels, state = [0, 1, 2, 3, 4, 1, 2, 3], model.init_state(1)
    for t in range(len(labels)):
        _, state = model.score(labels[: t + 1], state)
    lent = model.prefixes.tables.labels.lent
    model.batch_score([Hypothesis(0.0, [*labels, label], state) for label in range(5)])
    assert model.prefixes.tables.labels.lent == lent + 5


@pytest.mark.parametrize("search_type", SEARCHES)
@torch.no_grad()
def test_many_utterances_take_no_more_memory_than_a_few(search_type, seed):
    model = decoder(vocab_size=7, seed=seed)
    beam = search(model, seed, search_type)
    sizes = []
    for _ in range(10):
        beam(torch.randn(9, 5, dtype=torch.float64))
        gc.collect()
        sizes.append((model.prefixes.tables.labels.lent, model.prefixes.tables.ends.lent))
    assert set(sizes) == {(0, 0)}
    assert model.prefixes.tables.labels.size <= 2 * Table.FIRST


def test_a_table_that_a_long_utterance_made_large_is_given_back(monkeypatch, seed):
    monkeypatch.setattr(Table, "KEPT", 256)
    model = decoder(max_positions=1000)
    labels, state = [0], model.init_state(1)
    for _ in range(300):
        _, state = model.score(labels, state)
        labels = [*labels, 1 + len(labels) % 4]
    assert model.prefixes.tables.labels.bytes > 0
    del state
    model.score_cache = {}
    assert model.prefixes.tables.labels.bytes == 0
    assert model.score([0], model.init_state(1))[0].isfinite().all()


# -- two users of one decoder


@pytest.mark.parametrize("search_type", SEARCHES)
@torch.no_grad()
def test_two_threads_with_one_decoder(search_type, seed):
    """Each has its own search over the one decoder and resets it when it likes."""
    model = decoder(vocab_size=7, seed=seed)
    utterances = [torch.randn(9, 5, dtype=torch.float64) for _ in range(8)]
    alone = [[(h.yseq, float(h.score)) for h in search(model, seed, search_type)(x)] for x in utterances]
    searches, found, failed = [search(model, seed, search_type) for _ in range(2)], {}, []

    def decode(which: int) -> None:
        try:
            with torch.no_grad():
                for i in range(which, len(utterances), 2):
                    found[i] = [(h.yseq, float(h.score)) for h in searches[which](utterances[i])]
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=decode, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for i, want in enumerate(alone):
        assert [labels for labels, _ in found[i]] == [labels for labels, _ in want]
        assert [score for _, score in found[i]] == pytest.approx([score for _, score in want], rel=1e-9)


def test_threads_share_what_the_weights_mean_for_a_step(seed):
    """Whoever asks first makes the table of biases; nobody meets half of it."""
    network, between = decoder(seed=seed), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            constants, begin, found = Constants(network), threading.Barrier(6), []

            def ask(n, constants=constants, begin=begin, found=found):
                begin.wait()
                for distances in (n, 60 + 100 * n, n):
                    found.append(constants.bias(network, distances).shape[1] > distances)

            threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 7)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == [True] * 18
    finally:
        sys.setswitchinterval(between)


@torch.no_grad()
def test_a_replica_of_data_parallel_remembers_for_itself(seed):
    model = decoder()
    copied = replica(model)
    assert copied.prefixes is not model.prefixes
    state = copied.init_state(1)
    for t in range(3):
        out, state = copied.score([0, 3, 1][: t + 1], state)
    torch.testing.assert_close(out, model(torch.tensor([[0, 3, 1]]))[:, -1], **EXACT)
    copied.embed.weight.mul_(2.0)
    out, _ = copied.score([0], copied.init_state(1))
    torch.testing.assert_close(out, copied(torch.tensor([[0]]))[:, -1], **EXACT)
    assert copied.label_scorer() is not None and model.prefixes.evaluated == 0
    streams = BatchedSearch(copied, JointNetwork(5, 5, 12, 8).double(), 2, "maes").streams()
    streams.push({streams.open(): torch.randn(4, 5, dtype=torch.float64)})


def test_what_others_made_of_infinite_numbers_is_not_seen(seed):
    """float16: places that fill up hold rows of other hypotheses, and 0 * inf is NaN."""
    model = decoder(9, dtype=torch.float32)
    with torch.no_grad():
        model.mega_blocks[0][0].proj_v.weight.abs_().mul_(100)
        model.embed.weight[5] = 6e4
    model.half()
    start = model.init_state(1)
    kept = model.score([5], start)[1]
    assert not model.prefixes.tables.labels.tensors[0][:, 0].isfinite().all() and kept is not None
    (_, a), (_, b) = model.score([1], start), model.score([1], start)
    b = model.score([1, 2], b)[1]
    out, _ = model.batch_score([Hypothesis(0.0, [1, 3], a), Hypothesis(0.0, [1, 2, 3], b)])
    want = torch.stack([model(torch.tensor([labels]))[0, -1] for labels in ([1, 3], [1, 2, 3])])
    assert want.isfinite().all()
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_what_old_weights_meant_for_a_step_is_let_go(seed):
    """Without a reset: it holds a copy of the weights."""
    model, alive = decoder(), lambda: sum(type(one) is Constants for one in gc.get_objects())
    gc.collect()
    before, labels, state = alive(), [0], model.init_state(1)
    for t in range(12):
        with torch.no_grad():
            model.final_norm.bias.add_(0.01)
        _, state = model.score(labels, state)
        labels.append(1 + t % 4)
    gc.collect()
    assert alive() == before + 1


def test_weights_that_count_no_changes_are_never_remembered(seed):
    """Made in inference mode, where torch counts none."""
    with torch.inference_mode():
        model = perturbed(MEGADecoder(5, **SMALL)).double().eval()
        for factor in (1.0, 2.0):
            model.embed.weight.mul_(factor)
            out, _ = model.score([3], model.init_state(1))
            torch.testing.assert_close(out, model(torch.tensor([[3]]))[:, -1], **EXACT)
        model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()})
        out, _ = model.score([3], model.init_state(1))
        torch.testing.assert_close(out, model(torch.tensor([[3]]))[:, -1], **EXACT)


def test_rows_of_states_built_by_hand_are_not_taken_for_each_other(seed):
    """The buffer of what was gathered last must not outlive those whose rows it holds."""
    model, states = decoder(7), []
    for labels in ([0, 1, 2, 3], [0, 4, 5, 6]):
        _, state = model.inference(torch.tensor([labels]), model.init_state(1))
        names = ("ema_state", "prev_key", "prev_value")
        states.append((labels, [{name: block[name][0] for name in names} for block in state]))
    model.prefixes.remembered = 0
    for labels, state in states * 2:
        out = model.score([*labels, 2], state)[0]  # its state is let go, and the rows with it
        torch.testing.assert_close(out, model(torch.tensor([[*labels, 2]]))[:, -1], **EXACT)


def test_tables_do_not_fit_another_device_or_dtype(seed):
    """Rows of one device are none of another's; with fake CUDA tensors, as there need be no such device."""
    model = decoder(dtype=torch.float32)
    model.score([0], model.init_state(1))
    tables = model.prefixes.tables
    assert tables.fit(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            elsewhere = MEGADecoder(5, **SMALL)
        assert not tables.fit(elsewhere)
    assert not tables.fit(copy.deepcopy(model).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("for_nothing", [0, prefixes.FOR_NOTHING])
@pytest.mark.parametrize("reach", [{}, {"truncation_length": 5}, {"chunk_size": 3}, {"attention_window": 3}])
def test_a_step_waits_for_no_device(reach, for_nothing, dtype, monkeypatch):
    """Hypotheses of different lengths, one with padding, on a fake CUDA device."""
    monkeypatch.setattr(prefixes, "FOR_NOTHING", for_nothing)
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)  # fake parameters cannot be cast later
        try:
            with torch.device("cuda"):
                model = MEGADecoder(5, **SMALL, **reach, embed_pad=2).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            start = model.init_state(1)
            _, one = model.score([0], start)  # what the weights mean for a step is made once, and waits
            with NoWaiting():
                _, two = model.score([0, 1], one)
                hypotheses = [([0, 2], one), ([0, 1, 3], two), ([0], start)]
                out, states = model.batch_score([Hypothesis(0.0, *hypothesis) for hypothesis in hypotheses])
                model.batch_score([Hypothesis(0.0, [0, 2, 1], model.select_state(states, 0))])
    assert out.device.type == "cuda" and out.shape == (3, 12)


# -- states


@reaches
def test_a_state_looked_into_and_changed_is_read_as_it_is(reach, seed):
    model = decoder(**reach)
    labels, state = [0, 3, 1, 4, 2], model.init_state(1)
    for t in range(len(labels)):
        _, state = model.score(labels[: t + 1], state)
    plain, _ = model.score([*labels, 1], state)
    assert state.prefixes is not None
    with torch.no_grad():
        if "truncation_length" in reach:
            state[0]["prev_input"].add_(1.0)
        else:
            state[0]["ema_state"].add_(1.0)
    changed, _ = model.score([*labels, 1], state)
    by_hand, _ = model.score([*labels, 1], [dict(block) for block in state])
    assert not torch.allclose(changed, plain)
    torch.testing.assert_close(changed, by_hand, **EXACT)


def test_a_state_is_a_list_to_whoever_looks(seed):
    model = decoder()
    _, state = model.score([0], model.init_state(1))
    _, batch = model.batch_score([Hypothesis(0.0, [0, 1], state), Hypothesis(0.0, [0, 2], state)])
    assert isinstance(batch, PrefixState) and isinstance(batch, list)
    assert len(batch) == SMALL["num_blocks"] and [type(block) for block in batch] == [dict] * 2
    assert batch[0]["prev_key"].shape == (2, 2, 6) and batch[-1]["position"].tolist() == [2, 2]
    for one in (model.batch_score([Hypothesis(0.0, [0], model.init_state(1))])[1], model.create_batch_states([state])):
        assert one[0]["ema_state"].shape == (1, 12, 2) and one[0]["prev_key"].shape == (1, 1, 6)  # a batch of one
    _, again = model.score([0, 1], model.init_state(1))
    assert type(pickle.loads(pickle.dumps(again))) is list
    assert "ema_state" in repr(again) and again == again.copy()


# -- the flat step as a function of tensors


class Step(torch.nn.Module):
    def __init__(self, model: MEGADecoder, constants):
        super().__init__()
        self.model, self.constants = model, constants

    def forward(self, labels, ema, *past):
        kind = Past(ema, None, *past) if len(past) == 3 else Together(ema, None, past[0].clone(), past[1])
        out, fresh = step(self.model, self.constants, labels, None, kind)
        return out, fresh.ema, fresh.keys_values


def step_inputs(model: MEGADecoder, B: int, P: int, T: int) -> tuple[torch.Tensor, ...]:
    blocks, width = SMALL["num_blocks"], SMALL["qk_size"] + SMALL["v_size"]
    bias = torch.randn(blocks, B, P + T + 1)
    bias[:, 0, P : P + T] = float("-inf")
    return (
        torch.randint(1, model.vocab_size, (B,)),
        torch.randn(blocks, B, SMALL["num_heads"], SMALL["block_size"]),
        torch.randn(blocks, P, width),
        torch.randn(blocks, B, T, width),
        bias,
    )


def together_inputs(model: MEGADecoder, B: int, P: int, T: int) -> tuple[torch.Tensor, ...]:
    labels, ema, shared, _, bias = step_inputs(model, B, P + T * B, B - 1)
    table = torch.cat([shared, torch.zeros(len(shared), B, shared.shape[2])], 1)
    return labels, ema, table, bias  # (blocks, B, U + B)


def a_step() -> Step:
    model = decoder(dtype=torch.float32)
    model.score([0], model.init_state(1))
    return Step(model, model.prefixes._constants)


def test_the_step_is_exported_for_any_sizes(seed):
    module = a_step()
    B, P, T = (torch.export.Dim(name, min=2, max=64) for name in ("hypotheses", "shared", "own"))
    shapes = ({0: B}, {1: B}, ({1: P}, {1: B, 2: T}, {1: B, 2: torch.export.Dim.AUTO}))
    with torch.no_grad():
        exported = torch.export.export(module, step_inputs(module.model, 9, 6, 4), dynamic_shapes=shapes).module()
        for sizes in ((9, 6, 4), (12, 30, 3)):
            inputs = step_inputs(module.model, *sizes)
            torch.testing.assert_close(exported(*inputs), module(*inputs))


def test_the_step_of_hypotheses_together_is_exported_for_any_sizes(seed):
    module, auto = a_step(), torch.export.Dim.AUTO
    shapes = ({0: auto}, {1: auto}, ({1: auto}, {1: auto, 2: auto}))  # the last two are *past
    with torch.no_grad():
        inputs = together_inputs(module.model, 9, 6, 4)
        exported = torch.export.export(module, inputs, dynamic_shapes=shapes).module()
        for sizes in ((9, 6, 4), (5, 30, 3)):
            inputs = together_inputs(module.model, *sizes)
            torch.testing.assert_close(exported(*inputs), module(*inputs))


# Without the C++ compiler that code generation needs, and with it
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler (g++)")],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", [step_inputs, together_inputs])
def test_the_step_is_one_graph_for_torch_compile(made, backend, seed):
    module = a_step()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for sizes in ((9, 6, 4), (12, 30, 3), (3, 5, 2)):
            inputs = made(module.model, *sizes)
            torch.testing.assert_close(compiled(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_is_one_graph_for_torch_compile(backend, seed):
    model = decoder(dtype=torch.float32, num_blocks=1).train()
    compiled, labels = torch.compile(model, fullgraph=True, backend=backend), torch.randint(1, 5, (3, 7))
    found, wanted = (
        torch.autograd.grad(run(labels).square().sum(), [*model.parameters()]) for run in (compiled, model)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("configuration", REACHES)
def test_no_checkpoint_holds_integers(configuration):
    """Averaging checkpoints would sum them (`average_nbest_models`)."""
    held = decoder(**configuration).state_dict()
    assert held and all(tensor.is_floating_point() for tensor in held.values())


def test_an_average_of_checkpoints_is_the_mean_of_their_weights(tmp_path, seed):
    from espnet2.main_funcs.average_nbest_models import average_nbest_models
    from espnet2.train.reporter import Reporter

    models, reporter = [decoder(seed=number) for number in (1, 2)], Reporter()
    for epoch, model in enumerate(models, 1):
        torch.save(model.state_dict(), tmp_path / f"{epoch}epoch.pth")
        reporter.set_epoch(epoch)
        with reporter.observe("valid") as sub:
            sub.register({"loss": float(epoch)})
            sub.next()
    average_nbest_models(tmp_path, reporter, [("valid", "loss", "min")], 2)
    averaged = decoder()
    averaged.load_state_dict(torch.load(tmp_path / "valid.loss.ave.pth"))
    for name, tensor in averaged.state_dict().items():
        torch.testing.assert_close(tensor, sum(model.state_dict()[name] for model in models) / 2)


@pytest.mark.parametrize("few", [0, 7])  # as on Intel's processors and elsewhere
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (256, 1025)])
@torch.no_grad()
def test_a_packed_layer_is_the_layer(rows, sizes, few, seed, monkeypatch):
    monkeypatch.setattr("espnet_mega_plugin.mega.packed.FEW", few)
    layer, x = torch.nn.Linear(*sizes), torch.randn(rows, sizes[0])
    packed = PackedLayers(layer)
    is_packed = sizes == (256, 1025) and torch.backends.mkldnn.is_available()
    assert (layer in packed) == is_packed
    for given_ in (x, x.t().contiguous().t(), x[:1].expand(rows, -1)):
        torch.testing.assert_close(packed(layer, given_), layer(given_))
    other = torch.nn.Linear(*sizes)
    torch.testing.assert_close(packed(other, x), other(x))
    other.forward = lambda x, plain=other.forward: 2 * plain(x)  # as libraries that offload or wrap do it
    torch.testing.assert_close(PackedLayers(other)(other, x), other(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(layer, x).dtype == torch.bfloat16
    layer.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(packed(layer, x), layer(x))
