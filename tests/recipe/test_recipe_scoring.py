"""Stage 13: counts against hand counting and jiwer's own totals, tables in ESPnet's form."""

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jiwer
import pytest

from espnet_mega_plugin.recipe.kaldi_dir import write_table
from espnet_mega_plugin.recipe.results import collect, results_page, word_error_table
from espnet_mega_plugin.recipe.score import (
    Counts,
    align,
    characters,
    pieces,
    result_table,
    score,
    score_folder,
    words,
)
from espnet_mega_plugin.recipe.tokens import train_bpe


def total(alignments) -> Counts:
    return sum((alignment.counts for alignment in alignments.values()), Counts())


@pytest.mark.parametrize(
    ("reference", "hypothesis", "correct", "substitutions", "deletions", "insertions"),
    [
        ("one two three", "one two three", 3, 0, 0, 0),
        ("one two three", "one three", 2, 0, 1, 0),
        ("one two three", "one two two three", 3, 0, 0, 1),
        ("one two three", "one four three", 2, 1, 0, 0),
        ("one two three", "", 0, 0, 3, 0),
        ("", "one two", 0, 0, 0, 2),
        ("", "", 0, 0, 0, 0),
        # -one, two, three -> tree, four, +four, five, -six; no other alignment has as few as four errors
        ("one two three four five six", "two tree four four five", 3, 1, 2, 1),
        ("a b c d", "x a b c d", 4, 0, 0, 1),
    ],
)
def test_hand_counted(reference, hypothesis, correct, substitutions, deletions, insertions):
    counts = align(words(reference), words(hypothesis)).counts
    want = Counts(1, len(words(reference)), correct, substitutions, deletions, insertions, int(reference != hypothesis))
    assert counts == want


def test_totals_are_jiwers(seed):
    draw = random.Random(seed)
    vocabulary = "zero one two three four".split()
    references = {f"u{i}": " ".join(draw.choices(vocabulary, k=draw.randint(1, 8))) for i in range(100)}
    hypotheses = {utt: " ".join(draw.choices(vocabulary, k=draw.randint(1, 8))) for utt in references}
    texts = [references[utt] for utt in references], [hypotheses[utt] for utt in references]
    ours, theirs = total(score(references, hypotheses, words)), jiwer.process_words(*texts)
    assert (ours.correct, ours.substitutions, ours.deletions, ours.insertions) == (
        theirs.hits, theirs.substitutions, theirs.deletions, theirs.insertions,
    )  # fmt: skip
    assert ours.percentages()[4] / 100 == pytest.approx(jiwer.wer(*texts), abs=1e-12)
    errors = total(score(references, hypotheses, characters)).percentages()[4] / 100
    assert errors == pytest.approx(jiwer.cer(*texts), abs=1e-12)


def test_a_missing_hypothesis_is_all_deletions():
    alignments = score({"a": "one two", "b": "three"}, {"b": "three"}, words)
    assert total(alignments) == Counts(
        sentences=2, units=3, correct=1, substitutions=0, deletions=2, insertions=0, wrong=1
    )


def test_a_stranger_is_refused():
    with pytest.raises(ValueError, match="1 hypotheses have no reference, such as 'z'"):
        score({"a": "one"}, {"a": "one", "z": "one"}, words)


def test_case_differs_only_when_asked():
    assert total(score({"a": "ONE Two"}, {"a": "one two"}, words)).errors == 0
    assert total(score({"a": "ONE Two"}, {"a": "one two"}, words, case_sensitive=True)).errors == 2


def test_a_space_is_a_character():
    assert characters(" ab  c ") == ["a", "b", "<space>", "c"]
    assert total(score({"a": "six ty"}, {"a": "sixty"}, characters)).deletions == 1


def test_pieces_of_both_sides(tmp_path):
    texts = ["ONE TWO THREE", "TWO TWO ONE", "THREE ONE TWO"] * 5
    (tmp_path / "bpe.model").write_bytes(train_bpe(texts, 14))
    split = pieces(tmp_path / "bpe.model")
    assert "".join(split("ONE TWO")) == "▁ONE▁TWO" and split("") == []
    assert total(score({"a": texts[0]}, {"a": texts[0]}, split)).units == len(split(texts[0]))


# ----------------------------------------------------------------------------------------------------------------------


