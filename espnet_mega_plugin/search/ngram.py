"""n-gram language models in ARPA form over the model's own tokens: pieces, characters or words.

An ARPA file holds log10 P(w | h) for n-grams (h, w) and a backoff weight for each context h. Its definition, N the
order of the model:

    P(w | h) = p(h, w)                       if the file has (h, w)
             = backoff(h) P(w | h less its first word)    if not; backoff(h) is 1 where the file has no h

with h the last N - 1 words, `<s>` before the first. Source: SRILM's ngram-format(5).

The file is read here: of the libraries that read it, KenLM is published as source to compile and `arpa` looks up one
n-gram at a time. Both are what tests/search/test_ngram.py compares with.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from espnet_mega_plugin.search.trie import ROOT, Trie, TrieScorer

BEGIN, END = "<s>", "</s>"
UNKNOWN = ("<unk>", "<UNK>")  # SRILM's and KenLM's name, and the other one KenLM reads
FLOOR = -100 * math.log(10)  # what KenLM gives unknown words where the file has no <unk>


@dataclass(frozen=True)
class Arpa:
    """An ARPA file, its logarithms natural. Lists begin with order 1; N_n n-grams of order n."""

    path: Path
    words: list[str]  # in the order of the 1-grams
    ngrams: list[Tensor]  # indices into words. (N_n, n) int64
    logp: list[Tensor]  # (N_n,) float64
    backoff: list[Tensor]  # 0 where the file gives none. (N_n,) float64


# --- the file --------------------------------------------------------------------------------------------------------


def read_arpa(path: str | Path) -> Arpa:
    """Reads an n-gram model, plain or compressed with gzip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not what ARPA asks for, or there are more or fewer n-grams than announced; names the line.
    """
    lines = _Lines(Path(path))
    header, counts = _announced(lines)
    words: dict[bytes, int] = {}
    sections = []
    for order, count in enumerate(counts, 1):
        lines.check(header == b"\\%d-grams:" % order, f"expected \\{order}-grams:, got {_shown(header)}")
        header, section = _section(lines, order, order == len(counts), words)
        found = len(section[1])
        lines.check(found == count, f"\\{order}-grams: ends after {found} n-grams; \\data\\ announces {count}")
        sections.append(section)
    lines.check(header == b"\\end\\", f"expected \\end\\, got {_shown(header)}")
    ngrams, logp, backoff = zip(*sections, strict=True)
    return Arpa(lines.path, [word.decode() for word in words], list(ngrams), list(logp), list(backoff))


def _announced(lines: _Lines) -> tuple[bytes, list[int]]:
    """The line behind `\\data\\` and its counts, and how many n-grams of each order there are to be."""
    for line in lines:
        if line == b"\\data\\":
            break
    else:
        lines.fail("there is no line \\data\\; is this a model in ARPA form?")
    counts: list[int] = []
    for line in lines:
        if line.startswith(b"\\"):
            lines.check(bool(counts), "\\data\\ announces nothing; expected lines as `ngram 1=2000`")
            return line, counts
        match = re.fullmatch(rb"ngram\s+(\d+)\s*=\s*(\d+)", line)
        if not match or int(match[1]) != len(counts) + 1:
            lines.fail(f"expected `ngram {len(counts) + 1}=` and how many there are, got {_shown(line)}")
        counts.append(int(match[2]))
    lines.fail("the file ends behind \\data\\")


def _section(
    lines: _Lines, order: int, highest: bool, words: dict[bytes, int]
) -> tuple[bytes, tuple[Tensor, Tensor, Tensor]]:
    """The line behind the n-grams of one order, and they: words, log-probability, backoff. Enters words of order 1."""
    ngrams: dict[tuple[int, ...], None] = {}
    logp, backoff = [], []
    for line in lines:
        if line.startswith(b"\\"):
            table = torch.tensor(list(ngrams), dtype=torch.long).view(-1, order)
            numbers = (torch.tensor(column, dtype=torch.float64) * math.log(10) for column in (logp, backoff))
            return line, (table, *numbers)
        fields = line.split()
        if len(fields) != order + 1 and (highest or len(fields) != order + 2):
            more = "" if highest else " and, if it has one, a backoff weight"
            lines.fail(f"expected a log10 probability, {_number(order, 'word')}{more}, got {_shown(line)}")
        if order == 1:
            lines.check_utf8(fields[1])
            words.setdefault(fields[1], len(words))
        ngram = tuple(words.get(word, -1) for word in fields[1 : order + 1])
        if -1 in ngram:
            lines.fail(f"{_shown(fields[1 + ngram.index(-1)])} is not among the 1-grams")
        if ngram in ngrams:
            lines.fail(f"{_shown(b' '.join(fields[1 : order + 1]))} is there a second time")
        ngrams[ngram] = None
        logp.append(lines.number(fields[0]))
        if logp[-1] > 0:
            lines.fail(f"log10 probability {_shown(fields[0])} is above 0")
        backoff.append(lines.number(fields[-1]) if len(fields) == order + 2 else 0.0)
    lines.fail("the file ends without \\end\\; is it whole?")


class _Lines:
    """Lines of a file that are not empty, and errors that name file and line."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected an n-gram model in ARPA form (plain or gzip).")
        self.path, self.at = path, 0
        self._lines = self._read()

    def _read(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        try:
            with gzip.open(self.path) if packed else self.path.open("rb") as file:
                for self.at, line in enumerate(file, 1):
                    if line := line.strip():
                        yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self.path}: behind line {self.at} it cannot be unpacked ({error}).") from error

    def __iter__(self) -> Iterator[bytes]:
        return self._lines

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{self.path}:{self.at}: {message}.")

    def check(self, condition: bool, message: str) -> None:
        if not condition:
            self.fail(message)

    def check_utf8(self, word: bytes) -> None:
        try:
            word.decode()
        except UnicodeDecodeError:
            self.fail(f"{word!r} is not UTF-8")

    def number(self, field: bytes) -> float:
        try:
            value = float(field)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            self.fail(f"{_shown(field)} is not a finite number (a probability of zero is written -99)")
        return value


