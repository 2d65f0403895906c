"""Decoders side by side: `python tests/bench/bench_decoder.py` prints a table and appends it to results.csv.

*One step*, as ESPnet's searches make it: `batch_score` of n hypotheses by a new label each, `select_state` for each of
them. The label is another one each time, so that no step is answered from memory (counted, not hoped). Ours depends on
what the hypotheses have in common: all but their last 8 labels, as in a beam, or nothing. In ESPnet's decoders each
hypothesis carries a past of its own in any case. The past is random numbers in the shapes of the states, apart from
our last 8 labels: the time of a step does not depend on them.

*Training*: forward and backward to all parameters, ours and ESPnet's MEGA with the same weights in turns.

Default size (13 million parameters), V = 500; LSTM, stateless and RWKV with the same output size. A method that fails
is listed with its exception.
"""

import argparse
import itertools
from pathlib import Path

import torch
from espnet2.asr_transducer.beam_search_transducer import Hypothesis
from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder as EspnetMEGA
from espnet2.asr_transducer.decoder.rnn_decoder import RNNDecoder
from espnet2.asr_transducer.decoder.rwkv_decoder import RWKVDecoder
from espnet2.asr_transducer.decoder.stateless_decoder import StatelessDecoder
from harness import RESULTS, append, compared, extra_memory, measure, require_green, row, table
from mended import V, pair
from training_case import case

from espnet_mega_plugin.decoder import MEGADecoder

OWN = 8  # labels of a hypothesis that the others of its beam do not share
SMALL = {"block_size": 32, "linear_size": 64, "qk_size": 16, "v_size": 64, "num_blocks": 2}
TRAINING = "16,50 32,100 64,64 8,200"  # batch, length with the start label
SHOWN = (
    "what method shape part dtype threads median_ms p20_ms p80_ms cpu_ms extra_memory_mb times_as_fast error".split()
)
BASELINE = "espnet_mega"


def build(device: str, size: dict) -> dict:
    """ESPnet's MEGA and ours with the same weights, and ESPnet's other decoders with the same output size."""
    espnet, ours = pair(**size)
    D = ours.output_size
    found = {
        "ours": ours,
        BASELINE: espnet,
        "espnet_lstm": RNNDecoder(V, hidden_size=D),
        "espnet_stateless": StatelessDecoder(V, embed_size=D),
    }
    try:
        found["espnet_rwkv"] = RWKVDecoder(V, block_size=D)
    except Exception as error:  # it compiles a CUDA kernel, which fails in many ways
        print(f"espnet_rwkv is left out: {type(error).__name__}: {error}\n")
    for decoder in found.values():
        decoder.to(device).eval().set_device(torch.device(device))
    return found


# ---- one step


def extended(decoder, hyps: list[Hypothesis]) -> list[Hypothesis]:
    """The hypotheses by one random label each; the labels differ from one another."""
    labels = (torch.randperm(V - 1)[: len(hyps)] + 1).tolist()
    longer = [Hypothesis(0.0, [*hyp.yseq, label], hyp.dec_state) for hyp, label in zip(hyps, labels, strict=True)]
    _, states = decoder.batch_score(longer)
    return [Hypothesis(0.0, hyp.yseq, decoder.select_state(states, i)) for i, hyp in enumerate(longer)]


def past(decoder, length: int) -> Hypothesis:
    """A hypothesis of so many labels; for MEGA a state built by hand."""
    states = decoder.init_state(1)
    if isinstance(decoder, (MEGADecoder, EspnetMEGA)):
        length += isinstance(decoder, EspnetMEGA)  # whose keys and values begin with a row of zeros
        shapes = {
            "ema_state": (decoder.output_size, decoder.mega_ema_num_heads),
            "prev_key": (length, decoder.mega_att_k_size),
            "prev_value": (length, decoder.mega_att_v_size),
        }
        device = decoder.embed.weight.device
        states = [
            {name: 0.1 * torch.randn(shape, device=device) for name, shape in shapes.items()}
            for _ in range(decoder.num_blocks)
        ]
    return Hypothesis(0.0, [0] * length, states)


def beam(decoder, n: int, history: int, own: int | None) -> list[Hypothesis]:
    """n hypotheses that share all but their last `own` labels; None: nothing."""
    if own is None:
        return extended(decoder, [past(decoder, history - 1) for _ in range(n)])
    hyps = extended(decoder, [past(decoder, history - own - 1)]) * n
    for _ in range(own):
        hyps = extended(decoder, hyps)
    return hyps