def test_table_sums_speakers_and_shows_errors():
    references = {"s1-a": "one two", "s1-b": "one", "s2-a": "two two"}
    alignments = score(references, {**references, "s2-a": "two one"}, words)
    table = result_table(alignments, {"s1-a": "s1", "s1-b": "s1", "s2-a": "s2"})
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in table.splitlines() if line.startswith("|")}
    assert [cell.split() for cell in rows["s1"]] == [["2", "3"], ["100.0", "0.0", "0.0", "0.0", "0.0", "0.0"]]
    assert [cell.split() for cell in rows["s2"]] == [["1", "2"], ["50.0", "50.0", "0.0", "0.0", "50.0", "100.0"]]
    assert [cell.split() for cell in rows["Sum/Avg"]] == [["3", "5"], ["80.0", "20.0", "0.0", "0.0", "20.0", "33.3"]]
    assert table.count("id: ") == 1 and "id: s2-a\nScores: (#C #S #D #I) 1 1 0 0\n" in table


@pytest.fixture
def experiment(tmp_path):
    """Two decodings of two sets, scored, below exp/asr_x."""
    data, exp = tmp_path / "dump" / "raw", tmp_path / "exp" / "asr_x"
    references = {"s-1": "one two", "s-2": "three"}
    for name in ("test", "org/dev"):
        write_table(data / name / "text", references)
        write_table(data / name / "utt2spk", dict.fromkeys(references, "s"))
        for tag, second in (("decode_a", "three"), ("decode_b", "four five")):
            (exp / tag / name).mkdir(parents=True)
            (exp / tag / name / "text").write_text(f"s-1 one two\ns-2 {second}\n")
            score_folder(data / name, exp / tag / name, {"wer": words, "cer": characters}, False, str)
    return exp


def test_trn_files_pair_up(experiment):
    folder = experiment / "decode_b" / "test" / "score_wer"
    assert (folder / "ref.trn").read_text() == "one two\t(s-s-1)\nthree\t(s-s-2)\n"
    assert (folder / "hyp.trn").read_text() == "one two\t(s-s-1)\nfour five\t(s-s-2)\n"


def test_results_page_has_espnets_form(experiment):
    page = results_page([experiment], experiment)
    assert page.startswith("# RESULTS\n\n## Environments\n\n- date: `")
    for name in ("python", "espnet", "torch", "espnet-mega-plugin"):
        assert re.search(rf"^- {name} version: `\d", page, re.MULTILINE), page
    header = "|dataset|Snt|Wrd|Corr|Sub|Del|Ins|Err|S.Err|\n|---|---|---|---|---|---|---|---|---|\n"
    assert page.count(header) == 2  # WER and CER
    assert f"### WER\n\n{header}|decode_a/org/dev|2|3|100.0|0.0|0.0|0.0|0.0|0.0|\n" in page
    assert "|decode_b/test|2|3|66.7|33.3|0.0|33.3|66.7|50.0|\n" in page


def test_screen_table_has_a_row_a_decoding(experiment):
    head, *rows = word_error_table(experiment).splitlines()
    assert head.split()[3:] == ["org/dev", "test"]
    assert [row.split()[0] for row in rows] == ["decode_a", "decode_b"]
    assert rows[1].split()[1:] == ["66.7", "(33.3/0.0/33.3)"] * 2


