"""ESPnet's four searches over several decoders, on a CPU: prints a table and appends it to results.csv.

    python tests/bench/bench_search.py  # default size, a made-up utterance
    python tests/bench/bench_search.py --exp exp/asr_x --wav_scp dump/raw/test/wav.scp  # a trained model, real audio

Timed is `BeamSearchTransducer` from the encoder's output to the n-best list, beam 5: search, joint network and decoder.
Each decoder works for real on every row the search asks for, in its own states; but the joint network is shown the
outputs of one fixed decoder, looked up in a dictionary that an untimed run has filled. So all decoders follow the same
trajectory, that of a trained model, and only their own work differs. Before it is timed, each answer of our decoder
on a first utterance is compared with `forward` over the whole label sequence.

With --exp the trajectory is the trained model's own (`forward` over whole prefixes), our decoder and ESPnet's MEGA have
its weights, and LSTM and stateless its output size. It is run over the first utterances of wav.scp, and over one long
audio made of utterances in a row. Without --exp decoders have the default size (13 million parameters), V = 500, and
the trajectory is that of a stateless decoder, set by hand to read labels off 10 s of made-up frames.

calls: of `score` or `batch_score`; asked: rows in them; evaluated: rows the network was run for.

At last 2,000 short decodes with one small decoder, of 50 utterances in turn: resident memory and the bytes of its tables
after 1, after all 50, after 100 … The same with ESPnet's LSTM: what a process keeps whatever decodes in it.
"""

import argparse
import copy
import ctypes
import gc
import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder as EspnetMEGA
from espnet2.asr_transducer.decoder.rnn_decoder import RNNDecoder
from espnet2.asr_transducer.decoder.stateless_decoder import StatelessDecoder
from espnet2.asr_transducer.joint_network import JointNetwork
from harness import RESULTS, append, compared, extra_memory, measure, require_green, row, table
from made_up import utterances as utterances_of
from mended import V, pair
from torch import Tensor

from espnet_mega_plugin.decoder import MEGADecoder

BEAM = 5
SMALL = {"block_size": 256, "linear_size": 64, "qk_size": 16, "v_size": 64, "num_blocks": 2}
ROUND = 50  # utterances whose decoding shows what memory grows by
BASELINE = "espnet_mega"
COUNTS = ("calls", "asked", "evaluated")
SHOWN = (
    "what method shape threads calls asked evaluated median_ms p20_ms p80_ms cpu_ms extra_memory_mb times_as_fast error"
).split()


class Outputs:
    """What `forward` gives for the last label of a sequence; remembered for good."""

    def __init__(self, network: torch.nn.Module):
        self.network, self.known = network, {}

    def __call__(self, sequences: list[list[int]]) -> Tensor:
        keys = [tuple(sequence) for sequence in sequences]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        if new:
            longest = max(map(len, new))
            # Filled up at the end, which no label before it sees
            out = self.network(torch.tensor([[*key, *[1] * (longest - len(key))] for key in new]))
            self.known.update((key, out[i, len(key) - 1].clone()) for i, key in enumerate(new))
        return torch.stack([self.known[key] for key in keys])


class Following:
    """A decoder at work in a search that is shown other outputs; it counts what it is asked for."""

    def __init__(self, decoder, shown: Callable[[list[list[int]]], Tensor]):
        self.decoder, self.shown = decoder, shown
        self.vocab_size, self.device = decoder.vocab_size, decoder.device
        self.init_state, self.select_state = decoder.init_state, decoder.select_state
        self.set_device = decoder.set_device
        self.calls = self.asked = self._evaluated = 0

    @property
    def evaluated(self) -> int:
        return self.decoder.prefixes.evaluated if isinstance(self.decoder, MEGADecoder) else self._evaluated

    @property
    def score_cache(self) -> dict:
        return self.decoder.score_cache

    @score_cache.setter
    def score_cache(self, replacement: dict) -> None:
        self.decoder.score_cache = replacement

    def score(self, label_sequence, states):
        known = len(self.decoder.score_cache)
        out, states = self.decoder.score(label_sequence, states)
        self._evaluated += len(self.decoder.score_cache) - known  # ESPnet's remember in `score` alone
        return self._answer(out, [label_sequence]), states

    def batch_score(self, hyps):
        out, states = self.decoder.batch_score(hyps)
        self._evaluated += len(hyps)
        return self._answer(out, [hyp.yseq for hyp in hyps]), states

    def _answer(self, out: Tensor, sequences: list[list[int]]) -> Tensor:
        self.calls, self.asked = self.calls + 1, self.asked + len(sequences)
        return self.shown(sequences)


class Checked(Following):
    """Each answer of the decoder must be what `forward` gives over the whole sequence."""

    def __init__(self, decoder, shown):
        super().__init__(decoder, shown)
        self.truth = Outputs(copy.deepcopy(decoder))

    def _answer(self, out: Tensor, sequences: list[list[int]]) -> Tensor:
        torch.testing.assert_close(out, self.truth(sequences), rtol=1e-4, atol=1e-4)
        return super()._answer(out, sequences)


