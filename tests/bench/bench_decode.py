"""Decoding in batches beside ESPnet's search: prints a table and appends it to results.csv.

    python tests/bench/bench_decode.py  # default size, made-up utterances of 10 s
    python tests/bench/bench_decode.py --exp exp/asr_x --data dump/raw/test  # a trained model, real audio

Timed is the search from the encoder's output to the n-best lists. Without --exp the decoders (MEGA and LSTM, 13 million
and 2 million parameters, V = 500) work for real on every prefix they are asked for, but the joint network is shown the
outputs of a fixed decoder that reads labels off made-up frames (bench_search.py): all follow the trajectory of a
trained model. With --exp the model is the checkpoint's and errors are counted in words of `text`.

method  espnet: ESPnet's BeamSearchTransducer, an utterance after the other; with ESPnet's MEGA class where the decoder
        is MEGA. batch of n: the plugin's search. The n-best lists are compared with ESPnet's before anything is timed.
rtf     seconds of search in a second of audio (frames of 40 ms)
errors  edit distance to what was said, of labels or words, %; of the first --alone utterances in every row
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_search import BASELINE, Following, Task, decoders_beside, synthetic
from harness import RESULTS, append, clock, extra_memory, measure, require_green, row, table
from made_up import FollowingScorer, wrong
from mended import pair

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.search.espnet_decoders import scorer_of
from espnet_mega_plugin.search.search import BatchedSearch

SMALL = {"block_size": 256, "linear_size": 64, "qk_size": 16, "v_size": 64, "num_blocks": 2}
FRAME = 0.04  # seconds
SHOWN = "what method shape part threads median_ms cpu_ms extra_memory_mb rtf errors times_as_fast error".split()
MAES = {"search_type": "maes", "nstep": 2, "expansion_gamma": 2.3, "expansion_beta": 2}
GREEDY = {"search_type": "maes", "nstep": 2, "expansion_gamma": 2.3, "expansion_beta": 0}  # ESPnet's, with beam 1
TSD = {"search_type": "tsd", "max_sym_exp": 3}


class FollowingDecoder(torch.nn.Module):
    def __init__(self, decoder: torch.nn.Module, task: Task):
        super().__init__()
        self.decoder, self.vocab_size, self._task = decoder, decoder.vocab_size, task

    def label_scorer(self) -> FollowingScorer:
        return FollowingScorer(scorer_of(self.decoder), self._task.shown.network.vectors)


def batched(decoder: torch.nn.Module, task: Task, batch: int, options: dict) -> list:
    """N-best lists of all utterances, so many at once."""
    search = BatchedSearch(decoder, task.joint, **options)
    lists = []
    for first in range(0, len(task.frames), batch):
        frames = task.frames[first : first + batch]
        lengths = torch.tensor([len(one) for one in frames])
        lists += search(torch.nn.utils.rnn.pad_sequence(frames, batch_first=True), lengths)
    return lists


def one_by_one(decoder, task: Task, beam: int, options: dict) -> list:
    from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer

    search = BeamSearchTransducer(decoder, task.joint, beam, **options)
    return [search(frames) for frames in task.frames]


def errors(lists: list, task: Task, words: Callable[[list[int]], list]) -> float:
    """Edit distance of the best hypotheses to what was said, in percent of it."""
    return wrong([words(best[0].yseq[1:]) for best in lists], task.said[: len(lists)])


def few(task: Task, count: int) -> Task:
    return Task(task.name, task.frames[:count], task.joint, task.shown, task.said and task.said[:count])


def check(espnet, ours, task: Task, options: dict) -> None:
    """The same n-best lists as ESPnet's search finds with ESPnet's class."""
    theirs = one_by_one(espnet, task, 5, {**options, "nbest": 5})
    mine = batched(ours, task, len(task.frames), {**options, "beam_size": 5, "nbest": 5})
    for a, b in zip(theirs, mine, strict=True):
        if [h.yseq for h in a] != [h.yseq for h in b]:
            raise SystemExit(f"The n-best lists differ: {[h.yseq for h in a]} and {[h.yseq for h in b]}")
        torch.testing.assert_close([h.score for h in a], [h.score for h in b], rtol=1e-4, atol=1e-3)


def bench(what: str, beam: int, task: Task, runs: dict[str, tuple[Task, Callable]], words, repeats: int) -> list[dict]:
    """Rows of several ways to do the same; each way has a task of its own size, its figures are an utterance's.

    Errors are counted of the utterances that all ways have, or they could not be compared.
    """
    common = min(len(own.frames) for own, _ in runs.values())
    rows = []
    for method, (own, run) in runs.items():
        n, frames = len(own.frames), sum(map(len, own.frames))
        try:
            differing = errors(run(None)[:common], own, words)
            memory = extra_memory(lambda: None, run)
            times = measure(lambda: None, {method: run}, warmup=0, repeats=repeats)[method]
        except Exception as error:  # a row of its own, by name
            rows.append(row(what, method=method, shape=f"{task.name} beam {beam}", error=type(error).__name__))
            continue
        an_utterance = {key: value / n for key, value in times.items()}
        figures = {"rtf": times[clock(times)] / 1e3 / (FRAME * frames), "errors": differing}
        rows.append(
            row(
                what,
                **{"method": method, "shape": f"{task.name} beam {beam}", "dtype": "float32", "repeats": repeats},
                **{**an_utterance, **figures, "extra_memory_mb": memory},
            )
        )
    base = next((r["rtf"] for r in rows if r["method"] == "espnet" and "error" not in r), None)
    return [{**r, "times_as_fast": base / r["rtf"]} if base and "error" not in r else r for r in rows]


def all_rows(name: str, espnet, ours, task: Task, args: argparse.Namespace, words) -> list[dict]:
    """What the tables need of one decoder. espnet: as ESPnet's search takes it; ours: as the batched one does."""
    alone = few(task, args.alone)
    rows = []

    def cell(what: str, beam: int, theirs: dict | None, mine: dict, batches: list[int]) -> None:
        runs = {}
        if theirs is not None:
            runs["espnet"] = alone, lambda _: one_by_one(espnet, alone, beam, theirs)
        for batch in batches:
            part = few(task, max(batch, args.alone))
            runs[f"batch of {batch}"] = part, partial(_batched, ours, part, batch, {**mine, "beam_size": beam})
        found = bench(f"decode_{name}_{what}", beam, task, runs, words, args.repeats)
        print(table(found, SHOWN), flush=True)
        rows.extend(found)

    two = sorted({min(args.batches), min(16, max(args.batches))})
    cell("greedy", 1, GREEDY, {"search_type": "greedy"}, args.batches)
    cell("maes", 5, MAES, MAES, args.batches)
    for beam in args.beams:
        cell("maes", beam, MAES, MAES, two)
    cell("maes_gamma10", 5, None, {**MAES, "expansion_gamma": 10.0}, two)
    cell("tsd", 5, TSD, TSD, two)
    return rows


