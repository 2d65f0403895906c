"""Stage 2: the training set at several speeds.

Factor 0.9 plays slower: the audio is resampled to 1/0.9 of its samples, which lowers the pitch as well. The copies are
new utterances of new speakers, `sp0.9-<name>`, as Kaldi's perturb_data_dir_speed.sh names them; factor 1 keeps names
and recordings.
"""

import argparse
import shutil
import sys
from fractions import Fraction
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from espnet_mega_plugin.recipe.audio import Recording, recordings, stretched, utterances_of, write_audio
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


def perturb_directory(source: Path, target: Path, factors: dict[str, Fraction], jobs: int = 1) -> int:
    """Write `target`: a copy of `source` for each factor; returns the number of utterances.

    Raises:
        FileNotFoundError, ValueError: `source` lacks a table, its tables disagree, or a recording cannot be read.
    """
    cut, data = recordings(source)
    (target / "wav.scp").unlink(missing_ok=True)
    shutil.rmtree(target / "audio", ignore_errors=True)
    wav, text, speaker = {}, {}, {}
    with Pool(min(jobs, len(cut)) or 1) as pool:
        for name, factor in factors.items():
            prefix = "" if factor == 1 else f"sp{name}-"
            write = partial(_perturb_recording, folder=target / "audio", prefix=prefix, factor=factor)
            done = pool.imap_unordered(write, cut, chunksize=8)
            for paths in tqdm(done, total=len(cut), desc=f"speed {name}", unit="rec", leave=False, disable=None):
                for utterance, path in paths.items():
                    wav[prefix + utterance] = path
                    text[prefix + utterance] = data.text[utterance]
                    speaker[prefix + utterance] = prefix + data.speaker[utterance]
    write_data_dir(target, DataDir(wav, text, speaker))
    return len(wav)


def _perturb_recording(recording: Recording, folder: Path, prefix: str, factor: Fraction) -> dict[str, str]:
    if factor == 1 and None in recording.utterances.values():
        return dict.fromkeys(recording.utterances, recording.source)
    paths = {}
    for utterance, samples, rate in utterances_of(recording):
        path = folder / f"{prefix}{utterance}.flac"
        write_audio(path, stretched(samples, 1 / factor), rate)
        paths[utterance] = str(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", required=True, help="such as '0.9 1.0 1.1'")
    parser.add_argument("--nj", type=int, default=1, help="parallel processes")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    try:
        count = perturb_directory(args.source, args.target, speed_factors(args.factors), args.nj)
    except (OSError, ValueError) as error:
        sys.exit(f"perturb: {error}")
    print(f"{args.target}: {count} utterances")


if __name__ == "__main__":
    main()
