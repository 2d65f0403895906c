"""`decoder: mega` and `warprnnt_pytorch` resolve to the plugin wherever ESPnet looks, and to nothing of it when off."""

import copy
import importlib
import importlib.util
import inspect
import logging
import pickle
import shutil
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch
import yaml
from espnet2.asr_transducer.decoder.abs_decoder import AbsDecoder
from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder as ESPnetDecoder
from espnet2.bin.asr_transducer_train import get_parser
from espnet2.tasks.asr_transducer import ASRTransducerTask, decoder_choices
from espnet2.train.class_choices import ClassChoices
from espnet2.utils.get_default_kwargs import get_default_kwargs
from fresh_python import LOSS, OURS, THEIRS, WHICH, finish, python, start
from torchaudio.functional import rnnt_loss as torchaudio_rnnt_loss

import espnet_mega_plugin
from espnet_mega_plugin import MEGADecoder, attach, register

CHECKOUT = Path(__file__).parents[1]


def named(class_: type) -> str:
    return f"{class_.__module__}.{class_.__qualname__}"


# --- the choice, in a process where nothing but torch was asked to attach anything


def test_espnets_transducer_task_gives_the_plugins_class_and_keeps_its_own():
    assert decoder_choices.get_class("mega") is MEGADecoder and named(MEGADecoder) == OURS
    assert named(decoder_choices.get_class("mega_espnet")) == THEIRS
    assert sorted(decoder_choices.choices()) == ["mega", "mega_espnet", "rnn", "rwkv", "stateless"]
    assert decoder_choices.get_class("rnn").__module__ == "espnet2.asr_transducer.decoder.rnn_decoder"


@pytest.mark.skipif(importlib.util.find_spec("espnet3") is None, reason="ESPnet3 came after 202511")
def test_espnet3_has_a_choice_of_its_own_and_it_gives_the_same():
    task = importlib.import_module("espnet3.systems.esp2_asr.src.transducer_task")
    assert task.decoder_choices is not decoder_choices
    assert task.decoder_choices.get_class("mega") is MEGADecoder
    assert task.decoder_choices.get_class("mega_espnet") is ESPnetDecoder


def test_a_copy_of_the_task_is_covered_and_other_choices_are_not_touched():
    copied = ClassChoices("decoder", dict(mega=ESPnetDecoder), type_check=AbsDecoder, default="mega")
    assert copied.get_class("mega") is MEGADecoder and copied.get_class("mega_espnet") is ESPnetDecoder
    for other in (
        ClassChoices("decoder", dict(mega=ESPnetDecoder), default="mega"),
        ClassChoices("decoder", dict(mega=ESPnetDecoder), type_check=torch.nn.Module, default="mega"),
        ClassChoices("encoder", dict(mega=ESPnetDecoder), type_check=AbsDecoder, default="mega"),
    ):
        assert other.classes == {"mega": ESPnetDecoder}


def test_the_commands_parser_and_print_config_show_the_plugins_parameters(monkeypatch):
    assert "{mega,rnn,rwkv,stateless,mega_espnet}" in get_parser().format_help()
    monkeypatch.setattr(sys, "argv", ["asr_transducer_train", "--print_config", "--decoder", "mega"])
    shown = ASRTransducerTask.get_default_config()["decoder_conf"]
    parameters = inspect.signature(MEGADecoder.__init__).parameters.values()
    assert shown == {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in ("self",)}
    ours_alone = {"attention_window": None, "pre_norm": False}
    # so a YAML written for ESPnet's class means the same here
    assert shown == {**get_default_kwargs(ESPnetDecoder), **ours_alone}


def test_an_abs_decoder_of_a_second_espnet_is_refused_when_mega_is_asked_for():
    second = importlib.util.module_from_spec(importlib.util.find_spec(AbsDecoder.__module__))
    second.__spec__.loader.exec_module(second)

    class Other(second.AbsDecoder):
        pass

    choices = ClassChoices("decoder", dict(mega=Other, other=Other), type_check=second.AbsDecoder, default="mega")
    assert choices.get_class("other") is Other
    with pytest.raises(ImportError, match="two ESPnets are mixed.*doctor.*ESPNET_MEGA_PLUGIN=0"):
        choices.get_class("mega")


