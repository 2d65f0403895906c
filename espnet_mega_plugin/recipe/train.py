"""Stage 11: run ESPnet's training command, show a line an epoch, and refuse to resume a different model.

ESPnet's own output goes to the log; what is shown is read from there.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml

from espnet_mega_plugin.recipe.jobs import leave_on_signals, log_tail
from espnet_mega_plugin.recipe.progress import LogFollower, StatusLine, clock

# What may change between the start of a training and its resumption: how long it goes on and how it is watched
MAY_CHANGE = {
    "max_epoch", "patience", "keep_nbest_models", "num_workers", "ngpu", "log_interval", "log_level",
    "use_tensorboard", "use_matplotlib", "num_att_plot",
}  # fmt: skip

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


def check_same_model(config: Path, token_list: Path, exp: Path) -> None:
    """Do nothing when the training in `exp` was begun with this configuration and token list, or has not begun.

    Raises:
        ValueError: it was begun with others; names what differs.
    """
    if not (exp / "checkpoint.pth").exists() or not (exp / "config.yaml").exists():
        return
    begun = yaml.safe_load((exp / "config.yaml").read_text(encoding="utf-8"))
    wanted = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    differences = [d for key, value in (wanted or {}).items() if key not in MAY_CHANGE
                   for d in _differences(key, value, begun.get(key))]  # fmt: skip
    tokens = token_list.read_text(encoding="utf-8").split("\n")[:-1]
    if begun.get("token_list") and begun["token_list"] != tokens:
        differences.append("token_list")
    if differences:
        raise ValueError(
            f"the training in {exp} was begun with something else: {'; '.join(differences[:5])}. "
            f"Give this one another name with --asr_tag, or remove {exp}"
        )


def _differences(key: str, wanted, begun) -> list[str]:
    """ESPnet adds defaults to what the YAML says, so only what the YAML says is compared."""
    if isinstance(wanted, dict) and isinstance(begun, dict):
        return [d for k, value in wanted.items() for d in _differences(f"{key}.{k}", value, begun.get(k))]
    if isinstance(wanted, list) and isinstance(begun, list) and len(wanted) == len(begun):
        pairs = enumerate(zip(wanted, begun, strict=True))
        return [d for i, (a, b) in pairs for d in _differences(f"{key}[{i}]", a, b)]
    return [] if _plain(wanted) == _plain(begun) else [f"{key} was {begun}, is now {wanted}"]


def _plain(value):
    """`1e-3` is text in YAML 1.1 and a number to ESPnet; `none` is how its options write None."""
    if value == "none":
        return None
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def run_training(command: list[str], log: Path) -> int:
    """Run the command with its output appended to `log`; returns the exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        out.write(f"# {shlex.join(command)}\n")
    follower, watcher = LogFollower(log), Watcher(StatusLine())
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        while True:
            status = process.poll()
            for line in follower.new_lines():
                watcher.see(line)
            if status is not None:
                return status
            time.sleep(0.5)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--asr_exp", type=Path, required=True)
    parser.add_argument("--asr_config", type=Path, default=Path())
    parser.add_argument("--token_list", type=Path, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- ESPnet's training command")
    args = parser.parse_args()
    leave_on_signals()
    try:
        check_same_model(args.asr_config, args.token_list, args.asr_exp)
    except (OSError, ValueError) as error:
        sys.exit(f"train: {error}")
    log = args.asr_exp / "train.log"
    if status := run_training(args.command[1:], log):
        sys.exit(f"train: exit status {status}; the end of {log}:\n{log_tail(log)}")


if __name__ == "__main__":
    main()
