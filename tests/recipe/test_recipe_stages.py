"""The engine's checks: a stage that lacks its input says so and says which stage makes it; one that is off says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tones import corpus, recipe

SETS = "--lang en --train_set train --valid_set dev --test_sets 'test'"


def stages(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(folder / "run.sh"), *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture
def folder(tmp_path):
    return recipe(tmp_path, SETS)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


DUMP = ["dump/raw/train/wav.scp", "dump/raw/dev/wav.scp", "dump/raw/test/wav.scp", "dump/raw/train/text"]
TOKENS = "data/en_token_list/bpe_unigram30/tokens.txt"
STATS = "exp/asr_stats_raw_en_bpe30"


@pytest.mark.parametrize(
    ("stage", "there", "missing", "made_by"),
    [
        (2, [], "data/train/wav.scp", 1),
        (3, [], "data/train_sp/wav.scp", 2),
        (3, ["data/train_sp/wav.scp"], "data/dev/wav.scp", 1),
        (4, [], "dump/raw/org/train_sp/wav.scp", 3),
        (5, [], "dump/raw/train_sp/text", 4),
    ],
)
def test_missing_input_with_speed_perturbation(folder, stage, there, missing, made_by):
    touch(folder, *there)
    result = stages(folder, "--speed_perturb_factors", "0.9 1.0", "--stage", str(stage))
    assert result.returncode == 2
    assert result.stderr == f"asr.sh: {missing} is missing: run stage {made_by} first (--stage {made_by})\n"


@pytest.mark.parametrize(
    ("stage", "there", "missing", "made_by"),
    [
        (3, [], "data/train/wav.scp", 1),
        (10, [], "dump/raw/train/wav.scp", 4),
        (10, DUMP, TOKENS, 5),
        (11, [], f"{STATS}/train/text_shape.bpe", 10),
        (12, [], "exp/asr_train_raw_en_bpe30/config.yaml", 11),
        (12, ["exp/asr_train_raw_en_bpe30/config.yaml"], "exp/asr_train_raw_en_bpe30/valid.loss.ave.pth", 11),
        (13, [], "exp/asr_train_raw_en_bpe30/inference_asr_model_valid.loss.ave/test/text", 12),
    ],
)
def test_missing_input(folder, stage, there, missing, made_by):
    touch(folder, *there)
    result = stages(folder, "--stage", str(stage))
    assert result.returncode == 2
    assert result.stderr == f"asr.sh: {missing} is missing: run stage {made_by} first (--stage {made_by})\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stage 1", "local/data.sh is missing"),
        ("--test_sets ''", "--test_sets is required"),
        ("--asr_task asr", "knows asr_transducer alone"),
        ("--feats_type fbank", "only raw here"),
        ("--num_nodes 2", "--num_nodes 2: cuda_cmd in cmd.sh runs on this machine alone; choose a cluster there"),
        ("--num_nodes 0", "--num_nodes 0: expected 1 or more"),
        ("--num_splits_lm 0", "--num_splits_lm 0: expected 1 or more"),
        ("--ngram_units phrase", "--ngram_units phrase: expected token or word"),
        ("--token_type phn", "expected bpe, char or word"),
        ("--audio_format mp3", "expected wav or flac"),
        ("--feats_normalize local", "expected global_mvn, utterance_mvn or none"),
        ("--score_opts -x", "only -s is known"),
        ("--skip_stages all", "expected numbers"),
        ("--stage 16", "--stage 16: the last stage is 15"),
        ("--stage 5 --stop_stage 3", "--stop_stage 3 comes before --stage 5"),
        ("--ngpu -1", "--ngpu -1: expected 0 (the CPU) or more"),
        ("--fs 16", "--fs 16: expected a sampling rate of at least 1000 Hz such as 16000 or 16k"),
        ("--fs 0.5k", "--fs 0.5k: expected"),
        ("--fs 16K", "--fs 16K: expected"),
        ("--inference_tag x --inference_config 'a.yaml b.yaml'", "names one decoding"),
        ("--use-ml true", "unknown option --use-ml; did you mean --use_lm"),
    ],
)
def test_refusals(folder, arguments, message):
    script = folder / "run.sh"
    script.write_text(script.read_text().replace('"$@"', f'{arguments} "$@"'))
    result = stages(folder)
    assert result.returncode == 2 and result.stderr.startswith("asr.sh: ") and message in result.stderr


@pytest.mark.parametrize(
    ("stage", "option"),
    [(6, "--use_lm true"), (9, "--use_ngram true"), (14, "--skip_packing false"), (15, "--skip_upload_hf false")],
)
def test_a_stage_that_is_switched_off_says_so(folder, stage, option):
    result = stages(folder, "--stage", str(stage), "--stop_stage", str(stage))
    assert result.returncode == 0 and f"Stage {stage} is left out: {option} runs it" in result.stdout


LM = "exp/lm_train_en_bpe30"
MODEL = ["exp/asr_train_raw_en_bpe30/config.yaml", "exp/asr_train_raw_en_bpe30/valid.loss.ave.pth"]


@pytest.mark.parametrize(
    ("stage", "there", "missing", "made_by"),
    [
        (6, DUMP, TOKENS, 5),
        (7, [], "exp/lm_stats_en_bpe30/train/text_shape.bpe", 6),
        (8, [], f"{LM}/config.yaml", 7),
        (8, [f"{LM}/config.yaml"], f"{LM}/valid.loss.ave.pth", 7),
        (9, [], "dump/raw/train/text", 4),
        (12, MODEL + DUMP, f"{LM}/config.yaml", 7),
        (14, MODEL, f"{LM}/config.yaml", 7),
        (15, [], "exp/asr_train_raw_en_bpe30/asr_train_raw_en_bpe30_valid.loss.ave.zip", 14),
    ],
)
def test_missing_input_of_language_models_and_packs(folder, stage, there, missing, made_by):
    touch(folder, *there)
    switches = ["--use_lm", "true", "--use_ngram", "true", "--skip_packing", "false", "--skip_upload_hf", "false"]
    result = stages(folder, *switches, "--hf_repo", "a/b", "--stage", str(stage))
    assert result.returncode == 2
    assert result.stderr == f"asr.sh: {missing} is missing: run stage {made_by} first (--stage {made_by})\n"


@pytest.mark.parametrize(
    ("stage", "option"), [(6, "--lm_train_text"), (6, "--lm_dev_text"), (8, "--lm_test_text"), (9, "--lm_train_text")]
)
def test_a_text_of_ones_own_that_is_missing_is_named(folder, stage, option):
    touch(folder, *DUMP, "dump/raw/dev/text", TOKENS, f"{LM}/config.yaml", f"{LM}/valid.loss.ave.pth")
    options = ["--use_lm", "true", "--use_ngram", "true", "--stage", str(stage), option, "corpus.txt"]
    result = stages(folder, *options)
    assert result.returncode == 2 and f"{option} corpus.txt: no such file in {folder}" in result.stderr


def test_an_upload_needs_the_name_of_a_repository(folder):
    result = stages(folder, "--stage", "15", "--skip_upload_hf", "false")
    assert result.returncode == 2 and "--hf_repo is empty: name the repository on the hub, user/name" in result.stderr


@pytest.mark.parametrize(
    ("cmd", "message"),
    [
        ("train_cmd=run.pl; cuda_cmd=run.pl; decode_cmd=nowhere.pl", "cmd.sh: decode_cmd=nowhere.pl: no such command"),
        ("train_cmd=run.pl; cuda_cmd=run.pl", "cmd.sh does not set decode_cmd"),
        ("echo lost >&2; return 1", "lost"),
    ],
)
def test_a_recipes_own_cmd_file_is_read(folder, cmd, message):
    (folder / "cmd.sh").write_text(f"{cmd}\n")
    result = stages(folder, "--stage", "14")
    assert result.returncode != 0 and message in result.stderr


def test_an_unknown_backend_is_refused(folder, monkeypatch):
    monkeypatch.setenv("cmd_backend", "sge")
    assert "cmd_backend=sge: expected local or slurm" in stages(folder, "--stage", "14").stderr


@pytest.mark.parametrize("fs", ["8000", "22.05k", "16k"])
def test_sampling_rates(folder, fs):
    assert stages(folder, "--fs", fs, "--stage", "14").returncode == 0


def with_data_stage(folder: Path, script: str) -> Path:
    (folder / "local").mkdir()
    (folder / "local" / "data.sh").write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / "local" / "data.sh").chmod(0o755)
    return folder


def test_the_first_stage_names_each_set_of_data_once(folder):
    options = ["--stop_stage", "1", "--test_sets", "dev test dev", "--speed_perturb_factors", "0.9 1.0"]
    result = stages(with_data_stage(folder, "true"), *options)
    assert result.returncode == 0 and " Stage 1: data: data/{train,dev,test}\n" in result.stdout


@pytest.mark.parametrize(("given", "wanted"), [("", "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise(folder, monkeypatch, given, wanted):
    monkeypatch.setenv("OMP_WAIT_POLICY", given)
    result = stages(with_data_stage(folder, "echo threads are ${OMP_WAIT_POLICY}"), "--stop_stage", "1")
    assert f"\nthreads are {wanted}\n" in result.stdout


def test_missing_configuration_is_named(folder):
    touch(folder, *DUMP, TOKENS)
    result = stages(folder, "--stage", "10", "--asr_config", "conf/train_mgea.yaml")
    assert result.returncode == 2 and "--asr_config conf/train_mgea.yaml: no such file in" in result.stderr


DECODING = {"conf/decode_default.yaml": "default", "conf/decode_tsd.yaml": "tsd", "conf/decode_maes.yaml": "maes"}


@pytest.mark.parametrize(
    ("configs", "decoded"),
    [
        ("conf/decode_default.yaml conf/decode_tsd.yaml", "decode_tsd_batched_"),
        ("conf/decode_default.yaml", "decode_maes_batched_"),
        ("conf/decode_maes.yaml,conf/decode_tsd.yaml", "{decode_maes_batched_asr_model_valid.loss.ave,decode_tsd_"),
    ],
)
def test_batches_do_without_espnets_default_search(folder, configs, decoded):
    """The recipes' own lists hold it; decoding in batches takes the others, or mAES."""
    for name, kind in DECODING.items():
        touch(folder, name)
        (folder / name).write_text(f"beam_search_config:\n    search_type: {kind}\n")
    decoding = ["--stage", "12", "--stop_stage", "12", "--inference_config", configs]
    result = stages(folder, *decoding, "--batched", "true")
    assert decoded in result.stdout and "decode_default_" not in result.stdout
    assert ("conf/decode_default.yaml asks for ESPnet's default search" in result.stdout) == ("default" in configs)
    assert "batched" not in stages(folder, *decoding).stdout


