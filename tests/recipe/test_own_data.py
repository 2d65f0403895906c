"""One's own data: wav.scp and text are enough, what is given stays as it is, a fault has its file and line."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml
from espnet2.main_funcs.pack_funcs import unpack
from small_form import PLAIN, TINY, decoded, run, run_together, same_words, scored, stages_done
from tones import REPOSITORY, spoken

from espnet_mega_plugin.recipe.audio import recordings
from espnet_mega_plugin.recipe.kaldi_dir import read_data_dir, read_table
from espnet_mega_plugin.recipe.own_data import complete

SENTENCES = {"z1": "A BE", "b2": "CO A DI", "a10": "FU", "a9": "EK CO"}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A set as somebody may hand it in: two tables, unsorted, with relative paths."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "train", SENTENCES)
    return Path("data/train")


def write(folder: Path, sentences: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, sentence in sentences.items():
        soundfile.write(folder / f"{name}.wav", spoken(sentence), 16000)
    place = Path(*folder.parts[-2:])
    (folder / "wav.scp").write_text("".join(f"{name} {place}/{name}.wav\n" for name in sentences))
    (folder / "text").write_text("".join(f"{name} {sentence}\n" for name, sentence in reversed(sentences.items())))


def test_two_tables_are_enough_and_stay_as_they_are(corpus):
    given = {name: (corpus / name).read_bytes() for name in ("wav.scp", "text")}
    data = complete(corpus)
    assert {name: (corpus / name).read_bytes() for name in given} == given
    assert data.text == SENTENCES and data.speaker == {name: name for name in SENTENCES}
    assert list(read_table(corpus / "utt2spk")) == ["a10", "a9", "b2", "z1"]
    found, tables = recordings(corpus)  # what stages 2 and 3 read
    assert len(found) == 4 and tables.text == SENTENCES


def test_speakers_that_are_given_are_kept_and_those_that_were_made_follow_the_utterances(corpus):
    complete(corpus)
    with (corpus / "text").open("a") as text, (corpus / "wav.scp").open("a") as scp:
        text.write("new A\n")
        scp.write("new data/train/z1.wav\n")
    assert complete(corpus).speaker["new"] == "new"
    (corpus / "utt2spk").write_text("z1 eve\nb2 eve\na10 bob\na9 bob\nnew bob\n")
    assert complete(corpus).by_speaker() == {"bob": ["a10", "a9", "new"], "eve": ["b2", "z1"]}
    assert (corpus / "utt2spk").read_text().split() == "a10 bob a9 bob b2 eve new bob z1 eve".split()
    assert (corpus / "spk2utt").read_text() == "bob a10 a9 new\neve b2 z1\n"


def test_segments_and_commands_are_taken(corpus):
    (corpus / "wav.scp").write_text("tape data/train/b2.wav\nother cat data/train/z1.wav |\n")
    (corpus / "segments").write_text("s2 tape 0.35 0.65\ns1 tape 0.0 0.35\ns3 other 0 0.6\n")
    (corpus / "text").write_text("s1 CO\ns2 A\ns3 A BE\n")
    assert complete(corpus).wav == {
        "s1": "data/train/b2.wav", "s2": "data/train/b2.wav", "s3": "cat data/train/z1.wav |",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("text", None, "data/train/text is missing: a set consists of wav.scp with lines 'utterance path', text"),
        ("wav.scp", None, "data/train/wav.scp is missing"),
        ("text", "z1 A\nb2\na10 A\na9 A\n", "data/train/text, line 2: no words; write them, or remove 'b2'"),
        ("text", "z1 A\n\nb2 A\n", "data/train/text, line 2: expected 'key value'"),
        ("text", "z1 A\nz1 B\n", "data/train/text, line 2: 'z1' appears a second time"),
        ("text", "z1 A\na10 A\na9 A\n", "data/train/wav.scp, line 2: 'b2' has no line in data/train/text; 1 such"),
        ("text", "z1 A\nb2 A\na10 A\na9 A\n c7 A\n", "data/train/text, line 5: 'c7' has no line in data/train/wav.scp"),
        ("wav.scp", "z1 data/train/z1.wav\nb2 gone.wav\n", "wav.scp, line 2: no such recording: gone.wav .looked for from"),
        ("wav.scp", "z1 data/train/z1.wav\nb2\n", "wav.scp, line 2: expected 'key value', got 'b2'"),
        ("utt2spk", "z1 eve\nb2 eve\na10 bob\n", "text, line 1: 'a9' has no line in data/train/utt2spk; 1 such"),
        ("utt2spk", "z1 eve\nb2\n", "utt2spk, line 2: expected 'key value'"),
        ("segments", "z1 z1 0 0.3\nb2 b2 0.3\n", "segments, line 2: expected 'utterance recording start end' in seconds"),
        ("segments", "z1 z1 0 0.3\nb2 b2 1 1\n", "segments, line 2: expected .*got 'b2 b2 1 1'"),
        ("segments", "z1 z1 0 0.3\nb2 tape 0 1\n", "segments, line 2: cut from 'tape', which wav.scp does not have"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_file_and_line(corpus, table, content, message):
    (corpus / table).write_text(content) if content is not None else (corpus / table).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        complete(corpus)
    assert not (corpus / "spk2utt").exists()


def test_the_command_names_each_set_once_and_ends_without_a_traceback(corpus):
    command = [sys.executable, "-m", "espnet_mega_plugin.recipe.own_data", "data/train", "data/train"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "data/train: 4 utterances, 8 words, 4 speakers\n")
    (corpus / "text").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: data/train/text is missing")


@pytest.fixture
def mine(tmp_path):
    """egs/mine/asr1, set up as the head of TEMPLATE's run.sh says."""
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    template = shutil.copytree(REPOSITORY / "egs/TEMPLATE", tmp_path / "egs/TEMPLATE", symlinks=True)
    head = (template / "asr1" / "run.sh").read_text().splitlines()
    commands = [line.lstrip("# ") for line in head if line.startswith("#   mkdir ") or line.startswith("#   cp ")]
    assert len(commands) == 2
    commands[0] = commands[0].split("   ")[0]
    subprocess.run(["bash", "-ec", "\n".join(commands)], cwd=tmp_path, check=True)
    folder = tmp_path / "egs/mine/asr1"
    for name, part in {"train": 4, "valid": 2, "test": 1}.items():
        write(folder / "data" / name, {f"{name}{i}": line for i, line in enumerate(list(SENTENCES.values())[:part])})
    return folder


