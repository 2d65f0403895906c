"""Stages 2 to 4: speed perturbation, formatting, the length filter."""

import shlex
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import soundfile
from tones import HERTZ, corpus, spoken

from espnet_mega_plugin.recipe.audio import hertz, resampled
from espnet_mega_plugin.recipe.filter_lengths import filter_directory
from espnet_mega_plugin.recipe.format_wav import format_directory
from espnet_mega_plugin.recipe.kaldi_dir import read_table, validate, write_table
from espnet_mega_plugin.recipe.perturb import perturb_directory, speed_factors

SENTENCES = ["A", "BE CO", "DI EK FU", "CO A"]


def loudest_hertz(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * rate / len(samples)


def formatted(source, target, **options):
    options = {"rate": 16000, "jobs": 2} | options
    return format_directory(source, target, **options)


def test_formatting_keeps_the_samples(tmp_path):
    data = corpus(tmp_path / "data", SENTENCES)
    assert formatted(tmp_path / "data", tmp_path / "dump") == []
    made = validate(tmp_path / "dump")
    assert (made.text, made.speaker) == (data.text, data.speaker)
    lengths = read_table(tmp_path / "dump" / "utt2num_samples")
    for utt, path in made.wav.items():
        before, after = soundfile.read(data.wav[utt], dtype="int16")[0], soundfile.read(path, dtype="int16")[0]
        np.testing.assert_array_equal(before, after)
        assert path.endswith(".flac") and int(lengths[utt]) == len(after)
    assert (tmp_path / "dump" / "feats_type").read_text() == "raw\n"
    assert (tmp_path / "dump" / "audio_format").read_text() == "flac\n"


def test_formatting_again_forgets_what_is_gone(tmp_path):
    corpus(tmp_path / "data", SENTENCES)
    formatted(tmp_path / "data", tmp_path / "dump")
    corpus(tmp_path / "data", SENTENCES[:2])
    formatted(tmp_path / "data", tmp_path / "dump", audio_format="wav")
    assert len(validate(tmp_path / "dump")) == 2
    assert len(list((tmp_path / "dump" / "data").iterdir())) == 2


def test_segments_are_cut(tmp_path):
    corpus(tmp_path / "data", ["A BE CO"], speakers=1)
    name = "s0-000"
    # 0.05 s pause, then 0.25 s of tone and 0.05 s of pause a word
    spans = {"s0-a": (0.05, 0.30), "s0-c": (0.65, 0.90), "s0-end": (0.65, 1.1)}
    write_table(tmp_path / "data" / "segments", {utt: f"{name} {a} {b}" for utt, (a, b) in spans.items()})
    write_table(tmp_path / "data" / "text", {"s0-a": "A", "s0-c": "CO", "s0-end": "CO"})
    write_table(tmp_path / "data" / "utt2spk", dict.fromkeys(spans, "s0"))
    assert formatted(tmp_path / "data", tmp_path / "dump") == []
    made = validate(tmp_path / "dump")
    lengths = {utt: int(n) for utt, n in read_table(tmp_path / "dump" / "utt2num_samples").items()}
    assert lengths == {"s0-a": 4000, "s0-c": 4000, "s0-end": round(0.3 * 16000)}  # the last one overruns by 0.15 s
    for utt, word in made.text.items():
        samples, rate = soundfile.read(made.wav[utt])
        assert loudest_hertz(samples, rate) == pytest.approx(HERTZ[word], abs=5)


def test_a_segment_outside_is_left_out_alone(tmp_path):
    corpus(tmp_path / "data", ["A BE"], speakers=1)
    write_table(tmp_path / "data" / "segments", {"s0-far": "s0-000 9 10", "s0-fit": "s0-000 0 0.3"})
    write_table(tmp_path / "data" / "text", {"s0-far": "A", "s0-fit": "A"})
    write_table(tmp_path / "data" / "utt2spk", {"s0-far": "s0", "s0-fit": "s0"})
    problems = formatted(tmp_path / "data", tmp_path / "dump")
    assert len(problems) == 1 and "s0-far: segment 9.0 to 10.0 s lies outside" in problems[0]
    assert list(validate(tmp_path / "dump").wav) == ["s0-fit"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("s0-000 0.5", "expected 'recording start end'"),
        ("nobody 0 1", "cut from 'nobody'"),
        ("s0-000 1 1", "0 <= start < end"),
    ],
)
def test_malformed_segments(tmp_path, line, message):
    corpus(tmp_path / "data", ["A"], speakers=1)
    write_table(tmp_path / "data" / "segments", {"s0-000": line})
    with pytest.raises(ValueError, match=message):
        formatted(tmp_path / "data", tmp_path / "dump")


