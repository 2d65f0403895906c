"""The files of a model, looked at before ESPnet and torch do, whose errors are those of unpickling and name no file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

PICKLE = b"\x80"  # the first byte of checkpoints from before torch 1.6, which are no archives


@contextmanager
def loading(**files: str | Path | None) -> Iterator[None]:
    """Whatever is raised inside, but for a missing file, becomes a ValueError that names the files.

    Args:
        files: by the names of their options, those that are checkpoints ending in `_file`, configurations in `_config`;
            None: there is none.

    Raises:
        ValueError: a configuration is no mapping, a checkpoint none of torch's, or they do not load.
    """
    files = {name: file for name, file in files.items() if file is not None}
    for name, file in files.items():
        if not Path(file).is_file():
            continue  # refused inside, by the name of its option
        if name.endswith("_config"):
            _check_config(name, Path(file))
        elif name.endswith("_file"):
            _check_checkpoint(name, Path(file))
    try:
        yield
    except FileNotFoundError:  # names its option and file
        raise
    except Exception as error:  # whatever torch, ESPnet and YAML raise for files that are not what they should be
        known = isinstance(error, (OSError, RuntimeError, ValueError))
        named = ", ".join(f"{name} {file}" for name, file in files.items())
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
