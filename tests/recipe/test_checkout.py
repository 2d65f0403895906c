"""A recipe of the plugin in an ESPnet checkout: its folder, and, where ESPNET_ROOT names a checkout, its stages."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tones import REPOSITORY, corpus

from espnet_mega_plugin.recipe.checkout import link
from espnet_mega_plugin.recipe.kaldi_dir import read_table

RECIPE = REPOSITORY / "egs" / "mini_an4" / "asr1"
ESPNET_ROOT = os.environ.get("ESPNET_ROOT")
SENTENCES = ["A BE", "CO A", "DI EK CO", "FU"]


@pytest.fixture
def bare(tmp_path):
    """The names that a checkout has, and nothing in them."""
    template = tmp_path / "espnet" / "egs2" / "TEMPLATE" / "asr1"
    for folder in ("scripts", "pyscripts", "steps", "utils", "conf", "local"):
        (template / folder).mkdir(parents=True)
    for name in ("asr.sh", "db.sh", "path.sh", "cmd.sh", "conf/queue.conf"):
        (template / name).write_text(f"# ESPnet's {name}\n")
    return tmp_path / "espnet"


@pytest.mark.parametrize("inside", [True, False])
def test_a_recipe_has_espnets_files_and_the_plugins(bare, tmp_path, inside):
    for _ in range(2):  # may be made again
        folder = link(bare, RECIPE, None if inside else tmp_path / "work" / "an4")
    assert folder == (bare / "egs2" / "mini_an4" / "asr_mega1" if inside else tmp_path / "work" / "an4")
    template = bare / "egs2" / "TEMPLATE" / "asr1"
    for name in ("asr.sh", "db.sh", "scripts", "pyscripts", "steps", "utils"):
        assert (folder / name).resolve() == template / name
    assert (folder / "cmd.sh").read_text() == "# ESPnet's cmd.sh\n" and not (folder / "cmd.sh").is_symlink()
    assert (folder / "conf" / "mini_an4_tiny.yaml").resolve() == REPOSITORY / "conf" / "mini_an4_tiny.yaml"
    assert (folder / "conf" / "queue.conf").exists() and (folder / "local" / "data.sh").exists()
    assert (folder / "path.sh").is_symlink() == inside and (folder / "local" / "path.sh").exists()
    script = (folder / "run.sh").read_text()
    assert "./asr.sh --asr_task asr_transducer" in script and "--nbpe 30" in script and "TEMPLATE" not in script
    assert subprocess.run(["bash", "-n", str(folder / "run.sh")]).returncode == 0


def test_espnets_script_takes_one_decoding_configuration(bare):
    script = (link(bare, REPOSITORY / "egs" / "spoken_numbers" / "asr1") / "run.sh").read_text()
    assert re.search(r"--inference_config conf/decode_default.yaml \\\n", script)


def test_refusals(bare, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no ESPnet checkout: it has no egs2/TEMPLATE/asr1/asr.sh"):
        link(tmp_path, RECIPE)
    with pytest.raises(FileNotFoundError, match="is no recipe of the plugin"):
        link(bare, REPOSITORY / "tests")
    (bare / "egs2" / "mini_an4" / "asr_mega1").mkdir(parents=True)
    (bare / "egs2" / "mini_an4" / "asr_mega1" / "run.sh").write_text("my own\n")
    with pytest.raises(FileExistsError, match="was not made by this command; choose another folder with --here"):
        link(bare, RECIPE)


@pytest.mark.slow
@pytest.mark.skipif(not ESPNET_ROOT, reason="ESPNET_ROOT names no ESPnet checkout")
@pytest.mark.parametrize("inside", [True, False])
def test_the_checkouts_own_script_trains_and_decodes(tmp_path, inside):
    """Stages 1 to 5 and 10 to 12 of a copy of the checkout's recipes, on tones."""
    root = tmp_path / "espnet"
    for part in ("egs2/TEMPLATE/asr1", "tools/extra_path.sh", "utils"):
        source = Path(ESPNET_ROOT, part)
        if source.is_dir():
            shutil.copytree(source, root / part, symlinks=True)
        elif source.exists():
            (root / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / part)
    folder = link(root, RECIPE, None if inside else tmp_path / "work")
    data = tmp_path / "source"
    for name, sentences in (("train", SENTENCES), ("dev", SENTENCES[:2]), ("test", SENTENCES[2:])):
        corpus(data / name, sentences, prefix=name)
    (folder / "local" / "data.sh").unlink()
    (folder / "local" / "data.sh").write_text(f"#!/bin/sh\ncp -r {data} data\n")
    (folder / "local" / "data.sh").chmod(0o755)
    options = "--train_set train --valid_set dev --test_sets test --token_type char --nj 1 --inference_nj 1"
    decoding = "--inference_config conf/decode_maes.yaml --stop_stage 12"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "ESPNET_ROOT"} | {"PATH": path}
    command = [str(folder / "run.sh"), *options.split(), *decoding.split(), "--asr_args", "--max_epoch 1"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    exp = folder / "exp" / "asr_mini_an4_tiny_raw_en_char_max_epoch1"
    log = (exp / "train.log").read_text()
    assert "decoder 'mega' is espnet_mega_plugin.decoder.MEGADecoder" in log
    decoded = exp / "decode_maes_asr_model_valid.loss.ave" / "test" / "text"
    assert list(read_table(decoded, empty_values=True)) == list(read_table(folder / "dump/raw/test/text"))
