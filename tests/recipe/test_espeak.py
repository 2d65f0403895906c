"""espeak-ng through ctypes: what is spoken depends on the arguments alone, and on every one of them."""

import _ctypes
import ctypes
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from espnet_mega_plugin.recipe import espeak
from espnet_mega_plugin.recipe.spoken_numbers import UNSEEN_VOICES, VOICES

TEXTS = ["nine zero four", "set the alarm at half past seven"]
ITEMS = [(text, voice) for voice in ("en-us", "en+f5", "en-us+m7") for text in TEXTS]


def digest(samples: np.ndarray) -> str:
    return hashlib.sha256(samples.tobytes()).hexdigest()


def test_samples_are_those_of_a_fresh_process_whatever_was_spoken_before():
    code = (
        "import sys, hashlib; from espnet_mega_plugin.recipe.espeak import speak;"
        "print(hashlib.sha256(speak(sys.argv[1], sys.argv[2], seed=3)[0].tobytes()).hexdigest())"
    )
    fresh = {}
    for item in ITEMS:
        done = subprocess.run([sys.executable, "-c", code, *item], capture_output=True, text=True, check=True)
        fresh[item] = done.stdout.strip()
    assert len(set(fresh.values())) == len(ITEMS)
    for order in (ITEMS, ITEMS[::-1], ITEMS[::2] + ITEMS[::-3]):
        assert {item: digest(espeak.speak(*item, seed=3)[0]) for item in order} == {item: fresh[item] for item in order}


def test_every_argument_is_heard():
    plain, rate = espeak.speak(TEXTS[1], "en-us")
    assert rate == 22050 and plain.dtype == np.int16 and 1.0 < len(plain) / rate < 4.0
    slow, fast = (espeak.speak(TEXTS[1], "en-us", rate=words)[0] for words in (120, 240))
    assert len(slow) > 1.4 * len(plain) > 1.7 * len(fast)
    low, high = (fundamental(*espeak.speak(TEXTS[1], "en-us", pitch=pitch)) for pitch in (30, 70))
    assert high > 1.2 * low, f"fundamental {low:.0f} Hz at pitch 30, {high:.0f} Hz at pitch 70"
    assert digest(espeak.speak(TEXTS[0], "en-us")[0]) != digest(plain)
    breathy, other_breath = (digest(espeak.speak(TEXTS[1], "en+f5", seed=seed)[0]) for seed in (1, 2))
    assert breathy != other_breath


def test_the_corpus_voices_differ_from_one_another():
    """More than one voice from itself with other noise: distance of long-term spectra, in decibels."""
    voices = {**VOICES, **UNSEEN_VOICES}.values()
    spectra = {voice: spectrum(*espeak.speak(TEXTS[1], voice)) for voice in voices}
    same = max(np.abs(spectra[voice] - spectrum(*espeak.speak(TEXTS[1], voice, seed=9))).mean() for voice in voices)
    for voice in voices:
        for other in voices:
            distance = np.abs(spectra[voice] - spectra[other]).mean()
            assert voice == other or distance > 2 * same, f"{voice} and {other}: {distance:.2f} dB, same {same:.2f} dB"


def test_female_voices_are_higher_than_male_ones():
    female, male = [], []
    for speaker, voice in {**VOICES, **UNSEEN_VOICES}.items():
        (female if "_f" in speaker else male).append(fundamental(*espeak.speak(TEXTS[1], voice)))
    assert min(female) > 1.3 * max(male), f"female {female}, male {male}"


@pytest.mark.parametrize("voice", [*VOICES.values(), *UNSEEN_VOICES.values()])
def test_no_voice_reaches_full_scale(voice):
    samples, _ = espeak.speak("zero one two three four five six seven eight nine ten", voice, pitch=62)
    assert 3000 < np.abs(samples.astype(int)).max() < 32000


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("yes", "xx"), {}, ValueError, "no voice 'xx'"),
        (("yes", "en+nobody"), {}, ValueError, "no variant 'nobody'.*belinda"),
        (("yes", "en"), {"rate": 79}, ValueError, "rate must be between 80 and 450, got 79"),
        (("yes", "en"), {"rate": 451}, ValueError, "rate must be between 80 and 450, got 451"),
        (("yes", "en"), {"pitch": 100}, ValueError, "pitch must be between 0 and 99, got 100"),
        (("yes", "en"), {"pitch": 50.0}, TypeError, "pitch must be a whole number, got 50.0"),
        (("", "en"), {}, ValueError, "nothing to say for ''"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing_behind(arguments, options, error, message):
    before = digest(espeak.speak(*ITEMS[0])[0])
    with pytest.raises(error, match=message):
        espeak.speak(*arguments, **options)
    assert digest(espeak.speak(*ITEMS[0])[0]) == before


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'espeakng-loader"):
        espeak.speak("yes", "en")


def test_a_library_that_somebody_else_holds_is_not_shared():
    import espeakng_loader

    held = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        with pytest.raises(RuntimeError, match="in use in this process already"):
            espeak.speak("yes", "en")
    finally:
        _ctypes.dlclose(held._handle)
    assert espeak.speak("yes", "en")[0].any()


def fundamental(samples: np.ndarray, rate: int) -> float:
    """Median frequency of the voiced frames of 46 ms, in Hz: the highest peak of the autocorrelation, 70 to 400 Hz."""
    found = []
    for start in range(0, len(samples) - 1024, 512):
        frame = samples[start : start + 1024].astype(float)
        correlation = np.correlate(frame, frame, "full")[1023:]
        lag = rate // 400 + int(np.argmax(correlation[rate // 400 : rate // 70]))
        if frame.std() > 500 and correlation[lag] > 0.5 * correlation[0]:
            found.append(rate / lag)
    return float(np.median(found))


def spectrum(samples: np.ndarray, rate: int) -> np.ndarray:
    """Mean power in 64 bands up to 8 kHz, in decibels relative to the loudest."""
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(float), 1024)[::256] * np.hanning(1024)
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(0)[1 : int(8000 / rate * 1024)]
    bands = np.array([band.mean() for band in np.array_split(power, 64)])
    return 10 * np.log10(bands / bands.max())
