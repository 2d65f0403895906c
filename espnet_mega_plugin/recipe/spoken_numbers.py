"""The corpus spoken_numbers: short sentences full of numbers, spoken by espeak-ng on the spot.

    python -m espnet_mega_plugin.recipe.spoken_numbers --out data --nj 2

Digit strings, dates, amounts, times of day and commands, in capitals, 2 to 9 words each, from 87 words. Four sets,
of which no two share a sentence:

    train dev test   ten voices: American and British, female and male
    test_unseen      four other voices

Homophones (TO and TWO, FOR and FOUR) and the teens (FIFTEEN sounds as FIFTY) are left out: the corpus shows within
minutes on a CPU whether a recogniser works, not how good a language model is.

Everything follows from the seed and each utterance's name: the files are the same bytes for any number of jobs and in
any order. An interrupted run goes on where it stopped; a finished one is left alone; other settings make it anew.
"""

import argparse
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from espnet_mega_plugin.recipe import espeak
from espnet_mega_plugin.recipe.kaldi_dir import TABLES, DataDir, validate, write_data_dir

SAMPLE_RATE = 16000
SIZES = {"train": 1500, "dev": 100, "test": 350, "test_unseen": 160}
WORDS = (2, 9)  # in a sentence

# Speaker -> espeak-ng's voice
VOICES = {
    "us_m0": "en-us",
    "us_m1": "en-us+m1",
    "us_m6": "en-us+m6",
    "us_f2": "en-us+f2",
    "us_f4": "en-us+f4",
    "gb_m0": "en",
    "gb_m3": "en+m3",
    "gb_m7": "en+m7",
    "gb_f1": "en+f1",
    "gb_f5": "en+f5",
}
UNSEEN_VOICES = {"us_f3": "en-us+f3", "us_m4": "en-us+m4", "gb_m2": "en+m2", "gb_f9": "en+belinda"}

STAMP = "spoken_numbers.json"
VERSION = 1  # of the corpus; raise it when sentences or samples change

# What a {name} may stand for. Repeating an alternative makes it more frequent: words that occur in one kind of sentence
# only, such as the months, need many of that kind.
GRAMMAR = {
    "sentence": (
        2 * "{digits} "
        + "{call} "
        + 6 * "{date} "
        + 3 * "{money} "
        + 2 * "{quantity} "
        + 3 * "{time} "
        + 4 * "{command} "
    ).split(),
    "digits": [" ".join(["{digit}"] * length) for length in range(4, 9)],
    "call": ["CALL {digits}", "CALL {digits} PLEASE"],
    "date": ["{weekday} {day}", "ON {weekday} {day}", "{weekday} {day} AT {hour}"],
    "day": ["THE {ordinal} OF {month}"],
    "money": ["{number} {currency}", "{number} {currency} AND {two digits} CENTS"],
    "quantity": ["{number} {unit} OF {goods}", "{number} {unit} OF {goods} AND {few} OF {goods}"],
    "time": ["SET THE ALARM AT {clock}", "SET THE ALARM AT {clock} ON {weekday}"]
    + ["{weekday} {part} AT {clock}", "ON {weekday} {part} AT {clock}"],
    "command": ["PLEASE {action} {place}", "{action} {place} PLEASE"]
    + ["{action} {place} AT {hour}", "{action} AT {hour}"],
    "clock": ["HALF PAST {hour}", "QUARTER PAST {hour}", "{hour} {minute}"],
    "number": ["{few}", "{two digits}", "{two digits}"]
    + ["{one} HUNDRED", "{one} HUNDRED {two digits}", "{one} THOUSAND"],
    "two digits": ["{ten} {one}"],
    "minute": [f"{ten} {{one}}" for ten in ("TWENTY", "THIRTY", "FORTY", "FIFTY")],
    "action": [f"TURN {way} THE {thing}" for way in ("ON", "OFF") for thing in ("LIGHT", "RADIO", "HEATER")]
    + [f"{verb} THE {thing}" for verb in ("OPEN", "CLOSE") for thing in ("DOOR", "WINDOW")],
    "place": [f"IN THE {room}" for room in ("KITCHEN", "BEDROOM", "GARDEN", "OFFICE")],
    "digit": "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split(),
    "one": "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split(),
    "few": "TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE".split(),
    "hour": "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE".split(),
    "ten": "TWENTY THIRTY FORTY FIFTY SIXTY SEVENTY EIGHTY NINETY".split(),
    "ordinal": ["FIRST", "SECOND", "THIRD", "FIFTH", "TENTH", "TWELFTH"]
    + ["TWENTY FIRST", "TWENTY SECOND", "TWENTY THIRD"],
    "weekday": "MONDAY TUESDAY WEDNESDAY THURSDAY FRIDAY SATURDAY SUNDAY".split(),
    "month": "JANUARY FEBRUARY MARCH APRIL MAY JUNE JULY AUGUST SEPTEMBER OCTOBER NOVEMBER DECEMBER".split(),
    "part": ["MORNING", "EVENING"],
    "currency": ["DOLLARS", "EUROS", "POUNDS"],
    "unit": ["KILOS", "BAGS", "BOXES"],
    "goods": ["RICE", "SUGAR", "COFFEE", "MILK"],
}


