"""Stage 13: the real-time factor of a decoding, seconds of computing for a second of audio.

It is read from the logs of stage 12. The plugin's command (--batched true) ends with how long it took for how much
audio. ESPnet's says when it is done with an utterance, so the time between two such lines is what the second one took;
the first one of a job has no line before it and is left out, together with the loading of the model. Jobs that run side
by side share the machine, so a figure is one of so many jobs at a time; for the speed of a machine by itself decode
with --inference_nj 1.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from espnet_mega_plugin.recipe.audio import hertz
from espnet_mega_plugin.recipe.kaldi_dir import read_table

DONE = re.compile(
    r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*?(?:INFO: Final best hypothesis: |WARNING: Utterance )[\[(]'([^']+)'"
)
SUMMARY = re.compile(r"INFO: (\d+) utterances, ([\d.]+) s of audio in ([\d.]+) s, RTF ")  # decode/progress.py
LINE = re.compile(r"RTF (\S+): (\S+) s for (\S+) s of audio, (\d+) utterances, (\d+) jobs")


@dataclass(frozen=True)
class Speed:
    """utterances: that were timed. computing, audio: seconds. jobs: that ran side by side."""

    utterances: int
    computing: float
    audio: float
    jobs: int

    @property
    def factor(self) -> float:
        return self.computing / self.audio if self.audio else float("nan")

    def __str__(self) -> str:
        return (
            f"RTF {self.factor:.4f}: {self.computing:.2f} s for {self.audio:.2f} s of audio, "
            f"{self.utterances} utterances, {self.jobs} jobs"
        )


def finished(log: Iterable[str]) -> list[tuple[float, str]]:
    """When (seconds) each utterance of a log was done, and its name."""
    found = filter(None, map(DONE.match, log))
    return [(datetime.strptime(m.group(1), "%Y-%m-%d %H:%M:%S,%f").timestamp(), m.group(2)) for m in found]


def speed(logs: Iterable[Path], seconds: Mapping[str, float]) -> Speed:
    """Of all jobs of a decoding. seconds: how long each utterance is."""
    computing = audio = 0.0
    utterances = jobs = 0
    for log in logs:
        jobs += 1
        text = log.read_text(encoding="utf-8", errors="replace")
        if summary := SUMMARY.search(text):
            utterances += int(summary.group(1))
            audio += float(summary.group(2))
            computing += float(summary.group(3))
            continue
        done = finished(text.splitlines())
        for (before, _), (after, utterance) in zip(done, done[1:], strict=False):
            computing += after - before
            audio += seconds[utterance]
            utterances += 1
    return Speed(utterances, computing, audio, jobs)


def read_speed(path: Path) -> Speed | None:
    """What `rtf.txt` says; None where there is none or nothing was timed."""
    found = LINE.search(path.read_text(encoding="utf-8")) if path.exists() else None
    if not found or not int(found.group(4)):
        return None
    return Speed(int(found.group(4)), float(found.group(2)), float(found.group(3)), int(found.group(5)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asr_exp", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the formatted sets, such as dump/raw")
    parser.add_argument("--test_sets", required=True, help="separated by blanks")
    parser.add_argument("--tags", required=True, help="folders of decodings below asr_exp, separated by blanks")
    parser.add_argument("--fs", required=True, help="sampling rate of the formatted sets")
    args = parser.parse_args()
    try:
        for tag in args.tags.split():
            for name in args.test_sets.split():
                samples = read_table(args.data_dir / name / "utt2num_samples")
                seconds = {utt: int(n) / hertz(args.fs) for utt, n in samples.items()}
                folder = args.asr_exp / tag / name
                logs = sorted((folder / "logdir").glob("asr_inference.*.log"))
                (folder / "rtf.txt").write_text(f"{speed(logs, seconds)}\n", encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"rtf: {error!r}")


if __name__ == "__main__":
    main()