def test_a_command_is_run_and_its_failure_reported(tmp_path):
    data = corpus(tmp_path / "data", SENTENCES)
    good, bad, *_ = data.wav
    cat = f"{shlex.quote(sys.executable)} -c 'import sys; sys.stdout.buffer.write(open(sys.argv[1], \"rb\").read())'"
    fail = f"{shlex.quote(sys.executable)} -c 'import sys; sys.exit(\"no such tape\")'"
    write_table(
        tmp_path / "data" / "wav.scp", {**data.wav, good: f"{cat} {shlex.quote(data.wav[good])} |", bad: f"{fail} |"}
    )
    problems = formatted(tmp_path / "data", tmp_path / "dump")
    assert len(problems) == 1 and problems[0].startswith(f"{bad}: ") and "exit status 1 no such tape" in problems[0]
    made = validate(tmp_path / "dump")
    assert set(made.wav) == set(data.wav) - {bad}
    np.testing.assert_array_equal(soundfile.read(made.wav[good])[0], soundfile.read(data.wav[good])[0])


@pytest.mark.parametrize("kind", ["text", "empty", "missing", "stereo", "no samples"])
def test_broken_audio_is_reported_and_left_out(tmp_path, kind):
    data = corpus(tmp_path / "data", SENTENCES)
    broken = list(data.wav)[1]
    path = tmp_path / "data" / "wav" / f"{broken}.wav"
    if kind == "missing":
        path.unlink()
    elif kind == "stereo":
        soundfile.write(path, np.zeros((1000, 2)), 16000)
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), 16000)
    else:
        path.write_bytes(b"" if kind == "empty" else b"this is no sound at all" * 50)
    problems = formatted(tmp_path / "data", tmp_path / "dump")
    assert len(problems) == 1 and problems[0].startswith(f"{broken}: {path}: ")
    assert ("has 2 channels" in problems[0]) == (kind == "stereo")
    assert set(validate(tmp_path / "dump").wav) == set(data.wav) - {broken}


def test_nothing_readable_is_an_error(tmp_path):
    data = corpus(tmp_path / "data", ["A"])
    write_table(tmp_path / "data" / "wav.scp", dict.fromkeys(data.wav, str(tmp_path / "nowhere.wav")))
    with pytest.raises(ValueError, match="no utterance could be read; the first problem: .*nowhere.wav"):
        formatted(tmp_path / "data", tmp_path / "dump")
    with pytest.raises(ValueError, match="audio_format must be one of wav, flac; got 'mp3'"):
        formatted(tmp_path / "data", tmp_path / "dump", audio_format="mp3")


