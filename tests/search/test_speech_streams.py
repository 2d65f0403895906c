"""`BatchedSpeech2Text.streams`: audio in chunks, taken whole or not at all, whoever else uses the model."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_experiment
import torch
from tiny_experiment import RATE, experiment, waveform

from espnet_mega_plugin.decode.speech2text import BatchedSpeech2Text
from espnet_mega_plugin.decode.streaming import chunks

MAES = {"beam_size": 4, "beam_search_config": {"search_type": "maes", "nstep": 2}}
SAMPLES = 640 * RATE // 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return experiment(tmp_path_factory.mktemp("streams"), 5, streaming=True)


@pytest.fixture(scope="module")
def ours(model):
    return BatchedSpeech2Text(**model, **MAES, streaming=True)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """Three chunks and a part."""
    return np.concatenate([waveform(1.35, 51), waveform(1.35, 52)])[: 3 * SAMPLES + 2000]


def same(found: list[tuple], wanted: list[tuple]) -> bool:
    return found[0][:3] == wanted[0][:3] and found[0][3].score == pytest.approx(wanted[0][3].score, rel=1e-5)


def pushed(ours, pieces, closed: bool = True):
    streams = ours.streams()
    stream = streams.open()
    for piece in pieces:
        streams.push({stream: piece})
    return streams.close(stream) if closed else (streams, stream)


@pytest.mark.parametrize("length", [3 * SAMPLES + 2000, 3 * SAMPLES + 1, 2 * SAMPLES])  # a stereo tail of one sample
def test_two_channels_are_heard_as_the_first(ours, speech, length):
    first, other = speech[:length], waveform(4, 7)[:length]
    stereo = np.stack([first, other], 1)
    [wanted] = ours([first])
    assert same(ours([stereo])[0], wanted)
    streams = ours.streams()
    stream = streams.open()
    pieces = chunks(torch.from_numpy(stereo), streams.samples)
    for piece in pieces[:-1]:
        streams.push({stream: piece})
    streams.push({stream: pieces[-1]}, final={stream})
    assert same(streams.close(stream), wanted)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.zeros(7, np.float32), ValueError, "a chunk of stream 1 has 7 samples; expected 10240"),
        (np.zeros(2 * SAMPLES, np.float32), ValueError, "a chunk of stream 1 has 20480 samples"),
        (np.full(SAMPLES, np.nan, np.float32), ValueError, "the chunk of stream 1 holds NaN"),
        (np.zeros((2, SAMPLES), np.float32), ValueError, r"the chunk of stream 1 .*got shape \(2, 10240\)"),
        ([0.0] * SAMPLES, TypeError, "the chunk of stream 1 must be an array or a tensor; got list"),
    ],
    ids=["short", "long", "nan", "transposed", "list"],
)
def test_a_refused_chunk_leaves_every_stream_as_it_was(ours, speech, bad, error, message):
    a_pieces = chunks(torch.from_numpy(speech), SAMPLES)
    streams = ours.streams()
    a, b = streams.open(), streams.open()
    for piece in a_pieces[:-1]:
        with pytest.raises(error, match=message):
            streams.push({a: piece, b: bad})
        with pytest.raises(KeyError, match="stream 99 is not open"):
            streams.push({a: piece, 99: piece})
        with pytest.raises(KeyError, match="stream 99 is not open"):
            streams.push({a: piece}, final={99})
        streams.push({a: piece})
    streams.push({a: a_pieces[-1]}, final={a})
    assert same(streams.close(a), ours([speech])[0])
    assert streams.close(b)[0][2] == []  # nothing was heard, nothing is said


def test_final_without_a_chunk_is_an_empty_last_chunk(ours, speech):
    whole = speech[: 3 * SAMPLES]
    [wanted] = ours([whole])
    streams, stream = pushed(ours, whole.reshape(3, SAMPLES), closed=False)
    assert not same(streams.partial(stream), wanted)  # the end is still to come
    streams.push({}, final={stream})
    assert same(streams.partial(stream), wanted)
    for call in (lambda: streams.push({stream: whole[:SAMPLES]}), lambda: streams.push({}, final={stream})):
        with pytest.raises(ValueError, match=rf"stream {stream} had its last chunk \(final\)"):
            call()
    assert same(streams.close(stream), wanted)
    with pytest.raises(KeyError, match=f"stream {stream} is not open"):
        streams.push({}, final={stream})
    with pytest.raises(KeyError, match=f"stream {stream} is not open"):
        streams.close(stream)


def test_close_hears_a_stream_to_its_end(ours, speech):
    whole = speech[: 3 * SAMPLES]
    assert same(pushed(ours, whole.reshape(3, SAMPLES)), ours([whole])[0])


@pytest.mark.parametrize("streaming", [True, False])
def test_threads_say_what_each_says_alone(model, streaming):
    ours = BatchedSpeech2Text(**model, **MAES, streaming=streaming, decoding_window=160)
    speech = [waveform(1.3, 60 + i) for i in range(4)]
    wanted = [ours([one])[0] for one in speech]
    with ThreadPoolExecutor(len(speech)) as threads:
        for _ in range(3):
            for found, alone in zip(threads.map(lambda one: ours([one])[0], speech), wanted, strict=True):
                assert same(found, alone)


def test_a_window_is_milliseconds_at_the_models_sampling_rate(tmp_path, monkeypatch):
    plain = tiny_experiment.configuration

    def telephone(**options) -> dict:
        config = plain(**options)
        config["frontend_conf"]["fs"] = "8k"
        return config

    monkeypatch.setattr(tiny_experiment, "configuration", telephone)
    ours = BatchedSpeech2Text(**experiment(tmp_path, 5, streaming=True), **MAES, streaming=True, decoding_window=640)
    assert ours.sampling_rate == 8000 and ours.streams().samples == 5120
    heard = []
    ours([waveform(1, 51)], lambda place, milliseconds, results: heard.append(milliseconds))  # two seconds at 8 kHz
    assert heard == [640, 1280, 1920]


@pytest.mark.parametrize("length", [600, SAMPLES, SAMPLES + 100, 3 * SAMPLES + 2000])
def test_times_end_with_the_audio(ours, speech, length):
    """A last chunk is filled up with silence, in which this model hears labels."""
    result = ours([speech[:length]])[0][0]
    times, words, end = ours.times(result), ours.words(result), length / RATE
    assert times == sorted(times) and 0 <= times[0] and times[-1] < end
    assert all(word.start < word.end <= end for word in words)
    assert words[-1].end == end


@pytest.mark.parametrize("window", [0, 5, -640, 119, float("nan"), "640", True])
def test_a_window_too_short_for_a_frame_is_refused(model, window):
    with pytest.raises(ValueError, match=f"decoding_window must be at least 120 milliseconds.* got {window!r}"):
        BatchedSpeech2Text(**model, **MAES, streaming=True, decoding_window=window)
    BatchedSpeech2Text(**model, **MAES, decoding_window=window)  # is not looked at


def test_the_least_window_works(model, speech):
    ours = BatchedSpeech2Text(**model, **MAES, streaming=True, decoding_window=120)
    assert ours([speech])[0][0][2]


def test_a_frontend_that_needs_all_channels_is_not_given_one(ours, monkeypatch, speech):
    monkeypatch.setattr(ours.asr_model.frontend.frontend, "use_beamformer", True)
    streams = ours.streams()
    stream = streams.open()
    with pytest.raises(ValueError, match=rf"chunk of stream {stream} must be \(samples,\); got shape \(10240, 2\)"):
        streams.push({stream: np.stack([speech[:SAMPLES]] * 2, 1)})
