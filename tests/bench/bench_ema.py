"""The moving average in training: `python tests/bench/bench_ema.py` prints a table and appends it to results.csv.

One layer of the default size, forward and backward to the input and all parameters, SiLU and residual included, one
row of the batch padded in its second half. Four ways of it in one run: ours, the same forward in plain operations that
torch differentiates (autograd), the direct sum in chunks of 32 labels with a state between them (scan), ESPnet's class.

Part `kept` is what the graph holds between forward and backward beyond input and parameters; a ratio of memory is one
to the size of the input. With one thread times are compared by CPU time, else by wall clock.
"""

import argparse
import operator
import sys
from pathlib import Path

import torch
from harness import RESULTS, append, compared, extra_memory, measure, require_green, row, table

sys.path.append(str(Path(__file__).resolve().parents[1] / "mega"))
from ema_by_autograd import ByAutograd, ByScan, kept_bytes

LENGTHS = (1, 8, 16, 32, 64, 128, 256, 512)
SHOWN = (
    "method shape part threads median_ms p20_ms p80_ms cpu_ms extra_memory_mb extra_memory_ratio times_as_fast error"
).split()


def espnet_class(*arguments):
    from espnet2.asr_transducer.decoder.modules.mega.multi_head_damped_ema import MultiHeadDampedEMA

    return MultiHeadDampedEMA(*arguments)


def our_class(*arguments):
    from espnet_mega_plugin.mega.ema import MultiHeadDampedEMA

    return MultiHeadDampedEMA(*arguments)


class TimeFirst(torch.nn.Module):
    """ESPnet's class with our arguments."""

    def __init__(self, ema: torch.nn.Module):
        super().__init__()
        self.ema = ema

    def forward(self, x, padding):
        return self.ema(x, padding[:, None])[0]


METHODS = {
    "espnet": lambda *arguments: TimeFirst(espnet_class(*arguments)),
    "autograd": ByAutograd,
    "scan": ByScan,
    "ours": our_class,
}


def bench(name: str, shape: tuple[int, ...], device: str, repeats: int) -> list[dict]:
    """A row for forward, for backward, for both and for what is kept, or one with the name of the exception."""
    L, B, D, N = shape
    known = {"method": name, "shape": "x".join(map(str, shape)), "dtype": "float32"}
    torch.manual_seed(0)
    try:
        ema = METHODS[name](D, N, torch.nn.SiLU(), None).to(device)
        x = torch.randn(L, B, D, device=device, requires_grad=True)
        grad = torch.randn(L, B, D, device=device)
        padding = torch.zeros(B, L, dtype=torch.bool, device=device)
        padding[-1, (L + 1) // 2 :] = True
        inputs = [x, *ema.parameters()]
        parts = {
            "forward": lambda _: ema(x, padding),
            "backward": lambda out: torch.autograd.grad(out, inputs, grad),
        }
        times = measure(lambda: None, parts, warmup=3, repeats=repeats)
        memory = extra_memory(lambda: None, lambda _: parts["backward"](parts["forward"](None)))
        kept = kept_bytes(ema, x, padding) / 1e6
    except Exception as error:  # a row of its own, by name
        return [row("ema", **known, error=type(error).__name__)]
    times["both"] = {key: sum(part[key] for part in times.values()) for key in times["forward"]}
    rows = [row("ema", **known, part=part, repeats=repeats, **values) for part, values in times.items()]
    rows.append(row("ema", **known, part="kept"))
    for held, megabytes in zip(rows[-2:], (memory, kept), strict=True):
        ratio = None if megabytes is None else megabytes * 1e6 / x.nbytes
        held.update(extra_memory_mb=megabytes, extra_memory_ratio=ratio)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--size", nargs=3, type=int, default=(16, 512, 4), metavar=("B", "D", "N"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are appended to this file")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small, untested, to --results only if given")
    args = parser.parse_args(argv)
    if args.quick:
        args.lengths, args.size, args.threads, args.repeats = (1, 37), (2, 6, 2), [1], 1
    else:
        require_green("tests/mega/test_ema.py", "tests/mega/test_ema_backward.py", "-m", "not slow")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        found = [
            measured
            for L in args.lengths
            for name in args.methods
            for measured in bench(name, (L, *args.size), device, args.repeats)
        ]
        print(table(compared(found, {"method": "espnet"}, operator.itemgetter("shape", "part")), SHOWN), flush=True)
        rows += found
    if not args.quick or args.results != RESULTS:
        append(rows, args.results)


if __name__ == "__main__":
    main()
