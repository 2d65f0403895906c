"""Stage 3: every utterance as one audio file at one sampling rate, with its number of samples.

Segments are cut, commands (`... |`) are run, other rates are resampled. A recording that cannot be read is reported
and left out. The result is a data directory with `utt2num_samples`, `feats_type` and `audio_format` beside its tables.
"""

import argparse
import shutil
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from espnet_mega_plugin.recipe.audio import (
    FORMATS,
    Recording,
    cut,
    hertz,
    read_recording,
    recordings,
    resampled,
    write_audio,
)
from espnet_mega_plugin.recipe.kaldi_dir import DataDir, write_data_dir, write_table


def format_directory(source: Path, target: Path, rate: int, audio_format: str = "flac", jobs: int = 1) -> list[str]:
    """Write data directory `source` anew as `target`, audio included; returns what was left out and why.

    Raises:
        FileNotFoundError, ValueError: `source` lacks a table or its tables disagree; no utterance could be read;
            unknown audio format.
    """
    if audio_format not in FORMATS:
        raise ValueError(f"audio_format must be one of {', '.join(FORMATS)}; got {audio_format!r}")
    sources, data = recordings(source)
    # wav.scp says that a directory is complete: it goes first and comes back last
    (target / "wav.scp").unlink(missing_ok=True)
    shutil.rmtree(target / "data", ignore_errors=True)
    write = partial(_format_recording, folder=target / "data", rate=rate, audio_format=audio_format)
    lengths, problems = {}, []
    with Pool(min(jobs, len(sources)) or 1) as pool:
        done = pool.imap_unordered(write, sources, chunksize=8)
        for found, problem in tqdm(done, total=len(sources), desc=str(target), unit="rec", leave=False, disable=None):
            lengths.update(found)
            problems += problem
    if not lengths:
        raise ValueError(f"{source}: no utterance could be read; the first problem: {(problems or ['it is empty'])[0]}")
    write_table(target / "utt2num_samples", lengths)
    (target / "feats_type").write_text("raw\n")
    (target / "audio_format").write_text(f"{audio_format}\n")
    write_data_dir(
        target,
        DataDir(
            {utt: str(target / "data" / f"{utt}.{audio_format}") for utt in lengths},
            {utt: data.text[utt] for utt in lengths},
            {utt: data.speaker[utt] for utt in lengths},
        ),
    )
    return sorted(problems)


def _format_recording(
    recording: Recording, folder: Path, rate: int, audio_format: str
) -> tuple[dict[str, int], list[str]]:
    lengths, problems = {}, []
    try:
        samples, own_rate = read_recording(recording.source)
    except ValueError as error:
        return {}, [f"{' '.join(recording.utterances)}: {error}"]
    for utterance, span in recording.utterances.items():
        try:
            part = resampled(cut(samples, own_rate, span), own_rate, rate)
        except ValueError as error:
            problems.append(f"{utterance}: {error}")
        else:
            write_audio(folder / f"{utterance}.{audio_format}", part, rate)
            lengths[utterance] = len(part)
    return lengths, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fs", default="16k", help="sampling rate: 16000 or 16k")
    parser.add_argument("--audio_format", default="flac", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--nj", type=int, default=1, help="parallel processes")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    try:
        problems = format_directory(args.source, args.target, hertz(args.fs), args.audio_format, args.nj)
    except (OSError, ValueError) as error:
        sys.exit(f"format_wav: {error}")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"{args.target}: left out {len(problems)} times, see above", file=sys.stderr)


if __name__ == "__main__":
    main()
