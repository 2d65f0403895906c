"""Stages 7 and 11: run ESPnet's training command and show a line an epoch; an interrupted training goes on.

ESPnet's own output goes to `train.log`, after it the peak memory; what is shown is read from there. With `--launcher`
the command is one of ESPnet's launcher, which submits the training to a cluster: then the cluster's job writes
`train.log`, the launcher moves an earlier one to `train.1.log`, and what the launcher itself says is in `launch.log`.
"""

import argparse
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

from espnet_mega_plugin.recipe.jobs import leave_on_signals, log_tail
from espnet_mega_plugin.recipe.progress import LogFollower, StatusLine, clock
from espnet_mega_plugin.recipe.resume import SAVED, back_up, check_same_model, mend, only_training, remove_backups

STARTED = re.compile(r"INFO: (\d+)/(\d+)epoch started")
BATCHES = re.compile(r"INFO: (\d+)epoch:train:\d+-(\d+)batch: .*?\bloss=([^,]+)")
NOTHING_LEFT = "The training has already reached at max_epoch"
RESULTS = re.compile(r"INFO: (\d+)epoch results: \[train\] (.*), \[valid\] (.*)")
LOSS = re.compile(r"(?:^|, )loss=([^,]+)")


class Watcher:
    """Turns lines of ESPnet's training log into what the user sees."""

    def __init__(self, status: StatusLine, now=time.monotonic):
        self._status, self._now = status, now
        self._epoch = self._last = 0
        self._epoch_began = self._began = now()
        self._first = None

    def see(self, line: str) -> None:
        if found := STARTED.search(line):
            self._epoch, self._last = map(int, found.groups())
            self._epoch_began = self._now()
            if self._first is None:
                self._first, self._began = self._epoch, self._now()
            self._status.show(f"epoch {self._epoch}/{self._last}")
        elif found := BATCHES.search(line):
            epoch, batch, loss = found.groups()
            self._status.show(f"epoch {epoch}/{self._last}: batch {batch}, loss {loss}")
        elif found := RESULTS.search(line):
            epoch, train, valid = found.groups()
            seconds = self._now() - self._epoch_began
            left = (self._last - int(epoch)) * (self._now() - self._began) / (int(epoch) - self._first + 1)
            self._status.keep(
                f"epoch {int(epoch):>3}/{self._last}   train loss {_loss(train):>8}   valid loss {_loss(valid):>8}"
                f"   {seconds:5.1f} s   ETA {clock(left)}"
            )
        elif NOTHING_LEFT in line:
            self._status.keep("the last epoch was trained already")


def _loss(report: str) -> str:
    found = LOSS.search(report)
    return found.group(1) if found else "-"


def run_training(command: list[str], exp: Path, launcher: bool = False) -> int:
    """Run ESPnet's training in `exp` with its output appended to `train.log`; returns the exit status.

    launcher: the command is the launcher's; its output is appended to `launch.log`, and `train.log` is only read.

    Raises:
        BlockingIOError: another training runs in `exp`.
    """
    log = exp / "train.log"
    with only_training(exp) as lock, (exp / "launch.log" if launcher else log).open("a", encoding="utf-8") as out:
        if mended := mend(exp, log):
            print(mended, flush=True)
        out.write(f"# {shlex.join(command)}\n")
        out.flush()
        follower, watcher = LogFollower(log), Watcher(StatusLine())
        # The child inherits the lock, so it holds as long as either of the two lives
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, pass_fds=[lock]
        )
        try:
            while True:
                status = process.poll()
                lines = follower.new_lines()
                for line in lines:
                    watcher.see(line)
                if any(SAVED.search(line) for line in lines):
                    back_up(exp, log)
                if status is not None:
                    break
                time.sleep(0.3)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if status == 0:
            remove_backups(exp)
        if not launcher:
            most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            out.write(f"# peak memory of a process: {most / 1e6:.0f} MB\n")
        return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exp", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path())
    parser.add_argument("--token_list", type=Path, required=True)
    parser.add_argument("--launcher", action="store_true", help="the command is espnet2.bin.launch's")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- ESPnet's training command")
    args = parser.parse_args()
    leave_on_signals()
    try:
        check_same_model(args.config, args.token_list, args.exp, args.command)
        status = run_training(args.command[1:], args.exp, args.launcher)
    except (OSError, ValueError) as error:
        sys.exit(f"train: {error}")
    if status:
        log = args.exp / "train.log"
        if not log.exists():  # the launcher did not come as far as that
            log = args.exp / "launch.log"
        sys.exit(f"train: exit status {status}; the end of {log}:\n{log_tail(log)}")


if __name__ == "__main__":
    main()
