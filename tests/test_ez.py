"""The ESPnet-EZ script, run for real: Python 3.11 and ESPnet 202511; later ESPnets do not have it."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from fresh_python import python
from recipe.tones import corpus

from espnet_mega_plugin.recipe.kaldi_dir import read_table

SCRIPT = Path(__file__).parents[1] / "egs" / "mini_an4" / "ez" / "run.py"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("espnetez") is None, reason="ESPnet-EZ ended with 202511")
SENTENCES = ["A BE CO", "DI EK FU", "A CO", "FU EK BE", "DI BE", "A EK CO FU"]


@pytest.mark.slow
def test_the_script_trains_decodes_and_measures(tmp_path):
    for name, number in (("train_nodev", 6), ("train_dev", 2), ("test", 2)):
        corpus(tmp_path / "data" / name, SENTENCES[:number], prefix=name[-3:])
    config = yaml.safe_load((SCRIPT.parent / "../asr1/conf/mini_an4_tiny.yaml").read_text())
    config["decoder_conf"]["attention_window"] = 8  # ESPnet's class would refuse it
    config["num_att_plot"], config["use_matplotlib"] = 1, True
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    script = tmp_path / "run.py"
    shutil.copy(SCRIPT, script)
    options = ["--data", "data", "--exp", "exp", "--config", "train.yaml", "--nbpe", "14", "--epochs", "2"]
    out, err = python(script.name, *options, cwd=tmp_path)
    lines = [line for line in out.splitlines() if "WER" in line]
    assert [line.split(":")[0] for line in lines] == ["train_dev", "test"], out
    assert all(re.search(r": 2 utterances, 6 words, WER \d+\.\d %$", line) for line in lines)

    exp = tmp_path / "exp" / "asr"
    trained = yaml.safe_load((exp / "config.yaml").read_text())
    assert (
        trained["decoder"] == "mega" and trained["max_epoch"] == 2 and trained["decoder_conf"]["attention_window"] == 8
    )
    weights = torch.load(exp / "valid.loss.ave.pth", weights_only=True)
    assert "decoder.mega_blocks.0.0.multihead_damped_ema.decay_factor" in weights
    for name in ("train_dev", "test"):
        given = read_table(tmp_path / "data" / name / "text")
        assert read_table(exp / "decode" / name / "text", empty_values=True).keys() == given.keys()
    losses = [float(x) for x in re.findall(r"epoch results: \[train\].*?\bloss=([\d.]+)", err)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert len(list((exp / "att_ws").rglob("*.png"))) == 4  # attention and kernels, two epochs