def test_two_decodings_that_would_write_to_one_folder_are_refused(folder):
    two = ["--inference_config", "conf/decode_maes.yaml conf/decode_maes_batched.yaml"]
    result = stages(folder, "--stage", "12", *two, "--batched", "true")
    assert result.returncode == 2 and "hold two that would both write decode_maes_batched_" in result.stderr
    assert "both write" not in stages(folder, "--stage", "12", *two).stderr


def test_skipped_stages_do_not_run(folder):
    for options in (["--skip_stages", "1 3 4 5 10 11 12 13"], ["--skip_data_prep", "true", "--skip_train", "true"]):
        result = stages(folder, *options, "--skip-eval", "true")
        assert result.returncode == 0 and "Stage" not in result.stdout, result.stdout


def test_data_stages_from_anywhere(folder, tmp_path):
    """Stages 2 to 5 as run.sh is called from another folder; what they print can be copied."""
    for name, sentences in (("train", ["A BE CO", "DI EK", "FU A", ""]), ("dev", ["CO A"]), ("test", ["EK EK"])):
        corpus(folder / "data" / name, sentences, prefix=name)
    result = stages(folder, "--stage", "2", "--stop_stage", "5", "--nbpe", "14", "--speed_perturb_factors", "0.9 1")
    assert result.returncode == 0, result.stderr
    assert "left out 2 without words: sp0.9-trains1-003 trains1-003" in result.stdout
    train = (folder / "dump/raw/train_sp/text").read_text().split("\n")
    assert "trains0-000 A BE CO" in train and "sp0.9-trains0-000 A BE CO" in train and len(train) == 7
    tokens = (folder / "data/en_token_list/bpe_unigram14/tokens.txt").read_text().split()
    assert len(tokens) == 14 and tokens[0] == "<blank>"
    assert "\n+ python3 -m espnet_mega_plugin.recipe.perturb --factors '0.9 1' --nj " in result.stdout
    assert [
        line.split(" done in ")[0].split(" ", 1)[1] for line in result.stdout.splitlines() if " done in " in line
    ] == [f"Stage {n}:" for n in (2, 3, 4, 5)]
    outside = {path.name for path in tmp_path.iterdir()} | {path.name for path in (tmp_path / "egs").iterdir()}
    assert outside == {"egs", "TEMPLATE", "tones"}
