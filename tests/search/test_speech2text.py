"""What `BatchedSpeech2Text` refuses at its door, and what it takes as it comes: files, weights, phrases, arrays."""

import numpy as np
import pytest
import torch
import yaml
from tiny_experiment import TOKENS, experiment, language_model, waveform

from espnet_mega_plugin.decode.speech2text import BatchedSpeech2Text

MAES = {"beam_size": 4, "beam_search_config": {"search_type": "maes", "nstep": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speech2text")


@pytest.fixture(scope="module")
def model(folder):
    return experiment(folder / "rnn", 3, decoder="rnn")


@pytest.fixture(scope="module")
def lm(folder):
    return language_model(folder / "lm", 1)


@pytest.fixture(scope="module")
def ours(model):
    return BatchedSpeech2Text(**model, **MAES)


def changed(config: str, to, **entries) -> str:
    """The configuration with other entries, in another file."""
    to.write_text(yaml.safe_dump({**yaml.safe_load(open(config)), **entries}))
    return str(to)


# --- the checkpoint


WRONG = {
    "half": (
        lambda weights, lm: {k: v for k, v in weights.items() if not k.startswith("encoder")},
        r"missing encoder\.\S+, encoder\.\S+, encoder\.\S+ and \d+ more\.",
    ),
    "checkpoint": (lambda weights, lm: {"model": weights, "epoch": 1}, "missing .*; unexpected model, epoch"),
    "language model": (lambda weights, lm: torch.load(lm["lm_file"]), r"unexpected lm\."),
    "in parallel": (lambda weights, lm: {f"module.{k}": v for k, v in weights.items()}, r"unexpected module\."),
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_of_another_model_are_refused(kind, model, lm, tmp_path):
    make, message = WRONG[kind]
    torch.save(make(torch.load(model["asr_model_file"]), lm), tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=rf"(?s)asr_model_file: .*wrong\.pth does not hold the weights .*{message}"):
        BatchedSpeech2Text(**{**model, "asr_model_file": tmp_path / "wrong.pth"}, **MAES)


def test_weights_as_deepspeed_wraps_them_are_the_models(model, ours, tmp_path):
    torch.save({"module": torch.load(model["asr_model_file"])}, tmp_path / "wrapped.pth")
    found = BatchedSpeech2Text(**{**model, "asr_model_file": tmp_path / "wrapped.pth"}, **MAES)([waveform(0.7, 1)])
    assert found == ours([waveform(0.7, 1)])


def test_weights_that_were_all_that_was_saved_are_enough(model, tmp_path):
    """A training that froze the rest and saves what it changed."""
    config = changed(model["asr_train_config"], tmp_path / "config.yaml", save_strategy="required_grad_only")
    weights = torch.load(model["asr_model_file"])
    part = {name: value for name, value in weights.items() if name.startswith("joint_network")}
    torch.save(part, tmp_path / "part.pth")
    BatchedSpeech2Text(config, tmp_path / "part.pth")
    for wrong in ({"model": part}, {**part, "lm.weight": weights["decoder.embed.weight"]}):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=r"wrong\.pth does not hold .*unexpected (model|lm\.weight)\. "):
            BatchedSpeech2Text(config, tmp_path / "wrong.pth")


def test_an_adapters_checkpoint_may_hold_its_own_weights_alone(model, tmp_path):
    pytest.importorskip("loralib")
    conf = {"rank": 2, "alpha": 2, "dropout_rate": 0.0, "target_modules": ["lin_enc"]}
    config = changed(
        model["asr_train_config"], tmp_path / "config.yaml", use_adapter=True, adapter="lora", adapter_conf=conf
    )
    outputs, inputs = torch.load(model["asr_model_file"])["joint_network.lin_enc.weight"].shape
    shapes = {"lora_A": (2, inputs), "lora_B": (outputs, 2)}
    weights = {f"joint_network.lin_enc.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save(weights, tmp_path / "adapter.pth")
    BatchedSpeech2Text(config, tmp_path / "adapter.pth", **MAES)
    torch.save({**weights, "lm.encoder.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold .*: unexpected lm\.encoder\.weight\. "):
        BatchedSpeech2Text(config, tmp_path / "other.pth", **MAES)


# --- what else is named


def test_a_language_model_of_other_tokens_is_refused(model, lm, tmp_path):
    other = [TOKENS[0], *reversed(TOKENS[1:-1]), TOKENS[-1]]
    config = changed(lm["lm_train_config"], tmp_path / "reversed.yaml", token_list=other)
    with pytest.raises(ValueError, match=r"reversed\.yaml has 'd' as token 1, the decoder '<unk>'.*same token list"):
        BatchedSpeech2Text(**model, lm_train_config=config, lm_file=lm["lm_file"])
    BatchedSpeech2Text(**model, **lm)


def test_a_configuration_that_is_no_language_models_is_refused(model, lm, tmp_path):
    (tmp_path / "config.yaml").write_text("token_list: [a]\n")
    (tmp_path / "lm.pth").write_bytes(open(lm["lm_file"], "rb").read())
    with pytest.raises(ValueError, match=r"config_file of the language model: .*config\.yaml has no key lm"):
        BatchedSpeech2Text(**model, lm_file=tmp_path / "lm.pth")
    with pytest.raises(ValueError, match=r"rnn/config\.yaml has no key lm"):
        BatchedSpeech2Text(**model, lm_train_config=model["asr_train_config"], lm_file=lm["lm_file"])


def test_a_bpemodel_that_is_gone_is_missed_at_once(model, tmp_path):
    config = changed(model["asr_train_config"], tmp_path / "bpe.yaml", token_type="bpe", bpemodel="gone.model")
    with pytest.raises(FileNotFoundError, match=r"bpemodel: there is no file gone\.model, which .*bpe\.yaml names"):
        BatchedSpeech2Text(config, model["asr_model_file"])


def test_a_bpemodel_that_is_none_is_refused_at_once(model, tmp_path):
    """ESPnet opens it with the first result."""
    (tmp_path / "bpe.model").write_text("this is no model")
    with pytest.raises(ValueError, match=r"while loading token_type bpe, bpemodel \S+bpe\.model: .*could not parse"):
        BatchedSpeech2Text(**model, token_type="bpe", bpemodel=str(tmp_path / "bpe.model"))


def test_a_file_that_the_configuration_names_is_missed_with_it(model, tmp_path):
    conf = {"normalize": "global_mvn", "normalize_conf": {"stats_file": "gone/stats.npz"}}
    config = changed(model["asr_train_config"], tmp_path / "stats.yaml", **conf)
    with pytest.raises(FileNotFoundError, match=r"while loading asr_train_config \S+stats\.yaml, .*no file gone/stats"):
        BatchedSpeech2Text(config, model["asr_model_file"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lm_weight": float("nan")}, ValueError, "lm_weight must be finite, as 0.5; got nan"),
        ({"lm_weight": float("inf")}, ValueError, "lm_weight must be finite.* got inf"),
        ({"lm_weight": "1"}, TypeError, "lm_weight must be a number; got '1'"),
        ({"ngram_weight": float("-inf")}, ValueError, "ngram_weight must be finite.* got -inf"),
        ({"ngram_weight": None}, TypeError, "ngram_weight must be a number; got None"),
        ({"phrase_weight": float("nan")}, ValueError, "phrase_weight must be finite.* got nan"),
        ({"phrases": 5}, TypeError, "phrases must be a file or a list of phrases; got 5"),
        ({"phrases": [("ab", True)]}, ValueError, r"phrases\[0\] has the weight True; expected a finite number"),
        ({"lm_weight": True}, TypeError, "lm_weight must be a number; got True"),
        (
            {"quantize_asr_model": True, "quantize_modules": "Linear"},
            TypeError,
            "quantize_modules must be a list .* got 'Linear'",
        ),
        ({"token_type": "xyz"}, ValueError, "while loading token_type xyz: token_mode must be one of bpe"),
        ({"phrases": [3]}, ValueError, r"phrases\[0\] must be a text, or a pair of text and weight; got 3"),
        ({"phrases": ["ab", ("ab",)]}, ValueError, r"phrases\[1\] must be .*; got \('ab',\)"),
        ({"phrases": [(1.0, "ab")]}, ValueError, r"phrases\[0\] must be .*; got \(1.0, 'ab'\)"),
        ({"quantize_asr_model": "false"}, TypeError, "quantize_asr_model must be True or False; got 'false'"),
        ({"streaming": "false"}, TypeError, "streaming must be True or False; got 'false'"),
        ({"streaming": 1}, TypeError, "streaming must be True or False; got 1"),
        ({"left_context": "a"}, TypeError, "left_context must be an integer, encoder frames; got 'a'"),
        ({"left_context": 1.5}, TypeError, "left_context must be an integer, encoder frames; got 1.5"),
        ({"device": "gpu"}, ValueError, "device must be one that torch has here, as cpu or cuda; got 'gpu': "),
        ({"device": "cuda:99"}, ValueError, "device must be one that torch has here, .*; got 'cuda:99': "),
        ({"device": None}, TypeError, "device must be a text, as cpu or cuda; got None"),
        ({"device": torch.device("cpu")}, TypeError, r"device must be a text, .* got device\(type='cpu'\)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_values_are_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        BatchedSpeech2Text(**model, **options)


# --- waveforms


def test_channels_before_samples_are_refused_and_behind_them_the_first_is_heard(ours):
    wave = waveform(0.7, 1)
    for channels in (1, 2):
        turned = torch.from_numpy(np.stack([wave] * channels))  # as torchaudio.load gives it
        with pytest.raises(
            ValueError, match=rf"waveforms\[0\] must be .*\(samples, channels\); got shape \({channels}, 11200\)"
        ):
            ours([turned])
    wanted = ours([wave])
    for channels in (1, 2, 6):
        found = ours([np.stack([wave, *[waveform(0.7, 2)] * (channels - 1)], 1)])
        assert [nbest[0][:3] for nbest in found] == [nbest[0][:3] for nbest in wanted]
    assert ours([np.zeros((0, 2), np.float32)])[0][0][0] == ""


def test_any_array_of_floats_is_taken(ours):
    wave = waveform(0.7, 1)
    [wanted] = ours([wave])
    strided = np.repeat(wave, 2)[::2]
    for given in (wave[::-1].copy()[::-1], wave.astype(">f4"), wave.astype(">f8"), wave.astype(np.longdouble), strided):
        assert ours([given])[0][0][:3] == wanted[0][:3]


@pytest.mark.parametrize("kind", ["int16", "int64", "uint8", "complex64", "bool", "S1"])
def test_other_numbers_are_refused_by_name(ours, kind):
    wave = np.zeros(9000, kind)
    given = [wave] if kind == "S1" else [wave, torch.from_numpy(wave)]
    hint = ": scale integers to -1 .. 1" if "int" in kind else r"\."
    for one in given:
        with pytest.raises(
            ValueError, match=rf"waveforms\[0\] must hold floating-point numbers; got \S*{kind[1:]}{hint}"
        ):
            ours([one])
