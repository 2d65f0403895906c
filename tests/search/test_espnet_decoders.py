"""A scorer made of a decoder gives, for every prefix of a growing tree, what the decoder gives for the prefix alone.

The oracle runs the whole prefix: `forward`, or the decoder's torch modules where ESPnet's forward is float32 only.
"""

import subprocess
import sys
from functools import cache

import pytest
import torch
from espnet2.asr_transducer.decoder.abs_decoder import AbsDecoder
from espnet2.asr_transducer.decoder.rnn_decoder import RNNDecoder
from espnet2.asr_transducer.decoder.stateless_decoder import StatelessDecoder
from random_tree import RandomTree

from espnet_mega_plugin.search.espnet_decoders import AnyDecoder, EmbeddingDecoder, RecurrentDecoder, scorer_of

V = 7
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
fixed_shapes = pytest.mark.parametrize("fixed_shapes", [False, True], ids=["", "fixed"])


class TwoLabels(AbsDecoder):
    """A decoder of one's own that follows ESPnet's methods: a moving sum of embeddings and the label before the last.

    Its state is a dict in a list, with a number that is no tensor in it.
    """

    def __init__(self, vocab_size: int, size: int):
        super().__init__()
        self.embed, self.output_size, self.device = torch.nn.Embedding(vocab_size, size), size, "nowhere"

    def forward(self, labels):
        x = self.embed(labels)
        decay = 0.5 ** (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).to(x.dtype)
        shifted = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return decay.tril() @ x + 3 * shifted

    def score(self, label_sequence, states):
        raise AssertionError("a batched search asks for batches")

    def batch_score(self, hyps):
        assert self.embed.weight.device == self.device
        last = self.embed(torch.tensor([h.yseq[-1] for h in hyps]))
        before = torch.stack([self.embed.weight[h.yseq[-2]] if len(h.yseq) > 1 else 0 * last[0] for h in hyps])
        assert [h.dec_state[0]["seen"] for h in hyps] == [len(h.yseq) - 1 for h in hyps]
        total = last + 0.5 * torch.stack([h.dec_state[0]["sum"] for h in hyps])
        return total + 3 * before, (total, [len(h.yseq) for h in hyps])

    def set_device(self, device):
        self.device = device

    def init_state(self, batch_size):
        return [{"sum": torch.zeros(self.output_size), "seen": 0}]

    def select_state(self, states, idx):
        return [{"sum": states[0][idx], "seen": states[1][idx]}]

    def create_batch_states(self, new_states):
        raise AssertionError("batch_score does what it needs itself")


def rnn(**options) -> RNNDecoder:
    return RNNDecoder(V, embed_size=5, hidden_size=6, **options)


def with_dropout() -> RNNDecoder:
    return rnn(num_layers=2, dropout_rate=0.9, embed_dropout_rate=0.9).train()


def without_bias() -> RNNDecoder:
    decoder = rnn()
    decoder.rnn[0] = torch.nn.LSTM(5, 6, bias=False, batch_first=True)
    return decoder


def weight_normed() -> RNNDecoder:
    decoder = rnn(num_layers=2)
    decoder.rnn[1] = torch.nn.utils.weight_norm(decoder.rnn[1], "weight_hh_l0")
    with torch.no_grad():
        decoder.rnn[1].weight_hh_l0_g *= 3  # the weight that was normed is stale until the module is called
    return decoder


TENSORS = {
    "lstm": rnn,
    "lstm-2": lambda: rnn(num_layers=2),
    "gru": lambda: rnn(rnn_type="gru"),
    "gru-3": lambda: rnn(rnn_type="gru", num_layers=3),
    "dropout": with_dropout,
    "no-bias": without_bias,
    "weight-norm": weight_normed,
    "stateless": lambda: StatelessDecoder(V, embed_size=6, embed_dropout_rate=0.5),
}


