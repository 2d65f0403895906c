"""Stage 4: leave out utterances that are too short, too long, or without words.

Too long eats memory in training, too short leaves the encoder no frames. The audio stays where it is.
"""

import argparse
import shutil
import sys
from pathlib import Path

from espnet_mega_plugin.recipe.audio import hertz
from espnet_mega_plugin.recipe.kaldi_dir import DataDir, read_data_dir, read_table, write_data_dir, write_table


def filter_directory(source: Path, target: Path, rate: int, shortest: float, longest: float) -> dict[str, list[str]]:
    """Write `target` with the utterances of `source` that last from `shortest` to `longest` seconds and have words.

    Returns:
        what was left out: reason -> utterances.

    Raises:
        FileNotFoundError: `source` is not what stage 3 makes.
        ValueError: no utterance is left.
    """
    data = read_data_dir(source)
    samples = {utt: int(n) for utt, n in read_table(source / "utt2num_samples").items()}
    left_out = {
        f"shorter than {shortest} s": [utt for utt in data.wav if samples[utt] < shortest * rate],
        f"longer than {longest} s": [utt for utt in data.wav if samples[utt] > longest * rate],
        "without words": [utt for utt in data.wav if not data.text[utt]],
    }
    gone = {utt for utts in left_out.values() for utt in utts}
    kept = [utt for utt in data.wav if utt not in gone]
    if not kept:
        counts = ", ".join(f"{len(utts)} {reason}" for reason, utts in left_out.items() if utts)
        raise ValueError(f"{source}: no utterance is left ({counts}); see --min_wav_duration and --max_wav_duration")
    (target / "wav.scp").unlink(missing_ok=True)
    write_table(target / "utt2num_samples", {utt: str(samples[utt]) for utt in kept})
    for name in ("feats_type", "audio_format"):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    tables = ({utt: table[utt] for utt in kept} for table in (data.wav, data.text, data.speaker))
    write_data_dir(target, DataDir(*tables))
    return left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fs", default="16k", help="sampling rate: 16000 or 16k")
    parser.add_argument("--min_wav_duration", type=float, required=True, help="seconds")
    parser.add_argument("--max_wav_duration", type=float, required=True, help="seconds")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    try:
        shortest, longest = args.min_wav_duration, args.max_wav_duration
        left_out = filter_directory(args.source, args.target, hertz(args.fs), shortest, longest)
    except (OSError, ValueError) as error:
        sys.exit(f"filter_lengths: {error}")
    for reason, utterances in left_out.items():
        if utterances:
            print(f"{args.target}: left out {len(utterances)} {reason}: {' '.join(utterances[:5])}")


if __name__ == "__main__":
    main()
