"""RNN-T losses side by side: `python tests/bench/bench_loss.py` prints a table and appends it to results.csv.

Forward and backward to the logits, log-softmax included, FastEmit off (torchaudio has none). The logits are no leaf,
as behind a joint network. Loops are left out at large shapes. A method that fails is listed with its exception.

With `--joint J` the joint network is timed as well: tanh, output layer, loss and the gradients of all of it, from
encoder and decoder outputs in a joint space of J channels and an output layer as torch initialises it, where the
posteriors are wide: a trained model's are narrower, and the fused loss gains more there.
"""

import argparse
import operator

import torch
from harness import append, extra_memory, measure, require_green, row, table
from torch import Tensor

from espnet_mega_plugin.rnnt import METHODS, fused_rnnt_loss, rnnt_loss

SHAPES = "2,20,5,30 4,200,40,500 8,150,30,1000 8,250,60,1000"  # B, T, U, V
LOOPS_UP_TO = 2 * 20 * 6 * 30  # logits; beyond this a call takes seconds
SHOWN = "method shape dtype part threads median_ms p20_ms p80_ms cpu_ms extra_memory_ratio times_as_fast error".split()


def ours(method: str):
    return lambda *problem: rnnt_loss(*problem, fastemit_lambda=0.0, method=method)


def torchaudio_loss(acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
    from torchaudio.functional import rnnt_loss as loss

    return loss(acts, labels, act_lens, label_lens, blank=0)


def espnet_numba_loss(*problem: Tensor) -> Tensor:
    from espnet2.asr.transducer.rnnt_multi_blank.rnnt_multi_blank import RNNTLossNumba

    return RNNTLossNumba(blank=0)(*problem)


LOSSES = {
    "torchaudio": torchaudio_loss,
    **{method: ours(method) for method in METHODS},
    "espnet_numba": espnet_numba_loss,
}
LOOPS = ("reference", "espnet_numba")
FUSED = "fused"


def targets(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, frame and label lengths: every utterance is as long as the longest."""
    B, T, U, V = shape
    labels = torch.randint(1, V, (B, U), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return labels.to(device), *(torch.full((B,), n, dtype=torch.int32, device=device) for n in (T, U))


def bench(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, repeats: int) -> list[dict]:
    B, T, U, V = shape
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, U + 1, V, generator=draw).to(device, dtype).requires_grad_()
    arguments = targets(shape, device)

    def prepare() -> Tensor:
        return logits * 1

    def forward(acts: Tensor) -> tuple[Tensor, Tensor]:
        return acts, LOSSES[name](acts, *arguments).sum()

    def backward(state: tuple[Tensor, Tensor]) -> Tensor:
        acts, loss = state
        return torch.autograd.grad(loss, acts)[0]

    return timed("rnnt_loss", name, shape, dtype, repeats, prepare, forward, backward)


def bench_joint(
    name: str, shape: tuple[int, ...], channels: int, dtype: torch.dtype, device: str, repeats: int
) -> list[dict]:
    B, T, U, V = shape
    torch.manual_seed(0)
    output = torch.nn.Linear(channels, V, device=device, dtype=dtype)
    enc = torch.randn(B, T, channels, device=device, dtype=dtype, requires_grad=True)
    dec = torch.randn(B, U + 1, channels, device=device, dtype=dtype, requires_grad=True)
    inputs, arguments = (enc, dec, output.weight, output.bias), targets(shape, device)

    def forward(_) -> Tensor:
        if name == FUSED:
            return fused_rnnt_loss(*inputs, *arguments, torch.tanh, fastemit_lambda=0.0)
        return LOSSES[name](output(torch.tanh(enc[:, :, None] + dec[:, None])), *arguments).sum()

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs)

    what = f"joint_{channels}_rnnt_loss"
    return timed(what, name, shape, dtype, repeats, lambda: None, forward, backward)


def timed(what, name, shape, dtype, repeats, prepare, forward, backward) -> list[dict]:
    """A row for forward, for backward and for both, or one with the name of the exception."""
    B, T, U, V = shape
    known = {"method": name, "shape": f"{B}x{T}x{U + 1}x{V}", "dtype": str(dtype).removeprefix("torch.")}
    try:
        times = measure(prepare, {"forward": forward, "backward": backward}, repeats=repeats)
        memory = extra_memory(prepare, lambda acts: backward(forward(acts)))
    except Exception as error:  # a row of its own, by name
        return [row(what, **known, error=type(error).__name__)]
    ratio = None if memory is None else memory * 1e6 / (B * T * (U + 1) * V * dtype.itemsize)
    times["both"] = {key: sum(part[key] for part in times.values()) for key in times["forward"]}
    peak = {"extra_memory_mb": memory, "extra_memory_ratio": ratio}
    return [
        row(what, **known, part=part, repeats=repeats, **values, **(peak if part == "both" else {}))
        for part, values in times.items()
    ]


def compared(rows: list[dict], baseline: str) -> list[dict]:
    """With how many times as fast as the baseline each is, in CPU time (wall-clock time on a GPU)."""
    clock = "median_ms" if torch.cuda.is_available() else "cpu_ms"
    same = operator.itemgetter("what", "shape", "dtype", "part")
    rows = [{"part": None, **r} for r in rows]
    base = {same(r): r[clock] for r in rows if r["method"] == baseline and r["part"]}
    found = [(r, base.get(same(r))) for r in rows]
    return [{**r, "times_as_fast": b / r[clock]} if b else r for r, b in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES.split(), help="B,T,U,V each")
    parser.add_argument("--losses", nargs="+", default=[*LOSSES, FUSED], choices=[*LOSSES, FUSED])
    parser.add_argument("--joint", type=int, metavar="J", help="time joint network and loss, J channels")
    parser.add_argument("--baseline", default="torchaudio", help="what times_as_fast compares with")
    parser.add_argument("--dtype", default="float32", choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no_append", action="store_true", help="print only")
    args = parser.parse_args()

    require_green(*(f"tests/rnnt/test_{name}.py" for name in ("loss_laws", "rnnt_reference", "fused")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for text in args.shapes:
        shape = tuple(map(int, text.split(",")))
        cells = shape[0] * shape[1] * (shape[2] + 1) * shape[3]
        for name in args.losses:
            if name in LOOPS and cells > LOOPS_UP_TO or name == FUSED and not args.joint:
                continue
            torch.set_num_threads(args.threads)  # ESPnet's numba loss changes it
            options = getattr(torch, args.dtype), device, args.repeats
            rows += bench_joint(name, shape, args.joint, *options) if args.joint else bench(name, shape, *options)
    if not args.no_append:
        append(rows)
    print(table(compared(rows, args.baseline), SHOWN))


if __name__ == "__main__":
    main()
