"""Stage 11: when a training may go on, and from which checkpoint.

ESPnet writes `checkpoint.pth` in place after each epoch and then the epoch's own file. A process that is killed while
it writes leaves a torn file, and the next start fails or averages it in. So a copy of the checkpoint is kept from the
last epoch whose files were all written, and a torn state goes back to it: at most the epochs since are lost.
"""

import fcntl
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

# What may change between the start of a training and its resumption: how long it goes on and how it is watched
MAY_CHANGE = {
    "max_epoch", "patience", "keep_nbest_models", "num_workers", "ngpu", "log_interval", "log_level",
    "use_tensorboard", "use_matplotlib", "num_att_plot",
}  # fmt: skip

# ESPnet's log: the results of an epoch, and what it says when the epoch's files are on disk
RESULTS = re.compile(r"INFO: (\d+)epoch results: ")
SAVED = re.compile(r"INFO: (The best model has been updated|There are no improvements in this epoch)")

CHECKPOINT = "checkpoint.pth"
BACKUP = re.compile(r"checkpoint\.epoch(\d+)\.backup")
EPOCH = re.compile(r"(\d+)epoch\.pth")


def check_same_model(config: Path, token_list: Path, exp: Path, command: Sequence[str] = ()) -> None:
    """Do nothing when the training in `exp` was begun with this configuration and token list, or has not begun.

    command: of the training; its options go before what the configuration says, as they do for ESPnet.

    Raises:
        ValueError: it was begun with others; names what differs.
    """
    if not (exp / "checkpoint.pth").exists() or not (exp / "config.yaml").exists():
        return
    begun = yaml.safe_load((exp / "config.yaml").read_text(encoding="utf-8"))
    wanted = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    wanted = _overridden(wanted or {}, command)
    differences = [d for key, value in wanted.items() if key not in MAY_CHANGE
                   for d in _differences(key, value, begun.get(key))]  # fmt: skip
    tokens = token_list.read_text(encoding="utf-8").split("\n")[:-1]
    if begun.get("token_list") and begun["token_list"] != tokens:
        differences.append("token_list")
    if differences:
        raise ValueError(
            f"the training in {exp} was begun with something else: {'; '.join(differences[:5])}. "
            f"Give this one another name with --asr_tag, or remove {exp}"
        )


def _overridden(config: dict, command: Sequence[str]) -> dict:
    """The configuration with the values of `--key value` and `--key_conf name=value` in a command, the last of each."""
    result = dict(config)
    for flag, value in zip(command, command[1:], strict=False):
        key = flag.removeprefix("--")
        if flag == key or key not in config:
            continue
        name, equals, inner = value.partition("=")
        if isinstance(result[key], dict) and equals:
            result[key] = {**result[key], name: inner}
        else:
            result[key] = value
    return result


def _differences(key: str, wanted, begun) -> list[str]:
    """ESPnet adds defaults to what the YAML says, so only what the YAML says is compared."""
    if isinstance(wanted, dict) and isinstance(begun, dict):
        return [d for k, value in wanted.items() for d in _differences(f"{key}.{k}", value, begun.get(k))]
    if isinstance(wanted, list) and isinstance(begun, list) and len(wanted) == len(begun):
        pairs = enumerate(zip(wanted, begun, strict=True))
        return [d for i, (a, b) in pairs for d in _differences(f"{key}[{i}]", a, b)]
    return [] if _plain(wanted) == _plain(begun) else [f"{key} was {begun}, is now {wanted}"]


def _plain(value):
    """`1e-3` is text in YAML 1.1 and a number to ESPnet; `none`, `true` and `false` are how its options write them."""
    if isinstance(value, str) and value.lower() in ("none", "true", "false"):
        return {"none": None, "true": 1.0, "false": 0.0}[value.lower()]
    try:
        return float(value) if isinstance(value, str | bool) else value
    except ValueError:
        return value


# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def only_training(exp: Path) -> Iterator[int]:
    """Hold the lock of an experiment; gives its file descriptor, for a child process to hold as well.

    Raises:
        BlockingIOError: another process holds it.
    """
    exp.mkdir(parents=True, exist_ok=True)
    with (exp / "train.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another training is running in {exp}; wait for it or stop it") from None
        yield lock.fileno()


def back_up(exp: Path, log: Path) -> None:
    """Keep a copy of the checkpoint if the log says that all files of its epoch are written."""
    epoch = _saved_epoch(log)
    if epoch is None:
        return
    new = exp / "checkpoint.new"
    shutil.copyfile(exp / CHECKPOINT, new)
    # The next results come before the next checkpoint is written: as long as there are none, the copy is this epoch's
    if _saved_epoch(log) == epoch:
        target = exp / f"checkpoint.epoch{epoch}.backup"
        os.replace(new, target)
        remove_backups(exp, but=target)
    else:
        new.unlink()


def remove_backups(exp: Path, but: Path | None = None) -> None:
    for path, _ in _numbered(exp, BACKUP):
        if path != but:
            path.unlink()


def mend(exp: Path, log: Path) -> str:
    """Make `exp` a state that ESPnet can go on from; returns what was done about a torn one, or nothing."""
    checkpoint = exp / CHECKPOINT
    if not checkpoint.exists() or (is_whole(checkpoint) and _saved_epoch(log)):
        return ""
    checkpoint.unlink()
    backups = sorted(_numbered(exp, BACKUP), key=lambda found: found[1])
    last = backups[-1][1] if backups else 0
    if backups:
        shutil.copyfile(backups[-1][0], checkpoint)
    for path, epoch in _numbered(exp, EPOCH):
        if epoch > last:
            path.unlink()
    cause = "the last training was stopped while it wrote its checkpoint"
    return f"{cause}; going on after epoch {last}" if backups else f"{cause}; beginning anew"


def is_whole(checkpoint: Path) -> bool:
    """Whether a file of torch.save, which is a zip archive with checksums, was written to its end."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError):
        return False


def _saved_epoch(log: Path) -> int | None:
    """The last epoch with results in the logs, if all its files are written."""
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in all_logs(log))
    last = max(RESULTS.finditer(text), key=re.Match.start, default=None)
    return int(last.group(1)) if last and SAVED.search(text, last.end()) else None


def all_logs(log: Path) -> list[Path]:
    """A log and those that ESPnet's launcher moved out of its way (train.1.log before train.log), oldest first."""
    moved = _numbered(log.parent, re.compile(rf"{re.escape(log.stem)}\.(\d+){re.escape(log.suffix)}"))
    oldest_first = [path for path, _ in sorted(moved, key=lambda found: -found[1])]
    return [*oldest_first, log] if log.exists() else oldest_first


def _numbered(exp: Path, name: re.Pattern) -> list[tuple[Path, int]]:
    return [(path, int(found.group(1))) for path in exp.iterdir() if (found := name.fullmatch(path.name))]
