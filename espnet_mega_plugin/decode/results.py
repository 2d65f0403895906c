"""The files of a decoding, for each place n of the n-best lists in `{n}best_recog/`, an utterance a line, key first:

    text         what was said
    token        the tokens
    token_int    their ids
    score        log-probability of the hypothesis, language models and phrases included
    timestamps   seconds at which each token was emitted, as many numbers as tokens
    confidence   probability of each token where it was emitted, as many numbers as tokens
    ctm          a word a line, in NIST's form: utterance, channel 1, start, duration, word, confidence

The first four are ESPnet's. The others' meaning is told in `timing.py`; times of streams end with the audio, although
ESPnet goes on into the silence that fills up the last chunk. Without a frontend there are no times, and no timestamps
and ctm. `skipped` lists the utterances without a result, and why.
"""

from __future__ import annotations

import math
from pathlib import Path

from espnet_mega_plugin.decode.timing import Word

TABLES = ("text", "token", "token_int", "score", "timestamps", "confidence", "ctm")
SKIPPED = "skipped"


def emptied(folder: str | Path) -> Path:
    """The folder of the results, without those of an earlier decoding.

    Raises:
        FileExistsError: it cannot be one; the message names --output_dir.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(f"--output_dir {folder}: it, or what it is in, is a file; name a folder.") from error
    remove_old_results(folder)
    return folder


def written(folder: str | Path) -> int:
    """How many utterances have a result there."""
    table = Path(folder) / "1best_recog" / "token"
    return len(table.read_text(encoding="utf-8").splitlines()) if table.is_file() else 0


def remove_old_results(folder: Path) -> None:
    for old in [folder / SKIPPED, *(path for table in TABLES for path in folder.glob(f"*best_recog/{table}"))]:
        old.unlink(missing_ok=True)


class ResultFiles:
    """Writes results in the order they are given; a context manager. What an earlier decoding left is removed."""

    def __init__(self, folder: str | Path):
        self._folder, self._files = emptied(folder), {}

    def __enter__(self) -> ResultFiles:
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()

    def write(self, key: str, place: int, result: tuple, times: list[float] | None, words: list[Word] | None) -> None:
        """One hypothesis. place: 1 for the best."""
        text, tokens, ids, hypothesis = result
        line = {
            "token": " ".join(tokens),
            "token_int": " ".join(map(str, ids)),
            "score": str(hypothesis.score),
            "confidence": " ".join(f"{math.exp(logp):.4f}" for logp in hypothesis.logps),
        }
        if text is not None:
            line["text"] = text
        if times is not None:
            line["timestamps"] = " ".join(f"{time:.3f}" for time in times)
        for name, value in line.items():
            self._file(f"{place}best_recog/{name}").write(f"{key} {value}\n")
        for word in words or ():
            duration = word.end - word.start
            entry = f"{key} 1 {word.start:.3f} {duration:.3f} {word.text} {word.confidence:.4f}\n"
            self._file(f"{place}best_recog/ctm").write(entry)

    def skip(self, key: str, reason: str) -> None:
        self._file(SKIPPED).write(f"{key} {' '.join(reason.split())}\n")

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def _file(self, name: str):
        if name not in self._files:
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            self._files[name] = path.open("w", encoding="utf-8")
        return self._files[name]
