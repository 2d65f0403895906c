"""Stages 14 and 15: what a pack says of the plugin, and the folder for a hub. The pack of a trained model: test_recipe_run."""

import inspect
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder as ESPnets
from espnet2.main_funcs.pack_funcs import pack, unpack

from espnet_mega_plugin import __version__
from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.recipe.hub import make_folder
from espnet_mega_plugin.recipe.pack import elsewhere, marked, needs_plugin, own_arguments, sign

SMALL = {"block_size": 8, "linear_size": 8, "qk_size": 4, "v_size": 8, "num_heads": 1, "num_blocks": 1}
CONFIG = {
    "decoder": "mega",
    "decoder_conf": SMALL,
    "frontend_conf": {"fs": "8k"},
    "token_list": ["<blank>", "é", "<sos/eos>"],
    "bpemodel": "data/bpe.model",
}


def test_a_marked_decoder_is_the_plugins_or_none():
    """ESPnet's own class refuses what the plugin's builds alike."""
    conf = marked(CONFIG, own_arguments(), [], Path("/r"))["decoder_conf"]
    assert SMALL.items() < conf.items() and conf.keys() - SMALL.keys() == own_arguments().keys()
    assert own_arguments() and all(name not in inspect.signature(ESPnets).parameters for name in own_arguments())
    ESPnets(5, **SMALL)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ESPnets(5, **conf)
    shapes = [{k: v.shape for k, v in MEGADecoder(5, **c).state_dict().items()} for c in (SMALL, conf)]
    assert shapes[0] == shapes[1]


def test_what_a_training_chose_is_kept():
    name, default = next((n, d) for n, d in own_arguments().items() if d is False)
    config = {**CONFIG, "decoder_conf": {**SMALL, name: True}}
    assert marked(config, own_arguments(), [], Path("/r"))["decoder_conf"][name] is True and default is False


@pytest.mark.parametrize(("decoder", "needs"), [("mega", True), ("MEGA", True), ("mega_espnet", True), ("rnn", False)])
def test_who_needs_the_plugin(decoder, needs):
    config = {**CONFIG, "decoder": decoder}
    packed = marked(config, own_arguments(), [], Path("/r"))
    assert needs_plugin(config) == needs == ("requires" in packed)
    assert (packed["decoder_conf"] != SMALL) == (decoder.lower() == "mega")


def test_absolute_names_of_packed_files_become_relative():
    config = {**CONFIG, "bpemodel": "/r/data/bpe.model", "normalize_conf": {"stats_file": ["/r/x.npz", "/r/y.npz"]}}
    packed = marked(config, {}, ["data/bpe.model", "x.npz"], Path("/r"))
    assert packed["bpemodel"] == "data/bpe.model" and packed["normalize_conf"] == {"stats_file": ["x.npz", "/r/y.npz"]}


@pytest.fixture
def packed(tmp_path):
    """A pack of ESPnet's form, signed."""
    meta = {
        "yaml_files": {"asr_train_config": "exp/asr_x/config.yaml"},
        "files": {"asr_model_file": "exp/asr_x/valid.loss.ave.pth"},
        "espnet": "202511",
        "torch": "2.12.1",
    }
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.writestr("meta.yaml", yaml.safe_dump(meta))
        archive.writestr("exp/asr_x/config.yaml", yaml.safe_dump(CONFIG))
        archive.writestr("exp/asr_x/valid.loss.ave.pth", bytes(range(256)) * 9000)
        archive.writestr("data/bpe.model", b"model")
    sign(tmp_path / "plain.zip", tmp_path / "asr_x.zip", own_arguments(), tmp_path)
    return tmp_path / "asr_x.zip"


def test_a_signed_pack_has_what_it_had_and_says_what_it_needs(packed):
    with zipfile.ZipFile(packed.with_name("plain.zip")) as plain, zipfile.ZipFile(packed) as signed:
        assert sorted(signed.namelist()) == sorted([*plain.namelist(), "README.md"])
        for name in ("exp/asr_x/valid.loss.ave.pth", "data/bpe.model"):
            assert signed.read(name) == plain.read(name)
        meta, config = (yaml.safe_load(signed.read(name)) for name in ("meta.yaml", "exp/asr_x/config.yaml"))
        readme = signed.read("README.md").decode()
    assert meta["requires"] == config["requires"] == {"espnet-mega-plugin": f">={__version__}"}
    assert config["token_list"] == CONFIG["token_list"] and config["bpemodel"] == "data/bpe.model"
    assert f"needs the package `espnet-mega-plugin` {__version__}" in readme and "# 8k, one channel" in readme


