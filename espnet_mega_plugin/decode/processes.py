"""Decoding by several processes, each with a part of the list and, where there are GPUs, with one of them.

Part n has, in the folder `logdir` of the results, its keys in `decode.n.keys`, what it says in `decode.n.log` and,
until all parts are done, its results in `decode.n.output`. Other files there belong to others and stay.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from espnet_mega_plugin.decode.command import NO_RESULT
from espnet_mega_plugin.decode.keys import first_column, keys_to_decode
from espnet_mega_plugin.decode.progress import Progress
from espnet_mega_plugin.decode.results import SKIPPED, remove_old_results

TAIL = 25  # lines of a log that are shown when its process fails
OURS = re.compile(r"decode\.\d+\.(keys|log|output)")

_log = logging.getLogger("espnet_mega_plugin")


@dataclass(frozen=True)
class Part:
    """The files of one process and the utterances it is to decode."""

    logs: Path
    number: int  # from 1
    keys: Sequence[str]

    @property
    def key_file(self) -> Path:
        return self.logs / f"decode.{self.number}.keys"

    @property
    def log(self) -> Path:
        return self.logs / f"decode.{self.number}.log"

    @property
    def output(self) -> Path:
        return self.logs / f"decode.{self.number}.output"


def decode_in_processes(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Split the list, run this command for each part, and put the results together, in the order of the list.

    Args:
        argv: the command line that `options` came from.

    Returns:
        0, or NO_RESULT when no utterance has a result.

    Raises:
        FileNotFoundError, ValueError: the list is missing or wrong, or there are fewer GPUs than wanted.
        RuntimeError: a process failed; the others were stopped. The message ends with the end of its log.
    """
    speech = next((path for path, name, _ in options.data_path_and_name_and_type if name == "speech"), None)
    if speech is None:
        raise ValueError("data_path_and_name_and_type: no entry is named speech.")
    keys = keys_to_decode(options.key_file, first_column(speech, "data_path_and_name_and_type"))
    number = min(options.num_processes, len(keys))
    environments = _environments(options, number)
    output = Path(options.output_dir)
    logs = _emptied(output / "logdir")
    bounds = [n * len(keys) // number for n in range(number + 1)]
    parts = [Part(logs, n + 1, keys[bounds[n] : bounds[n + 1]]) for n in range(number)]
    processes: list[subprocess.Popen] = []
    with Progress(options.progress, len(keys)) as progress:
        with _stopped_in_the_end(processes):
            for part, environment in zip(parts, environments, strict=True):
                processes.append(_start(part, [*argv, "--ngpu", str(min(options.ngpu, 1))], environment))
            readers = [threading.Thread(target=_follow, args=(p, progress), daemon=True) for p in processes]
            for reader in readers:
                reader.start()
            states = _wait(processes)
            for reader, process in zip(readers, processes, strict=True):
                if process.poll() is not None:
                    reader.join()
        skipped = dict(entry for part, state in zip(parts, states, strict=True) for entry in _skipped(part, state))
        summary = progress.summary(len(skipped))
    _put_together(output, [part.output for part in parts])
    for key, reason in skipped.items():
        _log.warning("Utterance %s is skipped: it %s", key, reason)
    if options.progress == "bar":
        print(summary, file=sys.stderr)
    _log.info(summary)
    return NO_RESULT if len(skipped) == len(keys) else 0


def _environments(options: argparse.Namespace, number: int) -> list[dict[str, str]]:
    """The environment variables of each process: which GPU it sees, or how many threads of the CPU it has."""
    environment = dict(os.environ)
    if not options.ngpu:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
        return [environment] * number
    visible = environment.get("CUDA_VISIBLE_DEVICES")  # empty: all are hidden, on purpose
    devices = list(map(str, range(options.ngpu))) if visible is None else [d for d in visible.split(",") if d.strip()]
    if len(devices) < options.ngpu:
        raise ValueError(
            f"ngpu is {options.ngpu}, but CUDA_VISIBLE_DEVICES={visible!r} shows {len(devices)}. "
            "Name more GPUs there, or ask for fewer; without --ngpu the CPU decodes."
        )
    return [environment | {"CUDA_VISIBLE_DEVICES": devices[n % options.ngpu]} for n in range(number)]


def _emptied(logs: Path) -> Path:
    """The folder of the parts, without what earlier parts have left there."""
    logs.mkdir(parents=True, exist_ok=True)
    for old in list(logs.iterdir()):
        if OURS.fullmatch(old.name):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return logs


@contextmanager
def _stopped_in_the_end(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Stops the processes that still run when this one is done, fails, is interrupted, or is to end (SIGTERM)."""
    handled = threading.current_thread() is threading.main_thread()  # in others Python does not let signals be handled
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number)) if handled else None
    try:
        yield
    finally:
        running = [process for process in processes if process.poll() is None]
        for process in running:  # all before the first is waited for: a second Ctrl-C leaves none behind
            process.terminate()
        for process in running:
            process.wait()
        if handled:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _start(part: Part, argv: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    own = ("--key_file", str(part.key_file), "--output_dir", str(part.output), "--num_processes", "1")
    part.key_file.write_text("".join(f"{key}\n" for key in part.keys), encoding="utf-8")
    command = [sys.executable, "-m", "espnet_mega_plugin.decode", *argv, *own, "--progress", "lines"]
    with part.log.open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)


def _follow(process: subprocess.Popen, progress: Progress) -> None:
    """Adds up what the processes say they have done (`progress.py`)."""
    for line in process.stdout:
        if line.startswith("done "):
            _, utterances, seconds = line.split()
            progress.done(int(utterances), float(seconds))


def _wait(processes: Sequence[subprocess.Popen]) -> list[int | None]:
    """The status of each; None for those that still run when another one has failed."""
    while True:
        states = [process.poll() for process in processes]
        if None not in states or any(state not in (None, 0, NO_RESULT) for state in states):
            return states
        for process in processes:
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                break


def _skipped(part: Part, state: int | None) -> list[tuple[str, str]]:
    """Utterances of a part that have no result, and why.

    Raises:
        RuntimeError: the process failed, or not every utterance of the part has a result or is skipped.
    """
    if state is None:  # another one failed
        return []
    trouble = f"ended with status {state}"
    if state in (0, NO_RESULT):
        skipped, results = _lines(part.output / SKIPPED), _lines(part.output / "1best_recog" / "token")
        told = {key for key, _ in (*skipped, *results)}
        lost = [key for key in part.keys if key not in told]
        if not lost:
            return skipped
        trouble += f", but {len(lost)} of its {len(part.keys)} utterances have no result and no reason, as {lost[0]!r}"
    tail = "\n".join(part.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])
    raise RuntimeError(f"process {part.number} {trouble}; the end of {part.log}:\n{tail}")


def _lines(table: Path) -> list[tuple[str, str]]:
    """Key and value of each line; none where there is no such file."""
    if not table.is_file():
        return []
    lines = table.read_text(encoding="utf-8").split("\n")
    return [(key, value) for key, _, value in (line.partition(" ") for line in lines if line)]


def _put_together(output: Path, parts: Sequence[Path]) -> None:
    remove_old_results(output)
    for part in parts:
        for file in sorted(path for path in part.rglob("*") if path.is_file()):
            target = output / file.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("ab") as together:
                together.write(file.read_bytes())
        shutil.rmtree(part)
