"""Stage 10, around ESPnet's collection of statistics: key files for its jobs, shapes with the vocabulary size."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A process of ESPnet takes 6 to 12 s to start, about as long as it needs for this many utterances
WORTH_A_JOB = 500


def even_parts(lines: Sequence[str], parts: int) -> list[list[str]]:
    """Split in order into `parts` runs whose lengths differ by at most one, the longer ones first."""
    size, longer = divmod(len(lines), parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return [list(lines[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


def number_of_jobs(wanted: int, *lengths: int) -> int:
    """At most `wanted`; none without an utterance of each set, none with so few that starting it costs more."""
    return max(1, min(wanted, *lengths, -(-sum(lengths) // WORTH_A_JOB)))


def split_keys(scps: dict[str, Path], folder: Path, wanted: int) -> int:
    """Write `<name>.<job>.scp` into `folder` for each named wav.scp; returns the number of jobs."""
    lines = {name: scp.read_text(encoding="utf-8").splitlines(keepends=True) for name, scp in scps.items()}
    jobs = number_of_jobs(wanted, *map(len, lines.values()))
    folder.mkdir(parents=True, exist_ok=True)
    for name, all_lines in lines.items():
        for job, part in enumerate(even_parts(all_lines, jobs), start=1):
            (folder / f"{name}.{job}.scp").write_text("".join(part), encoding="utf-8")
    return jobs


def write_text_shapes(stats_dir: Path, token_list: Path, token_type: str) -> None:
    """`text_shape` with the vocabulary size as second dimension: `text_shape.<token type>`.

    Raises:
        FileNotFoundError: the statistics or the token list are missing.
    """
    size = len(token_list.read_text(encoding="utf-8").split("\n")) - 1
    for part in ("train", "valid"):
        shapes = (stats_dir / part / "text_shape").read_text(encoding="utf-8").splitlines()
        target = stats_dir / part / f"text_shape.{token_type}"
        target.write_text("".join(f"{shape},{size}\n" for shape in shapes), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    split = steps.add_parser("split", help="write key files; print the number of jobs")
    split.add_argument("--train", type=Path, required=True, help="wav.scp of the training set")
    split.add_argument("--valid", type=Path, required=True, help="wav.scp of the validation set")
    split.add_argument("--nj", type=int, required=True, help="most jobs")
    split.add_argument("--logdir", type=Path, required=True)
    shapes = steps.add_parser("text_shapes", help="write text_shape.<token type>")
    shapes.add_argument("--stats_dir", type=Path, required=True)
    shapes.add_argument("--token_list", type=Path, required=True)
    shapes.add_argument("--token_type", required=True)
    args = parser.parse_args()
    try:
        if args.step == "split":
            print(split_keys({"train": args.train, "valid": args.valid}, args.logdir, args.nj))
        else:
            write_text_shapes(args.stats_dir, args.token_list, args.token_type)
    except OSError as error:
        sys.exit(f"stats: {error}")


if __name__ == "__main__":
    main()
