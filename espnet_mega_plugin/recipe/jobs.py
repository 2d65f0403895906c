"""Run commands in parallel on this machine, each with its own log file: the recipe's run.pl.

    run.pl [--max-jobs-run N] JOB=1:4 exp/log/stats.JOB.log command ... JOB ...

runs the command once for JOB = 1..4, with the number for the word JOB in command and log. When one fails, the others
are stopped and the end of its log is shown. The form is that of Kaldi's run.pl, which ESPnet's launcher knows; options
that concern a cluster (--gpu, --mem, --time, --num-threads, --num-nodes, --config, --name) change nothing here.
"""

import json
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ARRAY = re.compile(r"([A-Za-z_]\w*)=(\d+)(?::(\d+))?")  # JOB=1:4
TAIL = 25  # lines of a log that are shown when its command fails


class JobFailed(RuntimeError):
    """A command of a job ended with an error; the message names it and ends with the tail of its log."""


@dataclass(frozen=True)
class Job:
    """command: argument list. log: file that gets its output, begun anew with the command itself."""

    command: Sequence[str]
    log: Path


def run_jobs(
    jobs: Sequence[Job],
    parallel: int,
    worker: Sequence[str] = (),
    while_waiting: Callable[[], None] = lambda: None,
    submit: Sequence[str] = (),
) -> None:
    """Run all jobs, at most `parallel` at a time.

    worker: command that starts `recipe/worker.py`; given, the jobs `... -m module arguments` run in such long-lived
        processes, which import the module once.
    submit: command that runs `log command...` elsewhere, waits for it and writes the log, such as slurm.pl with its
        options; given, every job is handed to it, and there are no workers.
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
    serve = _serve_by_command if submit or not worker else _serve_by_worker
    threads = [
        threading.Thread(target=serve, args=(waiting, running, failed, submit or worker), daemon=True)
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


def _serve_by_command(waiting, running, failed, submit) -> None:
    while not failed and (job := _next(waiting)):
        command = [*submit, str(job.log), *job.command] if submit else job.command
        said = job.log.with_name(f"{job.log.name}.submit") if submit else job.log  # the log is the submitted job's
        with said.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
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


@dataclass(frozen=True)
class Call:
    """What a runner in Kaldi's form is asked: `[--option value]... [JOB=first:last] log command...`.

    options: with underscores in their names. word: what stands for the number, None for a single job. numbers: of the
    jobs, empty for a single one.
    """

    options: Mapping[str, str]
    word: str | None
    numbers: range
    log: str
    command: Sequence[str]


def parse_call(arguments: Sequence[str]) -> Call:
    """
    Raises:
        ValueError: an option without a value, numbers that are none, no log or no command.
    """
    rest, options = list(arguments), {}
    while rest and rest[0].startswith("--"):
        name = rest.pop(0)
        if not rest:
            raise ValueError(f"option {name} needs a value")
        options[name[2:].replace("-", "_")] = rest.pop(0)
    word, numbers = None, range(0)
    if rest and (found := ARRAY.fullmatch(rest[0])):
        word, first, last = found.group(1), int(found.group(2)), int(found.group(3) or found.group(2))
        if not 1 <= first <= last:
            raise ValueError(f"{rest[0]}: expected numbers from 1 on, such as JOB=1:4")
        numbers = range(first, last + 1)
        rest.pop(0)
    if len(rest) < 2:
        raise ValueError("expected [--option value]... [JOB=1:4] log command...")
    if numbers and numbered(rest[0], 1, word) == rest[0] and len(numbers) > 1:
        raise ValueError(f"log {rest[0]}: {len(numbers)} jobs need a log each, with {word} in its name")
    return Call(options, word, numbers, rest[0], rest[1:])


def numbered(text: str, job: int, word: str = "JOB") -> str:
    """With the job's number for the word JOB, as in `stats.JOB.log`; `JOBS` and `MY_JOB` are other words."""
    return re.sub(rf"\b{word}\b", str(job), text)


def main() -> None:
    leave_on_signals()
    try:
        call = parse_call(sys.argv[1:])
        if call.word:
            jobs = [
                Job([numbered(word, n, call.word) for word in call.command], Path(numbered(call.log, n, call.word)))
                for n in call.numbers
            ]
        else:
            jobs = [Job(call.command, Path(call.log))]
        run_jobs(jobs, int(call.options.get("max_jobs_run", len(jobs))))
    except (JobFailed, ValueError) as error:
        sys.exit(f"run.pl: {error}")


if __name__ == "__main__":
    main()