def _batched(decoder, task: Task, batch: int, options: dict, _) -> list:
    return batched(decoder, task, batch, options)


def state_rows(decoder, quick: bool) -> list[dict]:
    """MB of what the MEGA decoder remembers, at most: of a stream of 60 s, of 64 utterances of 200 labels."""
    D, rows = decoder.output_size, []
    frames, labels, count = (40, 4, 2) if quick else (1500, 250, 64)
    for utterances, T, said, beam in ((1, frames, labels, 5), (count, 2 * frames // 3, 2 * labels // 3, 8)):
        task = synthetic("", D, T, said, utterances=utterances)
        rows.append(state_row(FollowingDecoder(decoder, task), task.joint, task.frames, beam))
    return rows


def trained_state_rows(decoder, task: Task) -> list[dict]:
    """The same for a trained model and its utterances in a row, in four streams that begin with different ones."""
    quarter = -(-len(task.frames) // 4)
    turned = [task.frames[i * quarter :] + task.frames[: i * quarter] for i in range(4)]
    return [state_row(decoder, task.joint, [torch.cat(frames) for frames in turned], beam) for beam in (5, 8)]


def state_row(decoder, joint, frames: list[torch.Tensor], beam: int) -> dict:
    """Streams of so many frames each, 16 at a time; the most that was held after one of them."""
    streams = BatchedSearch(decoder, joint, beam).streams()
    opened, T = [streams.open() for _ in frames], len(frames[0])
    most, room = 0, ""
    for first in range(0, T, 16):
        streams.push({number: frames[i][first : first + 16] for i, number in enumerate(opened)})
        pool = streams._search.predictions._decoder
        pool = getattr(pool, "_scorer", pool)
        if pool.bytes > most:
            nodes = [piece.shape[1] for piece in pool.keys_values.of]
            most, room = pool.bytes, f"room for {min(nodes)} to {max(nodes)} nodes each"
            if pool.ema is not None:  # no truncation_length
                room += f", {pool.ema.tensor.shape[1]} leaves in all"
    longest = max(len(streams.close(number)[0].yseq) for number in opened)
    what = f"{len(frames)} x {FRAME * T:.3g} s, {longest} labels at most, beam {beam}"
    return row("decode_state", method="streams", shape=what, part=room, extra_memory_mb=most / 1e6)


def kept(r: dict) -> dict:
    """A row as results.csv has room for it."""
    words = ", ".join(f"{name} {r[name]:.4g}" for name in ("rtf", "errors") if name in r)
    return {
        "part": words or r.get("part", ""),
        **{k: v for k, v in r.items() if k not in ("rtf", "errors", "times_as_fast", "part")},
    }


def trained(exp: Path, data: Path, utterances: int) -> tuple[Task, torch.nn.Module, Callable]:
    """Encoder output of a set's first utterances, the model's decoder, and what turns labels into words."""
    import os

    import soundfile
    from espnet2.tasks.asr_transducer import ASRTransducerTask

    exp, data, here = exp.resolve(), data.resolve(), Path.cwd()
    os.chdir(exp.parents[1])  # paths in ESPnet's files begin where the recipe runs
    try:
        model, _ = ASRTransducerTask.build_model_from_file(exp / "config.yaml", exp / "valid.loss.ave.pth", "cpu")
        model.eval()
        text = dict(line.split(maxsplit=1) for line in (data / "text").read_text(encoding="utf-8").splitlines())
        frames, said = [], []
        for line in (data / "wav.scp").read_text(encoding="utf-8").splitlines()[:utterances]:
            key, path = line.split(maxsplit=1)
            audio = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            frames.append(model.encode(audio[None], torch.tensor([len(audio)]))[0][0])
            said.append(text[key].split())
    finally:
        os.chdir(here)

    def words(labels: list[int]) -> list[str]:
        return "".join(model.token_list[label] for label in labels).replace("▁", " ").split()

    name = f"{len(frames)} utterances: {sum(map(len, frames))} frames"
    return Task(name, frames, model.joint_network, None, said), model.decoder, words


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", type=Path, help="ESPnet's folder with config.yaml and valid.loss.ave.pth")
    parser.add_argument("--data", type=Path, help="wav.scp and text for --exp")
    parser.add_argument("--utterances", type=int, default=32)
    parser.add_argument("--alone", type=int, default=2, help="utterances ESPnet's search is timed on")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16, 32])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4, 8], help="beside 5")
    parser.add_argument("--decoders", nargs="+", choices=["mega", "rnn"], default=["mega", "rnn"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are appended to this file")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small, untested, to --results only if given")
    args = parser.parse_args(argv)
    if (args.exp is None) != (args.data is None):
        parser.error("--exp and --data go together.")
    if args.quick:
        args.utterances, args.alone, args.batches, args.beams, args.repeats = 2, 1, [2], [2], 1
    else:
        require_green("tests/search/test_maes.py")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    if args.exp:
        task, decoder, words = trained(args.exp, args.data, args.utterances)
        check(decoder, decoder, few(task, args.alone), MAES)
        rows += all_rows("model", decoder, decoder, task, args, words)
        if isinstance(decoder, MEGADecoder):
            rows += trained_state_rows(decoder, task)
    else:
        espnet, ours = pair(**(SMALL if args.quick else {}))
        beside = decoders_beside(ours, espnet)
        frames, labels = (12, 2) if args.quick else (249, 42)
        task = synthetic(f"{frames} frames", ours.output_size, frames, labels, utterances=args.utterances)
        for name, theirs, mine in (
            ("mega", beside[BASELINE], ours),
            ("rnn", beside["espnet_lstm"], beside["espnet_lstm"]),
        ):
            if name in args.decoders:
                theirs, mine = Following(theirs, task.shown), FollowingDecoder(mine, task)
                for options in (MAES, TSD):
                    check(theirs, mine, few(task, args.alone), options)
                rows += all_rows(name, theirs, mine, task, args, list)
        rows += state_rows(ours, args.quick)
    if not args.quick or args.results != RESULTS:
        append(map(kept, rows), args.results)
    print(f"\n{table(rows, SHOWN)}")


if __name__ == "__main__":
    main()