@pytest.mark.parametrize("rate", [8000, 12000, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    data = corpus(tmp_path / "data", ["A BE", "CO"], rate=rate)
    formatted(tmp_path / "data", tmp_path / "dump", audio_format="wav")
    for utt, path in validate(tmp_path / "dump").wav.items():
        samples, made_rate = soundfile.read(path)
        assert made_rate == 16000
        assert len(samples) == -(-soundfile.info(data.wav[utt]).frames * 16000 // rate)
        # the same sentence spoken at 16 kHz, apart from noise and the ends of the tones
        wanted = spoken(data.text[utt])[: len(samples)]
        error = np.sqrt(np.mean((samples[: len(wanted)] - wanted) ** 2))
        assert error < 0.03, error


def test_resampling_removes_what_the_rate_cannot_hold():
    time = np.arange(16000) / 16000
    high = np.sin(2 * np.pi * 6000 * time)  # above 4 kHz: would come back as 2 kHz
    assert np.abs(resampled(high, 16000, 8000))[500:-500].max() < 0.01


def test_rates():
    assert [hertz(text) for text in ("16k", "16000", "22.05k", "8k")] == [16000, 16000, 22050, 8000]
    for text in ("", "k", "fast", "-8k", "0", "16K", "16", "999", "0.5k"):
        with pytest.raises(ValueError, match=f"--fs {text!r}: expected .* at least 1000 Hz such as 16000 or 16k"):
            hertz(text)


@pytest.mark.parametrize("step", ["format_wav", "filter_lengths --min_wav_duration 0 --max_wav_duration 9"])
def test_a_rate_in_kilohertz_without_its_k_is_refused(tmp_path, step):
    call = [sys.executable, "-m", *f"espnet_mega_plugin.recipe.{step} --fs 16".split(), "source", "target"]
    refused = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1 and not list(tmp_path.iterdir())
    assert "--fs '16': expected" in refused.stderr and "Traceback" not in refused.stderr


# ----------------------------------------------------------------------------------------------------------------------


def test_speed_scales_duration_and_pitch(tmp_path):
    data = corpus(tmp_path / "data", ["A", "CO"])
    assert perturb_directory(tmp_path / "data", tmp_path / "sp", speed_factors("0.9 1.0 1.1"), jobs=2) == []
    made = validate(tmp_path / "sp")
    assert len(made) == 3 * len(data)
    for utt in data.wav:
        n = soundfile.info(data.wav[utt]).frames
        assert made.wav[utt] == data.wav[utt]
        for name in ("0.9", "1.1"):
            copy = f"sp{name}-{utt}"
            samples, rate = soundfile.read(made.wav[copy])
            assert rate == 16000 and len(samples) == pytest.approx(n / float(name), abs=1)
            tone = HERTZ[data.text[utt]]
            assert loudest_hertz(samples, rate) == pytest.approx(tone * float(name), abs=5)
            assert made.text[copy] == data.text[utt]
            assert made.speaker[copy] == f"sp{name}-{data.speaker[utt]}"


def test_speed_of_segments(tmp_path):
    corpus(tmp_path / "data", ["A BE"], speakers=1)
    write_table(tmp_path / "data" / "segments", {"s0-x": "s0-000 0 0.3"})
    write_table(tmp_path / "data" / "text", {"s0-x": "A"})
    write_table(tmp_path / "data" / "utt2spk", {"s0-x": "s0"})
    perturb_directory(tmp_path / "data", tmp_path / "sp", speed_factors("1 2"))
    made = validate(tmp_path / "sp")
    assert {utt: soundfile.info(path).frames for utt, path in made.wav.items()} == {"s0-x": 4800, "sp2-s0-x": 2400}


def test_a_broken_recording_gets_no_copies(tmp_path):
    data = corpus(tmp_path / "data", ["A", "CO"], speakers=1)
    (tmp_path / "data" / "wav" / "s0-000.wav").write_bytes(b"silence")
    problems = perturb_directory(tmp_path / "data", tmp_path / "sp", speed_factors("0.9 1.1"))
    assert [problem.split(":")[0] for problem in problems] == ["sp0.9-s0-000", "sp1.1-s0-000"]
    assert list(validate(tmp_path / "sp").wav) == ["sp0.9-s0-001", "sp1.1-s0-001"] and len(data) == 2


def test_speed_factors():
    assert speed_factors("0.9 1.0") == {"0.9": Fraction(9, 10), "1.0": Fraction(1)}
    for text in ("", "slow", "0", "0.9 0.90", "11", "-1", "1/0"):
        with pytest.raises(ValueError, match="speed_perturb_factors"):
            speed_factors(text)


# ----------------------------------------------------------------------------------------------------------------------


def test_filter_drops_short_long_and_wordless(tmp_path):
    # 0.05 + 0.3 s a word: 0.35, 0.65, 0.95 and 0.65 s
    data = corpus(tmp_path / "data", ["A", "BE CO", "DI EK FU", "CO A"], speakers=1)
    write_table(tmp_path / "data" / "text", {**data.text, "s0-003": ""})
    formatted(tmp_path / "data", tmp_path / "org")
    left_out = filter_directory(tmp_path / "org", tmp_path / "dump", 16000, 0.5, 0.9)
    assert left_out == {"shorter than 0.5 s": ["s0-000"], "longer than 0.9 s": ["s0-002"], "without words": ["s0-003"]}
    made = validate(tmp_path / "dump")
    assert list(made.wav) == ["s0-001"]
    assert read_table(tmp_path / "dump" / "utt2num_samples") == {"s0-001": str(round(0.65 * 16000))}
    assert (tmp_path / "dump" / "feats_type").read_text() == "raw\n"


def test_filter_keeps_exact_bounds(tmp_path):
    corpus(tmp_path / "data", ["A", "BE CO"], speakers=1)
    formatted(tmp_path / "data", tmp_path / "org")
    filter_directory(tmp_path / "org", tmp_path / "dump", 16000, 0.35, 0.65)
    assert len(validate(tmp_path / "dump")) == 2


def test_filter_that_leaves_nothing_is_an_error(tmp_path):
    corpus(tmp_path / "data", ["A"], speakers=1)
    formatted(tmp_path / "data", tmp_path / "org")
    with pytest.raises(ValueError, match=r"no utterance is left \(1 longer than 0.1 s\)"):
        filter_directory(tmp_path / "org", tmp_path / "dump", 16000, 0.0, 0.1)
