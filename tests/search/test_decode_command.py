"""`python -m espnet_mega_plugin decode` and `BatchedSpeech2Text`: the words of ESPnet's Speech2Text, in batches."""

import importlib
import math
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from configurations import perturbed
from espnet2.asr_transducer.encoder.encoder import Encoder
from espnet2.asr_transducer.utils import TooShortUttError
from espnet2.bin.asr_transducer_inference import Speech2Text
from fresh_python import finish, start
from tiny_experiment import FACTOR, HOP, RATE, audio, experiment, language_model, table, waveform

from espnet_mega_plugin.decode.command import main
from espnet_mega_plugin.decode.encoding import (
    encode_alone,
    encode_padded,
    features,
    too_short_for_encoder,
    why_not_padded,
)
from espnet_mega_plugin.decode.options import parsed
from espnet_mega_plugin.decode.speech2text import BatchedSpeech2Text
from espnet_mega_plugin.decode.streaming import chunks
from espnet_mega_plugin.decode.timing import Word, words

SECONDS = [0.7, 1.35, 0.5, 0.64, 0.02]
SECONDS_PER_FRAME = FACTOR * HOP / RATE
MAES = {"beam_size": 4, "beam_search_config": {"search_type": "maes", "nstep": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decode")


@pytest.fixture(scope="module")
def model(folder):
    return experiment(folder / "mega", 11)


@pytest.fixture(scope="module")
def streaming_model(folder):
    return experiment(folder / "streaming", 5, streaming=True)


@pytest.fixture(scope="module")
def scp(folder):
    """Five utterances, the last one too short for the encoder."""
    return audio(folder / "audio", SECONDS, 100)


def waves() -> list[np.ndarray]:
    return [waveform(seconds, 50 + i) for i, seconds in enumerate(SECONDS[:-1])]


def options_of(model: dict) -> list[str]:
    return [word for name, value in model.items() for word in (f"--{name}", value)]


def run(folder, model, scp, name: str, *more: str):
    output = folder / name
    data = ["--data_path_and_name_and_type", f"{scp},speech,sound", "--progress", "none", "--beam_size", "4"]
    status = main([*options_of(model), *data, "--output_dir", str(output), *more])
    return status, output


# --- the encoder

BODIES = {
    "conformer": [{"block_type": "conformer", "hidden_size": 8, "linear_size": 8, "heads": 2, "conv_mod_kernel_size": 5, "num_blocks": 2}],
    "branchformer": [{"block_type": "branchformer", "hidden_size": 8, "linear_size": 8, "heads": 2, "conv_mod_kernel_size": 5}],
    "ebranchformer": [{"block_type": "ebranchformer", "hidden_size": 8, "linear_size": 8, "heads": 2, "conv_mod_kernel_size": 5, "depthwise_conv_kernel_size": 3}],
    "conv1d": [
        {"block_type": "conv1d", "output_size": 8, "kernel_size": 3, "dilation": 2},
        {"block_type": "conformer", "hidden_size": 8, "linear_size": 8, "heads": 2, "conv_mod_kernel_size": 5},
    ],
}  # fmt: skip
INPUTS = {
    "strided": {"vgg_like": False, "conv_size": 4, "subsampling_factor": 6},
    "vgg": {"vgg_like": True, "subsampling_factor": 4, "conv_size": [4, 4]},
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", INPUTS)
@torch.no_grad()
def test_a_padded_batch_is_encoded_as_each_alone(body, kind, seed):
    torch.manual_seed(seed)
    encoder = perturbed(Encoder(12, BODIES[body], INPUTS[kind])).double().eval()
    assert why_not_padded(encoder) is None
    lengths = [random.randint(40, 90) for _ in range(4)]
    feats = [(torch.randn(1, n, 12, dtype=torch.float64), torch.tensor([n])) for n in lengths]
    alone, alone_lengths = encode_alone(encoder, feats)
    padded, padded_lengths = encode_padded(encoder, feats)
    torch.testing.assert_close(padded_lengths, alone_lengths)
    for one, other, n in zip(padded, alone, alone_lengths, strict=True):
        torch.testing.assert_close(one[:n], other[:n], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [*INPUTS, "twice", "vgg of 6"])
@torch.no_grad()
def test_what_is_too_short_for_the_encoder_is_what_it_refuses(kind):
    inputs = INPUTS | {
        "twice": {"vgg_like": False, "conv_size": 4, "subsampling_factor": 2},
        "vgg of 6": {"vgg_like": True, "subsampling_factor": 6, "conv_size": [4, 4]},
    }

    def conv1d(kernel: int, stride: int, dilation: int, causal: bool = False) -> dict:
        sizes = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "causal": causal}
        return {"block_type": "conv1d", "output_size": 8, **sizes}

    blocks = [[], [conv1d(3, 2, 1)], [conv1d(5, 1, 2)], [conv1d(1, 3, 1)], [conv1d(3, 2, 1), conv1d(5, 2, 2)]]
    for body in [*blocks, [conv1d(5, 1, 1, causal=True)], [conv1d(3, 1, 2, causal=True)]]:
        encoder = Encoder(12, [*body, *BODIES["conformer"]], inputs[kind]).eval()
        refused = {n for n in range(1, 60) if too_short_for_encoder(encoder, n)}
        for n in range(1, 60):
            try:
                frames = encoder(torch.randn(1, n, 12), torch.tensor([n]))[0].shape[1]
            except (RuntimeError, TooShortUttError):
                frames = 0
            assert (frames < 1) == (n in refused), (body, n)


def test_encoders_of_which_it_is_not_known_are_not_padded():
    body = [{"block_type": "conv1d", "output_size": 8, "kernel_size": 3, "stride": 2}, *BODIES["conformer"]]
    assert "stride" in why_not_padded(Encoder(12, body, INPUTS["strided"]))


# --- BatchedSpeech2Text


def test_words_and_scores_are_those_of_espnets_speech2text(model, seed):
    theirs = Speech2Text(**model, **MAES, nbest=3)
    ours = BatchedSpeech2Text(**model, **MAES, nbest=3)
    speech = waves()
    wanted = [theirs.hypotheses_to_results(theirs(wave)) for wave in speech]
    assert sum(len(nbest[0][2]) for nbest in wanted) > 10
    order = random.sample(range(len(speech)), len(speech))
    batches = [ours(speech), [nbest for wave in speech for nbest in ours([wave])]]
    shuffled = ours([torch.from_numpy(speech[i]) for i in order])
    batches.append([shuffled[order.index(i)] for i in range(len(speech))])
    for found in batches:
        for nbest, theirs_nbest in zip(found, wanted, strict=True):
            assert [result[:3] for result in nbest] == [result[:3] for result in theirs_nbest]
            scores = [float(result[3].score) for result in theirs_nbest]
            assert [result[3].score for result in nbest] == pytest.approx(scores, rel=1e-4, abs=1e-4)


def test_padded_encoding_and_other_precisions(model):
    speech = waves()
    reference = BatchedSpeech2Text(**model, **MAES)(speech)
    texts = [nbest[0][0] for nbest in reference]
    for options in ({"encoder_batches": "padded"}, {"dtype": "float64"}):
        assert [nbest[0][0] for nbest in BatchedSpeech2Text(**model, **MAES, **options)(speech)] == texts
    # Of this model, whose weights and audio are always the same, scores moved by 0.4, 6 and 10 % on one processor
    for options, most, same in (
        ({"dtype": "float16"}, 0.02, 3),
        ({"dtype": "bfloat16"}, 0.15, 1),
        ({"quantize_asr_model": True}, 0.2, 0),
    ):
        found = BatchedSpeech2Text(**model, **MAES, **options)(speech)
        assert sum(nbest[0][0] == text for nbest, text in zip(found, texts, strict=True)) >= same, options
        for nbest, wanted in zip(found, reference, strict=True):
            assert nbest[0][3].score == pytest.approx(wanted[0][3].score, rel=most), options


def test_streaming_is_espnets(streaming_model):
    chunked = {"streaming": True, "decoding_window": 640, "left_context": 8}
    theirs = Speech2Text(**streaming_model, **MAES, **chunked)
    ours = BatchedSpeech2Text(**streaming_model, **MAES, **chunked)
    samples = theirs.audio_processor.decoding_samples
    speech, wanted, partial = waves(), [], {}
    for wave in speech:
        for i in range(len(wave) // samples + 1):
            final = i == len(wave) // samples
            found = theirs.streaming_decode(wave[i * samples : (i + 1) * samples], is_final=final)
        wanted.append(theirs.hypotheses_to_results(found)[0])
    found = [nbest[0] for nbest in ours(speech, lambda *seen: partial.setdefault(seen[0], []).append(seen[1:]))]
    assert [result[:3] for result in found] == [result[:3] for result in wanted]
    assert [r[3].score for r in found] == pytest.approx([float(r[3].score) for r in wanted], rel=1e-4, abs=1e-4)
    assert {i: [step[0] for step in steps] for i, steps in partial.items()} == {
        i: [640 * (n + 1) for n in range(len(wave) // samples)] for i, wave in enumerate(speech) if len(wave) >= samples
    }


@pytest.mark.parametrize("window", [640, 500])  # 20 encoder frames, and 15.625
@torch.no_grad()
def test_a_stream_tells_where_its_frames_are(streaming_model, window):
    """Each of a chunk's frames is what the input block makes of the whole utterance's features from there on."""
    ours = BatchedSpeech2Text(**streaming_model, **MAES, streaming=True, decoding_window=window)
    embed, speech, seen = ours.asr_model.encoder.embed, ours.waveform(waves()[1]), []
    handle = embed.register_forward_hook(lambda module, given, out: seen.append(out[0][0, 1:-1]))
    stream = ours.encoder_stream()
    for piece in chunks(speech, stream.samples)[:-1]:
        stream(piece, False)
    handle.remove()
    assert len(stream.places) == sum(map(len, seen)) > 2 * len(seen[0])
    feats = features(ours.asr_model, speech, torch.float32)[0]
    for frame, place in zip(torch.cat(seen), stream.places, strict=True):
        first = round(place * FACTOR)
        torch.testing.assert_close(embed(feats[:, first : first + 7])[0][0, 0], frame, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_times_of_a_stream_are_those_of_its_frames(streaming_model):
    ours = BatchedSpeech2Text(**streaming_model, **MAES, streaming=True)
    result = ours(waves())[1][0]
    assert result[3].frames and ours.times(result) == [place * SECONDS_PER_FRAME for place in result[3].places]
    assert result[3].places == sorted(result[3].places) and ours.words(result)[0].start == ours.times(result)[0]


def test_streams_join_and_leave_when_they_like(streaming_model):
    ours = BatchedSpeech2Text(**streaming_model, **MAES, streaming=True)
    first, second = waves()[1][: 2 * 10240 + 500], waves()[3][:10240]
    wanted = ours([first, second])
    streams = ours.streams()
    a = streams.open()
    streams.push({a: first[: streams.samples]})
    b = streams.open()
    streams.push({a: first[streams.samples : 2 * streams.samples], b: second})
    assert streams.partial(a)[0][3].frames[-1] < 2 * streams.samples // (FACTOR * HOP)
    streams.push({b: second[:0]}, final={b})
    assert streams.close(b)[0][:3] == wanted[1][0][:3]
    with pytest.raises(KeyError, match=f"stream {b} is not open"):
        streams.push({b: second})
    with pytest.raises(ValueError, match="a chunk of stream 0 has 7 samples; expected 10240"):
        streams.push({a: first[:7]})
    streams.push({a: first[2 * streams.samples :]}, final={a})
    assert streams.close(a)[0][:3] == wanted[0][0][:3]


def test_times_come_from_the_trace(model):
    ours = BatchedSpeech2Text(**model, **MAES)
    assert ours.seconds_per_frame == SECONDS_PER_FRAME == 0.032
    for nbest in ours(waves()):
        hypothesis = nbest[0][3]
        assert ours.times(nbest[0]) == [frame * 0.032 for frame in hypothesis.frames]
        assert hypothesis.frames == sorted(hypothesis.frames) and all(logp <= 1e-9 for logp in hypothesis.logps)
        said = ours.words(nbest[0])
        assert [word.text for word in said] == nbest[0][0].split()
        assert all(0 < word.confidence <= 1 and word.start < word.end for word in said)


def test_words():
    logps = [math.log(p) for p in (0.9, 0.8, 0.5, 1.0, 0.7)]
    frames, half = [2, 3, 7, 8, 8], 0.5
    bpe = words(["▁a", "b", "▁", "c", "▁d"], frames, logps, half, "bpe")
    assert bpe == [
        Word("ab", 1.0, 2.0, pytest.approx(0.8)),
        Word("c", 3.5, 4.5, pytest.approx(0.5)),
        Word("d", 4.0, 4.5, pytest.approx(0.7)),
    ]
    char = words(["<space>", "b", "c", "<space>", "d"], frames, logps, half, "char")
    assert [(w.text, w.start, w.end) for w in char] == [("bc", 1.5, 4.0), ("d", 4.0, 4.5)]
    assert [w.text for w in words(["one", "two"], frames, logps, half, "word")] == ["one", "two"]
    assert words([], [], [], half, "bpe") == words(["▁"], [1], [0.0], half, "bpe") == []


def test_what_is_fused_is_heard(model, folder, seed):
    speech = waves()
    plain = BatchedSpeech2Text(**model, **MAES)(speech)
    lm = language_model(folder / "lm", 1)
    (folder / "unigrams.arpa").write_text(
        "\\data\\\nngram 1=4\n\n\\1-grams:\n-0.01\ta\n-9\tb\n-9\tc\n-9\td\n\n\\end\\\n"
    )
    texts = ["".join(nbest[0][0] for nbest in plain)]
    for options in (
        {**lm, "lm_weight": 1.0},
        {"ngram_file": folder / "unigrams.arpa", "ngram_weight": 1.0},
        {"phrases": ["dd", ("cd", 3.0)], "phrase_weight": 2.0},
    ):
        found = BatchedSpeech2Text(**model, **MAES, **options)(speech)
        texts.append("".join(nbest[0][0] for nbest in found))
        without = {name: 0.0 if "weight" in name else value for name, value in options.items()}
        if "phrases" in options:
            without["phrases"] = ["dd"]
        again = BatchedSpeech2Text(**model, **MAES, **without)(speech[:2])
        assert [nbest[0][2] for nbest in again] == [nbest[0][2] for nbest in plain[:2]]
    share = [text.count("a") / max(1, len(text)) for text in texts]
    assert share[2] > share[0]
    assert texts[3].count("dd") + texts[3].count("cd") > texts[0].count("dd") + texts[0].count("cd")


def test_the_python_doors_errors(model, tmp_path):
    for error, message, options in (
        (ValueError, "asr_model_file is missing", {"asr_model_file": None}),
        (FileNotFoundError, "asr_model_file: there is no file nowhere.pth", {"asr_model_file": "nowhere.pth"}),
        (ValueError, "dtype must be one of float32", {"dtype": "int8"}),
        (ValueError, "search_type default is not there in batches.*maes", {"beam_search_config": {"search_type": "default"}}),
        (ValueError, "beam_search_config: gamma not known; known are .*expansion_gamma", {"beam_search_config": {"gamma": 1}}),
        (ValueError, "search_type must be one of greedy, maes, tsd, alsd; got 'best'", {"beam_search_config": {"search_type": "best"}}),
        (ValueError, "lm_train_config is given without lm_file", {"lm_train_config": "config.yaml"}),
        (ValueError, "'xyz' is empty or has something the model has no token for", {"phrases": ["xyz"]}),
        (ValueError, "quantize_modules must be one of Linear, LSTM; got 'GRU'", {"quantize_asr_model": True, "quantize_modules": ["GRU"]}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            BatchedSpeech2Text(**{**model, **options})
    ours = BatchedSpeech2Text(**model, **MAES)
    for nothing in (None, 3, "a.wav"):
        with pytest.raises(TypeError, match=f"expected a list of waveforms; got {nothing!r}"):
            ours(nothing)
    with pytest.raises(TypeError, match=r"write \[waveform\]"):
        ours(waves()[0])
    with pytest.raises(ValueError, match=r"waveforms\[1\] holds NaN"):
        ours([waves()[0], np.full(9000, np.nan, np.float32)])
    assert [nbest[0][:3] for nbest in ours([np.zeros(n, np.float32) for n in (0, 1, 600)])] == [("", [], [])] * 3
    assert ours([]) == []


# --- the command


def test_the_command_writes_espnets_files_in_the_order_of_the_list(folder, model, scp):
    status, output = run(
        folder, model, scp, "ours", "--nbest", "2", "--batch_size", "3", "--beam_search_config", "nstep=2"
    )
    assert status == 0
    config = folder / "maes.yaml"
    config.write_text(yaml.safe_dump({**MAES, "nbest": 2}))
    data = ["--data_path_and_name_and_type", f"{scp},speech,sound", "--num_workers", "0", "--config", str(config)]
    inference = importlib.import_module("espnet2.bin.asr_transducer_inference")
    inference.main([*options_of(model), *data, "--output_dir", str(folder / "theirs")])
    keys = [line.split()[0] for line in scp.read_text().splitlines()]
    for n in (1, 2):
        ours, theirs = (folder / name / f"{n}best_recog" for name in ("ours", "theirs"))
        for name in ("text", "token", "token_int"):
            found, wanted = table(ours / name), table(theirs / name)
            assert list(wanted) == keys and list(found) == (keys if n == 1 else keys[:-1])
            wanted = {key: wanted[key] for key in found} | ({keys[-1]: ""} if n == 1 else {})
            assert found == wanted  # the last one is too short: ESPnet writes <space> for it, n times
        scores = {key: float(score) for key, score in table(theirs / "score").items() if key != keys[-1]}
        assert {k: float(v) for k, v in table(ours / "score").items() if k in scores} == pytest.approx(
            scores, rel=1e-4, abs=1e-3
        )
    found = output / "1best_recog"
    tokens, times, sure = (table(found / name) for name in ("token", "timestamps", "confidence"))
    assert list(tokens) == list(times) == list(sure) == keys
    for key in keys:
        assert len(tokens[key].split()) == len(times[key].split()) == len(sure[key].split())
        assert all(
            abs(float(t) / SECONDS_PER_FRAME - round(float(t) / SECONDS_PER_FRAME)) < 1e-6 for t in times[key].split()
        )
    said = [line.split() for line in (found / "ctm").read_text().splitlines()]
    text = table(found / "text")
    assert all(len(line) == 6 for line in said)
    assert {key: " ".join(line[4] for line in said if line[0] == key) for key in keys} == {
        key: " ".join(text[key].split()) for key in keys
    }
    assert not (output / "skipped").exists()


def test_two_processes_give_the_same_files(folder, model, scp):
    (folder / "six.scp").write_text(f"{scp.read_text()}gone {folder / 'gone.wav'}\n")
    data = ["--data_path_and_name_and_type", f"{folder / 'six.scp'},speech,sound", "--beam_size", "4", "--nbest", "2"]
    command = ["-m", "espnet_mega_plugin", "decode", *options_of(model), *data, "--num_processes", "2"]
    process = start(*command, "--output_dir", str(folder / "split"), cwd=folder)
    _, alone = run(folder, model, folder / "six.scp", "alone", "--nbest", "2")
    out, err = finish(process)
    assert out == "" and "6/6" in err and "RTF" in err
    assert "WARNING: Utterance gone is skipped: it cannot be read" in err
    assert "\n6 utterances, 3.2 s of audio in " in err and err.endswith("; 1 skipped\n")
    files = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    assert len(files) == 15
    for file in files:
        found, wanted = (folder / "split" / file).read_text(), (alone / file).read_text()
        if file.name != "score":
            assert found == wanted
    assert {path.name for path in (folder / "split").iterdir()} == {"1best_recog", "2best_recog", "logdir", "skipped"}


def test_bad_utterances_are_named_and_skipped(folder, model, scp, tmp_path, caplog):
    lines = scp.read_text().splitlines()
    (tmp_path / "text.wav").write_text("this is no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(9000, np.nan), RATE, subtype="FLOAT")
    bad = [f"{name} {tmp_path / name}.wav" for name in ("text", "gone", "empty", "nan")]
    mixed = tmp_path / "wav.scp"
    mixed.write_text("\n".join([bad[0], *lines[:2], *bad[1:], lines[2]]) + "\n")
    status, output = run(tmp_path, model, mixed, "mixed")
    _, good = run(folder, model, scp, "good")
    assert status == 0
    found, wanted = (table(at / "1best_recog" / "text") for at in (output, good))
    assert found == {line.split()[0]: wanted[line.split()[0]] for line in lines[:3]}
    skipped = table(output / "skipped")
    assert list(skipped) == ["text", "gone", "empty", "nan"]
    assert "cannot be read" in skipped["text"] and skipped["empty"] == "is empty" and "NaN" in skipped["nan"]
    assert sum("is skipped" in record.getMessage() for record in caplog.records) == 4
    (tmp_path / "bad.scp").write_text("\n".join(bad) + "\n")
    assert run(tmp_path, model, tmp_path / "bad.scp", "bad")[0] == 3


def test_arrays_that_are_no_waveforms_are_named_and_skipped(folder, model, tmp_path, caplog):
    arrays = {
        "good": waves()[0],
        "scalar": np.float32(1),
        "cube": np.ones((2, 3, 4), np.float32),
        "text": np.array("a"),
    }
    with (tmp_path / "npy.scp").open("w") as scp:
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
            scp.write(f"{name} {tmp_path / name}.npy\n")
    more = ("--data_path_and_name_and_type", f"{tmp_path / 'npy.scp'},speech,npy")
    assert main([*options_of(model), *more, "--output_dir", str(tmp_path / "out"), "--progress", "none"]) == 0
    assert list(table(tmp_path / "out" / "1best_recog" / "text")) == ["good"]
    skipped = table(tmp_path / "out" / "skipped")
    assert list(skipped) == ["scalar", "cube", "text"]
    assert skipped["cube"] == "has shape (2, 3, 4), not (samples,) or (frames, size)"


def test_scores_that_are_not_numbers_are_told(folder, model, scp, caplog):
    weights = torch.load(model["asr_model_file"])
    weights["joint_network.lin_out.bias"].fill_(math.nan)
    torch.save(weights, folder / "nan.pth")
    assert run(folder, model, scp, "nan", "--asr_model_file", str(folder / "nan.pth"))[0] == 0
    reason = "cannot be decoded: the model's scores are not numbers"
    assert list(table(folder / "nan" / "skipped").values()) == 4 * [reason]  # no scores were asked for the short one
    assert any(record.getMessage().endswith(f" is skipped: it {reason}") for record in caplog.records)


def test_a_mistake_in_decoding_is_shown(folder, model, scp, monkeypatch):
    monkeypatch.setattr(BatchedSpeech2Text, "__call__", lambda self, waveforms, on_partial: None + 1)
    with pytest.raises(TypeError, match="NoneType"):
        run(folder, model, scp, "mistake")


def test_a_batch_that_fails_is_taken_apart(model, monkeypatch):
    from espnet_mega_plugin.decode import command, utterances

    ours = BatchedSpeech2Text(**model, **MAES)
    speech = [utterances.Utterance(str(i), wave) for i, wave in enumerate(waves())]
    wanted = command.decoded(ours, speech)
    search = ours.search

    def out_of_memory(encoder_out, lengths):
        if encoder_out.shape[0] * encoder_out.shape[1] > 90 or int(lengths.max()) > 40:
            raise torch.OutOfMemoryError("out of memory")
        return search(encoder_out, lengths)

    monkeypatch.setattr(ours, "search", out_of_memory)
    found = command.decoded(ours, speech)
    lost = {key for key, results in found.items() if isinstance(results, str)}
    assert lost == {"1"} and "out of memory" in found["1"]
    assert all(found[key][0][:3] == wanted[key][0][:3] for key in wanted.keys() - lost)


def test_streaming_and_key_files(folder, streaming_model, scp, caplog):
    keys = [line.split()[0] for line in scp.read_text().splitlines()]
    (folder / "keys").write_text(f"{keys[3]} something\n{keys[0]}\n")
    more = ["--streaming", "--key_file", str(folder / "keys"), "--display_hypotheses", "true"]  # at any log level
    status, output = run(folder, streaming_model, scp, "streamed", *more)
    text = table(output / "1best_recog" / "text")
    assert status == 0 and list(text) == [keys[3], keys[0]]
    said = [record.getMessage() for record in caplog.records]
    assert f"Final best hypothesis: {keys[0]}: {text[keys[0]]}" in said
    assert any(line.startswith(f"Current best hypothesis (0-640ms): {keys[0]}: ") for line in said)
    caplog.clear()
    _, whole = run(folder, streaming_model, scp, "whole", "--streaming", "false")
    assert not any("best hypothesis" in record.getMessage() for record in caplog.records)
    assert len(table(whole / "1best_recog" / "text")) == 5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--streaming", "false"], {"streaming": False}),
        (["--streaming"], {"streaming": True}),
        (["--quantize_asr_model", "no", "--display_hypotheses", "1"], {"quantize_asr_model": False, "display_hypotheses": True}),
        (["--beam_search_config", "{search_type: tsd, max_sym_exp: 4}"], {"beam_search_config": {"search_type": "tsd", "max_sym_exp": 4}}),
        (["--beam_search_config", "nstep=3", "score_norm=true"], {"beam_search_config": {"search_type": "maes", "nstep": 3, "score_norm": True}}),
        (["--quantize_modules", "[Linear,LSTM]"], {"quantize_modules": ["Linear", "LSTM"]}),
        (["--quantize_modules", "Linear", "LSTM"], {"quantize_modules": ["Linear", "LSTM"]}),
        (["--lm_weight", "0.3", "--key_file", "none"], {"lm_weight": 0.3, "key_file": None}),
        ([], {"beam_size": 7, "streaming": False, "nbest": 2, "beam_search_config": {"search_type": "maes", "nstep": 2}}),
    ],
)  # fmt: skip
def test_options_mean_what_they_say(arguments, expected, tmp_path):
    (tmp_path / "decode.yaml").write_text(
        "beam_size: 7\nstreaming: false\nnbest: '2'\nlm_weight: 1\nbeam_search_config: {search_type: maes, nstep: 2}\n"
        "data_path_and_name_and_type: ['a,speech,sound']\n"
    )
    given = ["--config", str(tmp_path / "decode.yaml"), "--asr_model_file", "m.pth", "--output_dir", "out"]
    options = vars(parsed([*given, *arguments]))
    assert {name: options[name] for name in expected} == expected
    assert options["data_path_and_name_and_type"] == [("a", "speech", "sound")]


def test_data_on_the_command_line_take_the_place_of_the_yamls(tmp_path):
    (tmp_path / "decode.yaml").write_text("data_path_and_name_and_type: ['a,speech,sound', [b, text, text]]\n")
    given = ["--config", str(tmp_path / "decode.yaml"), "--asr_model_file", "m.pth", "--output_dir", "out"]
    assert parsed(given).data_path_and_name_and_type == [("a", "speech", "sound"), ("b", "text", "text")]
    name = "--data_path_and_name_and_type"
    options = parsed([*given, name, "c,speech,sound", name, "d,text,text"])
    assert options.data_path_and_name_and_type == [("c", "speech", "sound"), ("d", "text", "text")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output_dir is missing"),
        (["--output_dir", "o"], "--asr_model_file is missing"),
        (["--model_tag", "espnet/x"], "nothing is downloaded here"),
        (["--streaming", "maybe"], "expected true or false, got 'maybe'"),
        (["--beam_search_config", "nstep"], "expected {name: value} or name=value, got 'nstep'"),
        (["--data_path_and_name_and_type", "wav.scp"], "expected FILE,NAME,TYPE"),
        (["--beam_size", "0"], "--beam_size 0: expected 1 or more"),
        (["--beam_sise", "3"], "unrecognized arguments: --beam_sise"),
        (["--config", "CONFIG"], "unknown key 'beam_sise'; did you mean beam_size?"),
        (["--config", "BROKEN"], "beam_size: 5.5 is no value for it"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file"),
        (["--config", "LATIN"], "LATIN: expected text in UTF-8"),
        (["--config", "DATA"], "DATA: data_path_and_name_and_type: expected FILE,NAME,TYPE such as wav.scp,speech,sound; got 'wav.scp'"),
        (["--config", "NUMBER"], "NUMBER: data_path_and_name_and_type: expected FILE,NAME,TYPE"),
        (["--decoding_window", "0"], "--decoding_window 0: expected 1 or more"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_at_the_door(arguments, message, tmp_path, capsys):
    (tmp_path / "CONFIG").write_text("beam_sise: 5\n")
    (tmp_path / "BROKEN").write_text("beam_size: 5.5\n")
    (tmp_path / "LATIN").write_bytes(b"output_dir: \xff\n")
    (tmp_path / "DATA").write_text("data_path_and_name_and_type: [wav.scp]\n")
    (tmp_path / "NUMBER").write_text("data_path_and_name_and_type: [5]\n")
    needed = ["--output_dir", "o", "--asr_model_file", "m", "--data_path_and_name_and_type", "a,speech,sound"]
    given = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    with pytest.raises(SystemExit) as left:
        parsed([*(needed if arguments and arguments[0] not in ("--output_dir", "--model_tag") else []), *given])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


FILES = {
    "asr_model_file": [
        ("", "is empty; expected a checkpoint"),
        (0.5, "is cut off; expected a checkpoint"),
        ("encoder: conformer\n", "is another kind of file; expected a checkpoint"),
    ],
    "asr_train_config": [("", "has no `name: value` lines"), ("- a\n", "has no `name: value` lines")],
    "lm_file": [("", "is empty; expected a checkpoint"), (0.5, "is cut off")],
    "lm_train_config": [("", "has no `name: value` lines"), ("a: [\n", "has no `name: value` lines")],
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none_of_a_training_are_refused_by_name(name, model, tmp_path, capsys):
    given = {**model, **language_model(tmp_path / "lm", 1)}
    whole, file = Path(given[name]).read_bytes(), tmp_path / "file"
    for content, message in FILES[name]:
        file.write_bytes(whole[: int(content * len(whole))] if isinstance(content, float) else content.encode())
        with pytest.raises(ValueError, match=f"^{name}: {file} {message}"):
            BatchedSpeech2Text(**{**given, name: str(file)})
        options = [*options_of({**given, name: str(file)}), "--output_dir", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as left:
            main([*options, "--data_path_and_name_and_type", "wav.scp,speech,sound"])
        said = capsys.readouterr().err
        assert left.value.code == 2 and f"espnet_mega_plugin decode: {name}: {file} {message}" in said


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_decoding_that_cannot_begin_leaves_no_earlier_results(processes, model, scp, tmp_path, capsys):
    (tmp_path / "out" / "1best_recog").mkdir(parents=True)
    for old in ("1best_recog/text", "1best_recog/token", "skipped"):
        (tmp_path / "out" / old).write_text("a of an earlier decoding\n")
    (tmp_path / "bad.pth").write_bytes(b"PK")
    broken = {**model, "asr_model_file": str(tmp_path / "bad.pth")}
    with pytest.raises(SystemExit):
        run(tmp_path, broken, scp, "out", "--num_processes", processes)
    assert "bad.pth is cut off" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name in ("text", "token", "skipped")]
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(SystemExit):
            run(tmp_path, model, scp, place, "--num_processes", processes)
        assert f"--output_dir {tmp_path / place}: it, or what it is in, is a file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_decoding_says_what_there_is(processes, model, tmp_path):
    """Ctrl-C, sent to the command alone: its processes end with it."""
    scp, output = audio(tmp_path / "audio", [5.0] * 90, 7), tmp_path / "out"
    given = ["--data_path_and_name_and_type", f"{scp},speech,sound", "--progress", "none", "--batch_size", "1"]
    more = ["--output_dir", str(output), "--num_processes", str(processes)]
    process = start("-m", "espnet_mega_plugin", "decode", *options_of(model), *given, *more, cwd=tmp_path)
    token = (output if processes == 1 else output / "logdir" / "decode.2.output") / "1best_recog" / "token"
    until = time.monotonic() + 500  # a busy machine needs minutes to begin
    while not token.is_file() or not token.read_text():
        assert time.monotonic() < until
        if process.poll() is not None:
            finish(process)  # shows what it said
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = finish(process, status=130)
    assert "Traceback" not in said
    if processes == 1:
        done = len(token.read_text().splitlines())
        assert f"interrupted, {output} holds {done} of 90 utterances and is not complete; decode again" in said
    else:
        assert "interrupted, there is no result; decode again" in said


def test_wrong_files_are_refused_at_the_door(folder, model, scp, tmp_path, capsys):
    (tmp_path / "keys").write_text("nobody\n")
    (tmp_path / "empty.scp").write_text("")
    (tmp_path / "list.yaml").write_text("- a list\n")
    (tmp_path / "some.yaml").write_text("token_list: [a]\n")
    for more, message in (
        (["--asr_model_file", "no.pth"], "asr_model_file: there is no file no.pth"),
        (["--asr_model_file", str(scp)], f"asr_model_file: {scp} is another kind of file"),
        (["--asr_train_config", str(tmp_path / "empty.scp")], f"asr_train_config: {tmp_path / 'empty.scp'} has no `name: value` lines"),
        (["--asr_train_config", str(tmp_path / "list.yaml")], f"asr_train_config: {tmp_path / 'list.yaml'} has no `name: value` lines"),
        (["--asr_train_config", str(tmp_path / "some.yaml")], f"while loading asr_train_config {tmp_path / 'some.yaml'}, asr_model_file "),
        (["--key_file", str(tmp_path / "keys")], "names 1 utterances the data has not, as 'nobody'"),
        (["--data_path_and_name_and_type", f"{scp},text,text"], "expected one entry FILE,speech,TYPE"),
        (["--ngpu", "1"], "torch sees no GPU here"),
    ):  # fmt: skip
        if more[0] == "--ngpu" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as left:
            run(tmp_path, model, scp, "refused", *more)
        assert left.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, model, tmp_path / "empty.scp", "refused")
    assert "has no samples" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, model, tmp_path / "gone.scp", "refused", "--num_processes", "2")
    assert "there is no file" in capsys.readouterr().err


def test_lists_that_are_no_lists_are_refused(folder, model, tmp_path, capsys):
    (tmp_path / "latin.scp").write_bytes(b"\xff a.wav\n")
    (tmp_path / "gap.scp").write_text("a a.wav\n \nb b.wav\n")
    for name, number, message in (
        ("latin.scp", "1", f"{tmp_path / 'latin.scp'},speech,sound: expected text in UTF-8"),
        ("latin.scp", "2", f"{tmp_path / 'latin.scp'}: expected text in UTF-8"),
        ("gap.scp", "1", f"{tmp_path / 'gap.scp'},speech,sound: line 2 is empty; remove it."),
    ):
        with pytest.raises(SystemExit) as left:
            run(tmp_path, model, tmp_path / name, "refused", "--num_processes", number)
        assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_process_that_cannot_load_the_model_tells_why(model, scp, tmp_path, capsys):
    (tmp_path / "keys").write_text(scp.read_text().splitlines()[0])
    with pytest.raises(SystemExit) as left:
        more = ("--num_processes", "2", "--key_file", str(tmp_path / "keys"), "--asr_model_file", str(scp))
        run(tmp_path, model, scp, "refused", *more)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "process 1 ended with status 2" in said and f"asr_model_file: {scp} is another kind of file" in said


def test_help_needs_neither_torch_nor_espnet(tmp_path):
    code = "import sys; from espnet_mega_plugin.__main__ import main\ntry: main(['decode', '--help'])\nexcept SystemExit: pass\n"
    process = start("-c", f"{code}print({{'torch', 'espnet2', 'numpy'}} & set(sys.modules))", cwd=tmp_path)
    out, _ = finish(process)
    assert "--batch_size" in out and out.endswith("set()\n")
