"""The corpus mini_an4: eight recordings of CMU's AN4, with which a recipe is tried out on real speech.

    python -m espnet_mega_plugin.recipe.mini_an4 --out data [--source PATH]
    python -m espnet_mega_plugin.recipe.mini_an4 --fetch

ESPnet's package carries it from version 202611 on, as `egs3/mini_an4/esp2_asr/downloads.tar.gz`. It is looked for in
this order: the path given as `--source`; the installed ESPnet; the folder `--downloads`, into which `--fetch` puts it
by downloading (not installing) that version of ESPnet. Without `--fetch` nothing is downloaded.

The sets and names are those of ESPnet's recipe: utterances are named speaker first (`fash-an251-b`), the first
training utterance is `train_dev`, the others are `train_nodev`, and `test` is apart. An utterance that cannot be read
is reported and left out.

AN4: copyright (c) 1991-2005 Carnegie Mellon University, all rights reserved. Free for any use, commercial or not;
redistribution must keep CMU's notice and its disclaimer of warranty (the file `LICENSE` in the archive, which is
copied beside the data).
"""

import argparse
import io
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import espnet_mega_plugin
from espnet_mega_plugin.recipe.kaldi_dir import DataDir, c_sorted, validate, write_data_dir
from espnet_mega_plugin.recipe.sphere import read_sphere

SAMPLE_RATE = 16000
IN_WHEEL = "egs3/mini_an4/esp2_asr/downloads.tar.gz"
ESPNET = "espnet==202611"  # the first version that carries the archive

# Part of AN4 -> its transcripts and its recordings
PARTS = {
    "train": ("etc/an4_train.transcription", "wav/an4_clstk"),
    "test": ("etc/an4_test.transcription", "wav/an4test_clstk"),
}
SETS = ("train_nodev", "train_dev", "test")
_TRANSCRIPT = re.compile(r"^(?:<s> )?(?P<words>.+?)(?: </s>)? \((?P<session>\w+)-(?P<speaker>\w+)-(?P<take>\w+)\)$")

logger = logging.getLogger(__name__)


def make(out: str | Path, *, source: str | Path | None = None, downloads: str | Path | None = None) -> list[str]:
    """Write `<out>/{train_nodev,train_dev,test}/{wav.scp,text,utt2spk,spk2utt}` and their recordings as WAV files.

    Args:
        out: folder to write to; nothing is written elsewhere.
        source, downloads: where AN4 is, as for `find_source`.

    Returns:
        one line about each utterance that was left out, and why.

    Raises:
        FileNotFoundError: AN4 is nowhere to be found; the message has the command that fetches it.
        ValueError: the source is not AN4, or hardly an utterance of it could be read.
    """
    out = Path(out).resolve()
    origin = find_source(source, downloads)
    files = read_source(origin)
    left_out: list[str] = []
    utterances = {part: _part(files, transcripts, folder, left_out) for part, (transcripts, folder) in PARTS.items()}
    train = c_sorted(utterances["train"])
    if len(train) < 2 or not utterances["test"]:
        raise ValueError(
            f"{origin}: needs at least 2 training utterances and 1 test utterance that can be read, "
            f"got {len(train)} and {len(utterances['test'])}. Left out: {'; '.join(left_out) or 'none'}"
        )
    names = {"train_nodev": train[1:], "train_dev": train[:1], "test": c_sorted(utterances["test"])}
    for name in SETS:
        part = utterances["test" if name == "test" else "train"]
        write_utterances(out / name, {utterance: part[utterance] for utterance in names[name]})
    if "LICENSE" in files:
        (out / "LICENSE.an4").write_bytes(files["LICENSE"])
    return left_out


