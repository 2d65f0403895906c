"""Figures that can be trusted: warm-up, median of n, peak memory, the machine and the commit; nothing on a red test.

    require_green("tests/rnnt/test_loss_laws.py")
    times = measure(prepare, {"forward": forward, "backward": backward})
    append([row("rnnt_loss", method="wavefront", shape="8x150x31x1000", part=part, **t) for part, t in times.items()])

Wall-clock and CPU time are both kept: where other programs share the machine, the CPU time of one thread is the fair
figure. Appended rows of `results.csv` are never changed.
"""

import csv
import ctypes
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = (
    "what method shape dtype part threads repeats median_ms p20_ms p80_ms cpu_ms extra_memory_mb extra_memory_ratio "
    "error device python torch versions commit date gradient_error bandwidth_share"
).split()


def require_green(*tests: str) -> None:
    """Run these tests; a failing one ends the program with pytest's output."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nNo figures are taken: {' '.join(tests)} is red.")


def measure(
    prepare: Callable[[], object], parts: dict[str, Callable], warmup: int = 2, repeats: int = 10
) -> dict[str, dict]:
    """Times of each part in milliseconds: median_ms, p20_ms, p80_ms and cpu_ms (median CPU time).

    The first three are wall-clock times; on a GPU what its events count, from the part's first kernel to its last.

    Each repeat begins with a fresh ``prepare()``, which is not timed; a part takes what the part before it returned.
    Freeing memory takes time, too: a part should return what its caller would keep.
    """
    wall, cpu = ({name: [] for name in parts} for _ in range(2))
    for repeat in range(-warmup, repeats):
        state = prepare()
        for name, part in parts.items():
            stop = _stopwatch()
            result = part(state)
            seconds = stop()
            if repeat >= 0:
                wall[name].append(seconds[0])
                cpu[name].append(seconds[1])
            state = result  # what the part was given is freed off the clock
        del state, result
    return {name: {**_quantiles(wall[name]), "cpu_ms": _milliseconds(cpu[name], 0.5)} for name in parts}


def extra_memory(prepare: Callable[[], object], run: Callable) -> float | None:
    """MB that ``run(prepare())`` holds at its peak beyond what was held before it. None where it cannot be measured."""
    run(prepare())  # what a first call loads and keeps is not counted
    state = prepare()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(state)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the first call freed is given back, or it would not count again
        Path("/proc/self/clear_refs").write_text("5")  # the peak is reset to what is resident now
        before = _status("VmRSS")
        run(state)
        return max(0, _status("VmHWM") - before) / 1e3
    except (OSError, AttributeError):  # not Linux, not glibc
        return None


def clock(r: dict) -> str:
    """Which of a row's times is compared: CPU time of one thread on a CPU, else wall-clock time."""
    one_thread = r.get("threads", torch.get_num_threads()) == 1 and not torch.cuda.is_available()
    return "cpu_ms" if one_thread else "median_ms"


def compared(rows: Iterable[dict], base: dict, same: Callable[[dict], object]) -> list[dict]:
    """With how many times as fast each is as the row that has the values of `base` and is otherwise the same."""
    rows = list(rows)
    slow = {same(r): r for r in rows if "cpu_ms" in r and base.items() <= r.items()}

    def found(r: dict) -> dict:
        against = slow.get(same(r)) if "cpu_ms" in r else None
        if against is None:
            return r
        return {**r, "times_as_fast": against[which := clock(against)] / r[which]}

    return [found(r) for r in rows]


def row(what: str, **values) -> dict:
    """One line of results.csv with this machine's columns filled in."""
    return {"what": what, **machine(), **values}


def machine() -> dict:
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": " ".join(f"{name}={_version(name)}" for name in ("espnet", "torchaudio", "triton", "numba")),
        "commit": _git("describe", "--always", "--dirty"),
        "date": datetime.date.today().isoformat(),
    }


def append(rows: Iterable[dict], path: Path = RESULTS) -> None:
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({name: _shown(value) for name, value in row.items()} for row in rows)


def table(rows: list[dict], columns: Iterable[str]) -> str:
    """Rows as a Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *([_shown(row.get(name)) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def copy_bandwidth(device: str) -> float:
    """Bytes a second that copying a tensor reads and writes, at 256 MB on a CPU and 1 GB on a GPU."""
    size = 2**26 if device == "cpu" else 2**28
    source, target = (torch.zeros(size, device=device) for _ in range(2))
    times = measure(lambda: None, {"copy": lambda _: target.copy_(source)})
    return 2 * source.nbytes / (times["copy"]["median_ms"] / 1e3)


def _stopwatch() -> Callable[[], tuple[float, float]]:
    """Starts now; the call gives wall-clock (on a GPU: its events') and CPU seconds since."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
    started = time.perf_counter(), time.process_time()

    def stop() -> tuple[float, float]:
        if on_gpu:
            events[1].record()
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        return (events[0].elapsed_time(events[1]) / 1e3 if on_gpu else wall), cpu

    return stop


def _quantiles(seconds: list[float]) -> dict:
    return {f"{name}_ms": _milliseconds(seconds, q) for name, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}


def _milliseconds(seconds: list[float], quantile: float) -> float:
    return 1e3 * torch.tensor(seconds, dtype=torch.float64).quantile(quantile).item()


def _shown(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _status(key: str) -> int:
    """A figure of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
