"""A comparison of trained models: word error rates with confidence intervals, parameters, time and memory.

Models are the folders `asr_<name>_seed<N>` of an experiments' folder; those of one name are one row. Intervals are
percentiles of a bootstrap over the utterances (Bisani & Ney 2004, doi:10.1109/ICASSP.2004.1326009) and, where a name
has several seeds, over the seeds. A difference draws the same utterances for both of its sides. Real-time factors are
those of the decodings' own logs (`rtf.py`), for the first seed.

    python3 -m espnet_mega_plugin.recipe.compare --expdir exp/compare --data_dir dump/raw \\
        --test_sets "test test_unseen" --against mega --out exp/compare/README.md
"""

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy
import torch

from espnet_mega_plugin.recipe.kaldi_dir import read_table
from espnet_mega_plugin.recipe.results import environment
from espnet_mega_plugin.recipe.rtf import read_speed
from espnet_mega_plugin.recipe.score import score, words

MODEL = re.compile(r"asr_(.+)_seed(\d+)")
TAG = re.compile(r"(.+)_asr_model_.+")  # asr.sh ends a decoding's name with the parameters'
STAMP = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)"
BEGUN = re.compile(STAMP + r".*INFO: (\d+)/\d+epoch started")
ENDED = re.compile(STAMP + r".*INFO: (\d+)epoch results:")
MEMORY = re.compile(r"^# peak memory of a process: (\d+) MB$", re.MULTILINE)  # train.py
DRAWS = 10_000


@dataclass(frozen=True)
class Errors:
    """One name's word errors under one decoding of one set. errors: (seeds, utterances). words: (utterances,)"""

    errors: numpy.ndarray
    words: numpy.ndarray

    def rate(self) -> float:
        """Percent, the mean over the seeds."""
        return 100 * self.errors.sum() / (self.words.sum() * len(self.errors))

    def rates(self) -> list[float]:
        """Percent of each seed."""
        return (100 * self.errors.sum(1) / self.words.sum()).tolist()

    def drawn(self, utterances: numpy.ndarray, draws: numpy.random.Generator) -> numpy.ndarray:
        """Rates of bootstrap samples, percent. utterances: (samples, utterances) how often each one is in a sample."""
        seeds = draws.multinomial(len(self.errors), [1 / len(self.errors)] * len(self.errors), len(utterances))
        errors = ((utterances @ self.errors.T) * seeds).sum(1)
        return 100 * errors / (utterances @ self.words * len(self.errors))


