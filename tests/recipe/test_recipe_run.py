"""A whole recipe, data to scores, on eight utterances of tones: an interrupted training resumes, the loss falls, and
the training set is known by heart under every search; language models, packs, two machines. ESPnet's unmodified
commands do the work."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from slurm_stand_in import calls, install
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
    assert [int(n) for n in re.findall(r"^epoch +(\d+)/\d+ +train loss", output, re.MULTILINE)] == list(
        range(first, EPOCHS + 1)
    )
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


# ----------------------------------------------------------------------------------------------------------------------

LM = {
    "lm": "seq_rnn", "lm_conf": {"rnn_type": "lstm", "unit": 16, "nlayers": 1}, "optim": "adam", "optim_conf": {"lr": 0.01},
    "max_epoch": 6, "batch_type": "unsorted", "batch_size": 2, "num_workers": 0, "keep_nbest_models": 1, "log_interval": 1,
    "best_model_criterion": [["valid", "loss", "min"]], "use_tensorboard": False, "use_matplotlib": False,
}  # fmt: skip
WITH_LM = ["--use_lm", "true", "--lm_config", "conf/lm.yaml"]
LM_EXP, LM_STATS = "exp/lm_lm_en_char", "exp/lm_stats_en_char"


@pytest.fixture(scope="module")
def language_model(prepared):
    """Stages 6 to 9, the training text in two parts."""
    folder, _ = prepared
    (folder / "conf" / "lm.yaml").write_text(yaml.safe_dump(LM))
    options = ["--num_splits_lm", "2", "--use_ngram", "true", "--ngram_num", "2"]
    return folder, run(folder, *WITH_LM, *options, "--stage", "6", "--stop_stage", "9")


def test_a_language_model_is_trained(language_model):
    folder, output = language_model
    assert all(f"Stage {n}: done in" in output for n in (6, 7, 8, 9))
    text = read_table(folder / "dump/raw/train/text")
    vocabulary = len(set("".join(SENTENCES))) + 3
    shapes = read_table(folder / LM_STATS / "train" / "text_shape.char")
    assert shapes == {utt: f"{len(sentence)},{vocabulary}" for utt, sentence in text.items()}
    losses = [float(x) for x in re.findall(r"epoch +\d+/6 +train loss +(\S+)", output)]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_perplexity_is_that_of_its_utterances(language_model):
    folder, output = language_model
    results = folder / LM_EXP / "perplexity_test"
    each, tokens = (read_table(results / name) for name in ("utt2ppl", "utt2ntokens"))
    assert {utt: int(n) - 1 for utt, n in tokens.items()} == {
        utt: len(sentence) for utt, sentence in read_table(folder / "dump/raw/train/text").items()
    }
    nats = sum(int(n) * math.log(float(each[utt])) for utt, n in tokens.items())
    total = float((results / "ppl").read_text())
    assert total == pytest.approx(math.exp(nats / sum(map(int, tokens.values()))), rel=1e-4)
    assert f"perplexity of dump/raw/train/text: {(results / 'ppl').read_text()}" in output
    assert 1 < total < len(set("".join(SENTENCES))) + 3  # less than knowing nothing gives


def test_the_ngram_counts_the_recognisers_tokens(language_model):
    folder, output = language_model
    arpa = (folder / "exp" / "ngram" / "2gram.arpa").read_text()
    tokens = (folder / "data/en_token_list/char/tokens.txt").read_text().split()
    unigrams = re.search(r"\\1-grams:\n(.*?)\n\n", arpa, re.S).group(1).split("\n")
    assert {line.split("\t")[1] for line in unigrams} == {*tokens[2:-1], "<unk>", "<s>", "</s>"}
    assert re.search(r"perplexity of dump/raw/dev/text: \d", output)


def test_a_language_model_without_weight_changes_nothing(scored, language_model, tmp_path):
    """On a cluster, where every job is submitted, as on this machine."""
    folder, _ = scored
    install(tmp_path / "bin")
    options = [
        "--test_sets",
        "train",
        "--inference_config",
        "conf/decode_maes.yaml",
        "--stage",
        "12",
        "--stop_stage",
        "12",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("cmd_backend", "slurm")
        run(folder, *WITH_LM, *options, "--inference_args", "--lm_weight 0.0", "--inference_nj", "1")
    tag = "decode_maes_lm_weight0.0_lm_lm_lm_en_char_valid.loss.ave_asr_model_valid.loss.ave"
    for name in ("text", "token_int", "score"):
        plain = read_table(folder / EXP / "decode_maes_asr_model_valid.loss.ave" / "train" / name)
        assert read_table(folder / EXP / tag / "train" / name) == plain
    logs = folder / EXP / tag / "train" / "logdir"
    assert f"--lm_file {LM_EXP}/valid.loss.ave.pth" in (logs / "asr_inference.1.log").read_text()
    scripts = [words[-1] for words in calls(tmp_path / "bin", "sbatch")]
    assert scripts == [str(logs.relative_to(folder) / "q" / "asr_inference.1.sh")]


def test_speed_is_reported(scored):
    folder, _ = scored
    table = (folder / EXP / "RESULTS.md").read_text().split("### RTF")[1]
    figures = re.search(r"\n\|decode_maes_asr_model\S+/train\|(.*)\|\n", table)
    timed, audio, seconds, jobs, factor = map(float, figures.group(1).split("|"))
    samples = read_table(folder / "dump/raw/train/utt2num_samples")
    assert (timed, jobs) == (len(SENTENCES) - 2, 2)  # but the first of each job
    assert 0 < audio < sum(map(int, samples.values())) / 16000
    assert factor == pytest.approx(seconds / audio, abs=0.1)


UNPACKED = """
import json, sys, soundfile
from espnet2.bin.asr_transducer_inference import Speech2Text
options = {"beam_search_config": json.loads(sys.argv[2]), "lm_weight": 0.0}
try:
    import espnet_model_zoo
    model = Speech2Text.from_pretrained(sys.argv[1], **options)