# --- the hook


def test_the_hook_leaves_no_trace_on_the_module():
    spec = importlib.util.find_spec("espnet2.train")  # a module the hook does not know, for comparison
    kind = type(spec.loader)
    again = importlib.util.module_from_spec(attach_spec := _found_by_the_hook())
    attach_spec.loader.exec_module(again)
    assert kind is type(again.__loader__) is type(again.__spec__.loader) is SourceFileLoader
    assert "exec_module" not in vars(again.__loader__)
    assert again.ClassChoices is not ClassChoices  # executed anew, as importlib.reload does, and attached anew
    choices = again.ClassChoices("decoder", dict(mega=ESPnetDecoder), type_check=AbsDecoder, default="mega")
    assert choices.get_class("mega") is MEGADecoder
    source = inspect.getsource(ClassChoices)
    assert "def get_class" in source and inspect.getsource(ClassChoices.__init__) in source
    assert inspect.signature(ClassChoices.__init__) == inspect.signature(inspect.unwrap(ClassChoices.__init__))


def _found_by_the_hook():
    (finder,) = (finder for finder in sys.meta_path if type(finder) is attach._PatchingFinder)
    return finder.find_spec(attach.CLASS_CHOICES, sys.modules["espnet2.train"].__path__)


def test_attaching_again_changes_nothing():
    before = list(sys.meta_path), ClassChoices.__init__, ClassChoices.get_class, dict(decoder_choices.classes)
    for attach_again in (attach.install, attach.attach, register):
        attach_again()
    assert before == (list(sys.meta_path), ClassChoices.__init__, ClassChoices.get_class, decoder_choices.classes)


def test_register_patches_a_task_that_was_imported_without_the_plugin(monkeypatch):
    monkeypatch.setattr(decoder_choices, "classes", {"mega": ESPnetDecoder, "rnn": decoder_choices.classes["rnn"]})
    register()
    assert decoder_choices.get_class("mega") is MEGADecoder
    assert decoder_choices.get_class("mega_espnet") is ESPnetDecoder


def test_the_switch_wins_over_register_and_says_so(monkeypatch, caplog):
    monkeypatch.setenv("ESPNET_MEGA_PLUGIN", "0")
    monkeypatch.setattr(decoder_choices, "classes", {"mega": ESPnetDecoder})
    register()
    assert decoder_choices.classes == {"mega": ESPnetDecoder}
    assert "ESPNET_MEGA_PLUGIN=0 turns the plugin off" in caplog.text


def test_one_line_at_info_for_each_decoder_names_class_loss_and_versions(monkeypatch, caplog):
    monkeypatch.setattr(attach, "_announced", set())
    caplog.set_level(logging.WARNING)
    decoder_choices.get_class("mega")  # ESPnet has not configured its logging yet: the line must wait
    caplog.set_level(logging.INFO)
    for name in ("mega", "rnn", "mega"):
        decoder_choices.get_class(name)
    record, of_rnn = (record for record in caplog.records if record.name == "espnet_mega_plugin")
    assert record.levelno == logging.INFO and "decoder 'rnn' is espnet2." in of_rnn.getMessage()
    for part in (f"decoder 'mega' is {OURS}", LOSS, espnet_mega_plugin.__version__, torch.__version__.split("+")[0]):
        assert part in record.getMessage()


# --- the loss


def test_warprnnt_pytorch_is_the_plugins_loss():
    warprnnt = importlib.import_module("warprnnt_pytorch")
    assert warprnnt.__spec__.origin == LOSS == attach.loss_in_use()
    assert warprnnt.RNNTLoss is espnet_mega_plugin.RNNTLoss and warprnnt.rnnt_loss is espnet_mega_plugin.rnnt_loss
    assert importlib.reload(warprnnt).RNNTLoss is espnet_mega_plugin.RNNTLoss
    assert isinstance(pickle.loads(pickle.dumps(warprnnt.RNNTLoss(reduction="sum"))), warprnnt.RNNTLoss)