@dataclass
class Task:
    """What is decoded, and along which trajectory."""

    name: str
    frames: list[Tensor]  # encoder output of each utterance. (T, D_enc)
    joint: JointNetwork
    shown: Outputs
    said: list[list[int]] | None = None  # the labels that are in each utterance, where they are known


def decode(decoder, task: Task, options: dict) -> list:
    """N-best lists of all utterances by one of ESPnet's searches."""
    search = BeamSearchTransducer(decoder, task.joint, BEAM, **options)
    return [search(frames) for frames in task.frames]


def searches(decoder, task: Task) -> dict[str, dict]:
    """Each search with its options. ALSD must be told how many labels there can be: what mAES finds and a few more."""
    maes = {"search_type": "maes", "nstep": 2, "expansion_gamma": 2.3, "expansion_beta": 2}
    found = max(len(nbest[0].yseq) for nbest in decode(Following(decoder, task.shown), task, maes))
    return {
        "default": {"search_type": "default"},
        "tsd": {"search_type": "tsd", "max_sym_exp": 3},
        "alsd": {"search_type": "alsd", "u_max": found + 10},
        "maes": maes,
    }


def check(decoder: MEGADecoder, task: Task, frames: int) -> None:
    """Every answer during all searches over the beginning of the first utterance is compared with `forward`."""
    first = Task(task.name, [task.frames[0][:frames]], task.joint, task.shown)
    checked = Checked(decoder, task.shown)
    for options in searches(decoder, task).values():
        decode(checked, first, options)


def bench(task: Task, decoders: dict, repeats: int) -> list[dict]:
    rows = []
    for search, options in searches(decoders["ours"], task).items():
        runs, memory, counts = {}, {}, {}
        for name, decoder in decoders.items():
            follower = Following(decoder, task.shown)

            def run(_, follower=follower, options=options):
                return decode(follower, task, options)

            try:
                memory[name] = extra_memory(lambda: None, run)
                before = [getattr(follower, count) for count in COUNTS]
                run(None)
                counts[name] = {c: getattr(follower, c) - b for c, b in zip(COUNTS, before, strict=True)}
                runs[name] = run
            except Exception as error:  # a row of its own, by name
                rows.append(row(f"search_{search}", method=name, shape=task.name, error=type(error).__name__))
        # One decoder after the other within a repeat: what else the machine does hits all of them
        times = measure(lambda: None, runs, warmup=0, repeats=repeats)
        rows += [
            row(
                f"search_{search}",
                **{"method": name, "shape": task.name, "dtype": "float32", "repeats": repeats},
                **{**counts[name], **times[name], "extra_memory_mb": memory[name]},
            )
            for name in runs
        ]
    return rows


def decoders_beside(ours: MEGADecoder, espnet: EspnetMEGA) -> dict:
    V, D = ours.vocab_size, ours.output_size
    return {
        "ours": ours,
        BASELINE: espnet,
        "espnet_lstm": RNNDecoder(V, hidden_size=D).eval(),
        "espnet_stateless": StatelessDecoder(V, embed_size=D).eval(),
    }


# ---- made-up utterances