def whole(decoder: torch.nn.Module):
    """What the decoder gives after the last label of a prefix, computed from its first."""

    @cache
    def output(labels: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            sequence = torch.tensor([[0, *labels]])
            if not isinstance(decoder, RNNDecoder):
                return decoder.eval()(sequence)[0, -1]
            x = decoder.embed(sequence)
            for module in decoder.rnn:
                x, _ = module(x)
            return x[0, -1]

    return output


def check(scorer, oracle, seed, fixed_shapes, tolerance, rounds=30) -> RandomTree:
    tree = RandomTree(scorer, V, seed, fixed_shapes)
    for labels, out in tree.grow_large(rounds):
        want = oracle(labels)
        assert out.dtype == want.dtype
        torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    return tree


@fixed_shapes
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_all_rows_give_what_the_whole_prefix_gives(name, dtype, fixed_shapes, seed):
    decoder = TENSORS[name]().to(dtype)
    scorer = scorer_of(decoder)
    assert type(scorer) is (EmbeddingDecoder if name == "stateless" else RecurrentDecoder)
    check(scorer, whole(decoder), seed, fixed_shapes, TOLERANCE[dtype])


def test_the_oracle_is_espnets_forward():
    for name in ("lstm-2", "gru-3", "stateless"):
        decoder = TENSORS[name]().eval()
        labels = tuple(torch.randint(1, V, (6,)).tolist())
        torch.testing.assert_close(whole(decoder)(labels), decoder(torch.tensor([[0, *labels]]))[0, -1])


@fixed_shapes
@pytest.mark.parametrize("name", ["lstm-2", "gru", "stateless"])
def test_the_public_methods_of_espnets_decoders(name, fixed_shapes, seed):
    decoder = TENSORS[name]().eval()
    check(AnyDecoder(decoder), whole(decoder), seed, fixed_shapes, 2e-6)


@fixed_shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_decoder_of_ones_own(dtype, fixed_shapes, seed):
    decoder = TwoLabels(V, 5).to(dtype)
    scorer = scorer_of(decoder)
    assert type(scorer) is AnyDecoder
    check(scorer, whole(decoder), seed, fixed_shapes, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_subclass_goes_by_its_methods_and_float32_states_do_not_stop_it(dtype, seed):
    class Louder(RNNDecoder):
        def batch_score(self, hyps):
            out, states = super().batch_score(hyps)
            return 2 * out, states

    decoder = Louder(V, embed_size=5, hidden_size=6).to(dtype)
    oracle = whole(decoder)
    check(scorer_of(decoder), lambda labels: 2 * oracle(labels), seed, False, max(1e-6, 2 * TOLERANCE[dtype]))


@pytest.mark.parametrize("rnn_type", ["lstm", "gru"])
def test_a_quantised_decoder_gives_what_its_quantised_modules_give(rnn_type, seed):
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[rnn_type]
    decoder = torch.ao.quantization.quantize_dynamic(rnn(rnn_type=rnn_type, num_layers=2).eval(), {kind}, torch.qint8)
    assert not isinstance(decoder.rnn[0], kind)
    scorer = scorer_of(decoder)
    assert type(scorer) is RecurrentDecoder
    # Rows of a batch share the range their activations are rounded to: a prefix alone is rounded otherwise
    check(scorer, whole(decoder), seed, False, 2e-2)


def test_changed_weights_take_effect_at_once(seed):
    decoder = rnn(num_layers=2).double()
    scorer = scorer_of(decoder)
    check(scorer, whole(decoder), seed, False, 1e-12)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.5)
    check(scorer, whole(decoder), seed, False, 1e-12)


def test_nothing_of_what_was_scored_holds_a_graph(seed):
    for decoder in (rnn(), StatelessDecoder(V, embed_size=6), TwoLabels(V, 5)):
        for _, out in RandomTree(scorer_of(decoder), V, seed, False).grow(2):
            assert not out.requires_grad


def test_a_prefix_does_not_keep_the_states_of_its_batch_alive(seed):
    decoder = TwoLabels(V, 5)
    scorer = scorer_of(decoder)
    list(RandomTree(scorer, V, seed, False).grow(10))
    held = [one for leaves in scorer._leaves._held for one in leaves if one is not None]
    assert held and all(one.dec_state[0]["sum"].untyped_storage().nbytes() == 5 * 4 for one in held)


def test_a_decoder_may_bring_its_own_scorer():
    class Own(torch.nn.Module):
        def label_scorer(self):
            return "its own"

    assert scorer_of(Own()) == "its own"


def test_what_is_no_decoder_is_refused_by_name():
    with pytest.raises(TypeError, match=r"Linear.*init_state, batch_score, select_state, output_size.*AbsDecoder"):
        scorer_of(torch.nn.Linear(2, 3))


def test_espnet_is_not_imported():
    modules = "espnet_mega_plugin.search.espnet_decoders, espnet_mega_plugin.search.language_model"
    code = f"import {modules}, sys; assert not {{'espnet', 'espnet2'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