except ImportError:
    from espnet2.main_funcs.pack_funcs import unpack
    model = Speech2Text(**unpack(sys.argv[1], "unpacked"), **options)
for path in sys.argv[3:]:
    hypotheses = model(soundfile.read(path, dtype="float32")[0])
    print("HEARD", model.hypotheses_to_results(hypotheses)[0][0])
"""


@pytest.fixture(scope="module")
def pack(scored, language_model):
    folder, _ = scored
    options = ["--stage", "14", "--skip_packing", "false", "--skip_upload_hf", "false", "--upload_dry_run", "true"]
    return folder, run(folder, *WITH_LM, *options, "--hf_repo", "someone/tones")


def elsewhere(folder: Path, **environment) -> subprocess.CompletedProcess:
    """Decode the training set with the pack alone, in a folder that has nothing else."""
    place = folder.parents[2] / "elsewhere"
    place.mkdir(exist_ok=True)
    archive = place / "model.zip"
    archive.write_bytes((folder / EXP / f"{Path(EXP).name}_valid.loss.ave.zip").read_bytes())
    audio = [str(folder / path) for path in read_table(folder / "dump/raw/train/wav.scp").values()]
    search = yaml.safe_load((folder / "conf" / "decode_maes.yaml").read_text())["beam_search_config"]
    command = [sys.executable, "-c", UNPACKED, str(archive), json.dumps(search), *audio]
    where = {**os.environ, "HOME": str(place), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=place, env=where, capture_output=True, text=True)


def test_a_pack_decodes_the_same_words_elsewhere(pack):
    folder, _ = pack
    result = elsewhere(folder)
    heard = [line.removeprefix("HEARD").strip() for line in result.stdout.splitlines() if line.startswith("HEARD")]
    decoded = read_table(folder / EXP / "decode_maes_asr_model_valid.loss.ave" / "train" / "text", empty_values=True)
    assert heard == list(decoded.values()), result.stderr[-3000:]


def test_espnet_without_the_plugin_refuses_the_pack(pack):
    folder, _ = pack
    result = elsewhere(folder, ESPNET_MEGA_PLUGIN="0")
    assert result.returncode and "HEARD" not in result.stdout
    assert re.search(r"TypeError: .*MEGADecoder.* got an unexpected keyword argument", result.stderr)


def test_the_folder_for_a_hub(pack):
    folder, output = pack
    hub = folder / "exp" / "hf_someone_tones"
    card = (hub / "README.md").read_text()
    assert "a dry run: nothing was sent" in output and "language: en" in card and "### WER" in card
    meta = yaml.safe_load((hub / "meta.yaml").read_text())
    assert all((hub / name).exists() for name in (*meta["files"].values(), *meta["yaml_files"].values()))
    assert set(meta["files"]) == {"asr_model_file", "lm_file"} and "requires" in meta


# ----------------------------------------------------------------------------------------------------------------------

EVEN = {
    **CONFIG,
    # no conformer: its batch normalisation makes a step depend on how the batch is dealt out
    "encoder_conf": {
        "input_conf": {"vgg_like": False, "conv_size": 8, "subsampling_factor": 4},
        "body_conf": [{"block_type": "branchformer", "hidden_size": 16, "linear_size": 16, "heads": 2, "conv_mod_kernel_size": 3}],
    },
    "optim": "sgd", "optim_conf": {"lr": 0.1}, "grad_clip": 1e9, "scheduler": None, "max_epoch": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def even(prepared):
    """Stage 11 on four sentences of the same length, so that no convolution sees padding; options for it."""
    folder, _ = prepared
    text = read_table(folder / "dump/raw/train/text")
    chosen = [utt for utt, sentence in text.items() if len(sentence.split()) == 2]
    assert len(chosen) == 4
    for source, target in (
        ("dump/raw/train/wav.scp", "dump/raw/even/wav.scp"),
        ("dump/raw/train/text", "dump/raw/even/text"),
        *((f"exp/asr_stats_raw_en_char/train/{name}", f"exp/even_stats/{part}/{name}")
          for name in ("speech_shape", "text_shape.char") for part in ("train", "valid")),
    ):  # fmt: skip
        table = read_table(folder / source)
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_text("".join(f"{utt} {table[utt]}\n" for utt in chosen))
    stats = (folder / "exp/asr_stats_raw_en_char/train/feats_stats.npz").read_bytes()
    (folder / "exp/even_stats/train/feats_stats.npz").write_bytes(stats)
    (folder / "conf" / "even.yaml").write_text(yaml.safe_dump(EVEN))
    sets = ["--train_set", "even", "--valid_set", "even", "--asr_stats_dir", "exp/even_stats"]
    return folder, [*sets, "--asr_config", "conf/even.yaml", "--stage", "11", "--stop_stage", "11"]


@pytest.fixture(scope="module")
def alone(even):
    """Two epochs by one process; each is a step over all four utterances."""
    folder, options = even
    run(folder, *options, "--asr_exp", "exp/alone")
    return folder, options


def weights(folder: Path, name: str) -> dict:
    return torch.load(folder / "exp" / name, weights_only=True)


def test_two_machines_are_one(alone, tmp_path):
    """ESPnet's launcher and the recipe's slurm.pl: two nodes with gradients of two batches, interrupted after an epoch."""
    folder, options = alone
    install(tmp_path / "bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("cmd_backend", "slurm")
        cluster = ["--num_nodes", "2", "--asr_exp", "exp/together"]
        for epochs in ("1", "2"):
            arguments = f"--batch_size 2 --accum_grad 2 --max_epoch {epochs}"
            output = run(folder, *options, *cluster, "--asr_args", arguments)
            assert re.search(rf"^epoch +{epochs}/{epochs} +train loss", output, re.MULTILINE)
    for epoch in (1, 2):
        together, once = weights(folder, f"together/{epoch}epoch.pth"), weights(folder, f"alone/{epoch}epoch.pth")
        torch.testing.assert_close(together, once, rtol=1e-4, atol=1e-5)
    assert (folder / "exp/together/train.1.log").exists()  # the launcher moves the first log
    [first, second] = calls(tmp_path / "bin", "sbatch")
    assert first[first.index("--nodes") + 1] == "2" and second[-1] == "exp/together/q/train.sh"
    [step, _] = calls(tmp_path / "bin", "srun")
    assert "--dist_launcher slurm" in " ".join(step) and step[0] == "--export=ALL"


def test_a_training_that_starts_from_a_model_and_stands_still_is_that_model(alone):
    """--pretrained_model, with the training set in two parts."""
    folder, options = alone
    model = "exp/alone/2epoch.pth"
    arguments = "--optim_conf lr=0.0 --max_epoch 1 --batch_size 2"
    run(
        folder,
        *options,
        "--asr_exp",
        "exp/still",
        "--pretrained_model",
        model,
        "--asr_args",
        arguments,
        "--num_splits_asr",
        "2",
    )
    torch.testing.assert_close(weights(folder, "still/1epoch.pth"), weights(folder, "alone/2epoch.pth"), rtol=0, atol=0)
    resume = (folder / "exp" / "still" / "run.sh").read_text()
    assert "--pretrained_model exp/alone/2epoch.pth" in resume and '--stage 11 "$@"' in resume


def test_batches_give_the_same_and_times(scored):
    folder, _ = scored
    run(
        folder,
        "--stage",
        "12",
        "--stop_stage",
        "12",
        "--batched",
        "true",
        "--inference_config",
        "conf/decode_maes.yaml",
    )
    ours, theirs = (folder / EXP / f"decode_maes_{tag}asr_model_valid.loss.ave" / "train" for tag in ("batched_", ""))
    for name in ("text", "token", "token_int"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    found, wanted = ({k: float(v) for k, v in read_table(at / "score").items()} for at in (ours, theirs))
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    times, words = read_table(ours / "timestamps"), (ours / "ctm").read_text().split("\n")
    assert list(times) == list(wanted) and len(words) - 1 == sum(len(text.split()) for text in SENTENCES)


def test_nothing_is_written_outside_of_the_recipe(scored):
    folder, _ = scored
    assert {path.name for path in folder.parent.iterdir()} == {"asr1", "source"}
    assert {path.name for path in folder.parent.parent.iterdir()} == {"TEMPLATE", "tones"}
