"""How the decode command reads, batches and counts utterances."""

import importlib
import io
import random
import re

import numpy as np
import pytest
import soundfile
from tiny_experiment import FACTOR, HOP, RATE, audio, experiment, table, waveform

from espnet_mega_plugin.decode import progress as progress_module
from espnet_mega_plugin.decode.command import main
from espnet_mega_plugin.decode.progress import Progress
from espnet_mega_plugin.decode.speech2text import BatchedSpeech2Text
from espnet_mega_plugin.decode.utterances import Utterance, batches

SECONDS = [0.7, 1.35, 0.5, 0.64, 0.9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("utterances")


@pytest.fixture(scope="module")
def model(folder):
    return [word for name, value in experiment(folder / "mega", 11).items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def scp(folder):
    return audio(folder / "audio", SECONDS, 100)


def decode(model, data, output, *more: str) -> int:
    given = ["--data_path_and_name_and_type", data, "--output_dir", str(output), "--beam_size", "4", *more]
    return main([*model, *given, *(() if "--progress" in more else ("--progress", "none"))])


# --- sampling rates and integers


@pytest.mark.parametrize("processes", ["1", "3"])
def test_utterances_of_another_sampling_rate_are_named_and_skipped(model, scp, tmp_path, processes):
    """Wherever they stand in the list: also first, and alone in the part of a process."""
    lines = scp.read_text().splitlines()[:2]
    soundfile.write(tmp_path / "8k.wav", waveform(0.7, 1), RATE // 2)
    (tmp_path / "wav.scp").write_text("\n".join([f"eight {tmp_path / '8k.wav'}", *lines]) + "\n")
    data = f"{tmp_path / 'wav.scp'},speech,sound"
    assert decode(model, data, tmp_path / "out", "--num_processes", processes) == 0
    reason = "has 8000 samples a second, but the model was trained on 16000; resample it"
    assert table(tmp_path / "out" / "skipped") == {"eight": reason}
    assert list(table(tmp_path / "out" / "1best_recog" / "text")) == [line.split()[0] for line in lines]
    if processes == "1":
        (tmp_path / "wav.scp").write_text(f"eight {tmp_path / '8k.wav'}\n")
        assert decode(model, data, tmp_path / "alone") == 3
        assert table(tmp_path / "alone" / "skipped") == {"eight": reason}


def test_integers_of_an_archive_are_decoded_as_by_espnets_command(tmp_path):
    """They are not scaled: with this model, which does not normalise, that would change the words."""
    made = experiment(tmp_path / "model", 5, streaming=True)
    model = [word for name, value in made.items() for word in (f"--{name}", value)]
    ark, scp = io.BytesIO(), ""
    for key in ("a", "b"):
        ark.write(f"{key} ".encode())
        scp += f"{key} {tmp_path / 'wav.ark'}:{ark.tell()}\n"
        wav = io.BytesIO()
        samples = (50 * waveform(0.9, ord(key))).astype(np.int16)  # as loud, unscaled, as what the model is made for
        soundfile.write(wav, samples, RATE, format="WAV", subtype="PCM_16")
        ark.write(wav.getvalue())
    (tmp_path / "wav.ark").write_bytes(ark.getvalue())
    (tmp_path / "wav.scp").write_text(scp)
    data = f"{tmp_path / 'wav.scp'},speech,kaldi_ark"
    config = tmp_path / "maes.yaml"
    config.write_text("beam_size: 4\nbeam_search_config: {search_type: maes}\n")
    assert decode(model, data, tmp_path / "ours", "--config", str(config)) == 0
    theirs = ["--data_path_and_name_and_type", data, "--config", str(config), "--num_workers", "0"]
    inference = importlib.import_module("espnet2.bin.asr_transducer_inference")
    inference.main([*model, *theirs, "--output_dir", str(tmp_path / "theirs")])
    found, wanted = (table(tmp_path / name / "1best_recog" / "text") for name in ("ours", "theirs"))
    assert found == wanted and all(len(text) > 1 for text in wanted.values())
    scores = [table(tmp_path / name / "1best_recog" / "score") for name in ("ours", "theirs")]
    found, wanted = ([float(score[key]) for key in ("a", "b")] for score in scores)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-3)


# --- batches


def test_batches_are_of_similar_lengths_and_no_larger_than_they_may_be():
    for _ in range(20):
        lengths = [random.randint(1, 100) for _ in range(random.randint(1, 40))]
        utterances = [Utterance(str(i), np.zeros(n, np.float32)) for i, n in enumerate(lengths)]
        size, most = random.randint(1, 8), random.choice((50, 300, 10**6))
        found = list(batches(utterances, size, most))
        assert [len(one.speech) for batch in found for one in batch] == sorted(lengths, reverse=True)
        assert {one.key for batch in found for one in batch} == {one.key for one in utterances}
        for batch, following in zip(found, [*found[1:], None], strict=True):
            longest = len(batch[0].speech)
            assert len(batch) == 1 or (len(batch) <= size and len(batch) * longest <= most)
            assert following is None or len(batch) == size or (len(batch) + 1) * longest > most  # no room for one more


def test_the_command_gives_batches_as_large_as_its_options_allow(model, scp, tmp_path, monkeypatch):
    seen, call = [], BatchedSpeech2Text.__call__

    def recorded(self, waveforms, *more):
        seen.append([len(waveform) for waveform in waveforms])
        return call(self, waveforms, *more)

    monkeypatch.setattr(BatchedSpeech2Text, "__call__", recorded)
    samples = sorted((round(seconds * RATE) for seconds in SECONDS), reverse=True)
    frames = -(-2 * samples[1] // (FACTOR * HOP))  # two of the second longest, padded; and not two of the longest
    data = f"{scp},speech,sound"
    for more, wanted in (
        ((), [samples]),
        (("--batch_size", "3"), [samples[:3], samples[3:]]),
        (("--max_batch_frames", str(frames)), [samples[:1], samples[1:3], samples[3:]]),
    ):
        seen.clear()
        assert decode(model, data, tmp_path / "out", *more) == 0
        assert seen == wanted


# --- progress


def test_rtf_is_the_time_over_the_length_of_the_audio(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    with Progress("lines", 5) as progress:
        progress.done(1, 0.0)  # unreadable
        assert progress.rtf is None
        clock[0] += 10
        progress.done(4, 40.0)
        assert progress.rtf == 0.25
        assert progress.summary(1) == "5 utterances, 40.0 s of audio in 10.0 s, RTF 0.2500; 1 skipped"
    assert capsys.readouterr().out == "done 1 0.000\ndone 4 40.000\n"


def test_the_command_counts_what_it_has_done(model, scp, tmp_path, capsys):
    (tmp_path / "wav.scp").write_text(f"{scp.read_text()}gone {tmp_path / 'gone.wav'}\n")
    data = f"{tmp_path / 'wav.scp'},speech,sound"
    assert decode(model, data, tmp_path / "out", "--progress", "lines", "--batch_size", "2") == 0
    said = re.findall(r"^done (\d+) (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert [int(number) for number, _ in said] == [1, 2, 2, 1]
    assert sum(float(seconds) for _, seconds in said) == pytest.approx(sum(SECONDS), abs=0.01)
