"""LibriSpeech, its 100-hour part: fetched from openslr.org, or taken from a path, as Kaldi-style data directories.

    python -m espnet_mega_plugin.recipe.librispeech --out data                        download and prepare
    python -m espnet_mega_plugin.recipe.librispeech --out data --librispeech PATH     prepare what is there

The corpus' own layout, below a folder LibriSpeech:

    SPEAKERS.TXT                                     reader | sex | part | minutes | name
    train-clean-100/103/1240/103-1240-0000.flac      part / reader / chapter
    train-clean-100/103/1240/103-1240.trans.txt      a line for each of the chapter's recordings: name, words

Sets and names are those of ESPnet's recipe: `train_clean_100`, `dev_clean`, `dev_other`, `test_clean`, `test_other`,
and `dev`, which is both dev sets; a chapter counts as a speaker, as in Kaldi. The recordings stay where they are:
wav.scp names the FLAC files.

LibriSpeech: V. Panayotov, G. Chen, D. Povey, S. Khudanpur, ICASSP 2015; https://www.openslr.org/12, CC BY 4.0.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from espnet_mega_plugin.recipe.download import DownloadFailed, download, read_checksums, unpack
from espnet_mega_plugin.recipe.kaldi_dir import DataDir, validate, write_data_dir, write_table

# Part -> md5 of its archive (https://www.openslr.org/resources/12/md5sum.txt), its utterances
PARTS = {
    "train-clean-100": ("2a93770f6d5c6c964bc36631d331a522", 28539),
    "dev-clean": ("42e2234ba48799c1f50f24a7926300a1", 2703),
    "dev-other": ("c8d0bcc9cca99d4f8b62fcc847357931", 2864),
    "test-clean": ("32fa31d27d2e1cad72775fee3f4849a9", 2620),
    "test-other": ("fb5a50374b501bb3bac4815ee91d3135", 2939),
}
# The site and the mirrors that it names, in the order in which they are tried
MIRRORS = {
    "openslr": "https://www.openslr.org/resources/12",
    "trmal": "https://openslr.trmal.net/resources/12",  # European Union
    "elda": "https://openslr.elda.org/resources/12",  # European Union
    "us": "https://us.openslr.org/resources/12",
    "cn": "https://openslr.magicdatatech.com/resources/12",
}
COMBINED = {"dev": ("dev_clean", "dev_other")}
DONE = ".extracted"  # in a part's folder: nothing of its archive is missing
SEXES = {"M": "m", "F": "f"}


def fetch(downloads: Path, mirrors: Sequence[str], checksums: Mapping[str, str]) -> Path:
    """Download and extract what is not there; returns the folder LibriSpeech.

    An archive that was extracted may be deleted; it is not downloaded again.

    Args:
        downloads: folder for the archives (7.6 GB together) and for LibriSpeech (about as much again).
        mirrors: addresses of folders with the archives.
        checksums: archive -> md5 or the like.

    Raises:
        OSError: an archive could not be had (DownloadFailed), or the disk is full.
        ValueError: an archive differs from its checksum or is damaged.
    """
    for part in PARTS:
        done = downloads / "LibriSpeech" / part / DONE
        if done.is_file():
            continue
        name = f"{part}.tar.gz"
        if name not in checksums:
            raise ValueError(f"no checksum for {name}; known are those of {', '.join(sorted(checksums)) or 'nothing'}")
        unpack(download([f"{url}/{name}" for url in mirrors], downloads / name, checksums[name]), downloads)
        if not done.parent.is_dir():
            raise ValueError(f"{downloads / name}: has no LibriSpeech/{part} in it")
        done.touch()
    return downloads / "LibriSpeech"


def find(path: Path) -> Path:
    """The folder LibriSpeech at or in a path that the user gave.

    Raises:
        FileNotFoundError: it is not there, or a part is missing; says what was expected.
    """
    for root in (path, path / "LibriSpeech"):
        if (root / "SPEAKERS.TXT").is_file():
            break
    else:
        raise FileNotFoundError(
            f"--librispeech {path}: neither it nor its LibriSpeech has SPEAKERS.TXT; expected the extracted corpus: "
            f"SPEAKERS.TXT and the folders {', '.join(PARTS)}. For a folder with the archives use --downloads {path}"
        )
    if missing := [part for part in PARTS if not (root / part).is_dir()]:
        raise FileNotFoundError(f"{root}: has no {', '.join(missing)}; extract {missing[0]}.tar.gz there")
    return root


def make(root: Path, out: Path) -> dict[str, int]:
    """Write a data directory below `out` for each part, and `dev`; returns their numbers of utterances.

    Raises:
        FileNotFoundError: a recording has no transcript beside it, or the other way round.
        ValueError: a transcript or SPEAKERS.TXT is malformed; names file and line.
    """
    root = root.absolute()
    sexes = read_speakers(root / "SPEAKERS.TXT")
    sets = {part.replace("-", "_"): read_part(root / part) for part in PARTS}
    for name, members in COMBINED.items():
        parts = [sets[member] for member in members]
        tables = [{key: value for part in parts for key, value in table(part).items()} for table in _TABLES]
        sets[name] = DataDir(*tables)
    for name, data in sets.items():
        write_table(out / name / "spk2gender", {speaker: _sex(speaker, sexes, root) for speaker in data.by_speaker()})
        write_data_dir(out / name, data)
        validate(out / name, recordings=False)  # read_part has seen them
    return {name: len(data) for name, data in sets.items()}


_TABLES = (lambda data: data.wav, lambda data: data.text, lambda data: data.speaker)


def read_part(folder: Path) -> DataDir:
    """The utterances of one part, by its transcripts.

    Raises:
        FileNotFoundError: there are none, or recordings and transcripts do not belong together.
        ValueError: a line is malformed; names file and line.
    """
    wav, text, speaker = {}, {}, {}
    transcripts = sorted(folder.glob("*/*/*.trans.txt"))
    if not transcripts:
        raise FileNotFoundError(f"{folder}: has no transcripts, <reader>/<chapter>/<reader>-<chapter>.trans.txt")
    for transcript in transcripts:
        chapter = f"{transcript.parts[-3]}-{transcript.parts[-2]}"
        words = read_transcript(transcript, chapter)
        recorded = {path.stem: path for path in transcript.parent.glob("*.flac")}
        if odd := sorted(words.keys() ^ recorded.keys()):
            what = "its recording" if odd[0] in words else f"a line in {transcript.name}"
            raise FileNotFoundError(
                f"{transcript.parent}: {odd[0]} lacks {what}; {len(odd)} such in this chapter. Extract the part anew"
            )
        wav |= {name: str(path) for name, path in recorded.items()}
        text |= words
        speaker |= dict.fromkeys(words, chapter)
    return DataDir(wav, text, speaker)


def read_transcript(path: Path, chapter: str) -> dict[str, str]:
    """Utterance -> words, of a chapter's transcript.

    Raises:
        ValueError: a line is malformed, of another chapter, or an utterance appears twice; names file and line.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, words = line.strip().partition(" ")
        if not name.startswith(f"{chapter}-") or not words:
            raise ValueError(f"{path}, line {number}: expected '{chapter}-<number> WORDS', got {line!r}")
        if name in found:
            raise ValueError(f"{path}, line {number}: {name!r} appears a second time")
        found[name] = words
    return found


