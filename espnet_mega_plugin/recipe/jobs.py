"""Run commands in parallel, each with its own log file: the recipe's run.pl.

    python3 -m espnet_mega_plugin.recipe.jobs --jobs 4 --log exp/log/stats.JOB.log -- command ... JOB ...

runs the command once for JOB = 1..4. When one fails, the others are stopped and the end of its log is shown.
"""

import argparse
import json
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL = 25  # lines of a log that are shown when its command fails


class JobFailed(RuntimeError):
    """A command of a job ended with an error; the message names it and ends with the tail of its log."""


@dataclass(frozen=True)
class Job:
    """command: argument list. log: file that gets its output, begun anew with the command itself."""

    command: Sequence[str]
    log: Path


def run_jobs(
    jobs: Sequence[Job], parallel: int, worker: Sequence[str] = (), while_waiting: Callable[[], None] = lambda: None
) -> None:
    """Run all jobs, at most `parallel` at a time.

    worker: command that starts `recipe/worker.py`; given, the jobs `... -m module arguments` run in such long-lived
        processes, which import the module once.
    while_waiting: called about twice a second until all is done, for progress.

    Raises:
        JobFailed: on the first failure, after the other processes were stopped.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_text(f"# {shlex.join(job.command)}\n", encoding="utf-8")
        waiting.put(job)
    running: list[subprocess.Popen] = []
    failed: list[tuple[Job, int]] = []
    serve = _serve_by_worker if worker else _serve_by_command
    threads = [
        threading.Thread(target=serve, args=(waiting, running, failed, worker), daemon=True)
        for _ in range(min(parallel, len(jobs)))
    ]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not failed:
            time.sleep(0.4)
            while_waiting()
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
    for thread in threads:
        thread.join()
    if failed:
        job, status = failed[0]
        raise JobFailed(f"exit status {status}: {shlex.join(job.command)}\n--- end of {job.log}\n{log_tail(job.log)}")
    while_waiting()


def _serve_by_command(waiting, running, failed, _worker) -> None:
    while not failed and (job := _next(waiting)):
        with job.log.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        running.append(process)
        if status := process.wait():
            failed.append((job, status))


def _serve_by_worker(waiting, running, failed, worker) -> None:
    process = None
    while not failed and (job := _next(waiting)):
        if process is None:
            with job.log.open("a", encoding="utf-8") as log:  # what the interpreter says before its first job
                process = subprocess.Popen(
                    worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
                )
            running.append(process)
        module, arguments = module_and_arguments(job.command)
        request = {"module": module, "arguments": arguments, "log": str(job.log)}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        status = json.loads(answer)["status"] if answer else process.wait()
        if status or not answer:
            failed.append((job, status))
    if process is not None:
        process.stdin.close()
        process.wait()


def _next(waiting) -> Job | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def module_and_arguments(command: Sequence[str]) -> tuple[str, list[str]]:
    """`python3 -m wrapper -m module a b` -> ("module", ["a", "b"]): the last `-m` before the arguments."""
    places = [i for i, word in enumerate(command) if word == "-m"]
    if not places:
        raise ValueError(f"no '-m module' in the command: {shlex.join(command)}")
    last = places[-1]
    return command[last + 1], list(command[last + 2 :])


def log_tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])


def leave_on_signals() -> None:
    """Let an interrupt or a termination end this process by SystemExit, so that it stops its children on the way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def numbered(text: str, job: int) -> str:
    """With the job's number for the word JOB, as in `stats.JOB.log`; `JOBS` and `MY_JOB` are other words."""
    return re.sub(r"\bJOB\b", str(job), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="number of jobs; JOB runs from 1 to it")
    parser.add_argument("--parallel", type=int, default=None, help="how many at a time (default: all)")
    parser.add_argument("--log", required=True, help="log file, with JOB where there are several")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- command")
    args = parser.parse_args()
    leave_on_signals()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    jobs = [
        Job([numbered(word, job) for word in command], Path(numbered(args.log, job))) for job in range(1, args.jobs + 1)
    ]
    try:
        run_jobs(jobs, args.parallel or args.jobs)
    except JobFailed as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
