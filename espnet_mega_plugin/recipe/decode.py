"""Stage 12: decode every test set with every inference configuration, by ESPnet's command or the plugin's, in parallel.

The utterances of each (configuration, set) are split into key files, one job each, and the jobs of all pairs share
one pool. Afterwards `<exp>/<tag>/<set>/{text,token,token_int,score}` hold all utterances in the order of wav.scp; the
plugin's command also gives `{timestamps,confidence,ctm}` (`decode/results.py`).
"""

import argparse
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from espnet_mega_plugin.recipe.jobs import Job, JobFailed, leave_on_signals, run_jobs
from espnet_mega_plugin.recipe.kaldi_dir import read_table
from espnet_mega_plugin.recipe.progress import LogFollower, StatusLine, bar, clock
from espnet_mega_plugin.recipe.stats import even_parts

MERGED = ("text", "token", "token_int", "score")
TIMED = ("timestamps", "confidence", "ctm")  # of the plugin's command alone
# What the commands say once an utterance, given --display_hypotheses
UTTERANCE_DONE = re.compile(r"INFO: Final best hypothesis|WARNING: Utterance .*(return empty results|is skipped)")


@dataclass(frozen=True)
class Decoding:
    """One test set under one configuration. folder: where its results go."""

    folder: Path
    wav_scp: Path
    keys: Sequence[str]
    jobs: Sequence[Job]

    @property
    def outputs(self) -> list[Path]:
        return [self.folder / "logdir" / f"output.{n}" for n in range(1, len(self.jobs) + 1)]


def plan(command: Sequence[str], config: Path | None, wav_scp: Path, folder: Path, nj: int) -> Decoding:
    """Write the key files of one decoding and say which jobs it has; what an earlier one left is removed."""
    lines = wav_scp.read_text(encoding="utf-8").splitlines(keepends=True)
    logdir = folder / "logdir"
    shutil.rmtree(logdir, ignore_errors=True)
    for name in (*MERGED, *TIMED):
        (folder / name).unlink(missing_ok=True)
    logdir.mkdir(parents=True)
    jobs = []
    for n, part in enumerate(even_parts(lines, min(nj, len(lines))), start=1):
        keys = logdir / f"keys.{n}.scp"
        keys.write_text("".join(part), encoding="utf-8")
        arguments = [
            *("--data_path_and_name_and_type", f"{wav_scp},speech,sound", "--key_file", str(keys)),
            *("--output_dir", str(logdir / f"output.{n}")),
            *(("--config", str(config)) if config else ()),
        ]
        jobs.append(Job([*command, *arguments], logdir / f"asr_inference.{n}.log"))
    return Decoding(folder, wav_scp, [line.split(maxsplit=1)[0] for line in lines], jobs)


def merge(decoding: Decoding) -> list[str]:
    """Write the jobs' results as one table each, in the order of the keys; returns the utterances without a result.

    A missing utterance gets a line without a value: the next ones must not move up beside its reference.
    """
    missing = []
    for name in MERGED:
        found: dict[str, str] = {}
        for output in decoding.outputs:
            table = output / "1best_recog" / name
            found |= read_table(table, empty_values=True) if table.exists() else {}
        lines = [f"{key} {found.get(key, '')}".rstrip() + "\n" for key in decoding.keys]
        (decoding.folder / name).write_text("".join(lines), encoding="utf-8")
        missing = missing or [key for key in decoding.keys if key not in found]
    for name in TIMED:
        tables = [output / "1best_recog" / name for output in decoding.outputs]
        lines = [table.read_text(encoding="utf-8") for table in tables if table.exists()]
        if lines:
            (decoding.folder / name).write_text("".join(lines), encoding="utf-8")
    return missing


class Progress:
    """Shows how many utterances all jobs together have done, by what their logs say."""

    def __init__(self, decodings: Sequence[Decoding]):
        self._total = sum(len(decoding.keys) for decoding in decodings)
        self._followers = [LogFollower(job.log) for decoding in decodings for job in decoding.jobs]
        self._status, self._done, self._began = StatusLine(), 0, time.monotonic()

    def show(self) -> None:
        for follower in self._followers:
            self._done += sum(bool(UTTERANCE_DONE.search(line)) for line in follower.new_lines())
        seconds = time.monotonic() - self._began
        eta = f", ETA {clock(seconds * (self._total - self._done) / self._done)}" if self._done else ""
        self._status.show(f"decoding {bar(self._done, self._total)}{eta}")

    def finish(self) -> None:
        self._status.keep(f"decoding took {clock(time.monotonic() - self._began)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asr_exp", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the formatted sets, such as dump/raw")
    parser.add_argument("--test_sets", required=True, help="separated by blanks")
    parser.add_argument("--configs", required=True, help="inference YAMLs, separated by blanks; 'none' for none")
    parser.add_argument("--tags", required=True, help="folder of each configuration's results below asr_exp")
    parser.add_argument("--nj", type=int, default=1, help="parallel processes")
    parser.add_argument("--worker", default="", help="command of recipe/worker.py: import ESPnet once a process")
    parser.add_argument("--submit", default="", help="runner that decodes elsewhere, such as 'slurm.pl --gpu 1'")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- ESPnet's inference command, or the plugin's")
    args = parser.parse_args()
    leave_on_signals()
    command = [*args.command[1:], "--display_hypotheses", "true"]
    decodings = []
    for config, tag in zip(args.configs.split(), args.tags.split(), strict=True):
        for name in args.test_sets.split():
            path = None if config == "none" else Path(config)
            scp = args.data_dir / name / "wav.scp"
            decodings.append(plan(command, path, scp, args.asr_exp / tag / name, args.nj))
            print(f"+ {shlex.join(decodings[-1].jobs[0].command)}  # job 1 of {len(decodings[-1].jobs)}")
    jobs = [job for decoding in decodings for job in decoding.jobs]
    try:
        progress = Progress(decodings)
        run_jobs(jobs, args.nj, shlex.split(args.worker), progress.show, shlex.split(args.submit))
    except JobFailed as error:
        sys.exit(f"\ndecode: {error}")
    progress.finish()
    for decoding in decodings:
        missing = merge(decoding)
        lost = f", no result for {len(missing)}: {' '.join(missing[:5])}" if missing else ""
        print(f"{decoding.folder}: {len(decoding.keys)} utterances{lost}")


if __name__ == "__main__":
    main()