def read_speakers(path: Path) -> dict[str, str]:
    """Reader -> `m` or `f`.

    Raises:
        ValueError: a line is malformed; names file and line.
    """
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith(";") or not line.strip():
            continue
        columns = [column.strip() for column in line.split("|")]
        if len(columns) < 5 or columns[1] not in SEXES:
            raise ValueError(f"{path}, line {number}: expected 'reader | M or F | part | minutes | name', got {line!r}")
        found[columns[0]] = SEXES[columns[1]]
    return found


def _sex(speaker: str, sexes: Mapping[str, str], root: Path) -> str:
    reader = speaker.split("-")[0]
    if reader not in sexes:
        raise ValueError(f"{root / 'SPEAKERS.TXT'}: has no line for reader {reader}, whose recordings are there")
    return sexes[reader]


def mirrors(choice: str | None) -> list[str]:
    """The addresses to try: all known ones, the chosen one first; a web address alone stands for itself.

    Raises:
        ValueError: neither a known mirror nor an address.
    """
    if choice is None:
        return list(MIRRORS.values())
    if "://" in choice:
        return [choice.rstrip("/")]
    if choice not in MIRRORS:
        raise ValueError(f"--mirror {choice}: expected one of {', '.join(MIRRORS)}, or an address such as https://…")
    return [MIRRORS[choice], *(url for name, url in MIRRORS.items() if name != choice)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mega_plugin.recipe.librispeech",
        description="Prepare LibriSpeech's 100-hour part with its dev and test sets; download it where it is missing.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the sets")
    parser.add_argument("--librispeech", type=Path, help="the extracted corpus; nothing is downloaded")
    parser.add_argument(
        "--downloads", type=Path, default=Path("downloads"), help="folder of the archives (default: downloads)"
    )
    parser.add_argument("--mirror", help=f"where to begin: {', '.join(MIRRORS)}; or an address, to use it alone")
    parser.add_argument("--checksums", type=Path, help="a list in md5sum's form to use instead of openslr.org's")
    args = parser.parse_args(argv)
    try:
        if args.librispeech:
            root = find(args.librispeech)
        else:
            known = {f"{part}.tar.gz": md5 for part, (md5, _) in PARTS.items()}
            sums = read_checksums(args.checksums) if args.checksums else known
            root = fetch(args.downloads.absolute(), mirrors(args.mirror), sums)
        sizes = make(root, args.out)
    except DownloadFailed as error:
        parser.exit(1, f"error: {error}\nAn extracted corpus is named with --librispeech PATH.\n")
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"LibriSpeech prepared: {args.out.absolute()}")
    wanted = {part.replace("-", "_"): size for part, (_, size) in PARTS.items()}
    wanted |= {name: sum(wanted[member] for member in members) for name, members in COMBINED.items()}
    for name, size in sizes.items():
        note = "" if size == wanted[name] else f"; the corpus has {wanted[name]}"
        print(f"  {name:16s}{size:6d} utterances{note}")


if __name__ == "__main__":
    main()
