"""Options of a recipe follow the rules of parse_options; the recipes of the repository declare ESPnet's names."""

import shlex
import subprocess
import sys

import pytest
from tones import REPOSITORY

from espnet_mega_plugin.recipe.options import declared_options, parse

ENGINE = REPOSITORY / "egs" / "TEMPLATE" / "asr1" / "asr.sh"

# research: the options users of ESPnet's asr.sh pass, as far as this engine has their stages
ESPNETS = """stage stop_stage skip_stages skip_data_prep skip_train skip_eval skip_packing skip_upload_hf ngpu num_nodes nj inference_nj gpu_inference
dumpdir expdir python local_data_opts speed_perturb_factors feats_type audio_format fs min_wav_duration max_wav_duration
token_type nbpe bpemode bpe_nlsyms bpe_char_cover bpe_train_text use_lm lm_config lm_args lm_tag
lm_exp lm_stats_dir lm_train_text lm_dev_text lm_test_text lm_fold_length num_splits_lm inference_lm use_ngram ngram_num
ngram_exp num_splits_asr hf_repo asr_task asr_config asr_args asr_tag asr_exp asr_stats_dir
pretrained_model ignore_init_mismatch feats_normalize inference_config inference_args inference_tag inference_asr_model
use_streaming train_set valid_set test_sets lang cleaner score_opts eval_valid_set""".split()


@pytest.fixture(scope="module")
def options():
    return declared_options(ENGINE)


def test_the_engine_has_espnets_options(options):
    assert not set(ESPNETS) - set(options)
    for option in options.values():
        assert option.refusal or option.help.endswith((".", ")")) or "..." in option.help, option


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ("", {}),
        ("--stage 3 --stop-stage 5", {"stage": "3", "stop_stage": "5"}),
        ("--nj 1 --nj 4", {"nj": "4"}),
        ("--use_lm false", {"use_lm": "false"}),
        ("--test_sets 'a b' --asr_args '--max_epoch 2'", {"test_sets": "a b", "asr_args": "--max_epoch 2"}),
        ("--asr_config ''", {"asr_config": ""}),
        ("--max_wav_duration 7", {"max_wav_duration": "7"}),
        ("--fs 8000", {"fs": "8000"}),
    ],
)
def test_values(options, arguments, values):
    assert parse(shlex.split(arguments), options) == values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stop_stag 3", "unknown option --stop_stag; did you mean --stop_stage"),
        ("--asr-confg x", "did you mean --asr_config"),
        ("--qqq 3", "unknown option --qqq; --help lists all"),
        (
            "--use_k2 true",
            "option --use_k2 of ESPnet's script is not here: k2 decodes ESPnet's CTC and attention models",
        ),
        (
            "--use-word-lm true",
            "option --use-word-lm of ESPnet's script is not here: ESPnet has no word language model",
        ),
        ("--use_lm yes", "option --use_lm takes true or false, not 'yes'"),
        ("--stage two", "option --stage takes an integer, not 'two'"),
        ("--stage --stop_stage 3", "option --stage takes an integer, not '--stop_stage'"),
        ("--max_wav_duration long", "option --max_wav_duration takes a number, not 'long'"),
        ("--stage=3", "write --name value, without '='"),
        ("--stage", "option --stage needs a value"),
        ("train", "'train' is no option"),
        ("-n 3", "'-n' is no option"),
    ],
)
def test_refusals(options, arguments, message):
    with pytest.raises(ValueError, match="^[^\n]*" + message.replace("(", r"\(")):
        parse(shlex.split(arguments), options)


def test_shell_gets_back_what_was_given(options):
    awkward = "a 'b' \"c\" $HOME `ls` \\ ; rm"
    command = [sys.executable, "-m", "espnet_mega_plugin.recipe.options", str(ENGINE), "--local_data_opts", awkward]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shell = subprocess.run(["bash", "-c", f'{code}\nprintf %s "$local_data_opts"'], capture_output=True, text=True)
    assert shell.stdout == awkward


def test_help_lists_every_option(options):
    command = [sys.executable, "-m", "espnet_mega_plugin.recipe.options", str(ENGINE), "--stage", "3", "--help"]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shell = subprocess.run(["bash", "-c", f"{code}\necho not reached"], capture_output=True, text=True)
    assert shell.returncode == 0 and "not reached" not in shell.stdout
    assert [line.split()[0][2:] for line in shell.stdout.splitlines() if line.startswith("  --")] == [
        name for name, option in options.items() if not option.refusal
    ]


@pytest.mark.parametrize("corpus", ["spoken_numbers", "mini_an4"])
def test_recipes_pass_known_options_only(corpus, options):
    script = (REPOSITORY / "egs" / corpus / "asr1" / "run.sh").read_text(encoding="utf-8")
    given = shlex.split(script[script.index("asr.sh") :].replace("\\\n", " "), comments=True)[1:-1]
    assert parse(given, options)


def test_a_malformed_declaration_is_named(tmp_path):
    script = tmp_path / "asr.sh"
    script.write_text("# options begin\nStage = 3\n# options end\n")
    with pytest.raises(ValueError, match="not an option declaration: 'Stage = 3'"):
        declared_options(script)
    script.write_text("stage=3\n")
    with pytest.raises(ValueError, match="has no lines '# options begin'"):
        declared_options(script)
