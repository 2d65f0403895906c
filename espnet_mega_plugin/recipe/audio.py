"""Recordings as Kaldi tables name them: a file, a `command |`, or a segment of one; read, resampled, written.

Samples are float64 in [-1, 1), one channel. libsndfile reads WAV, FLAC, OGG, MP3 and NIST SPHERE among others.
"""

import io
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile

from espnet_mega_plugin.recipe.kaldi_dir import DataDir, read_table

FORMATS = {"wav": "WAV", "flac": "FLAC"}


@dataclass(frozen=True)
class Recording:
    """One line of wav.scp with the utterances cut from it: name -> (start, end) in seconds, None for all of it."""

    source: str
    utterances: Mapping[str, tuple[float, float] | None]


def recordings(directory: Path) -> tuple[list[Recording], DataDir]:
    """The recordings of a data directory, and its tables by utterance (`wav` gives the recording's source).

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: the tables disagree, a segment is malformed or names an unknown recording.
    """
    sources = read_table(directory / "wav.scp")
    text = read_table(directory / "text", empty_values=True)
    speaker = read_table(directory / "utt2spk")
    if (directory / "segments").exists():
        segments = read_table(directory / "segments")
        spans = {utt: _segment(directory, utt, line, sources) for utt, line in segments.items()}
    else:
        spans = {utt: (utt, None) for utt in sources}
    for name, table in (("text", text), ("utt2spk", speaker)):
        if odd := sorted(table.keys() ^ spans.keys()):
            raise ValueError(f"{directory}: {name} and the audio differ in {len(odd)} utterances, e.g. {odd[0]!r}")
    parts: dict[str, dict] = {}
    for utt, (name, span) in spans.items():
        parts.setdefault(name, {})[utt] = span
    data = DataDir({utt: sources[name] for utt, (name, _) in spans.items()}, text, speaker)
    return [Recording(sources[name], utterances) for name, utterances in parts.items()], data


def _segment(directory: Path, utterance: str, line: str, sources: Mapping) -> tuple[str, tuple[float, float]]:
    where = f"{directory / 'segments'}: {utterance!r}"
    try:
        name, start, end = line.split()
        start, end = float(start), float(end)
    except ValueError:
        raise ValueError(f"{where}: expected 'recording start end', got {line!r}") from None
    if name not in sources:
        raise ValueError(f"{where} is cut from {name!r}, which wav.scp does not have")
    if not 0 <= start < end:
        raise ValueError(f"{where}: start {start} and end {end} seconds must satisfy 0 <= start < end")
    return name, (start, end)


def read_recording(source: str) -> tuple[np.ndarray, int]:
    """Samples (N,) and rate in Hz of a file or of what `command |` prints.

    Raises:
        ValueError: it cannot be read, is empty, or has more than one channel; says which and why.
    """
    try:
        if source.rstrip().endswith("|"):
            result = subprocess.run(source.rstrip()[:-1], shell=True, capture_output=True)
            if result.returncode:
                last = result.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
                raise ValueError(f"exit status {result.returncode} {' '.join(last)}")
            samples, rate = soundfile.read(io.BytesIO(result.stdout))
        else:
            samples, rate = soundfile.read(source)
    except (OSError, RuntimeError, ValueError, TypeError) as error:  # libsndfile's errors are RuntimeErrors
        raise ValueError(f"{source}: cannot be read: {error}") from error
    if samples.ndim > 1:
        raise ValueError(f"{source}: has {samples.shape[1]} channels, expected 1; choose one in local/data.sh")
    if not len(samples):
        raise ValueError(f"{source}: has no samples")
    return samples, rate


def cut(samples: np.ndarray, rate: int, span: tuple[float, float] | None) -> np.ndarray:
    """The part from start to end seconds, all for None; the end may lie up to 0.5 s behind the recording's.

    Raises:
        ValueError: the segment lies outside of the recording.
    """
    if span is None:
        return samples
    start, end = (round(second * rate) for second in span)
    if start >= len(samples) or end > len(samples) + rate // 2:
        raise ValueError(
            f"segment {span[0]} to {span[1]} s lies outside of its recording, which lasts {len(samples) / rate:.2f} s"
        )
    return samples[start:end]


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """The same sound at another rate, ceil(N * wanted / rate) samples."""
    if rate == wanted:
        return samples
    return stretched(samples, Fraction(wanted, rate))


def stretched(samples: np.ndarray, ratio: Fraction) -> np.ndarray:
    """`ratio` times as many samples for the same curve, without aliasing."""
    from scipy.signal import resample_poly  # takes a second, and most corpora need no resampling

    return resample_poly(samples, ratio.numerator, ratio.denominator)


def write_audio(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write 16-bit WAV or FLAC, by the name's ending; louder than full scale is clipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.clip(samples, -1.0, 1.0), rate, format=FORMATS[path.suffix[1:]], subtype="PCM_16")


def hertz(text: str) -> int:
    """`16k` or `16000` -> 16000.

    Raises:
        ValueError: neither form, or below 1000 Hz: kilohertz without their `k`.
    """
    number = text.removesuffix("k")
    rate = float(number) * (1000 if text.endswith("k") else 1) if number.replace(".", "", 1).isdigit() else 0
    if rate < 1000:
        raise ValueError(f"--fs {text!r}: expected a sampling rate of at least 1000 Hz such as 16000 or 16k")
    return round(rate)
