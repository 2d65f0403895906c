"""Stage 13: word, character and token error rates of decoded sets, with substitutions, deletions and insertions.

Alignments are jiwer's. A space counts as a character, as in ESPnet. As with sclite, whose table result.txt repeats,
letters of different case are the same unless `-s` is given. An utterance without a hypothesis is all deletions.
Where several alignments have the fewest errors, sclite, which weighs a substitution as 4 and the others as 3, may
split them differently.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jiwer

from espnet_mega_plugin.recipe.kaldi_dir import read_table

SPACE = "<space>"
Splitter = Callable[[str], list[str]]


@dataclass(frozen=True)
class Counts:
    """Sums over sentences. units: in the references. wrong: sentences with an error."""

    sentences: int = 0
    units: int = 0
    correct: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    wrong: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    def percentages(self) -> list[float]:
        """Corr, Sub, Del, Ins, Err of the units, then S.Err of the sentences."""
        of_units = (self.correct, self.substitutions, self.deletions, self.insertions, self.errors)
        return [100 * n / max(self.units, 1) for n in of_units] + [100 * self.wrong / max(self.sentences, 1)]


@dataclass(frozen=True)
class Alignment:
    """One utterance: what was counted, and both sides with `*` for what one of them lacks."""

    counts: Counts
    pairs: list[tuple[str, str, str]]  # reference, hypothesis, one of "", S, D, I


def words(text: str) -> list[str]:
    return text.split()


def characters(text: str) -> list[str]:
    return [SPACE if character == " " else character for character in " ".join(text.split())]


def pieces(model: Path) -> Splitter:
    """Tokens of a sentencepiece model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return lambda text: processor.encode(" ".join(text.split()), out_type=str)


def align(reference: list[str], hypothesis: list[str]) -> Alignment:
    """Alignment of two token sequences with the fewest errors."""
    if reference and hypothesis:
        # jiwer takes texts and splits at blanks, so a token with a blank in it would come apart: ours have none
        chunks = jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments[0]
        pairs = [pair for chunk in chunks for pair in _pairs(chunk, reference, hypothesis)]
    else:
        pairs = [(unit, "*", "D") for unit in reference] + [("*", unit, "I") for unit in hypothesis]
    kinds = [kind for _, _, kind in pairs]
    counts = Counts(
        sentences=1,
        units=len(reference),
        correct=kinds.count(""),
        substitutions=kinds.count("S"),
        deletions=kinds.count("D"),
        insertions=kinds.count("I"),
        wrong=int(any(kinds)),
    )
    return Alignment(counts, pairs)


def _pairs(chunk, reference: list[str], hypothesis: list[str]) -> list[tuple[str, str, str]]:
    ours = reference[chunk.ref_start_idx : chunk.ref_end_idx]
    theirs = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
    if chunk.type == "delete":
        return [(unit, "*", "D") for unit in ours]
    if chunk.type == "insert":
        return [("*", unit, "I") for unit in theirs]
    kind = "" if chunk.type == "equal" else "S"
    return [(a, b, kind) for a, b in zip(ours, theirs, strict=True)]


def score(
    references: Mapping[str, str], hypotheses: Mapping[str, str], split: Splitter, case_sensitive: bool = False
) -> dict[str, Alignment]:
    """Align every reference with its hypothesis, by utterance; none counts as an empty one.

    Raises:
        ValueError: a hypothesis has no reference.
    """
    if strangers := sorted(hypotheses.keys() - references.keys()):
        raise ValueError(f"{len(strangers)} hypotheses have no reference, such as {strangers[0]!r}; run stage 12 anew")

    def prepared(text: str) -> list[str]:
        return [token if case_sensitive else token.lower() for token in split(text)]

    return {utt: align(prepared(text), prepared(hypotheses.get(utt, ""))) for utt, text in references.items()}


def result_table(alignments: Mapping[str, Alignment], speakers: Mapping[str, str]) -> str:
    """sclite's summary, a row a speaker and `Sum/Avg`, then the alignment of every utterance with an error."""
    by_speaker: dict[str, Counts] = {}
    for utterance, alignment in alignments.items():
        speaker = speakers.get(utterance, utterance)
        by_speaker[speaker] = by_speaker.get(speaker, Counts()) + alignment.counts
    rows = [*sorted(by_speaker.items()), ("Sum/Avg", sum(by_speaker.values(), Counts()))]
    width = max(len(name) for name, _ in rows)
    lines = [f"| {'SPKR':<{width}} |  # Snt   # Wrd |   Corr    Sub    Del    Ins    Err  S.Err |"]
    for name, counts in rows:
        figures = " ".join(f"{figure:6.1f}" for figure in counts.percentages())
        lines.append(f"| {name:<{width}} | {counts.sentences:6} {counts.units:7} | {figures} |")
    for utterance, alignment in alignments.items():
        if alignment.counts.wrong:
            lines += ["", *_alignment_lines(utterance, alignment)]
    return "\n".join(lines) + "\n"