def _shown(line: bytes) -> str:
    return repr(line.decode(errors="replace"))


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


# --- the scorer ------------------------------------------------------------------------------------------------------


class NgramScorer(TrieScorer):
    """Natural log-probability of each next token by an n-gram model.

    The file's words are entries of the token list. A token the file does not have is its `<unk>`, in the probability
    and in the context of what follows. n-grams of words that are no tokens are left out. Probabilities above one, which
    only a file gives whose probabilities do not sum to one, count as one: a search relies on log-probabilities.

    Args:
        arpa: what `read_arpa` gives.
        token_list: the model's tokens, blank first, as in an ESPnet configuration. (V,)
        dtype: of the scores.
        floor: log-probability of tokens the file does not have, where it has no `<unk>` either; nats.
        score_end: `final` gives the probability that the hypothesis ends here. ESPnet's transducers have no end label,
            so that nothing else of a hypothesis's score says so.

    Attributes:
        unknown_tokens: those the file does not have, without blank.

    Raises:
        ValueError: no word of the file is in the token list, or `score_end` and the file has no `</s>`.
    """

    def __init__(
        self,
        arpa: Arpa,
        token_list: Sequence[str],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        floor: float = FLOOR,
        score_end: bool = False,
    ):
        tokens = list(token_list)
        index = {word: place for place, word in enumerate(arpa.words)}
        self.unknown_tokens = [token for token in tokens[1:] if token not in index]
        if not (set(tokens[1:]) & index.keys()) - {BEGIN, END, *UNKNOWN}:
            raise ValueError(
                f"{arpa.path}: none of its {len(index)} words (as {arpa.words[:5]}) is in the token list (as "
                f"{tokens[1:6]}). Its words have to be the model's tokens: train it on text that is split into them."
            )
        if score_end and END not in index:
            raise ValueError(f"{arpa.path}: it has no {END}, which score_end asks for.")
        if not floor <= 0:
            raise ValueError(f"floor is a log-probability, at most 0; got {floor}.")
        unknown = next((index[name] for name in UNKNOWN if name in index), len(index))
        word_of_token = torch.tensor([unknown] + [index.get(token, unknown) for token in tokens[1:]])
        others = [index[word] for word in (BEGIN, END) if word in index]
        used = torch.cat((word_of_token, torch.tensor(others, dtype=torch.long))).unique()
        column = torch.full((len(index) + 1,), -1)
        column[used] = torch.arange(len(used))

        ngrams, logp, backoff = _reachable(arpa, column)
        trie = Trie(ngrams, len(used))
        gain = torch.full((len(trie.key),), torch.nan, dtype=torch.float64)
        gain[trie.end - 1] = logp
        fall = torch.zeros(len(trie.key) + 1, dtype=torch.float64)
        fall[trie.end] = backoff
        begin = int(column[index[BEGIN]]) if BEGIN in index else -1
        start = int(torch.searchsorted(trie.key, begin)) + 1 if begin >= 0 else ROOT
        super().__init__(trie, gain, fall, floor, dtype, device, start, column[word_of_token])
        self._end = int(column[index[END]]) if score_end else None

    def _scores(self, state: Tensor, fixed_shapes: bool) -> Tensor:
        return super()._scores(state, fixed_shapes).clamp_(max=0)

    def final(self, utterance: Tensor, leaf: Tensor) -> Tensor:
        """log P(</s> | the prefix) with `score_end`, zeros without. (R,), (R,) -> (R,)"""
        if self._end is None:
            return torch.zeros_like(leaf, dtype=self._fall.dtype)
        return self._scores(self._state[utterance, leaf], self.device.type != "cpu")[:, self._end]


def _reachable(arpa: Arpa, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n-grams of words that have a column, as columns, filled up with -1. (N, order), (N,), (N,)"""
    highest = len(arpa.ngrams)
    tables, kept = [], []
    for ngrams in arpa.ngrams:
        columns = column[ngrams]
        kept.append((columns >= 0).all(1))
        tables.append(torch.nn.functional.pad(columns[kept[-1]], (0, highest - columns.shape[1]), value=-1))
    logp, backoff = (
        torch.cat([numbers[keep] for numbers, keep in zip(lists, kept, strict=True)])
        for lists in (arpa.logp, arpa.backoff)
    )
    return torch.cat(tables), logp, backoff