def test_an_unknown_choice_of_the_loss_is_refused_by_name(monkeypatch, caplog):
    monkeypatch.setenv("ESPNET_MEGA_PLUGIN_LOSS", "warp")
    with pytest.raises(ValueError, match="ESPNET_MEGA_PLUGIN_LOSS='warp': expected 'auto'.* or 'plugin'"):
        register()
    attach.install()  # torch's import must not fail
    assert "ESPNET_MEGA_PLUGIN_LOSS='warp'" in caplog.text


def test_espnets_other_transducer_trains_with_it(seed):
    """Task asr, decoder transducer: int32 lengths, the loss of torchaudio and its gradient."""
    from espnet2.tasks.asr import ASRTask

    config = {
        "token_list": ["<blank>", "<unk>", "a", "b", "<sos/eos>"],
        "input_size": 8,
        "normalize": None,
        "encoder": "rnn",
        "encoder_conf": {"hidden_size": 8, "output_size": 8, "num_layers": 1, "subsample": [1]},
        "decoder": "transducer",
        "decoder_conf": {"hidden_size": 8},
        "joint_net_conf": {"joint_space_size": 8},
        "model_conf": {"ctc_weight": 0.0, "report_cer": False, "report_wer": False},
    }
    args = ASRTask.get_parser().parse_args([])
    vars(args).update(config)
    model = ASRTask.build_model(args)
    assert isinstance(model.criterion_transducer, espnet_mega_plugin.RNNTLoss)

    calls = []
    model.criterion_transducer.register_forward_hook(lambda _, inputs, loss: calls.append((inputs, loss)))
    logits = []
    model.joint_network.register_forward_hook(lambda _, __, out: logits.append(out.detach().clone()))  # before the loss
    speech, text = torch.randn(3, 12, 8), torch.tensor([[2, 3, 2], [3, 2, -1], [2, -1, -1]])
    loss, stats, weight = model(speech, torch.tensor([12, 9, 7]), text, torch.tensor([3, 2, 1]))
    loss.backward()

    (((_, labels, frames, lengths), result),) = calls
    assert labels.dtype == frames.dtype == lengths.dtype == torch.int32
    expected = torchaudio_rnnt_loss(logits[0], labels, frames, lengths, blank=0, reduction="mean")
    torch.testing.assert_close(result.reshape(()), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.isfinite(p.grad).all() for p in model.decoder.parameters())


# --- a checkpoint that does not fit