def _alignment_lines(utterance: str, alignment: Alignment) -> list[str]:
    c = alignment.counts
    columns = [max(map(len, pair)) for pair in alignment.pairs]
    lines = [f"id: {utterance}", f"Scores: (#C #S #D #I) {c.correct} {c.substitutions} {c.deletions} {c.insertions}"]
    for name, units in zip(("REF: ", "HYP: ", "Eval:"), zip(*alignment.pairs, strict=True), strict=True):
        lines.append(" ".join([name, *(unit.ljust(n) for unit, n in zip(units, columns, strict=True))]).rstrip())
    return lines


def splitters(token_type: str, bpemodel: Path | None) -> dict[str, Splitter]:
    """Name of the score folder's ending -> how a text is split for it."""
    tokens = {"bpe": lambda: pieces(bpemodel), "char": lambda: characters, "word": lambda: words}
    return {"wer": words, "cer": characters, "ter": tokens[token_type]()}


def score_folder(data: Path, decoded: Path, split: Mapping[str, Splitter], case_sensitive: bool, clean) -> int:
    """Write `score_<name>/{ref.trn,hyp.trn,result.txt}` below `decoded` for every way to split.

    Returns:
        How many utterances have no hypothesis. Their lines in the tables of stage 12 have no value, `score` included;
        an utterance in which nothing was recognised has a score.

    Raises:
        FileNotFoundError: there is no `text` in either folder.
    """
    if not (decoded / "text").exists():
        raise FileNotFoundError(f"{decoded / 'text'}: no such file; stage 12 makes it")
    references = {utt: clean(text) for utt, text in read_table(data / "text", empty_values=True).items()}
    hypotheses = {utt: clean(text) for utt, text in read_table(decoded / "text", empty_values=True).items()}
    speakers = read_table(data / "utt2spk")
    scores = read_table(decoded / "score", empty_values=True) if (decoded / "score").exists() else {}
    for name, splitter in split.items():
        folder = decoded / f"score_{name}"
        folder.mkdir(exist_ok=True)
        for side, texts in (("ref", references), ("hyp", {utt: hypotheses.get(utt, "") for utt in references})):
            lines = [f"{' '.join(splitter(text))}\t({speakers[utt]}-{utt})\n" for utt, text in texts.items()]
            (folder / f"{side}.trn").write_text("".join(lines), encoding="utf-8")
        table = result_table(score(references, hypotheses, splitter, case_sensitive), speakers)
        (folder / "result.txt").write_text(table, encoding="utf-8")
    return sum(utt not in hypotheses or not (hypotheses[utt] or scores.get(utt, "given")) for utt in references)


def text_cleaner(name: str):
    """ESPnet's text cleaner of that name; `none` changes nothing."""
    if name == "none":
        return lambda text: text
    from espnet2.text.cleaner import TextCleaner

    return TextCleaner(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asr_exp", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the formatted sets, such as dump/raw")
    parser.add_argument("--test_sets", required=True, help="separated by blanks")
    parser.add_argument("--tags", required=True, help="folders of decodings below asr_exp, separated by blanks")
    parser.add_argument("--token_type", required=True, choices=("bpe", "char", "word"))
    parser.add_argument("--bpemodel", type=Path)
    parser.add_argument("--cleaner", default="none")
    parser.add_argument("-s", dest="case_sensitive", action="store_true", help="letters of different case differ")
    args = parser.parse_args()
    try:
        split, clean = splitters(args.token_type, args.bpemodel), text_cleaner(args.cleaner)
        for tag in args.tags.split():
            for name in args.test_sets.split():
                decoded = args.asr_exp / tag / name
                lost = score_folder(args.data_dir / name, decoded, split, args.case_sensitive, clean)
                if lost:
                    utterances = f"{lost} of {len(read_table(args.data_dir / name / 'utt2spk'))} utterances of {name}"
                    print(
                        f"warning: {decoded}: {utterances} have no hypothesis; counted as deleted words",
                        file=sys.stderr,
                    )
    except (OSError, ValueError) as error:
        sys.exit(f"score: {error}")


if __name__ == "__main__":
    main()
