"""Kaldi-style data directories: which recordings a set has, what is said in them and by whom.

A directory holds four tables, one entry a line, `key value…`, sorted by key in the C locale (by bytes), no key twice:

    wav.scp   utterance  path of the recording
    text      utterance  transcript
    utt2spk   utterance  speaker
    spk2utt   speaker    utterances of that speaker, sorted

An utterance's name should begin with its speaker's, so that sorting by utterance also sorts by speaker
(Kaldi's own tools insist: https://kaldi-asr.org/doc/data_prep.html).
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TABLES = ("wav.scp", "text", "utt2spk", "spk2utt")


@dataclass(frozen=True)
class DataDir:
    """The contents of a data directory; the three mappings have the same keys, the utterances."""

    wav: Mapping[str, str]
    text: Mapping[str, str]
    speaker: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.wav)

    def utterances(self) -> list[str]:
        return c_sorted(self.wav)

    def by_speaker(self) -> dict[str, list[str]]:
        """Speaker to its utterances, both in the order of the C locale."""
        groups: dict[str, list[str]] = {}
        for utterance in self.utterances():
            groups.setdefault(self.speaker[utterance], []).append(utterance)
        return {speaker: groups[speaker] for speaker in c_sorted(groups)}


def c_sorted(keys: Iterable[str]) -> list[str]:
    """Sorted as `LC_ALL=C sort` does: by bytes, not by the alphabet of the user's language."""
    return sorted(keys, key=lambda key: key.encode("utf-8"))


def read_table(path: str | Path, *, empty_values: bool = False) -> dict[str, str]:
    """Read `key value…` lines; the value is all that follows the first blank, stripped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key appears twice, a line is blank, or has no value (unless `empty_values`); names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; run stage 1 (local/data.sh) first")
    table: dict[str, str] = {}
    # Split at newlines alone: str.splitlines would also cut at characters such as U+2028 inside a transcript.
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        if not line and number == 1:
            break  # an empty file is an empty table
        key, _, value = line.strip().replace("\t", " ", 1).partition(" ")
        if not key or not (value or empty_values):
            raise ValueError(f"{path}, line {number}: expected 'key value', got {line!r}")
        if key in table:
            raise ValueError(f"{path}, line {number}: {key!r} appears a second time; keys must be unique")
        table[key] = value.strip()
    return table


def write_table(path: str | Path, table: Mapping[str, str]) -> None:
    """Write `key value` lines sorted in the C locale; the file appears complete or not at all.

    Raises:
        ValueError: a key is empty or has a blank in it, or a value has a line break.
    """
    path = Path(path)
    lines = []
    for key in c_sorted(table):
        value = str(table[key])
        if not key or key.split() != [key]:
            raise ValueError(f"{path}: a key must be one word without blanks, got {key!r}")
        if "\n" in value or "\r" in value:
            raise ValueError(f"{path}: the value of {key!r} has a line break: {value!r}")
        lines.append(f"{key} {value}".rstrip() + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def read_data_dir(directory: str | Path) -> DataDir:
    """Read a data directory, checked as `validate` does, but for the recordings themselves.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: a table is malformed or the tables disagree; names the file and an example.
    """
    directory = Path(directory)
    wav = read_table(directory / "wav.scp")
    text = read_table(directory / "text", empty_values=True)
    speaker = read_table(directory / "utt2spk")
    for name, table in (("text", text), ("utt2spk", speaker)):
        _same_keys(directory, name, table, wav)
    data = DataDir(wav, text, speaker)
    given = {key: value.split() for key, value in read_table(directory / "spk2utt").items()}
    if given != data.by_speaker():
        raise ValueError(f"{directory / 'spk2utt'}: is not the inverse of utt2spk in sorted order; write it anew")
    return data


def write_data_dir(directory: str | Path, data: DataDir) -> None:
    """Write the four tables; `wav.scp` comes last, so a directory that has it is complete.

    Raises:
        ValueError: the three mappings differ in their utterances, or a key or value cannot be written.
    """
    directory = Path(directory)
    _same_keys(directory, "text", data.text, data.wav)
    _same_keys(directory, "utt2spk", data.speaker, data.wav)
    write_table(directory / "text", data.text)
    write_table(directory / "utt2spk", data.speaker)
    write_table(directory / "spk2utt", {speaker: " ".join(utts) for speaker, utts in data.by_speaker().items()})
    write_table(directory / "wav.scp", data.wav)


def validate(directory: str | Path, *, recordings: bool = True) -> DataDir:
    """Check a data directory as strictly as Kaldi's tools would, and return it.

    Beyond `read_data_dir`: not empty; lines sorted in the C locale; sorted by utterance is sorted by speaker;
    every transcript has a word; with `recordings`, every file named in `wav.scp` exists and is not empty.

    Raises:
        FileNotFoundError: a table or a recording is missing.
        ValueError: a law is broken; names the file and an example.
    """
    directory = Path(directory)
    data = read_data_dir(directory)
    if not len(data):
        raise ValueError(f"{directory}: has no utterances")
    for name in TABLES:
        _sorted(directory / name, list(read_table(directory / name, empty_values=True)))
    speakers = [data.speaker[utterance] for utterance in data.utterances()]
    if speakers != c_sorted(speakers):
        raise ValueError(
            f"{directory / 'utt2spk'}: sorted by utterance is not sorted by speaker; "
            "begin every utterance's name with its speaker's"
        )
    for utterance, words in data.text.items():
        if not words:
            raise ValueError(f"{directory / 'text'}: {utterance!r} has no transcript")
    for utterance, path in data.wav.items() if recordings else ():
        if not Path(path).is_file() or not Path(path).stat().st_size:
            raise FileNotFoundError(f"{directory / 'wav.scp'}: the recording of {utterance!r} is missing: {path}")
    return data


def _same_keys(directory: Path, name: str, table: Mapping[str, str], wav: Mapping[str, str]) -> None:
    odd = c_sorted(table.keys() ^ wav.keys())
    if odd:
        where = name if odd[0] in table else "wav.scp"
        raise ValueError(
            f"{directory}: {name} and wav.scp differ in {len(odd)} utterances; for one, {odd[0]!r} is only in {where}"
        )


def _sorted(path: Path, keys: list[str]) -> None:
    for before, after in zip(keys, keys[1:], strict=False):
        if before.encode("utf-8") > after.encode("utf-8"):
            raise ValueError(f"{path}: {after!r} stands after {before!r}; sort it with LC_ALL=C")