def find_source(source: str | Path | None = None, downloads: str | Path | None = None) -> Path:
    """Where AN4 is: the path given, else in the installed ESPnet, else in the folder `downloads` (see `fetch`).

    Raises:
        FileNotFoundError: it is in none of them, or the path given does not exist.
    """
    if source is not None:
        if not Path(source).exists():
            raise FileNotFoundError(f"--source {source}: no such file or folder")
        return Path(source)
    try:
        installed = Path(str(distribution("espnet").locate_file(IN_WHEEL)))
    except PackageNotFoundError:
        installed = None
    fetched = _archive(downloads)
    for place in (installed, fetched):
        if place is not None and place.is_file():
            return place
    raise FileNotFoundError(
        f"AN4 is neither in the installed ESPnet (it is from 202611 on) nor in {fetched.parent}. "
        f"Fetch it once with: python -m espnet_mega_plugin.recipe.mini_an4 --fetch --downloads {fetched.parent}, "
        "or name it with --source: the archive downloads.tar.gz, the folder extracted from it, "
        "or a wheel of ESPnet 202611"
    )


def read_source(source: str | Path) -> dict[str, bytes]:
    """The files of AN4, by their names inside its folder, such as `etc/an4_train.transcription`.

    Args:
        source: an archive (.tar.gz), a wheel of ESPnet that carries it, or a folder that holds `an4` or is it.
            Archives are read in place; nothing of them is extracted.

    Raises:
        ValueError: it is none of these, is damaged, or has an entry that points outside the archive.
    """
    source = Path(source)
    if source.is_dir():
        return _read_folder(source)
    try:
        if zipfile.is_zipfile(source):
            return _read_archive(_from_wheel(source), source)
        return _read_archive(source.read_bytes(), source)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{source}: cannot be read as a .tar.gz archive or a wheel: {error}") from error


def fetch(downloads: str | Path | None = None, *, attempts: int = 3) -> Path:
    """Download ESPnet's wheel (4.5 MB) and keep its AN4 archive (0.4 MB); where that is already, do nothing.

    Args:
        downloads: folder to keep it in; default `downloads/mini_an4` in the checkout.
        attempts: how often to try, with a pause in between.

    Returns:
        the archive.

    Raises:
        RuntimeError: pip could not download it; the message has pip's.
    """
    archive = _archive(downloads)
    if archive.is_file():
        return archive
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", ESPNET, "--no-deps", "--only-binary", ":all:"]
        command += ["--python-version", "3.12", "--quiet", "--dest", folder]
        for attempt in range(1, attempts + 1):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
            logger.warning("attempt %d of %d to download %s failed", attempt, attempts, ESPNET)
            if attempt < attempts:
                time.sleep(5 * attempt)
        else:
            raise RuntimeError(f"{' '.join(command)} failed {attempts} times; the last time with:\n{done.stderr}")
        content = _from_wheel(next(Path(folder).glob("*.whl")))
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, archive)
    return archive


def _archive(downloads: str | Path | None) -> Path:
    if downloads is None:
        checkout = Path(espnet_mega_plugin.__file__).resolve().parents[1]
        # Installed from a wheel there is no checkout; then the folder one stands in.
        downloads = (checkout if (checkout / "egs").is_dir() else Path.cwd()) / "downloads" / "mini_an4"
    return Path(downloads) / "downloads.tar.gz"