def test_a_checkpoint_whose_decoder_keys_do_not_fit_is_refused_with_the_keys(tmp_path):
    config = {
        "token_list": ["<blank>", "a", "b", "<sos/eos>"],
        "input_size": 8,
        "frontend": None,
        "specaug": None,
        "normalize": None,
        "encoder_conf": {"body_conf": [{"block_type": "conv1d", "output_size": 8, "kernel_size": 3}]},
        "decoder": "mega",
        "decoder_conf": {"block_size": 8, "linear_size": 8, "qk_size": 4, "v_size": 8, "num_heads": 2},
        "joint_network_conf": {"joint_space_size": 8},
        "model_conf": {},
        "init": None,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    model, _ = ASRTransducerTask.build_model_from_file(tmp_path / "config.yaml")
    assert named(type(model.decoder)) == OURS
    weights = model.state_dict()
    torch.save(weights, tmp_path / "good.pth")
    loaded, _ = ASRTransducerTask.build_model_from_file(tmp_path / "config.yaml", tmp_path / "good.pth")
    torch.testing.assert_close(loaded.state_dict(), weights, rtol=0, atol=0)

    renamed = copy.copy(weights)
    renamed["decoder.embedding.weight"] = renamed.pop("decoder.embed.weight")
    torch.save(renamed, tmp_path / "renamed.pth")
    with pytest.raises(ValueError, match=r"decoder\.embed\.weight.*decoder\.embedding\.weight"):
        ASRTransducerTask.build_model_from_file(tmp_path / "config.yaml", tmp_path / "renamed.pth")


# --- processes of their own

POOL = """
import multiprocessing, sys

def resolve(_):
    from which import which
    return f"{__name__}\\n{which}"

if __name__ == "__main__":
    for method in sys.argv[1:]:
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(*pool.map(resolve, [0]))
"""


@pytest.mark.slow
def test_spawned_workers_resolve_the_plugin(tmp_path):
    (tmp_path / "which.py").write_text(WHICH)
    (tmp_path / "pool.py").write_text(POOL)
    plain = start("-m", "pool", "spawn", "forkserver", cwd=tmp_path)
    # torch's entry points off: only the wrapper is at work
    alone = {"cwd": tmp_path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    wrapped = start("-m", "espnet_mega_plugin.run", "-m", "pool", "spawn", **alone)
    by_path = start("-m", "espnet_mega_plugin", "run", "pool.py", "forkserver", **alone)
    for process, methods in ((plain, 2), (wrapped, 1), (by_path, 1)):
        out, _ = finish(process)
        assert out.count("__mp_main__") == methods, out
        assert out.count(f"mega {OURS}") == out.count(f"mega_espnet {THEIRS}") == out.count(f"loss {LOSS}") == methods


@pytest.mark.slow
def test_off_is_espnet_as_it_is(tmp_path):
    (tmp_path / "which.py").write_text(WHICH)
    (tmp_path / "hooks.py").write_text("import torch, sys; print([type(f).__module__ for f in sys.meta_path])")
    off = {"cwd": tmp_path, "ESPNET_MEGA_PLUGIN": "0"}
    model = "from espnet2.tasks.asr_transducer import ESPnetASRTransducerModel as m; print('model', m.__module__)"
    espnet = start("-c", f"from which import which; print(which); {model}", **off)
    for command in (["hooks.py"], ["-m", "espnet_mega_plugin.run", "hooks"]):
        out, err = python(*command, **off)
        assert out.startswith("[") and "espnet_mega_plugin" not in out
    assert err == "espnet_mega_plugin is off by ESPNET_MEGA_PLUGIN=0; hooks runs as it is.\n"
    out, _ = finish(espnet)
    assert f"mega {THEIRS}" in out and "mega_espnet" not in out and "loss None" in out
    assert "model espnet2.asr_transducer.espnet_transducer_model" in out


@pytest.mark.slow
def test_a_folder_on_pythonpath_and_espnets_own_commands(tmp_path):
    """As `pip install --target` leaves it: packages and metadata in one folder, which only PYTHONPATH names."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(CHECKOUT / "espnet_mega_plugin", source / "espnet_mega_plugin")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    (source / "README.md").touch()
    target.mkdir()
    build = ["egg_info", "--egg-base", str(target), "build_py", "--build-lib", str(target)]
    python("-c", "from setuptools import setup; setup()", "-q", *build, cwd=source)

    (tmp_path / "which.py").write_text(WHICH)
    code = "from which import which; import espnet_mega_plugin; print(which, espnet_mega_plugin.__file__)"
    which = start("-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    # argparse knows `mega_espnet` only where the plugin is attached
    command = ["espnet2.bin.asr_transducer_train", "--print_config", "--decoder", "mega_espnet"]
    unmodified = start("-m", *command, cwd=tmp_path, PYTHONPATH=str(target))
    wrapped = start("-m", "espnet_mega_plugin.run", "-m", *command, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    out, _ = finish(which)
    assert f"mega {OURS}" in out and f"loss {LOSS}" in out and f"{target}/espnet_mega_plugin/__init__.py" in out
    for process in (unmodified, wrapped):
        out, _ = finish(process)
        assert yaml.safe_load(out)["decoder_conf"] == get_default_kwargs(ESPnetDecoder)


@pytest.mark.slow
def test_an_installed_warprnnt_wins_unless_the_plugins_loss_is_forced(tmp_path):
    for name, body in {
        "real": "RNNTLoss = rnnt_loss = 'real'",
        "broken": "raise ImportError('libwarprnnt.so')",
    }.items():
        (tmp_path / name / "warprnnt_pytorch").mkdir(parents=True)
        (tmp_path / name / "warprnnt_pytorch" / "__init__.py").write_text(body)
    code = "import torch; from warprnnt_pytorch import RNNTLoss; print(RNNTLoss)"
    real, broken = ({"cwd": tmp_path, "PYTHONPATH": str(tmp_path / name)} for name in ("real", "broken"))
    forced = {"ESPNET_MEGA_PLUGIN_LOSS": "plugin"}
    runs = [start("-c", code, **where, **loss) for where in (real, broken) for loss in ({}, forced)]
    assert finish(runs[0])[0] == "real\n"
    assert "ImportError: libwarprnnt.so" in finish(runs[2], status=1)[1]
    for run in (runs[1], runs[3]):
        assert "espnet_mega_plugin.rnnt" in finish(run)[0]


def test_where_espnet_is_absent_torch_imports_in_silence_and_register_says_what_to_install(tmp_path):
    out, err = python(
        "-c",
        """
import sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("espnet", "espnet2", "espnet3"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent)
import torch
assert "espnet_mega_plugin.attach" in sys.modules
import espnet_mega_plugin, espnet_mega_plugin.mega.network, warprnnt_pytorch  # neither needs ESPnet
try:
    espnet_mega_plugin.register()
except ImportError as error:
    print(error)
""",
        cwd=tmp_path,
    )
    assert err == ""
    line = "202511" if sys.version_info < (3, 12) else "202611"
    assert out == f"ESPnet is not installed: `pip install espnet=={line}`.\n"


def test_attaching_is_cheap(tmp_path):
    """Under a millisecond (0.6 ms when written); the bound leaves room for a slow machine."""
    code = """
import functools, importlib.metadata, importlib.util, logging, threading, time  # what torch has loaded
begin = time.perf_counter()
from espnet_mega_plugin.attach import install
install()
print(1000 * (time.perf_counter() - begin))
import sys
assert not {"torch", "espnet2", "numpy"} & set(sys.modules)
"""
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    milliseconds = [float(python("-c", code, cwd=tmp_path, **bytecode)[0]) for _ in range(6)]
    print(milliseconds)
    assert min(milliseconds) < 2


# --- the wrapper


def test_run_runs_scripts_and_modules_as_python_does(tmp_path):
    (tmp_path / "package").mkdir()
    body = "import sys; print(__name__, __file__, __package__, sys.argv, sys.path[0]); sys.exit(int(sys.argv[1]))"
    for name in ("package/__init__.py", "package/__main__.py", "package/command.py"):
        (tmp_path / name).write_text("" if "init" in name else body)
    for form in (["-m", "package.command"], ["-m", "package"], ["package/command.py"]):
        arguments = [*form, "3", "--config", "a b"]
        expected, _ = python(*arguments, cwd=tmp_path, status=3)
        for wrapper in (["-m", "espnet_mega_plugin.run"], ["-m", "espnet_mega_plugin", "run"]):
            out, _ = python(*wrapper, *arguments, cwd=tmp_path, status=3)
            assert out.replace("None", "") == expected.replace("None", "")  # a script's package may be None or ""
    out, _ = python("-m", "espnet_mega_plugin.run", "package.command", "3", cwd=tmp_path, status=3)
    assert "__main__" in out  # a module needs no -m


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a module or a script first, got ''"),
        (["-c", "print()"], "expected a module or a script first, got '-c'"),
        (["-m", "espnet2.bin.no_such_command"], "no Python module named 'espnet2.bin.no_such_command' can be run"),
        (["no/such/script.py"], "no file 'no/such/script.py'"),
    ],
)
def test_run_says_what_it_cannot_run(tmp_path, arguments, message):
    _, err = python("-m", "espnet_mega_plugin.run", *arguments, cwd=tmp_path, status=2)
    assert message in err