def test_what_lies_outside_of_the_recipe_is_packed_under_the_name_it_was_given(tmp_path):
    """exp and conf as links to another disk; ESPnet resolves them, and its pack would not find its files again."""
    disk, here = tmp_path / "disk", tmp_path / "recipe"
    for name in ("exp/config.yaml", "exp/images/loss.png", "maes.yaml", "stats.npz"):
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).write_text("decoder: rnn\nnormalize_conf: {stats_file: exp/stats.npz}\n")
    here.mkdir()
    (here / "exp").symlink_to(disk / "exp")
    (here / "own").write_text("own")
    options = ["exp/images", str(disk / "maes.yaml"), "own", "no/such/file"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        pack({}, {"asr_train_config": "exp/config.yaml"}, here / "plain.zip", options[:3])  # ESPnet's
        sign(here / "plain.zip", here / "x.zip", {}, here, elsewhere(["exp/config.yaml", *options], here))
    with zipfile.ZipFile(here / "x.zip") as archive:
        names = {"meta.yaml", "README.md", "exp/config.yaml", "exp/images/loss.png", "packed/maes.yaml", "own"}
        assert set(archive.namelist()) == names and archive.read("own") == b"own"
    assert unpack(here / "x.zip", tmp_path / "out") == {"asr_train_config": str(tmp_path / "out" / "exp/config.yaml")}


@pytest.fixture
def scores(tmp_path):
    result = tmp_path / "exp" / "asr_x" / "decode_maes" / "test" / "score_wer" / "result.txt"
    result.parent.mkdir(parents=True)
    result.write_text("| Sum/Avg | 3 12 | 90.0 5.0 5.0 0.0 10.0 33.3 |\n")
    (tmp_path / "exp" / "asr_x" / "RESULTS.md").write_text("# RESULTS\n\n## exp/asr_x\n\n|dataset|Err|\n")
    return tmp_path / "exp" / "asr_x"


def test_a_folder_for_a_hub(packed, scores, tmp_path):
    folder = tmp_path / "hf"
    for _ in range(2):  # made anew
        (folder / "left").mkdir(parents=True) if folder.exists() else None
        files = make_folder(packed, scores, folder, "someone/model", "tones", "en", "cc-by-4.0")
    with zipfile.ZipFile(packed) as archive:
        assert sorted(map(str, files)) == sorted(archive.namelist())
    _, head, page = (folder / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert {"espnet", "automatic-speech-recognition", "mega"} <= set(head["tags"])
    assert (head["language"], head["license"], head["datasets"]) == ("en", "cc-by-4.0", ["tones"])
    [result] = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 10.0 and result["dataset"] == {"name": "tones test", "type": "tones"}
    assert "## RESULTS" in page and "|dataset|Err|" in page and "needs the package `espnet-mega-plugin`" in page
    assert 'from_pretrained("someone/model")' in page and "decoder: mega" in page


@pytest.mark.parametrize(
    ("repo", "message"), [("model", "--hf_repo 'model': expected user/name"), ("a/b/c", "expected user/name")]
)
def test_a_repository_has_two_names(packed, scores, tmp_path, repo, message):
    with pytest.raises(ValueError, match=message):
        make_folder(packed, scores, tmp_path / "hf", repo, "tones", "en", "mit")


def test_a_strangers_folder_is_left_alone(packed, scores, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is there and is no unpacked model"):
        make_folder(packed, scores, tmp_path / "hf", "a/b", "tones", "en", "mit")
    assert (tmp_path / "hf" / "thesis.tex").exists()


def hub(tmp_path, packed, scores, dry_run: str, **environment) -> subprocess.CompletedProcess:
    options = ["--pack", packed, "--asr_exp", scores, "--folder", tmp_path / "hf", "--repo", "a/b", "--corpus", "tones"]
    command = [sys.executable, "-m", "espnet_mega_plugin.recipe.hub", *map(str, options), "--dry_run", dry_run]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_dry_run_lists_and_sends_nothing(packed, scores, tmp_path):
    said = hub(tmp_path, packed, scores, "true").stdout.splitlines()
    assert said[-1] == "a dry run: nothing was sent" and "in 5 files of" in said[-2]
    assert any(line.split() == ["2.304", "MB", "exp/asr_x/valid.loss.ave.pth"] for line in said)


def test_an_upload_is_the_hub_librarys(packed, scores, tmp_path):
    """There is no network in tests, so a module of that name stands in for it and writes down what it is asked."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "huggingface_hub.py").write_text(
        "class HfApi:\n"
        "    def create_repo(self, repo, exist_ok):\n        print('create', repo, exist_ok); return 'hub:' + repo\n"
        "    def upload_folder(self, repo_id, folder_path, commit_message):\n        print('upload', repo_id, folder_path)\n"
    )
    said = hub(tmp_path, packed, scores, "false", PYTHONPATH=str(tmp_path / "lib")).stdout.splitlines()
    assert said[-3:] == ["create a/b True", f"upload a/b {tmp_path / 'hf'}", "sent: hub:a/b"]
    (tmp_path / "lib" / "huggingface_hub.py").write_text("raise ImportError('not here')\n")
    result = hub(tmp_path, packed, scores, "false", PYTHONPATH=str(tmp_path / "lib"))
    assert result.returncode == 1 and "the upload needs huggingface_hub: pip install huggingface_hub" in result.stderr
