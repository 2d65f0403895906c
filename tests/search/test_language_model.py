"""A scorer made of a language model gives, for every prefix, what the model's forward gives for the prefix alone."""

import argparse
from functools import cache

import pytest
import torch
import yaml
from espnet2.lm.seq_rnn_lm import SequentialRNNLM
from espnet2.lm.transformer_lm import TransformerLM
from espnet2.tasks.lm import LMTask
from random_tree import RandomTree

from espnet_mega_plugin.search.language_model import AnyLM, RecurrentLM, load_language_model, scorer_of_lm
from espnet_mega_plugin.search.transformer_lm import TreeTransformerLM

V = 7
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}
fixed_shapes = pytest.mark.parametrize("fixed_shapes", [False, True], ids=["", "fixed"])


def transformer(pos_enc: str | None) -> TransformerLM:
    return TransformerLM(V, pos_enc=pos_enc, embed_unit=6, att_unit=8, head=2, unit=10, layer=2)


MODELS = {
    "lstm": lambda: SequentialRNNLM(V, unit=5, nhid=6, nlayers=2, dropout_rate=0.5),
    "gru": lambda: SequentialRNNLM(V, unit=6, nlayers=1, rnn_type="gru"),
    "tanh": lambda: SequentialRNNLM(V, unit=6, nlayers=3, rnn_type="rnn_tanh", tie_weights=True),
    "relu": lambda: SequentialRNNLM(V, unit=5, nhid=6, nlayers=2, rnn_type="rnn_relu"),
    "transformer": lambda: transformer(None),
    "transformer-sinusoidal": lambda: transformer("sinusoidal"),
}


def whole(lm: torch.nn.Module):
    """Log-probabilities of the next label after a whole sequence that begins with <sos>, in float32 or better."""

    @cache
    def output(labels: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            logits, _ = lm(torch.tensor([[V - 1, *labels]]), None)
        logp = logits[0, -1].double().log_softmax(-1)
        return logp.to(torch.promote_types(logits.dtype, torch.float32))

    return output


def check(scorer, oracle, seed, fixed_shapes, tolerance, rounds=30) -> None:
    tree = RandomTree(scorer, V, seed, fixed_shapes)
    for labels, out in tree.grow_large(rounds):
        torch.testing.assert_close(out, oracle(labels), rtol=tolerance, atol=tolerance)


@fixed_shapes
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_each_prefix_has_the_log_probabilities_of_the_whole_sequence(name, dtype, fixed_shapes, seed):
    lm = MODELS[name]().to(dtype).eval()
    scorer = scorer_of_lm(lm, V)
    assert type(scorer) is (TreeTransformerLM if name.startswith("transformer") else RecurrentLM)
    check(scorer, whole(lm), seed, fixed_shapes, TOLERANCE[dtype])


@fixed_shapes
@pytest.mark.parametrize("name", ["lstm", "tanh", "transformer", "transformer-sinusoidal"])
def test_espnets_own_methods(name, fixed_shapes, seed):
    lm = MODELS[name]().eval()
    check(AnyLM(lm, V), whole(lm), seed, fixed_shapes, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_dropout_is_off_whatever_the_mode(name, seed):
    lm = MODELS[name]()
    want = whole(lm.eval())
    want(())
    scorer = scorer_of_lm(lm.train(), V)
    (_, out), *_ = RandomTree(scorer, V, seed, False).grow(0)
    torch.testing.assert_close(out, want(()))


def test_a_quantised_model_gives_what_its_quantised_modules_give(seed):
    lm = MODELS["lstm"]().eval()
    lm = torch.ao.quantization.quantize_dynamic(lm, {torch.nn.LSTM, torch.nn.Linear}, torch.qint8)
    check(scorer_of_lm(lm, V), whole(lm), seed, False, 5e-2)


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_another_vocabulary_is_refused(name):
    with pytest.raises(ValueError, match=r"has 7 tokens, the decoder 8.*same token list"):
        scorer_of_lm(MODELS[name](), V + 1)


def test_another_vocabulary_is_refused_at_the_latest_when_it_is_seen(seed):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MODELS["gru"]()
            self.batch_score = self.inner.batch_score

    scorer = scorer_of_lm(Wrapped(), V - 1)
    with pytest.raises(ValueError, match="has 7 tokens, the decoder 6"):
        list(RandomTree(scorer, V - 1, seed, False).grow(1))


def saved(tmp_path, lm: str, conf: dict) -> torch.nn.Module:
    tokens = ["<blank>", "<unk>", *"abcd", "<sos/eos>"]
    config = {"lm": lm, "lm_conf": conf, "model": "lm", "model_conf": {}, "token_list": tokens, "init": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    model = LMTask.build_model(argparse.Namespace(**config))
    torch.save(model.state_dict(), tmp_path / "valid.loss.ave.pth")
    return model


@pytest.mark.parametrize(
    "lm, conf", [("seq_rnn", {"unit": 6}), ("transformer", {"att_unit": 8, "unit": 8, "layer": 1})]
)
def test_a_model_trained_with_espnet_is_loaded(lm, conf, tmp_path, seed):
    model = saved(tmp_path, lm, conf)
    loaded = load_language_model(None, tmp_path / "valid.loss.ave.pth", dtype="float64")
    assert not loaded.training
    other = {name.replace("lm.", "ml."): value for name, value in model.state_dict().items()}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights .*lm\."):
        load_language_model(tmp_path / "config.yaml", tmp_path / "other.pth")
    check(scorer_of_lm(loaded, V), whole(model.lm.double().eval()), seed, False, 1e-12, rounds=30)
    with pytest.raises(TypeError, match=r"ESPnetLanguageModel.*has no batch_score.*attribute `lm`"):
        scorer_of_lm(model, V)


def test_a_missing_file_and_an_unknown_dtype_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_file.*there is no file .*lm\.pth"):
        load_language_model(None, tmp_path / "lm.pth")
    (tmp_path / "lm.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"config_file.*config\.yaml"):
        load_language_model(None, tmp_path / "lm.pth")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="float32, bfloat16 or float16; got 'float17'"):
        load_language_model(None, tmp_path / "lm.pth", dtype="float17")