def interval(values: numpy.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = numpy.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(ours: Errors, against: Errors | None = None, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the error rate, percent; with `against`, of the difference from its rate.

    Raises:
        ValueError: the two are not of the same utterances.
    """
    draws = numpy.random.default_rng(seed)
    count = len(ours.words)
    utterances = draws.multinomial(count, [1 / count] * count, DRAWS)
    rates = ours.drawn(utterances, draws)
    if against is not None:
        if not numpy.array_equal(ours.words, against.words):
            raise ValueError("a difference needs two decodings of the same utterances; run stage 12 anew for both")
        rates = rates - against.drawn(utterances, draws)
    return interval(rates)


@dataclass(frozen=True)
class Model:
    """The seeds of one name. folders: in the order of the seeds."""

    name: str
    folders: tuple[Path, ...]

    def errors(self, decoding: str, dataset: str, references: Mapping[str, str]) -> Errors | None:
        """None where a seed was not decoded so."""
        counts = []
        for folder in self.folders:
            text = _decoded(folder, decoding, dataset) / "text"
            if not text.exists():
                return None
            found = score(references, read_table(text, empty_values=True), words)
            counts.append([(a.counts.errors, a.counts.units) for a in found.values()])
        table = numpy.array(counts)
        return Errors(table[:, :, 0], table[0, :, 1])

    def parameters(self) -> tuple[int, int]:
        """Of the prediction network and of the whole model."""
        state = torch.load(self.folders[0] / "valid.loss.ave.pth", map_location="cpu", weights_only=True)
        sizes = {name: value.numel() for name, value in state.items() if value.is_floating_point()}
        return sum(n for name, n in sizes.items() if name.startswith("decoder.")), sum(sizes.values())

    def training(self) -> tuple[float, int]:
        """Seconds that all epochs took, the mean over the seeds; MB at most, or 0 where it was not written down."""
        seconds, memory = 0.0, 0
        for folder in self.folders:
            log = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
            begun = {epoch: _time(stamp) for stamp, epoch in BEGUN.findall(log)}  # an interrupted one began twice
            seconds += sum((_time(stamp) - begun[epoch]).total_seconds() for stamp, epoch in ENDED.findall(log))
            memory = max([memory, *map(int, MEMORY.findall(log))])
        return seconds / len(self.folders), memory


def _time(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S")


def _decoded(folder: Path, decoding: str, dataset: str) -> Path:
    """The folder of a decoding, whichever parameters it was made with."""
    found = [path for path in sorted(folder.glob(f"{decoding}_asr_model_*")) if TAG.fullmatch(path.name)[1] == decoding]
    return (found[0] if found else folder / decoding) / dataset


def models(expdir: Path) -> list[Model]:
    """In the order of their names.

    Raises:
        FileNotFoundError: there are none.
    """
    names: dict[str, dict[int, Path]] = {}
    for folder in expdir.glob("asr_*"):
        if (found := MODEL.fullmatch(folder.name)) and (folder / "valid.loss.ave.pth").exists():
            names.setdefault(found[1], {})[int(found[2])] = folder
    if not names:
        raise FileNotFoundError(f"{expdir}: has no trained models named asr_<name>_seed<number>")
    return [Model(name, tuple(folders[seed] for seed in sorted(folders))) for name, folders in sorted(names.items())]


def decodings(model: Model) -> list[str]:
    return sorted({found[1] for path in model.folders[0].glob("*_asr_model_*") if (found := TAG.fullmatch(path.name))})


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def error_table(
    found: list[Model], decoding: str, datasets: Mapping[str, Mapping[str, str]], against: Model
) -> str | None:
    """A row a model: error rate [interval], (seeds), and the difference from `against`; None where nobody has it."""
    header, rows = ["model"], []
    for dataset in datasets:
        header += [f"{dataset}: WER %", "each seed", f"less {against.name}"]
    for model in found:
        cells = [model.name]
        for dataset, references in datasets.items():
            ours = model.errors(decoding, dataset, references)
            if ours is None:
                break
            base = against.errors(decoding, dataset, references)
            cells += [
                "{:.2f} [{:.2f}, {:.2f}]".format(ours.rate(), *bootstrap(ours)),
                " ".join(f"{rate:.2f}" for rate in ours.rates()),
                "–"
                if model is against or base is None
                else "{:+.2f} [{:+.2f}, {:+.2f}]".format(ours.rate() - base.rate(), *bootstrap(ours, base)),
            ]
        else:
            rows.append(cells)
    return markdown(header, rows) if rows else None


def cost_table(found: list[Model]) -> str:
    rows = []
    for model in found:
        decoder, total = model.parameters()
        seconds, memory = model.training()
        rows.append(
            [
                model.name,
                f"{decoder / 1e3:,.0f} k",
                f"{total / 1e3:,.0f} k",
                f"{seconds / 60:.1f}",
                f"{memory:,}" if memory else "–",
            ]
        )
    header = ["model", "parameters of the decoder", "of the model", "training, min", "peak memory of training, MB"]
    return markdown(header, rows)


def speed_table(found: list[Model], datasets: list[str]) -> str:
    """Real-time factors over all sets, of the first seed; a column a decoding."""
    columns = sorted({name for model in found for name in decodings(model)})
    rows = []
    for model in found:
        cells = [model.name]
        for decoding in columns:
            speeds = [read_speed(_decoded(model.folders[0], decoding, dataset) / "rtf.txt") for dataset in datasets]
            if any(speed is None for speed in speeds):
                cells.append("–")
            else:
                cells.append(f"{sum(s.computing for s in speeds) / sum(s.audio for s in speeds):.4f}")
        rows.append(cells)
    return markdown(["model", *(name.removeprefix("decode_") for name in columns)], rows)


def page(expdir: Path, data_dir: Path, test_sets: list[str], against: str) -> str:
    """The Markdown page.

    Raises:
        FileNotFoundError: there are no models, or no such set.
        ValueError: no model is named `against`.
    """
    found = models(expdir)
    base = next((model for model in found if model.name == against), None)
    if base is None:
        raise ValueError(f"--against {against}: expected one of {', '.join(model.name for model in found)}")
    found = [base, *(model for model in found if model is not base)]
    datasets = {name: read_table(data_dir / name / "text", empty_values=True) for name in test_sets}
    text = f"# Comparison\n\n{environment(Path())}\n\n## Cost\n\n{cost_table(found)}"
    for decoding in sorted({name for model in found for name in decodings(model)}):
        if table := error_table(found, decoding, datasets, base):
            text += f"\n## {decoding}\n\n{table}"
    return text + f"\n## Real-time factor, first seed\n\n{speed_table(found, test_sets)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expdir", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the formatted sets, such as dump/raw")
    parser.add_argument("--test_sets", required=True, help="separated by blanks")
    parser.add_argument("--against", required=True, help="name of the model that the others are compared with")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file")
    args = parser.parse_args()
    try:
        args.out.write_text(page(args.expdir, args.data_dir, args.test_sets.split(), args.against), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"compare: {error}")
    print(args.out)


if __name__ == "__main__":
    main()
