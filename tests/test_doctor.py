"""The doctor tells what this installation would train and decode with; its exit status tells whether that is enough."""

import importlib.util
import json
import platform
import sys
from importlib.metadata import version

import pytest
import torch
from fresh_python import LOSS, OURS, THEIRS, finish, python, start

from espnet_mega_plugin import __main__, __version__, doctor


def test_the_page_of_a_whole_installation(capsys):
    assert __main__.main(["doctor"]) == 0
    page = capsys.readouterr().out
    rows = dict(line.strip().split(maxsplit=1) for line in page.splitlines() if line.startswith("  "))
    assert rows["python"] == platform.python_version() and rows["espnet-mega-plugin"] == __version__
    assert rows["espnet"] == version("espnet") and rows["jiwer"] == version("jiwer")
    assert rows["torch"] == version("torch") and rows["torchaudio"] == version("torchaudio")
    assert f"espnet2 mega        {OURS}\n" in page and f"espnet2 mega_espnet {THEIRS}\n" in page
    assert ("espnet3 mega " in page) == (version("espnet") >= "202611")
    assert rows["warprnnt_pytorch"].startswith((LOSS, "/"))
    assert rows["GPU"].startswith("none") == (not torch.cuda.is_available())
    assert page.endswith("\nNothing needed is missing.\n")


def test_a_switch_that_no_decoder_takes_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("ESPNET_MEGA_PLUGIN_CUDA_GRAPHS", "yes")
    assert __main__.main(["doctor"]) == 1
    assert "must be 0 or 1; got 'yes'" in (page := capsys.readouterr().out)
    assert "mend: unset ESPNET_MEGA_PLUGIN_CUDA_GRAPHS\n" in page


@pytest.mark.slow
def test_something_missing_is_an_error_with_the_command_that_mends_it(tmp_path):
    """Status 1 for a package that does not load, a broken warprnnt_pytorch, and a plugin that nothing attaches."""
    (tmp_path / "broken" / "warprnnt_pytorch").mkdir(parents=True)
    (tmp_path / "broken" / "warprnnt_pytorch" / "__init__.py").write_text("raise ImportError('libwarprnnt.so')")
    (tmp_path / "broken" / "editdistance.py").write_text("raise ImportError('no compiled part')")
    (tmp_path / "broken" / "torchaudio.py").write_text("raise OSError('undefined symbol')")  # 2.11.1, old torch
    command = ["-m", "espnet_mega_plugin", "doctor", "--json"]
    broken = start(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path / "broken"), ESPNET_MEGA_PLUGIN_LOSS="auto")
    detached = start(*command, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")

    report = json.loads(finish(broken, status=1)[0])  # nothing else is on stdout
    assert report["ok"] is False
    mend = {finding["mend"]: finding["what"] for finding in report["findings"] if finding["level"] == "error"}
    anew = "pip install --force-reinstall --no-deps "  # they are installed, so pip would leave them as they are
    loss = "export ESPNET_MEGA_PLUGIN_LOSS=plugin"
    assert set(mend) == {f"{anew}editdistance", f"{anew}'torchaudio==2.11.0'", "what the errors above say", loss}
    assert "no compiled part" in mend[f"{anew}editdistance"]
    assert "undefined symbol" in mend[f"{anew}'torchaudio==2.11.0'"]
    assert "libwarprnnt.so" in mend["export ESPNET_MEGA_PLUGIN_LOSS=plugin"]

    report = json.loads(finish(detached, status=1)[0])
    assert report["decoder"]["espnet2"] == {"mega": THEIRS} and report["loss"]["warprnnt_pytorch"] is None
    errors = [finding for finding in report["findings"] if finding["level"] == "error"]
    assert errors and all("unset TORCH_DEVICE_BACKEND_AUTOLOAD" in finding["mend"] for finding in errors)


def test_reservations_are_warnings_and_leave_the_status_at_0(monkeypatch, capsys):
    versions = {"espnet": "202504"}
    monkeypatch.setattr(doctor, "version_of", lambda name: versions.get(name, "1.0"))
    monkeypatch.setenv("ESPNET_MEGA_PLUGIN", "0")
    assert doctor.main([]) == 0
    page = capsys.readouterr().out
    assert "warning: ESPnet 202504 is none of the versions that the plugin is tested with (202511 and 202611)." in page
    assert "warning: ESPNET_MEGA_PLUGIN=0 turns the plugin off.\n    mend: unset ESPNET_MEGA_PLUGIN\n" in page


def test_packages_of_espnet3_are_a_note(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    missing = [name for name in ("lightning", "dask", "distributed", "dask-jobqueue") if not found(name)]
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    notes = [(finding["what"], finding["mend"]) for finding in report["findings"] if finding["level"] == "note"]
    if not found("espnet3"):
        assert notes == [] and "dask" not in report["versions"]
        return
    assert report["ok"] and {"lightning", "dask", "distributed", "dask-jobqueue"} <= report["versions"].keys()
    ((what, mend),) = notes
    assert what == f"ESPnet3's recipes cannot run without {', '.join(missing)}; ESPnet2's do."
    assert mend == 'pip install "espnet-mega-plugin[espnet3]"'


def test_with_its_packages_espnet3_is_worth_no_note(capsys):
    if not all(map(found, ("espnet3", "lightning", "dask", "distributed", "dask-jobqueue"))):
        pytest.skip("ESPnet3 and its packages are not installed: pip install '.[espnet3]'")
    assert doctor.main([]) == 0
    page = capsys.readouterr().out
    assert "\nnote: " not in page and f"\n  dask-jobqueue       {version('dask-jobqueue')}\n" in page


def found(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def test_an_unknown_choice_of_the_loss_is_an_error_of_a_whole_report(tmp_path):
    """In a process of its own: the value stands in the way of every `import warprnnt_pytorch` from its start."""
    out, _ = python("-m", "espnet_mega_plugin", "doctor", cwd=tmp_path, status=1, ESPNET_MEGA_PLUGIN_LOSS="warp")
    (error,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "ESPNET_MEGA_PLUGIN_LOSS='warp'" in error and "'auto'" in error and "'plugin'" in error
    assert "    mend: unset ESPNET_MEGA_PLUGIN_LOSS\n" in out and f"espnet2 mega        {OURS}\n" in out


def test_the_command_line_names_its_commands(tmp_path):
    for arguments in ([], ["--help"]):
        out, _ = python("-m", "espnet_mega_plugin", *arguments, cwd=tmp_path)
        assert "\n  doctor " in out and "\n  run " in out and __version__ in out
    out, _ = python("-m", "espnet_mega_plugin", "--version", cwd=tmp_path)
    assert out == f"espnet-mega-plugin {__version__}\n"
    for command in ("doctor", "run"):
        assert (
            "usage: python -m espnet_mega_plugin" in python("-m", "espnet_mega_plugin", command, "-h", cwd=tmp_path)[0]
        )
    _, err = python("-m", "espnet_mega_plugin", "docter", cwd=tmp_path, status=2)
    assert "no command 'docter'; there are: decode, doctor, pictures, run" in err