@dataclass(frozen=True)
class Utterance:
    """One recording to be: all that its samples depend on."""

    name: str
    text: str
    speaker: str
    voice: str
    rate: int  # words per minute
    pitch: int  # espeak-ng's, 0 to 99
    silence: tuple[float, float]  # seconds before and after
    peak: float  # of full scale
    snr: float  # decibels between speech and the noise under it
    seed: int


class Sentences:
    """An endless source of sentences of `GRAMMAR`, in which the alternatives of one name come equally often.

    They are dealt from a shuffled deck, which is used up before it is shuffled again.
    """

    def __init__(self, seed: str):
        self._random = random.Random(seed)
        self._decks: dict[str, list[str]] = {}

    def draw(self, name: str = "sentence") -> str:
        if not self._decks.get(name):
            self._decks[name] = self._random.sample(GRAMMAR[name], len(GRAMMAR[name]))
        return re.sub(r"\{(.+?)\}", lambda found: self.draw(found[1]), self._decks[name].pop())


def plan(sizes: dict[str, int] | None = None, seed: int = 0) -> dict[str, list[Utterance]]:
    """Decide every utterance of the corpus: its sentence, its voice and how it is spoken.

    Args:
        sizes: set -> number of utterances, at least one each; default `SIZES`.
        seed: another seed is another corpus of the same kind.

    Returns:
        set -> utterances, sorted by name; no sentence occurs twice, within a set or across sets.

    Raises:
        ValueError: a set is unknown, missing or empty, or there are not as many different sentences.
    """
    sizes = SIZES if sizes is None else sizes
    if sizes.keys() != SIZES.keys() or min(sizes.values()) < 1:
        raise ValueError(f"every set of {', '.join(SIZES)} needs at least one utterance, got {sizes}")
    used: set[str] = set()
    corpus = {}
    for name in SIZES:  # in this order, whatever the order of the argument
        source = Sentences(f"{seed}/{name}")
        voices = list((UNSEEN_VOICES if name == "test_unseen" else VOICES).items())
        utterances = []
        for number, text in enumerate(_new_sentences(source, used, sizes[name])):
            # Voices take turns over blocks of all voices; a shuffle inside keeps them apart from the deck of kinds.
            if number % len(voices) == 0:
                turns = random.Random(f"{seed}/{name}/voices/{number}").sample(voices, len(voices))
            speaker, voice = turns[number % len(voices)]
            utterances.append(_utterance(f"{speaker}-{name}-{number:05d}", text, speaker, voice, seed))
        corpus[name] = sorted(utterances, key=lambda utterance: utterance.name)
    return corpus


def _new_sentences(source: Sentences, used: set[str], count: int) -> Iterator[str]:
    vain = 0
    while count:
        text = source.draw()
        if text in used or not WORDS[0] <= len(text.split()) <= WORDS[1]:
            vain += 1
            if vain > 10000:
                raise ValueError(f"only {len(used)} different sentences were found; ask for smaller sets")
            continue
        used.add(text)
        vain, count = 0, count - 1
        yield text


def _utterance(name: str, text: str, speaker: str, voice: str, seed: int) -> Utterance:
    own = random.Random(f"{seed}/{name}")  # of nothing but seed and name, so that order and jobs do not matter
    return Utterance(
        name=name,
        text=text,
        speaker=speaker,
        voice=voice,
        rate=own.randint(155, 195),
        pitch=own.randint(38, 62),
        silence=(own.uniform(0.05, 0.2), own.uniform(0.05, 0.2)),
        peak=10 ** (own.uniform(-12, -3) / 20),
        snr=own.uniform(25, 40),
        seed=own.getrandbits(31),
    )


def render(utterance: Utterance) -> np.ndarray:
    """The samples of an utterance: (L,) int16 at 16 kHz; speech with a little silence around and noise under it.

    The noise is there because digital silence, whose logarithm is minus infinity, does not occur in recordings.
    """
    from scipy.signal import resample_poly

    speech, rate = espeak.speak(
        utterance.text.lower(), utterance.voice, rate=utterance.rate, pitch=utterance.pitch, seed=utterance.seed
    )
    speech = resample_poly(speech.astype(np.float64), SAMPLE_RATE, rate)  # divides by the common factor itself
    power = np.mean(speech**2)
    before, after = (round(seconds * SAMPLE_RATE) for seconds in utterance.silence)
    signal = np.pad(speech, (before, after))
    noise = np.random.default_rng(utterance.seed).standard_normal(len(signal))
    signal += noise * np.sqrt(power / 10 ** (utterance.snr / 10))
    return np.round(signal * (utterance.peak * 32767 / np.abs(signal).max())).astype(np.int16)