def test_the_recipe_goes_from_two_tables_to_what_training_reads(mine):
    output = run(mine, "--nj", "1", "--nbpe", "14", "--stop_stage", "5")
    assert stages_done(output) == [1, 3, 4, 5]
    assert "data/train: 4 utterances, 8 words, 4 speakers\n" in output
    made = read_data_dir(mine / "dump/raw/train")
    assert made.text == {f"train{i}": sentence for i, sentence in enumerate(SENTENCES.values())}
    assert len((mine / "data/token_list/bpe_unigram14/tokens.txt").read_text().split()) == 14
    assert (mine / "conf/train_mega.yaml").is_file()  # what stage 10 reads next


def test_a_fault_stops_the_recipe_at_its_first_stage(mine):
    (mine / "data/valid/text").write_text("valid0 A\nvalid1\n")
    output = run(mine, "--stop_stage", "3", status=1)
    assert "error: data/valid/text, line 2: no words; write them, or remove 'valid1' everywhere\n" in output
    assert not (mine / "dump").exists()


@pytest.mark.slow
def test_a_pack_decodes_the_same_words_in_another_recipe(mine, tmp_path):
    """From two tables to a pack; it is decoded, in batches, where nothing is but the pack and the test set."""
    small = [*shlex.split(TINY), "--asr_exp", "exp/small"]
    assert stages_done(run(mine, *small, "--stop_stage", "11")) == [1, 3, 4, 5, 10, 11]
    packing = ["--skip_packing", "false", "--stage", "14", "--stop_stage", "14"]
    assert stages_done(run(mine, *small, *packing)) == [14]

    theirs = mine.parents[1] / "theirs" / "asr1"
    shutil.copytree(mine, theirs, symlinks=True, ignore=shutil.ignore_patterns("data", "dump", "exp"))
    shutil.copytree(mine / "dump/raw/test", theirs / "dump/raw/test")
    scp = theirs / "dump/raw/test/wav.scp"
    assert str(mine) not in scp.read_text()  # paths from the recipe's folder
    files = unpack(mine / "exp/small/small_valid.loss.ave.zip", theirs / "downloads")
    exp = Path(files["asr_train_config"]).parent
    config = (exp / "config.yaml").read_text()
    assert "requires" in yaml.safe_load(config) and str(mine) not in config

    decoding = ["--stage", "12", "--stop_stage", "12"]
    there = [*small, *decoding, "--asr_exp", str(exp), "--inference_asr_model", Path(files["asr_model_file"]).name]
    run_together((mine, [*small, *decoding]), (theirs, [*there, "--inference_tag", "theirs", "--batched", "true"]))
    same_words(decoded(theirs, exp, "theirs", "test"), decoded(mine, mine / "exp/small", PLAIN, "test"))
    run(mine, *small, "--stage", "13", "--stop_stage", "13")
    assert scored(mine / "exp/small", PLAIN, "test") == (1, 2)
