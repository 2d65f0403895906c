"""The utterances to decode: read by several threads, put together by length, unreadable ones told apart."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from espnet2.tasks.asr_transducer import ASRTransducerTask
from espnet2.train.dataset import AdapterForSoundScpReader, ESPnetDataset

POOL = 16  # batches whose utterances are sorted by length together; results are written when a pool is done
OTHER_RATE = re.compile(r"Sampling rates are mismatched: \d+ != (\d+)")  # ESPnet's reader's words


@dataclass(frozen=True)
class Utterance:
    key: str
    speech: np.ndarray | None  # None: unreadable
    trouble: str | None = None  # why it cannot be decoded


class Reader:
    """Utterances by key, through ESPnet's own readers and preprocessing.

    Args:
        data: ESPnet's triples (file, name, type), of which one is named speech.
        args: the model's training arguments.
        rate: the model's sampling rate; utterances of another one have no speech. None: not known, and ESPnet's reader
            compares each utterance with the one before.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no triple, or more than one, is named speech; a file has no utterances or is no list of them.
    """

    def __init__(
        self,
        data: Sequence[tuple[str, str, str]],
        args: argparse.Namespace,
        others: bool = False,
        rate: int | None = None,
    ):
        names = [name for _, name, _ in data]
        if names.count("speech") != 1 or (len(names) > 1 and not others):
            raise ValueError(f"data_path_and_name_and_type: expected one entry FILE,speech,TYPE; got {data}.")
        ((path, name, kind),) = (entry for entry in data if entry[1] == "speech")
        if not Path(path).is_file():
            raise FileNotFoundError(f"data_path_and_name_and_type: there is no file {path}.")
        try:
            self._data = ESPnetDataset(
                [(path, name, kind)], preprocess=ASRTransducerTask.build_preprocess_fn(args, False)
            )
        except Exception as error:  # whatever ESPnet's readers raise for a broken list
            raise ValueError(f"data_path_and_name_and_type: {path},{name},{kind}: {_trouble(path, error)}.") from error
        self.keys = [str(key) for key in self._data]
        self._rate = rate
        reader = self._data.loader_dict["speech"]
        if isinstance(reader, AdapterForSoundScpReader):
            reader.rate = rate  # that of the last utterance it took: it takes none of another one

    def __call__(self, key: str) -> Utterance:
        try:
            speech = self._data[key][1]["speech"]
            if np.ndim(speech) not in (1, 2):
                return Utterance(key, None, f"has shape {np.shape(speech)}, not (samples,) or (frames, size)")
            if not len(speech):
                return Utterance(key, None, "is empty")
            if not np.isfinite(speech).all():
                return Utterance(key, None, "holds NaN or infinite numbers")
            if speech.dtype.kind == "i":  # of a Kaldi archive, say: as they are, as ESPnet's command decodes them
                speech = speech.astype(np.float32)
        except Exception as error:  # whatever a reader raises for a broken file: the others are to be decoded
            other = OTHER_RATE.search(str(error))
            if other and self._rate is not None:
                rates = f"has {other[1]} samples a second, but the model was trained on {self._rate}"
                return Utterance(key, None, f"{rates}; resample it")
            return Utterance(key, None, f"cannot be read: {type(error).__name__}: {error}")
        return Utterance(key, speech)


def _trouble(path: str, error: Exception) -> str:
    """Why a list cannot be read, in words where the reader's own do not tell."""
    if isinstance(error, UnicodeDecodeError):
        return f"expected text in UTF-8: {error}"
    if isinstance(error, ValueError):  # of splitting a line in two
        lines = Path(path).read_bytes().split(b"\n")[:-1]
        empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
        if empty is not None:
            return f"line {empty} is empty; remove it"
    return str(error) if isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__}: {error}"


def pools(read: Reader, keys: Sequence[str], size: int, threads: int) -> Iterator[list[Utterance]]:
    """All utterances in order, so many at a time; the next ones are read in the meantime."""
    parts = [keys[i : i + size] for i in range(0, len(keys), size)]
    executor = ThreadPoolExecutor(max_workers=max(1, threads))
    try:
        coming = [executor.submit(read, key) for key in parts[0]] if parts else []
        for following in [*parts[1:], []]:
            pool, coming = coming, [executor.submit(read, key) for key in following]
            yield [utterance.result() for utterance in pool]
    finally:
        executor.shutdown(cancel_futures=True)  # an interrupted decoding does not read what would come next


def batches(utterances: Iterable[Utterance], batch_size: int, most: float) -> Iterator[list[Utterance]]:
    """Batches of utterances of similar length, longest first.

    Args:
        most: length of a padded batch at most, in the unit of `speech`; an utterance longer than that is a batch.
    """
    batch: list[Utterance] = []
    for utterance in sorted(utterances, key=lambda u: len(u.speech), reverse=True):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(batch[0].speech) > most):
            yield batch
            batch = []
        batch.append(utterance)
    if batch:
        yield batch