def make(out: str | Path, *, sizes: dict[str, int] | None = None, seed: int = 0, nj: int = 2) -> bool:
    """Write the corpus: `<out>/<set>/{wav.scp,text,utt2spk,spk2utt}` and `<out>/<set>/wav/*.wav`.

    Args:
        out: folder to write to; nothing is written elsewhere.
        sizes, seed: as for `plan`.
        nj: processes to synthesise with. Above 1 they start anew, so a script that calls this must be importable
            (`if __name__ == "__main__":`).

    Returns:
        False where the corpus was there already, complete and made with the same settings; True where it was made.

    Raises:
        ValueError: a size or `nj` is below 1.
        FileExistsError: `<out>/<set>` holds something that this program did not write.
    """
    if nj < 1:
        raise ValueError(f"nj must be at least 1, got {nj}")
    out = Path(out).resolve()
    corpus = plan(sizes, seed)
    settings = {
        "version": VERSION,
        "espeak-ng": espeak.version(),
        "seed": seed,
        "sizes": {name: len(utterances) for name, utterances in corpus.items()},
    }
    if _settings(out) == settings:
        if all(_complete(out / name, utterances) for name, utterances in corpus.items()):
            return False
    else:
        _clear(out, list(corpus))
        out.mkdir(parents=True, exist_ok=True)
        (out / STAMP).write_text(json.dumps(settings, indent=1) + "\n")
    _record(out, corpus, nj)
    for name, utterances in corpus.items():
        write_data_dir(out / name, _data_dir(out / name, utterances))
        validate(out / name)
    return True


def _data_dir(directory: Path, utterances: list[Utterance]) -> DataDir:
    return DataDir(
        wav={utterance.name: str(_wav(directory, utterance)) for utterance in utterances},
        text={utterance.name: utterance.text for utterance in utterances},
        speaker={utterance.name: utterance.speaker for utterance in utterances},
    )


def _wav(directory: Path, utterance: Utterance) -> Path:
    return directory / "wav" / f"{utterance.name}.wav"


def _settings(out: Path) -> dict | None:
    try:
        return json.loads((out / STAMP).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _complete(directory: Path, utterances: list[Utterance]) -> bool:
    try:
        return validate(directory) == _data_dir(directory, utterances)
    except (FileNotFoundError, ValueError):
        return False


def _clear(out: Path, names: list[str]) -> None:
    """Remove an earlier corpus, known by its stamp; somebody else's data are not ours to remove."""
    if not (out / STAMP).exists():
        for name in names:
            if (out / name).exists():
                raise FileExistsError(
                    f"{out / name} exists and no {STAMP} beside it says that it is ours: give another --out, or move it"
                )
    for name in names:
        for table in TABLES:
            (out / name / table).unlink(missing_ok=True)
        shutil.rmtree(out / name / "wav", ignore_errors=True)


def _record(out: Path, corpus: dict[str, list[Utterance]], nj: int) -> None:
    from tqdm import tqdm

    tasks = [(one, _wav(out / name, one)) for name, utterances in corpus.items() for one in utterances]
    missing = [task for task in tasks if not task[1].is_file()]
    for name in corpus:
        (out / name / "wav").mkdir(parents=True, exist_ok=True)
        for leftover in (out / name / "wav").glob(".*"):  # half a file of a run that was killed
            leftover.unlink()
    progress = partial(tqdm, total=len(missing), desc="synthesis", unit="utt", mininterval=1)
    if nj == 1:
        for task in progress(missing):
            _write(task)
        return
    # Started anew, not forked: a fork would inherit whatever the caller has loaded, threads included.
    with get_context("spawn").Pool(nj) as pool:
        for _ in progress(pool.imap_unordered(_write, missing, chunksize=16)):
            pass


def _write(task: tuple[Utterance, Path]) -> None:
    import soundfile

    utterance, path = task
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # a file that has its name is complete
    soundfile.write(temporary, render(utterance), SAMPLE_RATE, subtype="PCM_16", format="WAV")
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mega_plugin.recipe.spoken_numbers",
        description="Synthesise the corpus spoken_numbers with espeak-ng.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the sets")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another corpus")
    parser.add_argument("--nj", type=int, default=2, help="processes")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help="utterances")
    args = parser.parse_args(argv)
    sizes = {name: getattr(args, name) for name in SIZES}
    try:
        made = make(args.out, sizes=sizes, seed=args.seed, nj=args.nj)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"spoken_numbers {'made' if made else 'is there already, complete'}: {args.out.resolve()}")
    for name in SIZES:
        data = validate(args.out / name)
        words = sum(len(text.split()) for text in data.text.values())
        bytes_ = sum(Path(path).stat().st_size - 44 for path in data.wav.values())  # 44: the header of a WAV file
        hours = bytes_ / 2 / SAMPLE_RATE / 3600
        voices = len(data.by_speaker())
        print(f"  {name:12s}{len(data):6d} utterances{words:7d} words{hours:6.2f} hours{voices:4d} voices")


if __name__ == "__main__":
    main()
