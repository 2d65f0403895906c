"""RNN-T losses side by side: `python tests/bench/bench_loss.py` prints two tables and appends them to results.csv.

Table `rnnt_loss`: from logits (no leaf, as behind a joint network) to their gradient, log-softmax included. Table
`joint_J_rnnt_loss`: tanh, output layer, loss and the gradients of all of it, from encoder and decoder outputs in a joint
space of J channels and an output layer as torch initialises it, where the posteriors are wide: a trained model's are
narrower, and the fused loss gains more there. FastEmit is off (torchaudio has none). Loops are left out at large
shapes. A method that fails is listed with its exception.

Beside torchaudio and ESPnet's, warprnnt-numba is measured where it is installed; it is all that pip builds elsewhere
than on a GPU: fast_rnnt and optimized_transducer fetch sources while they build, warp_rnnt wants CUDA, PyPI's k2
has no build for this torch, and warp-transducer is on no registry.

Shapes are B,T,U,V, all utterances of equal length, or an4,V: the utterances of a corpus (shapes_an4.txt), padded.

extra_memory_ratio  peak memory beyond what was there before, over the logits' size
bandwidth_share     what has to be moved (forward: the logits within the lengths are read; backward: read, and a gradient
                    of the logits' size written), over what the machine copies in the same time
gradient_error      largest relative error of a gradient tensor's norm against float64 on the same numbers
"""

import argparse
import importlib.util
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from harness import RESULTS, append, compared, copy_bandwidth, extra_memory, measure, require_green, row, table
from torch import Tensor

from espnet_mega_plugin.rnnt import (
    METHODS,
    do_rnnt_pruning,
    fused_rnnt_loss,
    get_rnnt_prune_ranges,
    rnnt_loss,
    rnnt_loss_pruned,
    rnnt_loss_smoothed,
)

SHAPES = "2,20,5,30 an4,30 4,200,40,500 8,150,30,1000 8,250,60,1000 2,500,100,5000"
CORPUS = Path(__file__).with_name("shapes_an4.txt")
LOOPS_UP_TO = 2 * 20 * 6 * 30  # logits; beyond this a call takes seconds
MANY = 1 << 28  # logits: timed 3 times at most, and on a CPU not with a joint network, whose products take minutes
ROWS_KEPT = 5  # a frame, in the pruned loss: ESPnet's default
SHOWN = (
    "method shape dtype part threads median_ms p20_ms p80_ms cpu_ms times_as_fast extra_memory_ratio bandwidth_share "
    "gradient_error error"
).split()


