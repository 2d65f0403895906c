"""A whole recipe, data to scores, on eight utterances of tones: an interrupted training resumes, the loss falls, and
the training set is known by heart under every search. ESPnet's unmodified commands do the work."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tones import corpus, recipe

from espnet_mega_plugin.recipe.kaldi_dir import read_table

pytestmark = pytest.mark.slow

SENTENCES = ["A BE", "CO A", "DI EK CO", "FU", "BE FU A", "EK DI", "CO BE EK", "FU DI"]
EPOCHS = 160

CONFIG = {
    "decoder": "mega",
    "decoder_conf": {
        "block_size": 16, "linear_size": 32, "qk_size": 8, "v_size": 16, "num_heads": 1, "num_blocks": 1,
        "max_positions": 32, "rel_pos_bias_type": "rotary",
    },
    "encoder_conf": {
        "input_conf": {"vgg_like": False, "conv_size": 8, "subsampling_factor": 4},
        "body_conf": [{"block_type": "conformer", "hidden_size": 32, "linear_size": 64, "heads": 2, "conv_mod_kernel_size": 7}],
    },
    "joint_network_conf": {"joint_space_size": 32},
    "model_conf": {"auxiliary_ctc_weight": 0.3},
    "optim": "adam", "optim_conf": {"lr": 0.005}, "scheduler": "warmuplr", "scheduler_conf": {"warmup_steps": 60},
    "max_epoch": EPOCHS, "batch_type": "unsorted", "batch_size": 4, "num_workers": 0, "keep_nbest_models": 2,
    "best_model_criterion": [["valid", "loss", "min"]], "num_att_plot": 0, "log_interval": 1,
    "use_tensorboard": False, "use_matplotlib": False,
}  # fmt: skip

DATA = """#!/usr/bin/env bash
cp -r ../source data
"""

DEFAULTS = """--lang en --train_set train --valid_set dev --test_sets 'train test' --token_type char --nj 2 \\
    --inference_nj 2 --asr_config conf/tiny.yaml --inference_config 'conf/decode_tsd.yaml,conf/decode_maes.yaml'"""

EXP = "exp/asr_tiny_raw_en_char"


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = [str(folder / "run.sh"), *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **output)


def run(folder: Path, *arguments: str) -> str:
    process = start(folder, *arguments)
    output = process.communicate(timeout=600)[0]
    print(output)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    folder = recipe(root, DEFAULTS)
    corpus(folder.parent / "source" / "train", SENTENCES)
    corpus(folder.parent / "source" / "dev", SENTENCES[::3], prefix="dev")
    corpus(folder.parent / "source" / "test", SENTENCES[:2] + ["A BE"], prefix="test", rate=8000)
    # stage 3 is to cope with paths of the recipe's folder and with a path from elsewhere; these are from elsewhere
    (folder / "local").mkdir()
    (folder / "local" / "data.sh").write_text(DATA)
    (folder / "local" / "data.sh").chmod(0o755)
    (folder / "conf" / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture(scope="module")
def prepared(root):
    return root, run(root, "--stop_stage", "10")


@pytest.fixture(scope="module")
def trained(prepared):
    """Stage 11, killed in its middle and called again."""
    folder, _ = prepared
    log = folder / EXP / "train.log"
    process = start(folder, "--stage", "11", "--stop_stage", "11")
    give_up = time.monotonic() + 300
    # epochs of this model take less time than the watcher's turn, so a copy of a whole checkpoint may be late
    while not (log.exists() and "3epoch results" in log.read_text() and list(log.parent.glob("checkpoint.epoch*"))):
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed_after = log.read_text()
    checkpoint = folder / EXP / "checkpoint.pth"
    # Where the kill fell is up to chance; the worst is in the midst of writing
    checkpoint.write_bytes(checkpoint.read_bytes()[:10_000])
    return folder, killed_after, run(folder, "--stage", "11", "--stop_stage", "11")


@pytest.fixture(scope="module")
def scored(trained):
    folder, *_ = trained
    return folder, run(folder, "--stage", "12")


def test_data_stages(prepared):
    folder, output = prepared
    for name, sentences in (("train", SENTENCES), ("dev", SENTENCES[::3])):
        assert sorted(read_table(folder / "dump/raw" / name / "text").values()) == sorted(sentences)
    assert all(f"Stage {n}: done in" in output for n in (1, 3, 4, 5, 10)) and "Stage 2" not in output
    assert " WARNING" not in output and "INFO" not in output  # ESPnet's own words stay in the logs


def test_character_list_is_espnets(prepared):
    """The most frequent first, as tokenize_text orders them, between the symbols ESPnet reserves."""
    folder, _ = prepared
    tokens = (folder / "data/en_token_list/char/tokens.txt").read_text().split()
    text = read_table(folder / "dump/raw/train/text")
    counts = Counter("<space>" if c == " " else c for sentence in text.values() for c in sentence)
    assert tokens[:2] == ["<blank>", "<unk>"] and tokens[-1] == "<sos/eos>"
    assert sorted(tokens[2:-1]) == sorted(counts)
    assert [counts[token] for token in tokens[2:-1]] == sorted(counts.values(), reverse=True)


def test_statistics_cover_every_utterance(prepared):
    folder, _ = prepared
    stats = folder / "exp/asr_stats_raw_en_char"
    samples = read_table(folder / "dump/raw/train/utt2num_samples")
    assert read_table(stats / "train/speech_shape") == samples
    text, vocabulary = read_table(folder / "dump/raw/train/text"), len(set("".join(SENTENCES))) + 3
    shapes = {utt: f"{len(sentence)},{vocabulary}" for utt, sentence in text.items()}
    assert read_table(stats / "train/text_shape.char") == shapes
    assert (stats / "train/feats_stats.npz").exists()


def test_an_interrupted_training_resumes(trained):
    folder, killed_after, output = trained
    log = (folder / EXP / "train.log").read_text()
    assert log.startswith(killed_after) and "The training was resumed using" in log
    epochs = [int(n) for n in re.findall(r"INFO: (\d+)epoch results", log)]
    before = len(re.findall(r"INFO: \d+epoch results", killed_after))
    first = int(re.search(r"stopped while it wrote its checkpoint; going on after epoch (\d+)", output).group(1)) + 1
    assert 1 < first <= before + 1
    assert epochs == [*range(1, before + 1), *range(first, EPOCHS + 1)]
    assert [int(n) for n in re.findall(r"^epoch +(\d+)/", output, re.MULTILINE)] == list(range(first, EPOCHS + 1))
    assert not list((folder / EXP).glob("*.backup"))


def test_the_loss_falls(trained):
    folder, *_ = trained
    log = (folder / EXP / "train.log").read_text()
    losses = [float(x) for x in re.findall(r"epoch results: \[train\] .*?\bloss=([^,]+)", log)]
    assert losses[-1] < 0.1 * losses[0], losses


def test_training_again_changes_nothing(trained):
    folder, *_ = trained
    before = (folder / EXP / "valid.loss.ave.pth").read_bytes()
    assert "the last epoch was trained already" in run(folder, "--stage", "11", "--stop_stage", "11")
    assert (folder / EXP / "valid.loss.ave.pth").read_bytes() == before


def test_another_configuration_does_not_resume(trained):
    folder, *_ = trained
    (folder / "conf" / "other.yaml").write_text(yaml.safe_dump({**CONFIG, "decoder": "rnn", "decoder_conf": {}}))
    process = start(folder, "--stage", "11", "--asr_config", "conf/other.yaml", "--asr_exp", EXP)
    output = process.communicate()[0]
    assert process.returncode == 1 and "decoder was mega, is now rnn" in output


def test_the_training_set_is_known_by_heart(scored):
    folder, output = scored
    text = read_table(folder / "dump/raw/train/text")
    for config in ("decode_tsd", "decode_maes"):
        decoded = folder / EXP / f"{config}_asr_model_valid.loss.ave" / "train"
        assert read_table(decoded / "text", empty_values=True) == text
        assert list(read_table(decoded / "score")) == list(text)
        assert "| Sum/Avg |      8      18 |  100.0    0.0    0.0    0.0    0.0    0.0 |" in (
            (decoded / "score_wer" / "result.txt").read_text()
        )
        assert re.search(rf"^{config}_asr_model_valid.loss.ave .* 0.0 \(0.0/0.0/0.0\)$", output, re.MULTILINE)
    page = (folder / "RESULTS.md").read_text()
    assert "|decode_maes_asr_model_valid.loss.ave/train|8|18|100.0|" in page
    assert page.split("\n## ")[2:] == (folder / EXP / "RESULTS.md").read_text().split("\n## ")[2:]


def test_a_new_process_for_each_job_gives_the_same(scored):
    folder, _ = scored
    options = ["--stage", "12", "--inference_config", "conf/decode_maes.yaml", "--inference_tag", "plain"]
    run(folder, *options, "--decode_in_one_process", "false", "--test_sets", "train")
    for name in ("text", "token", "token_int", "score"):
        ours = (folder / EXP / "decode_maes_asr_model_valid.loss.ave" / "train" / name).read_bytes()
        assert (folder / EXP / "plain" / "train" / name).read_bytes() == ours
    log = (folder / EXP / "plain" / "train" / "logdir" / "asr_inference.1.log").read_text()
    command = log.splitlines()[0]
    assert command.startswith("# python3 -m espnet_mega_plugin.run -m espnet2.bin.asr_transducer_inference --ngpu 0")


def test_nothing_is_written_outside_of_the_recipe(scored):
    folder, _ = scored
    assert {path.name for path in folder.parent.iterdir()} == {"asr1", "source"}
    assert {path.name for path in folder.parent.parent.iterdir()} == {"TEMPLATE", "tones"}
