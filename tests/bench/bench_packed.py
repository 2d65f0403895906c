"""Linear layers packed for few rows beside plain ones: `python tests/bench/bench_packed.py` prints a table and appends
it to results.csv.

All layers of a MEGA decoder that `PackedLayers` packs, one after the other, so that no weight is still in the cache
when its turn comes again. Part `plain` is the layers themselves, `packed` the same through `PackedLayers`. With one
thread times are compared by CPU time, else by wall clock.
"""

import argparse
import operator
from pathlib import Path

import torch
from harness import RESULTS, append, compared, measure, require_green, row, table

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.mega.packed import PackedLayers

ROWS = (1, 2, 3, 4, 5, 8, 20, 100)
SMALL = {"block_size": 384, "linear_size": 512, "num_blocks": 1}
SHOWN = "shape part threads median_ms p20_ms p80_ms cpu_ms times_as_fast".split()


@torch.no_grad()
def bench(decoder: torch.nn.Module, rows: int, repeats: int) -> list[dict]:
    """A row for the plain layers and one for the packed ones, which give the same."""
    packed = PackedLayers(decoder)
    layers = [layer for layer in decoder.modules() if layer in packed]
    inputs = {layer: torch.randn(rows, layer.in_features) for layer in layers}
    for layer, x in inputs.items():
        torch.testing.assert_close(packed(layer, x), layer(x), rtol=1e-4, atol=1e-4)
    parts = {
        "plain": lambda _: [layer(x) for layer, x in inputs.items()],
        "packed": lambda _: [packed(layer, x) for layer, x in inputs.items()],
    }
    times = measure(lambda: None, parts, warmup=3, repeats=repeats)
    weights = sum(layer.weight.nbytes for layer in layers) / 1e6
    shape = f"{rows} rows, {len(layers)} layers of {weights:.3g} MB"
    return [row("packed", shape=shape, dtype="float32", part=part, repeats=repeats, **t) for part, t in times.items()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are appended to this file")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small, untested, to --results only if given")
    args = parser.parse_args(argv)
    if args.quick:
        args.threads, args.repeats = [1], 1
    else:
        require_green("tests/test_prefixes.py")
    torch.manual_seed(0)
    decoder = MEGADecoder(500, **(SMALL if args.quick else {})).eval()
    before, rows = torch.get_num_threads(), []
    try:
        for threads in args.threads:
            torch.set_num_threads(threads)
            for count in (1, 5) if args.quick else ROWS:
                rows += bench(decoder, count, args.repeats)
    finally:
        torch.set_num_threads(before)
    print(table(compared(rows, {"part": "plain"}, operator.itemgetter("shape", "threads")), SHOWN))
    if not args.quick or args.results != RESULTS:
        append(rows, args.results)


if __name__ == "__main__":
    main()
