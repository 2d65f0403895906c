"""Stage 13: RESULTS.md, error rates and speed of all decodings of an experiment in ESPnet's table form."""

import argparse
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from espnet_mega_plugin.recipe.rtf import read_speed

KINDS = ("wer", "cer", "ter")
HEADER = "|dataset|Snt|Wrd|Corr|Sub|Del|Ins|Err|S.Err|\n|---|---|---|---|---|---|---|---|---|\n"
SPEED_HEADER = "|dataset|Snt|Audio s|Decoding s|Jobs|RTF|\n|---|---|---|---|---|---|\n"
SUM = re.compile(r"^\| Sum/Avg +\|(.*)\|(.*)\|$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """Error rates of one decoded set. decoding: folder of the configuration. figures: columns Snt to S.Err."""

    kind: str
    decoding: str
    dataset: str
    figures: list[str]


def collect(exp: Path) -> list[Row]:
    """The rows of every `score_*/result.txt` below an experiment, sorted by folder."""
    rows = []
    for kind in KINDS:
        for result in sorted(exp.glob(f"**/score_{kind}/result.txt")):
            decoding, *dataset = result.parent.parent.relative_to(exp).parts
            found = SUM.search(result.read_text(encoding="utf-8"))
            if not found:
                raise ValueError(f"{result}: has no line '| Sum/Avg'; score anew (stage 13)")
            rows.append(Row(kind, decoding, "/".join(dataset), " ".join(found.groups()).split()))
    return rows


def environment(recipe: Path) -> str:
    """Date, versions and commit, as a Markdown list."""
    lines = [
        f"- date: `{datetime.now().astimezone():%a %b %d %H:%M:%S %Z %Y}`",
        f"- python version: `{platform.python_version()}`",
    ]
    for name in ("espnet", "torch", "espnet-mega-plugin"):
        try:
            lines.append(f"- {name} version: `{version(name)}`")
        except PackageNotFoundError:
            lines.append(f"- {name} version: not installed")
    if commit := _git(recipe, "log", "-1", "--format=%H"):
        lines += [f"- Git hash: `{commit}`", f"  - Commit date: `{_git(recipe, 'log', '-1', '--format=%cd')}`"]
    return "\n".join(lines)


def _git(folder: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def results_page(exps: Iterable[Path], recipe: Path) -> str:
    """The Markdown page for several experiments; those without a score are left out."""
    page = f"# RESULTS\n\n## Environments\n\n{environment(recipe)}\n"
    for exp in exps:
        rows = collect(exp)
        if rows:
            page += f"\n## {exp}\n"
        for kind in KINDS:
            of_kind = [row for row in rows if row.kind == kind]
            if of_kind:
                page += f"\n### {kind.upper()}\n\n{HEADER}"
                page += "".join(f"|{'|'.join([f'{r.decoding}/{r.dataset}', *r.figures])}|\n" for r in of_kind)
        page += _speed_table(exp)
    return page


def _speed_table(exp: Path) -> str:
    """Real-time factors of the decodings that were timed, with how many jobs shared the machine."""
    speeds = {path.parent.relative_to(exp): read_speed(path) for path in sorted(exp.glob("**/rtf.txt"))}
    lines = [
        f"|{name}|{s.utterances}|{s.audio:.1f}|{s.computing:.1f}|{s.jobs}|{s.factor:.3f}|\n"
        for name, s in speeds.items()
        if s
    ]
    return f"\n### RTF\n\n{SPEED_HEADER}{''.join(lines)}" if lines else ""


def word_error_table(exp: Path) -> str:
    """For the screen: a row a decoding, a column a set, `WER (sub/del/ins)` in percent."""
    rows = [row for row in collect(exp) if row.kind == "wer"]
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    lines = [["WER % (sub/del/ins)", *datasets]]
    for decoding in dict.fromkeys(row.decoding for row in rows):
        cells = {r.dataset: "{5} ({2}/{3}/{4})".format(*r.figures[1:]) for r in rows if r.decoding == decoding}
        lines.append([decoding, *(cells.get(dataset, "-") for dataset in datasets)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)


def experiments(expdir: Path, asr_exp: Path) -> list[Path]:
    """The experiments of a folder and this one, which may lie elsewhere; each once, sorted."""
    others = [exp for exp in expdir.glob("asr_*") if exp.resolve() != asr_exp.resolve()]
    return sorted([*others, asr_exp])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--asr_exp", type=Path, required=True, help="its RESULTS.md is written")
    parser.add_argument("--expdir", type=Path, required=True, help="all its experiments and asr_exp: ./RESULTS.md")
    args = parser.parse_args()
    try:
        (args.asr_exp / "RESULTS.md").write_text(results_page([args.asr_exp], Path()), encoding="utf-8")
        page = results_page(experiments(args.expdir, args.asr_exp), Path())
        Path("RESULTS.md").write_text(page, encoding="utf-8")
    except ValueError as error:
        sys.exit(f"results: {error}")
    print(word_error_table(args.asr_exp))
    print(f"details: {args.asr_exp / 'RESULTS.md'}, and score_{{wer,cer,ter}}/result.txt of each decoding")


if __name__ == "__main__":
    main()
