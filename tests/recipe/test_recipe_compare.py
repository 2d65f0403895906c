"""The comparison of models: intervals against the normal approximation, tables from a tree made by hand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from tones import REPOSITORY

from espnet_mega_plugin.recipe.compare import MODEL, Errors, bootstrap, main, page
from espnet_mega_plugin.recipe.kaldi_dir import write_table

LOG = """\
[vm] 2026-11-22 15:00:00,123 (trainer:336) INFO: 1/2epoch started
[vm] 2026-11-22 15:01:00,000 (trainer:394) INFO: 1epoch results: [train] loss=3, [valid] loss=2
[vm] 2026-11-22 15:01:00,100 (trainer:324) INFO: 2/2epoch started. Estimated time to finish: 1 minute
[vm] 2026-11-22 17:00:00,000 (trainer:336) INFO: 2/2epoch started
[vm] 2026-11-22 17:02:00,000 (trainer:394) INFO: 2epoch results: [train] loss=2, [valid] loss=1
# peak memory of a process: 812 MB
"""


@pytest.mark.parametrize("seeds", [1, 3])
def test_interval_is_the_normal_approximation_for_many_utterances(seed, seeds):
    draw = numpy.random.default_rng(seed)
    words = draw.integers(3, 9, 2000)
    errors = numpy.repeat(draw.binomial(words, 0.1)[None], seeds, 0)  # the same for all: the seeds add no spread
    found = bootstrap(Errors(errors, words))
    rate = errors[0].sum() / words.sum()
    spread = numpy.sqrt(((errors[0] - rate * words) ** 2).sum()) / words.sum()  # delta method of a ratio
    numpy.testing.assert_allclose(found, [100 * (rate - 1.96 * spread), 100 * (rate + 1.96 * spread)], atol=0.06)


def test_a_difference_is_of_the_same_utterances(seed):
    draw = numpy.random.default_rng(seed)
    words = draw.integers(3, 9, 300)
    errors = draw.binomial(words, 0.2)
    ours, base = Errors(errors[None] + 0, words), Errors(errors[None], words)
    assert bootstrap(ours, base) == (0.0, 0.0)
    one_more = Errors(errors[None] + 1, words)
    low, high = bootstrap(one_more, base)
    assert low < 100 * len(words) / words.sum() < high
    assert high - low < 1.5  # by themselves some 5
    with pytest.raises(ValueError, match="same utterances"):
        bootstrap(ours, Errors(errors[None, 1:], words[1:]))


def test_seeds_that_differ_widen_the_interval():
    words = numpy.full(400, 5)
    alike = Errors(numpy.full((2, 400), 1), words)
    apart = Errors(numpy.stack([numpy.zeros(400, int), numpy.full(400, 2)]), words)
    assert alike.rate() == apart.rate() == pytest.approx(20)
    assert bootstrap(alike) == pytest.approx((20, 20))
    assert bootstrap(apart) == pytest.approx((0, 40))
    assert apart.rates() == [0, 40]


@pytest.fixture
def tree(tmp_path):
    """Two sets; mega with two seeds, rnn with one, which was not decoded with tsd."""
    texts = {f"u{i}": "one two three four" for i in range(10)}
    for name in ("test", "other"):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_table(tmp_path / "data" / name / "text", texts)
    for model, size, decoded in (("mega_seed0", 3, "one two three"), ("mega_seed1", 3, "one two three four")) + (
        ("rnn_seed0", 1000, "one two"),
    ):
        exp = tmp_path / f"asr_{model}"
        for tag in ("decode_maes", "decode_tsd")[: 1 if "rnn" in model else 2]:
            for name in ("test", "other"):
                folder = exp / f"{tag}_asr_model_valid.loss.ave" / name
                folder.mkdir(parents=True)
                write_table(folder / "text", dict.fromkeys(texts, decoded))
                folder.joinpath("rtf.txt").write_text("RTF 0.5: 5.00 s for 10.00 s of audio, 10 utterances, 1 jobs\n")
        torch.save({"decoder.a": torch.zeros(size, 1000), "b": torch.zeros(1000)}, exp / "valid.loss.ave.pth")
        (exp / "train.log").write_text(LOG)
    (tmp_path / "asr_rnn_seed1").mkdir()  # not trained: no parameters
    return tmp_path


def test_page(tree):
    text = page(tree, tree / "data", ["test", "other"], "mega")
    tables = dict(re.findall(r"## (.*?)\n\n((?:\|.*\n)+)", text))
    assert list(tables) == ["Cost", "decode_maes", "decode_tsd", "Real-time factor, first seed"]
    rows = {
        name: [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        for name, table in tables.items()
    }
    # three minutes: what lay between an interruption and going on does not count
    assert rows["Cost"] == [["mega", "3 k", "4 k", "3.0", "812"], ["rnn", "1,000 k", "1,001 k", "3.0", "812"]]
    mega, rnn = rows["decode_maes"]
    assert mega == ["mega", "12.50 [0.00, 25.00]", "25.00 0.00", "–", "12.50 [0.00, 25.00]", "25.00 0.00", "–"]
    assert rnn[:4] == ["rnn", "50.00 [50.00, 50.00]", "50.00", "+37.50 [+25.00, +50.00]"]
    assert [row[0] for row in rows["decode_tsd"]] == ["mega"]
    assert rows["Real-time factor, first seed"] == [["mega", "0.5000", "0.5000"], ["rnn", "0.5000", "–"]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"--against": "lstm"}, "--against lstm: expected one of mega, rnn"),
        ({"--expdir": "data"}, "has no trained models"),
        ({"--test_sets": "nothing"}, "nothing/text"),
    ],
)
def test_refusals(tree, monkeypatch, options, says):
    monkeypatch.chdir(tree)
    given = {"--expdir": ".", "--data_dir": "data", "--test_sets": "test", "--against": "mega", "--out": "t.md"}
    arguments = [word for pair in {**given, **options}.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    with pytest.raises(SystemExit, match=re.escape(says)):
        main()
    assert not (tree / "t.md").exists()


def test_command(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    monkeypatch.setattr(
        "sys.argv", "compare --expdir . --data_dir data --test_sets test --against rnn --out t.md".split()
    )
    main()
    assert capsys.readouterr().out == "t.md\n"
    assert "-37.50" in (tree / "t.md").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--only", "mega_seed9"], "compare.sh: no experiment matches mega_seed9"),
        (["--seeds", "3"], "compare.sh: unknown option --seeds, expected --train_jobs or --only"),
        (["--only"], "--only needs a regular expression"),
    ],
)
def test_script_refuses(tmp_path, options, says):
    local = REPOSITORY / "egs" / "spoken_numbers" / "asr1" / "local"
    script = shutil.copytree(local, tmp_path / "local") / "compare.sh"
    done = subprocess.run(["bash", script, *options], capture_output=True, text=True)
    assert done.returncode in (1, 2) and says in done.stderr
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize(
    ("only", "tables", "against"),
    [
        ("mega_seed0|rnn_seed0", ["exp/compare", "exp/compare/alone"], "mega"),
        ("rnn_seed0", ["exp/compare", "exp/compare/alone"], "rnn"),
        ("mega_seed1", ["exp/compare"], "mega"),  # trained by itself is the first seed alone
    ],
)
def test_script_compares_with_what_is_there(tree, only, tables, against):
    """All has been trained and decoded: what is left to do are the tables."""
    recipe = tree / "asr1"
    shutil.copytree(REPOSITORY / "egs" / "spoken_numbers" / "asr1" / "local", recipe / "local")
    shutil.copytree(tree / "data", recipe / "dump" / "raw")
    shutil.copytree(tree / "data" / "other", recipe / "dump" / "raw" / "test_unseen")
    for name in only.split("|"):
        for folder in tables if name.endswith("0") else tables[:1]:
            exp = shutil.copytree(tree / f"asr_{name}", recipe / folder / f"asr_{name}")
            for decoding in exp.glob("decode_*"):
                shutil.copytree(decoding / "other", decoding / "test_unseen")
            for batched in ("true", "false"):
                (exp / f"decoded_batched_{batched}").touch()
    (recipe / "exp" / "compare" / "asr_mega_seed2").mkdir()  # begun
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", recipe / "local" / "compare.sh", "--only", f"({only})"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{folder}/README.md" for folder in tables]
    for folder in tables:
        table = (recipe / folder / "README.md").read_text().partition("## decode_maes")[2]
        assert f"less {against} |" in table


def test_experiments_of_the_script_are_those_of_the_configurations():
    """Each is a name with a seed, an existing YAML, and options of ESPnet's training."""
    recipe = REPOSITORY / "egs" / "spoken_numbers" / "asr1"
    script = (recipe / "local" / "compare.sh").read_text()
    function = script[script.index("experiments() {") : script.index("\n}\n") + 3]
    lines = subprocess.run(["bash", "-c", f"{function}experiments"], capture_output=True, text=True).stdout.splitlines()
    names = [line.split("|")[0] for line in lines]
    assert len(set(names)) == len(names) >= 20
    for name, config, options in (line.split("|") for line in lines):
        seed = MODEL.fullmatch(f"asr_{name}")[2]
        assert f"--seed {seed}" in options and (recipe / config).is_file()