class LastTwo(torch.nn.Module):
    """A prediction network that knows the last two labels: the sum of their vectors."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors = vectors

    def forward(self, labels: Tensor) -> Tensor:
        seen = self.vectors[labels]
        return seen + torch.nn.functional.pad(seen, (0, 0, 1, 0))[:, :-1]


def synthetic(name: str, D: int, T: int, labels: int, seed: int = 0, utterances: int = 1) -> Task:
    """Utterances of T frames with labels to be read off (made_up.py), for decoders with D channels."""
    made_up = utterances_of(utterances, V, D, T, labels, seed, JointNetwork)
    return Task(name, made_up.frames, made_up.joint, Outputs(LastTwo(made_up.vectors)), made_up.said)


# ---- a trained model


def trained(exp: Path, wav_scp: Path, utterances: int, seconds: float) -> tuple[list[Task], dict]:
    """The first utterances of wav.scp, one audio of so many seconds, and the decoders, two of them with the weights."""
    import soundfile
    from espnet2.tasks.asr_transducer import ASRTransducerTask

    exp, wav_scp, here = exp.resolve(), wav_scp.resolve(), Path.cwd()
    os.chdir(exp.parents[1])  # paths in ESPnet's files begin where the recipe runs
    try:
        model, config = ASRTransducerTask.build_model_from_file(exp / "config.yaml", exp / "valid.loss.ave.pth", "cpu")
        paths = [line.split(maxsplit=1)[1] for line in wav_scp.read_text(encoding="utf-8").splitlines()]
        read = (torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in cycle(paths))
        rate = soundfile.info(paths[0]).samplerate
        audio = [next(read) for _ in range(utterances)]
        long = [*audio]
        while sum(map(len, long)) < seconds * rate:
            long.append(next(read))
    finally:
        os.chdir(here)
    model.eval()
    ours = model.decoder
    if not isinstance(ours, MEGADecoder):
        raise SystemExit(f"{exp} holds a {type(ours).__name__}; wanted is a model with the decoder `mega`.")
    espnet = EspnetMEGA(ours.vocab_size, **config.decoder_conf).eval()
    espnet.load_state_dict(ours.state_dict())
    shown = Outputs(copy.deepcopy(ours))

    def task(name: str, audio: Iterable[Tensor]) -> Task:
        frames = [model.encode(one[None], torch.tensor([len(one)]))[0][0] for one in audio]
        return Task(f"{name}: {sum(map(len, frames))} frames", frames, model.joint_network, shown)

    together = torch.cat(long)[: int(seconds * rate)]
    tasks = [task(f"{utterances} utterances", audio), task(f"{seconds:g} s of audio", [together])]
    return tasks, decoders_beside(ours, espnet)


# ---- memory of many decodes


def bench_memory(counts: list[int]) -> list[dict]:
    """Resident memory and our decoder's tables after so many utterances, of 50 in turn.

    oneDNN keeps what it has made for each shape of matrix, up to 1,024 of them: with another utterance each time the
    process grows by tens of megabytes that no decoder holds. After one round all shapes were seen, and it grows no more.
    """
    espnet, ours = pair(**SMALL)
    decoders, rows = decoders_beside(ours, espnet), []
    tasks = [synthetic("", SMALL["block_size"], 12 + n % 7, 3, seed=n) for n in range(ROUND)]
    for method in ("espnet_lstm", "ours"):
        followers = [Following(decoders[method], task.shown) for task in tasks]
        for n in range(1, max(counts) + 1):
            decode(followers[n % len(tasks)], tasks[n % len(tasks)], {"search_type": "maes"})
            if n in counts:
                tables = ours.prefixes.tables if method == "ours" else None
                held = tables.labels.bytes + tables.ends.bytes if tables else ""
                rows.append({"method": method, "decodes": n, "resident_mb": resident_mb(), "tables_bytes": held})
    return rows


def resident_mb() -> float | None:
    """Memory this process holds, without what it has freed and not given back; None where that is not told."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, AttributeError):  # not Linux, not glibc
        return None


# ---- rows


def kept(r: dict) -> dict:
    """A row as results.csv has room for it: the counts in words."""
    words = ", ".join(f"{r[count]} {count}" for count in COUNTS if count in r)
    return {"part": words, **{key: value for key, value in r.items() if key not in COUNTS}}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", type=Path, help="ESPnet's folder with config.yaml and valid.loss.ave.pth")
    parser.add_argument("--wav_scp", type=Path, help="audio for --exp")
    parser.add_argument("--utterances", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="of the long audio")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are appended to this file")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small, untested, to --results only if given")
    args = parser.parse_args(argv)
    if torch.cuda.is_available():
        parser.error("this is a benchmark of the CPU; hide the GPU: CUDA_VISIBLE_DEVICES= python ...")
    if (args.exp is None) != (args.wav_scp is None):
        parser.error("--exp and --wav_scp go together.")
    decodes = [1, ROUND, 100, 300, 1000, 2000]
    if args.quick:
        args.utterances, args.seconds, args.repeats, decodes = 2, 5, 1, [1, 3]
    else:
        require_green("tests/test_beam_search.py")

    torch.manual_seed(0)
    size = SMALL if args.quick else {}
    if args.exp:
        tasks, decoders = trained(args.exp, args.wav_scp, args.utterances, args.seconds)
    else:
        espnet, ours = pair(**size)
        decoders = decoders_beside(ours, espnet)
        frames, labels = (12, 2) if args.quick else (249, 42)  # 249 frames of 40 ms: 10 s
        tasks = [synthetic(f"made-up: {frames} frames", ours.output_size, frames, labels)]
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        check(decoders["ours"], tasks[0], frames=60)
        for task in tasks:
            rows += bench(task, decoders, args.repeats)
    memory = bench_memory(decodes)
    if not args.quick or args.results != RESULTS:
        append(map(kept, rows), args.results)
        first = {r["method"]: r["resident_mb"] for r in reversed(memory)}
        append(
            [
                row(
                    "search_memory",
                    **{
                        "method": r["method"],
                        "shape": f"{r['decodes']} decodes",
                        "part": f"{r['tables_bytes']} bytes of tables" if r["tables_bytes"] else "",
                    },
                    extra_memory_mb=r["resident_mb"] and r["resident_mb"] - first[r["method"]],
                )
                for r in memory
            ],
            args.results,
        )
    same = operator.itemgetter("what", "shape", "threads")
    print(table(compared(rows, {"method": BASELINE}, same), SHOWN))
    print(f"\nMany decodes with one decoder:\n\n{table(memory, memory[0])}")


if __name__ == "__main__":
    main()