@torch.no_grad()
def bench_step(decoder, n: int, history: int, own: int | None, repeats: int, seconds: float) -> dict:
    hyps = beam(decoder, n, history, own)
    steps = itertools.count()

    def prepare() -> list[Hypothesis]:
        k = next(steps)
        return [Hypothesis(0.0, [*hyp.yseq, (k + i) % (V - 1) + 1], hyp.dec_state) for i, hyp in enumerate(hyps)]

    def step(longer: list[Hypothesis]) -> list:
        _, states = decoder.batch_score(longer)
        return [decoder.select_state(states, i) for i in range(n)]

    before = decoder.prefixes.evaluated if isinstance(decoder, MEGADecoder) else None
    memory = extra_memory(prepare, step)
    once = measure(prepare, {"step": step}, warmup=1, repeats=1)["step"]["median_ms"] / 1e3
    repeats = max(3, min(repeats, int(seconds / once)))
    times = measure(prepare, {"step": step}, repeats=repeats)["step"]
    if before is not None and decoder.prefixes.evaluated - before != n * next(steps):
        raise RuntimeError(f"{n} hypotheses, history {history}: some steps were answered from memory.")
    return {"repeats": repeats, "extra_memory_mb": memory, **times}


def steps(decoders: dict, args: argparse.Namespace) -> list[dict]:
    rows = []
    for history, n in itertools.product(args.history, args.hypotheses):
        for name, decoder in decoders.items():
            kinds = {f"all but {OWN} shared": OWN, "nothing shared": None} if name == "ours" else {"": None}
            for part, own in kinds.items():
                known = {"method": name, "shape": f"{n}x{history}", "dtype": "float32", "part": part}
                try:
                    found = bench_step(decoder, n, history, own, args.repeats, args.seconds)
                except Exception as error:  # a row of its own, by name
                    found = {"error": type(error).__name__}
                rows.append(row("decoder_step", **known, **found))
                decoder.score_cache = {}  # the next one begins with nothing remembered
    return rows


# ---- training


def training(decoders: dict, args: argparse.Namespace, autocast: bool) -> list[dict]:
    rows = []
    dtype = "bfloat16 autocast" if autocast else "float32"
    for shape in args.training:
        known = {"shape": shape.replace(",", "x"), "dtype": dtype}
        cases = {name: case(decoders[name], *map(int, shape.split(",")), autocast) for name in ("ours", BASELINE)}
        memory = {}
        for name, (forward, backward) in list(cases.items()):
            try:
                memory[name] = extra_memory(lambda: None, lambda _, f=forward, b=backward: b(f(None)))
            except Exception as error:
                rows.append(row("decoder_training", method=name, **known, part="both", error=type(error).__name__))
                del cases[name]
        # One after the other within a repeat: what else the machine does hits both
        parts = {
            (name, part): run
            for name, runs in cases.items()
            for part, run in zip(("forward", "backward"), runs, strict=True)
        }
        times = measure(lambda: None, parts, repeats=args.training_repeats)
        for name in cases:
            both = {key: times[name, "forward"][key] + value for key, value in times[name, "backward"].items()}
            found = {
                "forward": times[name, "forward"],
                "backward": times[name, "backward"],
                "both": {**both, "extra_memory_mb": memory[name]},
            }
            rows += [
                row("decoder_training", method=name, **known, part=part, repeats=args.training_repeats, **values)
                for part, values in found.items()
            ]
    return rows


def same(r: dict) -> tuple:
    return r["what"], r["shape"], r["dtype"], r["threads"], r["what"] == "decoder_training" and r.get("part")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hypotheses", nargs="+", type=int, default=[1, 5, 20, 100])
    parser.add_argument(
        "--history", nargs="+", type=int, default=[10, 50, 200, 1000], help=f"labels, {OWN + 2} or more"
    )
    parser.add_argument("--training", nargs="*", default=TRAINING.split(), help="batch,length each")
    parser.add_argument("--autocast", action="store_true", help="train under autocast to bfloat16, too")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=30, help="of a step")
    parser.add_argument("--seconds", type=float, default=20, help="then fewer repeats of a step, but 3 at least")
    parser.add_argument("--training_repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are appended to this file")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small, untested, to --results only if given")
    args = parser.parse_args(argv)
    if min(args.history) < OWN + 2:
        parser.error(f"--history must be {OWN + 2} or more labels; got {min(args.history)}.")
    if args.quick:
        args.hypotheses, args.history, args.training = [1, 3], [10, 20], ["2,9"]
        args.repeats = args.training_repeats = 3
    else:
        require_green("tests/test_decoder.py", "tests/mega/test_laws.py")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        decoders = build(device, SMALL if args.quick else {})
        rows += steps(decoders, args)
        for autocast in (False, True) if args.autocast else (False,):
            rows += training(decoders, args, autocast)
    if not args.quick or args.results != RESULTS:
        append(rows, args.results)
    print(table(compared(rows, {"method": BASELINE}, same), SHOWN))


if __name__ == "__main__":
    main()
