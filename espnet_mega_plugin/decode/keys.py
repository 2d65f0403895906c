"""The keys of a table: the first column of wav.scp and the like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def first_column(file: str | Path, option: str) -> list[str]:
    """
    Raises:
        FileNotFoundError: there is no such file; the message names the option.
        ValueError: it is no text in UTF-8, or a key appears twice.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{option}: there is no file {file}.")
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {file}: expected text in UTF-8: {error}.") from error
    keys = [line.split(maxsplit=1)[0] for line in lines if line.strip()]
    if len(set(keys)) < len(keys):
        twice = sorted(keys)
        twice = next(a for a, b in zip(twice, twice[1:], strict=False) if a == b)
        raise ValueError(f"{option}: {file} names {twice!r} more than once.")
    return keys


def keys_to_decode(key_file: str | Path | None, there: Sequence[str]) -> list[str]:
    """The keys of the key file, in its order; without one all that are there.

    Raises:
        FileNotFoundError, ValueError: as above; the key file names an utterance that is not there, or none is.
    """
    keys = list(there) if key_file is None else first_column(key_file, "key_file")
    known = set(there)
    missing = [key for key in keys if key not in known]
    if missing:
        raise ValueError(f"key_file: {key_file} names {len(missing)} utterances the data has not, as {missing[0]!r}.")
    if not keys:
        raise ValueError(f"there is nothing to decode: {key_file or 'the data'} has no utterances.")
    return keys
