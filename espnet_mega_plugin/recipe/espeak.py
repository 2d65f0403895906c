"""Speech from text: espeak-ng's library, as the pip package `espeakng-loader` carries it, called through ctypes.

espeak-ng keeps memory from one utterance to the next (phases of its oscillators, its random numbers), and neither
choosing the voice again, nor its random seed, nor `espeak_Terminate` clears it: measured with version 1.52, 55 of 56
utterances changed with what was spoken before them. So the library is unloaded and loaded again for every utterance,
which takes about 4 ms and gives what a fresh process gives (tests/recipe/test_espeak.py compares the two).

espeak-ng is free software under the GPL, version 3 or later. It is used here as a separate library, when data are
made; nothing of it is part of this package, and models trained on its output do not contain it.
"""

import _ctypes
import ctypes
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np

RATE_RANGE = (80, 450)  # words per minute
PITCH_RANGE = (0, 99)

# Numbers from espeak-ng's speak_lib.h
_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_UTF8 = 1
_POSITION_CHARACTER = 1
_PARAMETER = {"rate": 1, "volume": 2, "pitch": 3}
_VOLUME = 60  # of 100, where the loudest voices reach full scale
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def speak(text: str, voice: str, *, rate: int = 175, pitch: int = 50, seed: int = 0) -> tuple[np.ndarray, int]:
    """Speak a text. The same arguments give the same samples, whatever was spoken before and in whichever process.

    Args:
        text: what to say, words in the voice's language.
        voice: a language of espeak-ng with an optional variant: "en-us", "en+f2" ("en" is British English).
        rate: words per minute, 80 to 450.
        pitch: 0 to 99, around the voice's own.
        seed: of the noise in breathy voices; the others are not random.

    Returns:
        samples: (L,) int16, mono.
        sample_rate: samples a second (22050).

    Raises:
        ModuleNotFoundError: `espeakng-loader` is not installed.
        ValueError: no such voice, a number outside its range, or a text without anything to say.
        TypeError: `rate` or `pitch` is not a whole number.
        RuntimeError: espeak-ng refused to start, or something else in this process holds its library.
    """
    for name, value, (low, high) in (("rate", rate, RATE_RANGE), ("pitch", pitch, PITCH_RANGE)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    _check_variant(voice)
    chunks: list[bytes] = []

    def collect(samples, count, _events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    callback = _CALLBACK(collect)  # keeps the function alive while C may call it
    with _fresh_library() as library:
        sample_rate = _initialise(library)
        library.espeak_SetSynthCallback(callback)
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        # The voice first: choosing it sets rate and pitch.
        if library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}; `python -m {__name__}` lists languages and variants")
        for name, value in (("rate", rate), ("volume", _VOLUME), ("pitch", pitch)):
            library.espeak_SetParameter(_PARAMETER[name], value, 0)
        encoded = text.encode()
        status = library.espeak_Synth(encoded, len(encoded) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        library.espeak_Synchronize()
        if status:
            raise RuntimeError(f"espeak-ng could not speak {text!r}: status {status}")
    samples = np.frombuffer(b"".join(chunks), dtype=np.int16)
    if not samples.any():
        raise ValueError(f"espeak-ng has nothing to say for {text!r} with voice {voice!r}")
    return samples, sample_rate


def version() -> str:
    """espeak-ng's version, for example "1.52.0"."""
    with _fresh_library() as library:
        library.espeak_Info.restype = ctypes.c_char_p
        return library.espeak_Info(None).decode()


def languages() -> list[str]:
    """What may stand before the "+" of a voice."""
    return sorted(file.name for file in (_data_path() / "lang").rglob("*") if file.is_file())


def variants() -> list[str]:
    """What may stand after the "+" of a voice."""
    return sorted(file.name for file in (_data_path() / "voices" / "!v").iterdir())


def _check_variant(voice: str) -> None:
    # espeak-ng itself speaks with the plain voice, in silence about it, where the variant does not exist.
    _, plus, variant = voice.partition("+")
    if plus and variant not in variants():
        raise ValueError(f"espeak-ng has no variant {variant!r} (voice {voice!r}); it has {', '.join(variants())}")


def _loader():
    try:
        import espeakng_loader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "synthesis needs espeak-ng's library: pip install 'espeakng-loader>=0.2.4'", name="espeakng_loader"
        ) from error
    return espeakng_loader


def _data_path() -> Path:
    return Path(_loader().get_data_path())


@contextmanager
def _fresh_library():
    """espeak-ng's library in the state it has when a process starts; unloaded on leaving."""
    path = _loader().get_library_path()
    if not os.path.isfile(path):
        raise RuntimeError(f"espeakng-loader names a library that is not there: {path}; reinstall the package")
    if _loaded(path):
        raise RuntimeError(
            f"{path} is in use in this process already (another package that speaks, or a C library that cannot "
            "unload); its memory would change the samples. Synthesise in a process of its own"
        )
    library = ctypes.CDLL(path)
    try:
        yield library
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)


def _loaded(path: str) -> bool:
    try:
        handle = _ctypes.dlopen(path, os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    _ctypes.dlclose(handle)
    return True


def _initialise(library: ctypes.CDLL) -> int:
    # espeak-ng wants the folder that holds espeak-ng-data; with _DONT_EXIT it answers instead of ending the process.
    folder = os.fsencode(_data_path().parent)
    sample_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, folder, _DONT_EXIT)
    if sample_rate <= 0:
        raise RuntimeError(f"espeak-ng could not read its data in {os.fsdecode(folder)}; reinstall espeakng-loader")
    return sample_rate


if __name__ == "__main__":
    print("languages:", *languages())
    print("variants:", *variants())
