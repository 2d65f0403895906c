"""AN4, all of it: 948 training and 130 test recordings of CMU's alphanumeric database, as Kaldi-style data directories.

    python -m espnet_mega_plugin.recipe.an4 --out data                   download and prepare
    python -m espnet_mega_plugin.recipe.an4 --out data --an4 PATH        prepare what is there

The corpus comes in two forms that differ in the recordings alone, NIST SPHERE (`.sph`) and headerless 16-bit samples
with the high byte first (`.raw`, 16 kHz); both are read:

    an4/etc/an4_train.transcription, an4_test.transcription     <s> WORDS </s> (session-speaker-take)
    an4/wav/an4_clstk/<speaker>/<session>-<speaker>-<take>.sph  training
    an4/wav/an4test_clstk/…                                     test

The sets and names are those of ESPnet's recipe: utterances are named speaker first (`fash-an251-b`), the first 100 of
the sorted training utterances are `train_dev`, the other 848 are `train_nodev`, and `test` is apart. An utterance that
cannot be read is reported and left out.

CMU publishes no checksums: a damaged download shows in the archive's own, and a SPHERE recording carries one as well.

AN4: copyright (c) 1991-2005 Carnegie Mellon University, all rights reserved. Free for any use; redistribution must
keep CMU's notice and its disclaimer of warranty. A. Acero, "Acoustical and environmental robustness in automatic
speech recognition", Kluwer 1993; http://www.speech.cs.cmu.edu/databases/an4/.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from espnet_mega_plugin.recipe.download import DownloadFailed, download, read_through
from espnet_mega_plugin.recipe.kaldi_dir import c_sorted, validate
from espnet_mega_plugin.recipe.mini_an4 import PARTS, SAMPLE_RATE, parse_transcript, read_source, write_utterances
from espnet_mega_plugin.recipe.sphere import read_sphere

SITES = {
    "cmu": "http://www.speech.cs.cmu.edu/databases/an4",
    "espnet": "https://huggingface.co/datasets/espnet/an4/resolve/main",  # ESPnet's copy, SPHERE alone
}
ARCHIVES = {"sph": "an4_sphere.tar.gz", "raw": "an4_raw.bigendian.tar.gz"}
UTTERANCES = {"train": 948, "test": 130}
DEV = 100


def fetch(downloads: Path, sites: Sequence[str], form: str = "sph") -> Path:
    """Download the archive of one form (64 MB) where it is not there; returns it.

    Raises:
        ValueError: `form` is unknown.
        DownloadFailed: no site gave it.
    """
    if form not in ARCHIVES:
        raise ValueError(f"--form {form}: expected one of {', '.join(ARCHIVES)}")
    name = ARCHIVES[form]
    return download([f"{site}/{name}" for site in sites], downloads / name)


def make(source: Path, out: Path, dev: int = DEV) -> list[str]:
    """Write `<out>/{train_nodev,train_dev,test}` with the recordings as WAV files.

    Args:
        source: the archive, the folder extracted from it, or the folder above.
        dev: utterances of `train_dev`.

    Returns:
        a line about each utterance that was left out, and why.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: it is not AN4, is damaged, or has too few utterances that can be read.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if source.is_file():
        with read_through(source):  # to gzip's checksum, which reading the files in it does not reach
            pass
    files = read_source(source)
    left_out: list[str] = []
    parts = {part: _utterances(files, *places, left_out) for part, places in PARTS.items()}
    train = c_sorted(parts["train"])
    if len(train) <= dev or not parts["test"]:
        raise ValueError(
            f"{source}: needs more than {dev} training utterances and a test utterance that can be read, "
            f"got {len(train)} and {len(parts['test'])}. Left out: {'; '.join(left_out) or 'none'}"
        )
    sets = {"train_nodev": train[dev:], "train_dev": train[:dev], "test": parts["test"]}
    for name, names in sets.items():
        part = parts["test" if name == "test" else "train"]
        write_utterances(out.absolute() / name, {utterance: part[utterance] for utterance in names})
    return left_out


def _utterances(files: Mapping[str, bytes], transcripts: str, folder: str, left_out: list[str]) -> dict[str, tuple]:
    """Utterance -> (words, speaker, samples) of one part; adds to `left_out`."""
    if transcripts not in files:
        raise ValueError(f"AN4 without {transcripts}; the source is not complete")
    found: dict[str, tuple] = {}
    for number, line in enumerate(files[transcripts].decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, words, speaker, recording = parse_transcript(line.strip(), folder)
            if name in found:
                raise ValueError(f"{name} appears a second time")
            found[name] = words, speaker, _samples(files, recording)
        except ValueError as error:
            left_out.append(f"{transcripts}, line {number}: {error}")
    return found


def _samples(files: Mapping[str, bytes], recording: str) -> np.ndarray:
    """The samples (N,) of `recording`, a name without its ending; int16."""
    if (name := f"{recording}.sph") in files:
        samples, rate = read_sphere(files[name], name)
        if rate != SAMPLE_RATE or samples.ndim != 1:
            raise ValueError(f"{name}: expected {SAMPLE_RATE} Hz and 1 channel, got {rate} Hz, shape {samples.shape}")
        return samples
    if (name := f"{recording}.raw") in files:
        content = files[name]
        if not content or len(content) % 2:
            raise ValueError(f"{name}: {len(content)} bytes are no 16-bit samples")
        return np.frombuffer(content, dtype=">i2").astype(np.int16)
    raise ValueError(f"there is no recording {recording}.sph or .raw")


def sites(choice: str | None) -> list[str]:
    """The addresses to try: both, the chosen one first; a web address alone stands for itself.

    Raises:
        ValueError: neither a known site nor an address.
    """
    if choice is not None and "://" in choice:
        return [choice.rstrip("/")]
    if choice is not None and choice not in SITES:
        raise ValueError(f"--site {choice}: expected one of {', '.join(SITES)}, or an address such as https://…")
    return sorted(SITES.values(), key=lambda url: url != SITES.get(choice, SITES["cmu"]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mega_plugin.recipe.an4",
        description="Prepare CMU's AN4; download it where it is missing.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the sets")
    parser.add_argument("--an4", type=Path, help="the archive or its extracted folder; nothing is downloaded")
    parser.add_argument(
        "--downloads", type=Path, default=Path("downloads"), help="folder of the archive (default: downloads)"
    )
    parser.add_argument("--site", help=f"where to begin: {', '.join(SITES)}; or an address, to use it alone")
    parser.add_argument(
        "--form", default="sph", help=f"which archive to download: {', '.join(ARCHIVES)} (default: sph)"
    )
    parser.add_argument("--dev", type=int, default=DEV, help=f"utterances of train_dev (default: {DEV})")
    args = parser.parse_args(argv)
    try:
        source = args.an4 or fetch(args.downloads.absolute(), sites(args.site), args.form)
        left_out = make(source, args.out, args.dev)
    except DownloadFailed as error:
        parser.exit(1, f"error: {error}\nAn archive or an extracted corpus is named with --an4 PATH.\n")
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    print(f"AN4 prepared: {args.out.absolute()}")
    wanted = {"train_nodev": UTTERANCES["train"] - args.dev, "train_dev": args.dev, "test": UTTERANCES["test"]}
    for name, size in wanted.items():
        found = len(validate(args.out / name))
        print(f"  {name:12s}{found:5d} utterances" + (f"; the corpus has {size}" if found != size else ""))


if __name__ == "__main__":
    main()
