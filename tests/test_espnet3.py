"""The ESPnet3 recipe, run from its stages: Python 3.12, ESPnet 202611 and the packages of `[espnet3]`."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import jiwer
import pytest
import torch
import yaml
from fresh_python import python
from recipe.tones import corpus

from espnet_mega_plugin import MEGADecoder

RECIPE = Path(__file__).parents[1] / "egs" / "mini_an4" / "espnet3"
NEEDS = ("espnet3", "lightning", "dask", "distributed", "dask_jobqueue", "jiwer")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install '.[espnet3]'")

CONFIGS = [
    *("--training_config", "conf/training.yaml"),
    *("--inference_config", "conf/inference.yaml"),
    *("--metrics_config", "conf/metrics.yaml"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A copy of the recipe, run from making its data to measuring; the folder of the recipe."""
    folder = tmp_path_factory.mktemp("egs") / "espnet3"
    shutil.copytree(RECIPE, folder, ignore=shutil.ignore_patterns("data", "exp", "__pycache__"))
    # An argument that ESPnet's class does not know: any process that built it would end with a TypeError
    rewrite(
        folder / "conf" / "training.yaml", lambda config: config["model"]["decoder_conf"].update(attention_window=8)
    )
    rewrite(folder / "conf" / "inference_parallel.yaml", lambda config: config["dataset"]["test"].pop(0))
    stages = ["create_dataset", "train_tokenizer", "collect_stats", "train", "infer", "measure"]
    # torch attaches nothing here: the dotted names of the configurations do it
    _, err = python("run.py", "--stages", *stages, *CONFIGS, cwd=folder, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    print(err)
    return folder


def rewrite(path: Path, change) -> None:
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def scp(path: Path) -> dict[str, str]:
    return {key: value for key, _, value in (line.partition(" ") for line in path.read_text().splitlines())}


@pytest.mark.slow
def test_the_stages_make_data_and_a_model_and_measure_it(run):
    assert {path.name for path in (run / "data").iterdir()} >= {"train_nodev", "train_dev", "test", "bpe_30"}
    weights = torch.load(run / "exp" / "training" / "valid.loss.ave_2best.pth", weights_only=True)
    assert weights["decoder.mega_blocks.1.0.multihead_damped_ema.decay_factor"].shape == (32, 2, 1)
    decoded = run / "exp" / "training" / "inference"
    measured = json.loads((decoded / "metrics.json").read_text())
    found = {name: value for name, value in measured.items() if name.endswith("WER")}
    assert len(found) == 1, measured
    for name in ("train_dev", "test"):
        texts, references = scp(decoded / name / "text.scp"), scp(run / "data" / name / "text")
        assert texts.keys() == references.keys()
        rate = 100 * jiwer.wer(list(references.values()), [texts[key].strip() or "." for key in references])
        (wer,) = (value for value in next(iter(found.values()))[name].values() if isinstance(value, float))
        assert wer == pytest.approx(rate, abs=0.01)


@pytest.mark.slow
def test_training_lowers_the_loss_and_draws_its_pictures(run):
    log = "\n".join(path.read_text() for path in (run / "exp" / "training").glob("*.log"))
    losses = [float(x) for x in re.findall(r"epoch_summary:\d+epoch:train:.*?\bloss=([\d.]+)", log)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    drawn = {path.name for path in (run / "exp" / "training" / "att_ws").rglob("*.png")}
    assert drawn == {f"decoder.{name}.{n}ep.png" for name in ("attention", "ema_kernels") for n in (1, 2, 3)}


@pytest.mark.slow
def test_a_training_that_is_started_again_goes_on(run, tmp_path):
    folder = tmp_path / "espnet3"
    shutil.copytree(run, folder, symlinks=True)
    rewrite(folder / "conf" / "training.yaml", lambda config: config["trainer"].update(max_epochs=4))
    python("run.py", "--stages", "train", "--training_config", "conf/training.yaml", cwd=folder)
    log = (folder / "exp" / "training" / "train.log").read_text()
    assert "Restored all states from the checkpoint" in log
    assert set(re.findall(r"epoch_summary:(\d+)epoch:train", log)) == {"4"}


@pytest.mark.slow
def test_dask_workers_decode_with_the_plugins_decoder(run):
    """Two processes that ESPnet3 starts give the words of one."""
    config = ["--training_config", "conf/training.yaml", "--inference_config", "conf/inference_parallel.yaml"]
    python("run.py", "--stages", "infer", *config, cwd=run, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    together, apart = (run / "exp" / "training" / name / "test" for name in ("inference", "inference_parallel"))
    assert {path.name for path in apart.glob("split.*")} >= {"split.0", "split.1"}
    assert scp(apart / "text.scp") == scp(together / "text.scp") and len(scp(apart / "text.scp")) == 2


def test_the_dotted_names_are_espnets_own_classes():
    from hydra.utils import get_class

    task, speech2text = (
        get_class(f"espnet_mega_plugin.espnet3.{name}") for name in ("ASRTransducerTask", "Speech2Text")
    )
    assert task.__module__ == "espnet3.systems.esp2_asr.src.transducer_task"
    assert speech2text.__module__ == "espnet2.bin.asr_transducer_inference"
    for module in (task.__module__, "espnet2.tasks.asr_transducer"):
        assert sys.modules[module].decoder_choices.get_class("mega") is MEGADecoder


def test_a_set_that_is_not_made_is_named_with_the_stage_that_makes_it(tmp_path):
    sys.path.insert(0, str(RECIPE))
    try:
        from dataset.dataset import MiniAn4
    finally:
        sys.path.remove(str(RECIPE))
    with pytest.raises(FileNotFoundError, match="nowhere/test: no such set; run .*--stages create_dataset"):
        MiniAn4("test", data_dir="nowhere")
    given = corpus(tmp_path / "test", ["A BE", "CO"])
    for named in (False, True):
        items = list(MiniAn4("test", named=named, data_dir=tmp_path)[n] for n in range(2))
        assert [item["text"] for item in items] == ["A BE", "CO"] and items[0]["speech"].dtype.name == "float32"
        assert [item.get("utt_id") for item in items] == (given.utterances() if named else [None, None])