class Case(NamedTuple):
    """A batch: the lengths of its utterances and the number of classes."""

    frame_lengths: list[int]
    label_lengths: list[int]
    V: int
    source: str = ""

    @classmethod
    def parsed(cls, text: str) -> "Case":
        first, *others = text.split(",")
        if first == "an4":
            lines = [line.split() for line in CORPUS.read_text().splitlines() if not line.startswith("#")]
            return cls([int(T) for T, _ in lines], [int(U) for _, U in lines], int(others[0]), "an4:")
        B, T, U, V = map(int, (first, *others))
        return cls([T] * B, [U] * B, V)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, T, U+1, V)"""
        return len(self.frame_lengths), max(self.frame_lengths), max(self.label_lengths) + 1, self.V

    @property
    def logits(self) -> int:
        B, T, U1, V = self.shape
        return B * T * U1 * V

    @property
    def logits_inside(self) -> int:
        return sum(T * (U + 1) for T, U in zip(self.frame_lengths, self.label_lengths, strict=True)) * self.V

    @property
    def name(self) -> str:
        return self.source + "x".join(map(str, self.shape))

    def targets(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, frame and label lengths."""
        B, _, U1, V = self.shape
        labels = torch.randint(1, V, (B, U1 - 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in (self.frame_lengths, self.label_lengths))
        return labels.to(device), *lengths


def ours(method: str) -> Callable[..., Tensor]:
    return lambda *problem: rnnt_loss(*problem, fastemit_lambda=0.0, method=method)


def torchaudio_loss(acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
    from torchaudio.functional import rnnt_loss as loss

    acts = acts.float() if acts.dtype == torch.bfloat16 else acts  # as ESPnet does: it refuses bfloat16
    return loss(acts, labels, act_lens, label_lens, blank=0)


def espnet_numba_loss(*problem: Tensor) -> Tensor:
    from espnet2.asr.transducer.rnnt_multi_blank.rnnt_multi_blank import RNNTLossNumba

    return RNNTLossNumba(blank=0)(*problem)


def warprnnt_numba_loss(*problem: Tensor) -> Tensor:
    from warprnnt_numba import RNNTLossNumba

    return RNNTLossNumba(blank=0)(*problem)


LOSSES = {
    "torchaudio": torchaudio_loss,
    **{method: ours(method) for method in METHODS},
    "espnet_numba": espnet_numba_loss,
    **({"warprnnt_numba": warprnnt_numba_loss} if importlib.util.find_spec("warprnnt_numba") else {}),
}
LOOPS = ("reference", "espnet_numba", "warprnnt_numba")
WITH_JOINT = ("fused", "pruned")  # these begin before the logits


# ---- from the logits ------------------------------------------------------------------------------------------------


def bench(name: str, case: Case, dtype: torch.dtype, device: str, repeats: int, bandwidth: float) -> list[dict]:
    draw = torch.Generator(device).manual_seed(0)
    leaf = torch.empty(case.shape, device=device, dtype=dtype)
    for utterance in leaf:
        utterance.copy_(torch.randn(utterance.shape, generator=draw, device=device))
    leaf.requires_grad_()
    arguments = case.targets(device)

    def prepare() -> Tensor:
        return leaf * 1

    def forward(acts: Tensor) -> tuple[Tensor, Tensor]:
        return acts, LOSSES[name](acts, *arguments).sum()

    def backward(state: tuple[Tensor, Tensor]) -> Tensor:
        acts, loss = state
        return torch.autograd.grad(loss, acts)[0]

    def error() -> float:
        found = backward(forward(prepare()))
        pairs = zip(found, exact_gradients(leaf.detach(), case, arguments), strict=True)
        wrong, whole = zip(*(((x - y).double().norm(), y.norm()) for x, y in pairs), strict=True)
        return float(torch.stack(wrong).norm() / torch.stack(whole).norm())

    rows = timed("rnnt_loss", name, case, dtype, repeats, prepare, forward, backward, error)
    moved = {"forward": case.logits_inside, "backward": case.logits_inside + case.logits}
    moved["both"] = sum(moved.values())
    for each in rows:
        if each.get("part"):
            seconds = each["median_ms"] / 1e3
            each["bandwidth_share"] = moved[each["part"]] * dtype.itemsize / seconds / bandwidth
    return rows


def exact_gradients(logits: Tensor, case: Case, arguments: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Of the mean loss, in float64, utterance by utterance: no more memory than for one. (T, U+1, V)"""
    for b in range(len(logits)):
        one = logits[b : b + 1].double().requires_grad_()
        loss = exact_loss(one, b, arguments) / len(logits)
        yield torch.autograd.grad(loss, one)[0][0]


def exact_loss(logits: Tensor, b: int, arguments: tuple[Tensor, ...]) -> Tensor:
    """-log P of utterance b; its logits (1, T, U+1, V) are padded as the batch is."""
    rest = (x[b : b + 1] for x in arguments)
    return rnnt_loss(logits, *rest, reduction="sum", fastemit_lambda=0.0, method="wavefront", threshold=0.0)


# ---- with the joint network -----------------------------------------------------------------------------------------


class Joint(NamedTuple):
    """Projected encoder and decoder outputs, the output layer, and the pruned loss's two layers, drawn from a seed."""

    enc: Tensor
    dec: Tensor
    output: torch.nn.Linear
    simple: torch.nn.ModuleList

    @classmethod
    def drawn(cls, case: Case, channels: int, dtype: torch.dtype, device: str) -> "Joint":
        torch.manual_seed(0)
        B, T, U1, V = case.shape
        layers = [torch.nn.Linear(channels, V) for _ in range(3)]
        enc, dec = (torch.randn(B, rows, channels) for rows in (T, U1))
        enc, dec = (x.to(device, dtype).requires_grad_() for x in (enc, dec))
        output, *simple = (layer.to(device, dtype) for layer in layers)
        return cls(enc, dec, output, torch.nn.ModuleList(simple))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.enc, self.dec, self.output.weight, self.output.bias

    def loss(self, name: str, arguments: tuple[Tensor, ...]) -> Tensor:
        if name == "fused":
            return fused_rnnt_loss(*self.inputs, *arguments, torch.tanh, fastemit_lambda=0.0)
        if name == "pruned":
            return self.pruned_loss(*arguments)
        return LOSSES[name](self.output(torch.tanh(self.enc[:, :, None] + self.dec[:, None])), *arguments).sum()

    def pruned_loss(self, labels: Tensor, frames: Tensor, lengths: Tensor) -> Tensor:
        zeros = torch.zeros_like(frames)
        boundary = torch.stack([zeros, zeros, lengths, frames], 1).long().cpu()
        lm, am = self.simple[0](self.dec), self.simple[1](self.enc)
        simple, grads = rnnt_loss_smoothed(lm, am, labels, 0, 0.0, 0.0, boundary, return_grad=True)
        ranges = get_rnnt_prune_ranges(*grads, boundary, ROWS_KEPT)
        logits = self.output(torch.tanh(sum(do_rnnt_pruning(self.enc, self.dec, ranges))))
        return simple + rnnt_loss_pruned(logits, labels, ranges, 0, boundary)


def bench_joint(
    name: str, case: Case, channels: int, dtype: torch.dtype, device: str, repeats: int, bandwidth: float
) -> list[dict]:
    joint, arguments = Joint.drawn(case, channels, dtype, device), case.targets(device)
    wanted = joint.inputs if name != "pruned" else (*joint.inputs, *joint.simple.parameters())

    def forward(_) -> Tensor:
        return joint.loss(name, arguments)

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, wanted)

    def error() -> float | None:
        if name == "pruned":
            return None  # it is another loss
        pairs = zip(backward(forward(None)), exact_joint_gradients(joint, arguments), strict=True)
        return max(float((found - exact).norm() / exact.norm()) for found, exact in pairs)

    what = f"joint_{channels}_rnnt_loss"
    return timed(what, name, case, dtype, repeats, lambda: None, forward, backward, error)


def exact_joint_gradients(joint: Joint, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """In float64, utterance by utterance, with the logits built."""
    exact = [x.detach().double().requires_grad_() for x in joint.inputs]
    enc, dec, weight, bias = exact
    totals = [torch.zeros_like(x) for x in exact]
    for b in range(len(enc)):
        hidden = torch.tanh(enc[b : b + 1, :, None] + dec[b : b + 1, None])
        loss = exact_loss(torch.nn.functional.linear(hidden, weight, bias), b, arguments) / len(enc)
        for total, part in zip(totals, torch.autograd.grad(loss, exact), strict=True):
            total += part
    return totals


# ---- both -----------------------------------------------------------------------------------------------------------


def timed(what, name, case, dtype, repeats, prepare, forward, backward, error) -> list[dict]:
    """A row for forward, for backward and for both, or one with the name of the exception."""
    known = {"method": name, "shape": case.name, "dtype": str(dtype).removeprefix("torch.")}
    known["threads"] = torch.get_num_threads()  # ESPnet's numba loss changes it
    try:
        times = measure(prepare, {"forward": forward, "backward": backward}, repeats=repeats)
        memory = extra_memory(prepare, lambda state: backward(forward(state)))
        wrong = error()
    except Exception as exception:  # a row of its own, by name
        return [row(what, **known, error=type(exception).__name__)]
    ratio = None if memory is None else memory * 1e6 / (case.logits * dtype.itemsize)
    times["both"] = {key: sum(part[key] for part in times.values()) for key in times["forward"]}
    whole = {"extra_memory_mb": memory, "extra_memory_ratio": ratio, "gradient_error": wrong}
    return [
        row(what, **known, part=part, repeats=repeats, **values, **(whole if part == "both" else {}))
        for part, values in times.items()
    ]


def runs(name: str, case: Case, with_joint: bool, device: str) -> bool:
    """Whether a loss is for this table, device and size."""
    if with_joint and device == "cpu" and case.logits >= MANY:
        return False
    if name in WITH_JOINT:
        return with_joint
    if name in LOOPS:
        return case.logits <= LOOPS_UP_TO and device == "cpu"
    return name != "triton" or device == "cuda"


def tables(rows: list[dict], baseline: str) -> str:
    """One for each thing measured."""
    rows = compared(rows, {"method": baseline}, operator.itemgetter("what", "shape", "dtype", "part"))
    names = dict.fromkeys(r["what"] for r in rows)
    return "\n\n".join(f"{name}\n\n" + table([r for r in rows if r["what"] == name], SHOWN) for name in names)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES.split(), help="B,T,U,V or an4,V each")
    every = [*LOSSES, *WITH_JOINT]
    parser.add_argument("--losses", nargs="+", default=every, choices=every)
    parser.add_argument("--tables", nargs="+", default=["loss", "joint"], choices=["loss", "joint"])
    parser.add_argument("--joint", type=int, metavar="J", default=512, help="channels of the joint space")
    parser.add_argument("--baseline", default="torchaudio", help="what times_as_fast compares with")
    parser.add_argument("--dtype", default="float32", choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="3 at most from 2**28 logits on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are appended to this file as they come")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small, untested, to --results only if given")
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.repeats, args.joint = ["2,7,3,20"], 1, 16
    else:
        require_green(*(f"tests/rnnt/test_{name}.py" for name in ("loss_laws", "rnnt_reference", "fused", "pruned")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    for kind in args.tables:
        for case in map(Case.parsed, args.shapes):
            rows, repeats = [], args.repeats if case.logits < MANY else min(args.repeats, 3)
            bandwidth = copy_bandwidth(device)  # anew: on a shared machine it is another one minutes later
            copies = f"the machine copies {bandwidth / 1e9:.3g} GB/s (read and written, {args.threads} threads)"
            for name in args.losses:
                if not runs(name, case, kind == "joint", device):
                    continue
                torch.set_num_threads(args.threads)  # ESPnet's numba loss changes it
                options = getattr(torch, args.dtype), device, repeats, bandwidth
                if kind == "joint":
                    rows += bench_joint(name, case, args.joint, *options)
                else:
                    rows += bench(name, case, *options)
            if not args.quick or args.results != RESULTS:
                append(rows, args.results)
            if rows:
                print(f"\n{tables(rows, args.baseline)}\n{copies}", flush=True)


if __name__ == "__main__":
    main()
