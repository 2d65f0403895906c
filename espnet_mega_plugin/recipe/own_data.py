"""One's own data: check `data/<set>/{wav.scp,text}` and make what else a data directory has.

    python -m espnet_mega_plugin.recipe.own_data data/train data/valid data/test

    wav.scp    utterance  path of the recording, or a command whose output it is, ending in |
    text       utterance  what is said in it
    utt2spk    utterance  speaker                          optional; without it every utterance is its own speaker
    segments   utterance  recording  start  end (seconds)  optional; then wav.scp has recordings, not utterances

Paths are relative to the recipe's folder. The lines may stand in any order. What is given is left as it is; only
utt2spk, where it was not given, and spk2utt are written. A fault is told with its file and line.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from espnet_mega_plugin.recipe.kaldi_dir import DataDir, c_sorted, read_table, write_table

GIVEN = "wav.scp with lines 'utterance path', text with lines 'utterance words'"


def complete(directory: Path) -> DataDir:
    """Check a set and write its utt2spk (where none was given) and spk2utt.

    Returns:
        the set by utterance; `wav` has the path or command of the utterance's recording.

    Raises:
        FileNotFoundError: wav.scp, text or a recording is missing; names file and line.
        ValueError: a line is malformed, or belongs to no line of the other table; names file and line.
    """
    for name in ("wav.scp", "text"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is missing: a set consists of {GIVEN}")
    sources, text = read_table(directory / "wav.scp"), read_table(directory / "text", empty_values=True)
    for name, source in sources.items():
        if not source.endswith("|") and not Path(source).is_file():
            raise FileNotFoundError(
                f"{_where(directory / 'wav.scp', name)}: no such recording: {source} (looked for from {Path.cwd()})"
            )
    recording = _segments(directory, sources) if (directory / "segments").exists() else {name: name for name in sources}
    of_recordings = "segments" if (directory / "segments").exists() else "wav.scp"
    _belong(directory, "text", text, of_recordings, recording)
    for name, words in text.items():
        if not words:
            raise ValueError(f"{_where(directory / 'text', name)}: no words; write them, or remove {name!r} everywhere")
    data = DataDir({name: sources[source] for name, source in recording.items()}, text, _speakers(directory, text))
    write_table(directory / "utt2spk", data.speaker)
    write_table(directory / "spk2utt", {speaker: " ".join(names) for speaker, names in data.by_speaker().items()})
    return data


def _segments(directory: Path, sources: Mapping[str, str]) -> dict[str, str]:
    """Utterance -> recording."""
    found = {}
    for name, line in read_table(directory / "segments").items():
        where = _where(directory / "segments", name)
        try:
            source, start, end = line.split()
            fits = 0 <= float(start) < float(end)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{where}: expected 'utterance recording start end' in seconds, got '{name} {line}'")
        if source not in sources:
            raise ValueError(f"{where}: cut from {source!r}, which wav.scp does not have")
        found[name] = source
    return found


def _speakers(directory: Path, text: Mapping[str, str]) -> dict[str, str]:
    """Utterance -> speaker. A table that this module made, each utterance its own speaker, follows the utterances."""
    path = directory / "utt2spk"
    given = read_table(path) if path.exists() else {}
    if all(name == speaker for name, speaker in given.items()):
        return {name: name for name in text}
    _belong(directory, "utt2spk", given, "text", text)
    return given


def _belong(directory: Path, name: str, table: Mapping[str, str], other: str, others: Mapping[str, str]) -> None:
    if odd := c_sorted(table.keys() ^ others.keys()):
        has, lacks = (name, other) if odd[0] in table else (other, name)
        raise ValueError(
            f"{_where(directory / has, odd[0])}: {odd[0]!r} has no line in {directory / lacks}; {len(odd)} such in all"
        )


def _where(path: Path, key: str) -> str:
    """`path, line 3`: where a table has a key."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.split(maxsplit=1)[:1] == [key]:
            return f"{path}, line {number}"
    return str(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mega_plugin.recipe.own_data",
        description="Check one's own data and complete them: data/<set>/{wav.scp,text}.",
    )
    parser.add_argument("sets", type=Path, nargs="+", help="folders of the sets")
    args = parser.parse_args(argv)
    try:
        for directory in dict.fromkeys(args.sets):
            data = complete(directory)
            words = sum(len(line.split()) for line in data.text.values())
            print(f"{directory}: {len(data)} utterances, {words} words, {len(data.by_speaker())} speakers")
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