def command(name: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", f"espnet_mega_plugin.recipe.{name}", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, check=True)


def test_utterances_without_a_hypothesis_are_told_about(tmp_path):
    """Not in `text`, or there only as the bare line that stage 12 writes; an empty hypothesis has a score."""
    data, exp = tmp_path / "dump" / "raw", tmp_path / "exp" / "asr_x"
    references = {f"s-{i}": "one two" for i in range(4)}
    write_table(data / "test" / "text", references)
    write_table(data / "test" / "utt2spk", dict.fromkeys(references, "s"))
    (exp / "tag" / "test").mkdir(parents=True)
    options = ["--asr_exp", exp, "--data_dir", data, "--test_sets", "test", "--tags", "tag", "--token_type", "word"]

    (exp / "tag" / "test" / "text").write_text("s-0 one two\ns-1\ns-2\n")
    (exp / "tag" / "test" / "score").write_text("s-0 -1.5\ns-1 -2.5\ns-2\n")
    told = command("score", *options, cwd=tmp_path).stderr
    assert "2 of 4 utterances of test have no hypothesis; counted as deleted words" in told
    assert f"{exp / 'tag' / 'test'}: " in told

    (exp / "tag" / "test" / "text").write_text("s-0 one two\ns-1\ns-2 one\ns-3\n")
    (exp / "tag" / "test" / "score").write_text("s-0 -1.5\ns-1 -2.5\ns-2 -3.5\ns-3 -4.5\n")
    assert "no hypothesis" not in command("score", *options, cwd=tmp_path).stderr


def test_results_hold_this_experiment_wherever_it_lies(experiment, tmp_path):
    """Beside those of expdir, and once, however its folder is written."""
    shutil.copytree(experiment, tmp_path / "my" / "exp")
    for asr_exp, wanted in (
        ("my/exp", ["exp/asr_x", "my/exp"]),
        ("exp/asr_x", ["exp/asr_x"]),
        (experiment, [str(experiment)]),
    ):
        command("results", "--asr_exp", asr_exp, "--expdir", "exp", cwd=tmp_path)
        titles = re.findall(r"^## (?!Environments)(.*)$", (tmp_path / "RESULTS.md").read_text(), re.MULTILINE)
        assert titles == wanted


INFERENCE_LOG = """\
2026-11-22 15:00:00,000 (asr_transducer:417) INFO: Vocabulary size: 30
2026-11-22 15:00:09,500 (asr_transducer_inference:428) INFO: Final best hypothesis: ['s-1']: ONE
2026-11-22 15:00:10,000 (asr_transducer_inference:415) INFO: Current best hypothesis (0-640ms): ['s-2']: ON
2026-11-22 15:00:11,750 (asr_transducer_inference:428) INFO: Final best hypothesis: ['s-2']: ONE 's-9' TWO
2026-11-22 15:00:12,000 (asr_transducer_inference:430) WARNING: Utterance ['s-3'] has 1 frames and is too short, return empty results
"""


def test_real_time_factor_is_read_from_the_logs(experiment, tmp_path):
    """2.25 s for s-2 and 0.25 s for s-3, of 4 s and 1 s; s-1 and a job's only utterance have no beginning."""
    for tag in ("decode_a", "decode_b"):
        (experiment / tag / "test" / "logdir").mkdir()
    logs = experiment / "decode_a" / "test" / "logdir"
    (experiment / "decode_b" / "test" / "logdir" / "asr_inference.1.log").write_text(
        "[vm] 2026-11-22 15:00:00 (command:75) INFO: 3 utterances, 8.0 s of audio in 2.0 s, RTF 0.2500; 1 skipped\n"
    )
    (logs / "asr_inference.1.log").write_text(INFERENCE_LOG)
    (logs / "asr_inference.2.log").write_text(INFERENCE_LOG[: INFERENCE_LOG.index("2026-11-22 15:00:10")])
    write_table(tmp_path / "dump/raw/test/utt2num_samples", {"s-1": "99", "s-2": "32000", "s-3": "8000"})
    options = ["--asr_exp", experiment, "--data_dir", "dump/raw", "--test_sets", "test", "--tags", "decode_a decode_b"]
    command("rtf", *options, "--fs", "8k", cwd=tmp_path)
    said = (experiment / "decode_a" / "test" / "rtf.txt").read_text()
    assert said == "RTF 0.5000: 2.50 s for 5.00 s of audio, 2 utterances, 2 jobs\n"
    page = results_page([experiment], experiment)
    table = "### RTF\n\n|dataset|Snt|Audio s|Decoding s|Jobs|RTF|\n|---|---|---|---|---|---|\n"
    assert page.endswith(f"{table}|decode_a/test|2|5.0|2.5|2|0.500|\n|decode_b/test|3|8.0|2.0|1|0.250|\n")


def test_missing_decoding_and_unreadable_result(experiment, tmp_path):
    with pytest.raises(FileNotFoundError, match="stage 12 makes it"):
        score_folder(tmp_path / "dump" / "raw" / "test", tmp_path, {}, False, str)
    (experiment / "decode_a" / "test" / "score_wer" / "result.txt").write_text("nothing")
    with pytest.raises(ValueError, match="has no line '| Sum/Avg'"):
        collect(experiment)