def _from_wheel(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as content:
        if IN_WHEEL not in content.namelist():
            raise ValueError(f"{wheel}: has no {IN_WHEEL}; ESPnet's wheel has it from 202611 on")
        return content.read(IN_WHEEL)


def _read_archive(content: bytes, source: Path) -> dict[str, bytes]:
    files = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if Path(member.name).is_absolute() or ".." in parts or not (member.isfile() or member.isdir()):
                raise ValueError(f"{source}: {member.name!r} is a link or points outside the archive; refused")
            if member.isfile() and "an4" in parts:
                files["/".join(parts[parts.index("an4") + 1 :])] = archive.extractfile(member).read()
    if not files:
        raise ValueError(f"{source}: has no folder an4")
    return files


def _read_folder(folder: Path) -> dict[str, bytes]:
    for root in (folder / "downloads" / "an4", folder / "an4", folder):
        if (root / "etc").is_dir() and (root / "wav").is_dir():
            return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    raise ValueError(f"{folder}: neither is nor holds AN4's folder, which has etc and wav in it")


def _part(files: dict[str, bytes], transcripts: str, folder: str, left_out: list[str]) -> dict[str, tuple]:
    """Utterance -> (words, speaker, samples) of one part of AN4; adds to `left_out`."""
    if transcripts not in files:
        raise ValueError(f"AN4 without {transcripts}; the source is not complete")
    utterances = {}
    for line in files[transcripts].decode("utf-8", "replace").splitlines():
        if not line.strip():
            continue
        try:
            name, words, speaker, recording = parse_transcript(line.strip(), folder)
            if name in utterances:
                raise ValueError(f"{name}: appears twice in {transcripts}")
            utterances[name] = (words, speaker, _samples(files, f"{recording}.sph"))
        except ValueError as error:
            left_out.append(str(error))
            logger.warning("left out: %s", error)
    return utterances


def parse_transcript(line: str, folder: str) -> tuple[str, str, str, str]:
    """Name, words, speaker and recording, without its ending, of a line of AN4's transcriptions.

    Raises:
        ValueError: the line has another form.
    """
    found = _TRANSCRIPT.match(line)
    if not found:
        raise ValueError(f"expected '<s> WORDS </s> (session-speaker-take)', got the transcript {line!r}")
    session, speaker, take = found["session"], found["speaker"], found["take"]
    recording = f"{folder}/{speaker}/{session}-{speaker}-{take}"
    return f"{speaker}-{session}-{take}", found["words"].upper(), speaker, recording


def _samples(files: dict[str, bytes], recording: str):
    if recording not in files:
        raise ValueError(f"{recording}: there is a transcript and no recording")
    samples, rate = read_sphere(files[recording], recording)
    if rate != SAMPLE_RATE or samples.ndim != 1:
        shape = f"{rate} Hz and {samples.shape[1] if samples.ndim > 1 else 1} channels"
        raise ValueError(f"{recording}: expected {SAMPLE_RATE} Hz and 1 channel, got {shape}")
    return samples


def write_utterances(directory: Path, utterances: Mapping[str, tuple]) -> None:
    """A data directory with its audio, of words, speaker and samples (int16) of each name."""
    import soundfile

    (directory / "wav").mkdir(parents=True, exist_ok=True)
    paths = {name: directory / "wav" / f"{name}.wav" for name in utterances}
    for name, (_, _, samples) in utterances.items():
        soundfile.write(paths[name], samples, SAMPLE_RATE, subtype="PCM_16")
    data = DataDir(
        wav={name: str(path) for name, path in paths.items()},
        text={name: words for name, (words, _, _) in utterances.items()},
        speaker={name: speaker for name, (_, speaker, _) in utterances.items()},
    )
    write_data_dir(directory, data)
    validate(directory)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mega_plugin.recipe.mini_an4",
        description="Prepare mini_an4, eight recordings of CMU's AN4.",
    )
    parser.add_argument("--out", type=Path, help="folder for the sets train_nodev, train_dev and test")
    parser.add_argument("--source", type=Path, help="AN4: downloads.tar.gz, its folder, or a wheel of ESPnet 202611")
    parser.add_argument("--downloads", type=Path, help="folder of --fetch; default: downloads/mini_an4 in the checkout")
    parser.add_argument("--fetch", action="store_true", help="download AN4 where it is neither installed nor fetched")
    args = parser.parse_args(argv)
    if not (args.out or args.fetch):
        parser.error("nothing to do: give --out to make the data, --fetch to download AN4, or both")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        if args.fetch:
            print(f"AN4: {_found_or_fetched(args.source, args.downloads)}")
        if args.out:
            left_out = make(args.out, source=args.source, downloads=args.downloads)
            print(f"mini_an4 made: {args.out.resolve()} ({len(left_out)} utterances left out)")
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(1, f"error: {error}\n")
    for name in SETS if args.out else ():
        texts = validate(args.out / name).text.values()
        print(f"  {name:12s}{len(texts):4d} utterances{sum(len(text.split()) for text in texts):5d} words")


def _found_or_fetched(source: Path | None, downloads: Path | None) -> Path:
    try:
        return find_source(source, downloads)
    except FileNotFoundError:
        if source is not None:  # a path that the user got wrong is not mended by another one
            raise
        return fetch(downloads)


if __name__ == "__main__":
    main()
