"""The files of a model, looked at before ESPnet and torch do, whose errors are those of unpickling and name no file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

PICKLE = b"\x80"  # the first byte of checkpoints from before torch 1.6, which are no archives


@contextmanager
def loading(**given: str | Path | None) -> Iterator[None]:
    """Whatever is raised inside, but for a missing file, becomes a ValueError that names what was given.

    Args:
        given: by the names of their options, those that are checkpoints ending in `_file`, configurations in `_config`;
            None: there is none.

    Raises:
        FileNotFoundError: one is not there, or names another one that is not.
        ValueError: a configuration is no mapping, a checkpoint none of torch's, or they do not load.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        check = {"config": _check_config, "file": _check_checkpoint}.get(name.rpartition("_")[2])
        if check is not None and Path(value).is_file():  # else refused inside, by the name of its option
            check(name, Path(value))
    named = ", ".join(f"{name} {value}" for name, value in given.items())
    try:
        yield
    except FileNotFoundError as error:
        if error.filename is None:  # ours: names its option and file
            raise
        raise FileNotFoundError(f"while loading {named}: there is no file {error.filename}.") from error
    except Exception as error:  # whatever torch, ESPnet and YAML raise for files that are not what they should be
        known = isinstance(error, (OSError, RuntimeError, ValueError))
        raise ValueError(f"while loading {named}: {error if known else f'{type(error).__name__}: {error}'}") from error


def _check_config(name: str, file: Path) -> None:
    try:
        fits = isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)
    except (UnicodeDecodeError, yaml.YAMLError):
        fits = False
    if not fits:
        raise ValueError(f"{name}: {file} has no `name: value` lines; expected the config.yaml of a training.")


def _check_checkpoint(name: str, file: Path) -> None:
    with file.open("rb") as opened:
        archive = zipfile.is_zipfile(opened)
        opened.seek(0)
        first = opened.read(1)
    if not archive and first != PICKLE:
        what = "is cut off" if first == b"P" else "is another kind of file" if first else "is empty"
        raise ValueError(f"{name}: {file} {what}; expected a checkpoint of the training, as valid.loss.ave.pth.")
