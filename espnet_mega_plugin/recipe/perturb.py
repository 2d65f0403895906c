"""Stage 2: the training set at several speeds.

Factor 0.9 plays slower: the audio is resampled to 1/0.9 of its samples, which lowers the pitch as well. The copies are
new utterances of new speakers, `sp0.9-<name>`, as Kaldi's perturb_data_dir_speed.sh names them; factor 1 keeps names
and recordings. A recording that cannot be read is reported and gets no copies.
"""

import argparse
import shutil
import sys
from fractions import Fraction
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from espnet_mega_plugin.recipe.audio import Recording, cut, read_recording, recordings, stretched, write_audio
from espnet_mega_plugin.recipe.kaldi_dir import DataDir, write_data_dir


def speed_factors(text: str) -> dict[str, Fraction]:
    """`"0.9 1.0 1.1"` -> factor as written -> its value.

    Raises:
        ValueError: not numbers between 0.1 and 10, or one twice.
    """
    try:
        factors = {word: Fraction(word) for word in text.split()}
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"speed_perturb_factors {text!r}: expected numbers such as '0.9 1.0 1.1'") from None
    if not factors or not all(Fraction(1, 10) <= factor <= 10 for factor in factors.values()):
        raise ValueError(f"speed_perturb_factors {text!r}: expected numbers from 0.1 to 10")
    if len(set(factors.values())) != len(text.split()):
        raise ValueError(f"speed_perturb_factors {text!r}: a factor appears twice")
    return factors


def perturb_directory(source: Path, target: Path, factors: dict[str, Fraction], jobs: int = 1) -> list[str]:
    """Write `target`: a copy of `source` for each factor; returns what was left out and why.

    Raises:
        FileNotFoundError, ValueError: `source` lacks a table or its tables disagree.
    """
    sources, data = recordings(source)
    (target / "wav.scp").unlink(missing_ok=True)
    shutil.rmtree(target / "audio", ignore_errors=True)
    wav, text, speaker, problems = {}, {}, {}, []
    with Pool(min(jobs, len(sources)) or 1) as pool:
        for name, factor in factors.items():
            prefix = "" if factor == 1 else f"sp{name}-"
            write = partial(_perturb_recording, folder=target / "audio", prefix=prefix, factor=factor)
            done = pool.imap_unordered(write, sources, chunksize=8)
            done = tqdm(done, total=len(sources), desc=f"speed {name}", unit="rec", leave=False, disable=None)
            for paths, problem in done:
                problems += problem
                for utterance, path in paths.items():
                    wav[prefix + utterance] = path
                    text[prefix + utterance] = data.text[utterance]
                    speaker[prefix + utterance] = prefix + data.speaker[utterance]
    write_data_dir(target, DataDir(wav, text, speaker))
    return sorted(problems)


def _perturb_recording(
    recording: Recording, folder: Path, prefix: str, factor: Fraction
) -> tuple[dict[str, str], list[str]]:
    if factor == 1 and None in recording.utterances.values():
        return dict.fromkeys(recording.utterances, recording.source), []
    paths, problems = {}, []
    try:
        samples, rate = read_recording(recording.source)
    except ValueError as error:
        return {}, [f"{prefix}{' '.join(recording.utterances)}: {error}"]
    for utterance, span in recording.utterances.items():
        path = folder / f"{prefix}{utterance}.flac"
        try:
            part = cut(samples, rate, span)
        except ValueError as error:
            problems.append(f"{prefix}{utterance}: {error}")
        else:
            write_audio(path, stretched(part, 1 / factor), rate)
            paths[utterance] = str(path)
    return paths, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", required=True, help="such as '0.9 1.0 1.1'")
    parser.add_argument("--nj", type=int, default=1, help="parallel processes")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    try:
        problems = perturb_directory(args.source, args.target, speed_factors(args.factors), args.nj)
    except (OSError, ValueError) as error:
        sys.exit(f"perturb: {error}")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)


if __name__ == "__main__":
    main()
