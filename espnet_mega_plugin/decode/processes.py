"""Decoding by several processes, each with a part of the list and, where there are GPUs, with one of them."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from espnet_mega_plugin.decode.keys import first_column, keys_to_decode
from espnet_mega_plugin.decode.progress import Progress

TAIL = 25  # lines of a log that are shown when its process fails


def decode_in_processes(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Split the list, run this command for each part, and put the results together, in the order of the list.

    Args:
        argv: the command line that `options` came from.

    Returns:
        0, or 1 when no utterance has a result.

    Raises:
        FileNotFoundError, ValueError: the list is missing or wrong.
        RuntimeError: a process failed; the others were stopped. The message ends with the end of its log.
    """
    output = Path(options.output_dir)
    speech = next((path for path, name, _ in options.data_path_and_name_and_type if name == "speech"), None)
    if speech is None:
        raise ValueError("data_path_and_name_and_type: no entry is named speech.")
    keys = keys_to_decode(options.key_file, first_column(speech, "data_path_and_name_and_type"))
    number = min(options.num_processes, len(keys))
    logs = output / "logdir"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    processes, states = [], []
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that the parts are stopped too
    try:
        with Progress(options.progress, len(keys)) as progress:
            for n in range(number):
                part = keys[n * len(keys) // number : (n + 1) * len(keys) // number]
                (logs / f"keys.{n + 1}").write_text("".join(f"{key}\n" for key in part), encoding="utf-8")
                with (logs / f"decode.{n + 1}.log").open("w", encoding="utf-8") as log:
                    processes.append(_start(options, argv, logs, n, log))
            readers = [threading.Thread(target=_follow, args=(p, progress), daemon=True) for p in processes]
            for reader in readers:
                reader.start()
            states = _wait(processes)
            for reader, process in zip(readers, processes, strict=True):
                if process.poll() is not None:
                    reader.join()
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    for n, state in enumerate(states):
        if state not in (0, 1):  # 1: nothing of that part could be decoded
            log = logs / f"decode.{n + 1}.log"
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])
            raise RuntimeError(f"process {n + 1} of {number} ended with status {state}; the end of {log}:\n{tail}")
    _put_together(output, [logs / f"output.{n + 1}" for n in range(number)])
    return int(all(states))


def _start(options: argparse.Namespace, argv: Sequence[str], logs: Path, n: int, log) -> subprocess.Popen:
    own = [
        *("--key_file", str(logs / f"keys.{n + 1}"), "--output_dir", str(logs / f"output.{n + 1}")),
        *("--num_processes", "1", "--ngpu", str(min(options.ngpu, 1)), "--progress", "lines"),
    ]
    environment = dict(os.environ)
    if options.ngpu:
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(options.ngpu)))
        devices = visible.split(",")[: options.ngpu]
        if len(devices) < options.ngpu:
            raise ValueError(f"ngpu is {options.ngpu}, but CUDA_VISIBLE_DEVICES={visible!r} shows {len(devices)}.")
        environment["CUDA_VISIBLE_DEVICES"] = devices[n % len(devices)]
    elif "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.num_processes))
    command = [sys.executable, "-m", "espnet_mega_plugin.decode", *argv, *own]
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
        if None not in states or any(state not in (None, 0, 1) for state in states):
            return [0 if state is None else state for state in states]
        for process in processes:
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                break


def _put_together(output: Path, parts: Sequence[Path]) -> None:
    from espnet_mega_plugin.decode.results import remove_old_results

    remove_old_results(output)
    for part in parts:
        for file in sorted(path for path in part.rglob("*") if path.is_file()):
            target = output / file.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("ab") as together:
                together.write(file.read_bytes())
        shutil.rmtree(part)
