"""`python -m espnet_mega_plugin doctor`: what this installation would train and decode with, and what it lacks.

It looks by doing: it imports what ESPnet would import and asks ESPnet's task for `mega`. It attaches nothing itself, so
that it sees what ESPnet's own commands see in this environment.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points, requires

from espnet_mega_plugin import __version__
from espnet_mega_plugin.attach import (
    LOSS_SWITCH,
    PLUGIN_LOSS,
    SWITCH,
    TASKS,
    WARPRNNT,
    is_off,
    loss_in_use,
    loss_is_forced,
    version_of,
)

ESPNET_LINES = ("202511", "202611")
PLUGIN_CLASS = "espnet_mega_plugin.decoder.MEGADecoder"

# module, pip's name, what stops without it. ESPnet declares none of the first group, and part of the second
NEEDS = (
    ("torch", "torch", "everything"),
    ("torchaudio", "torchaudio", "ESPnet's transducer task cannot be imported"),
    ("tensorboard", "tensorboard", "training cannot start (unless --use_tensorboard false)"),
    ("matplotlib", "matplotlib", "training ends after the first epoch (unless --use_matplotlib false)"),
    ("editdistance", "editdistance", "validation fails with report_cer or report_wer"),
    ("six", "six", "ESPnet-EZ cannot be imported"),  # it came with 202511 and went after it
    ("yaml", "pyyaml", "no configuration can be read"),
    ("sentencepiece", "sentencepiece", "no bpe tokens"),
    ("soundfile", "soundfile", "no audio can be read"),
    ("jiwer", "jiwer", "the recipes cannot score"),
    ("tqdm", "tqdm", "the recipes show no progress"),
    ("espeakng_loader", "espeakng-loader", "the recipe spoken_numbers cannot make its corpus"),
)
# What ESPnet3's recipes import, which comes with the plugin's extra `espnet3` and not with ESPnet
ESPNET3_NEEDS = {
    "lightning": "lightning",
    "dask": "dask",
    "distributed": "distributed",
    "dask_jobqueue": "dask-jobqueue",
}


@dataclass(frozen=True)
class Finding:
    # "error": something needed is missing; "warning": it works, with a reservation; "note": a part that not all need
    level: str
    what: str
    mend: str  # the command that mends it


@dataclass
class Report:
    """What the doctor saw; `ok` is False where something needed is missing."""

    versions: dict[str, str | None] = field(default_factory=dict)  # None: not installed
    decoder: dict[str, dict[str, str]] = field(default_factory=dict)  # ESPnet's line -> name in the YAML -> class
    loss: dict[str, str | None] = field(default_factory=dict)
    device: dict[str, object] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)

    def error(self, what: str, mend: str) -> None:
        self.findings.append(Finding("error", what, mend))

    def warning(self, what: str, mend: str) -> None:
        self.findings.append(Finding("warning", what, mend))

    def note(self, what: str, mend: str) -> None:
        self.findings.append(Finding("note", what, mend))


def examine() -> Report:
    """Looks at this environment; takes as long as ESPnet's import, some ten seconds."""
    report = Report()
    _look_at_packages(report)
    _look_at_espnet3(report)
    if _attempt("torch") is None and version_of("espnet") is not None:
        _look_at_decoder(report)
        _look_at_loss(report)
        _look_at_device(report)
    return report


def _attempt(module: str) -> Exception | None:
    """Imports a module; what went wrong, if anything (a compiled library that does not fit raises OSError)."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return error
    return None


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _look_at_packages(report: Report) -> None:
    report.versions = {"python": platform.python_version(), "espnet-mega-plugin": __version__}
    espnet = report.versions["espnet"] = version_of("espnet")
    right_line = f"pip install espnet=={ESPNET_LINES[sys.version_info >= (3, 12)]}"
    if espnet is None:
        report.error("ESPnet is not installed.", right_line)
    elif espnet not in ESPNET_LINES:
        known = " and ".join(ESPNET_LINES)
        report.warning(f"ESPnet {espnet} is none of the versions that the plugin is tested with ({known}).", right_line)
    for module, package, loses in NEEDS:
        if module == "six" and espnet != "202511":
            continue
        report.versions[package] = version_of(package)
        error = _attempt(module)
        if error is not None:
            report.error(f"{package} cannot be imported ({_say(error)}): {loses}.", _how_to_install(package))


def _how_to_install(package: str) -> str:
    """The command, for the versions this plugin asks for here; one that is there and broken is installed anew."""
    again = "--force-reinstall --no-deps " if version_of(package) else ""
    wanted = package
    # without the plugin's metadata (run from a checkout) or the reader of it, any version
    with contextlib.suppress(ImportError):
        from packaging.requirements import Requirement

        for requirement in map(Requirement, requires("espnet-mega-plugin") or ()):
            if requirement.name == package and (
                requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            ):
                wanted = f"{package}{requirement.specifier}"
    return f"pip install {again}{wanted if wanted == package else repr(wanted)}"


def _look_at_espnet3(report: Report) -> None:
    """Whether its packages are there; they are not imported, because most people do without and it takes seconds."""
    if importlib.util.find_spec("espnet3") is None:
        return  # it comes with 202611
    for package in ESPNET3_NEEDS.values():
        report.versions[package] = version_of(package)
    missing = [package for module, package in ESPNET3_NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        what = f"ESPnet3's recipes cannot run without {', '.join(missing)}; ESPnet2's do."
        report.note(what, 'pip install "espnet-mega-plugin[espnet3]"')


def _look_at_decoder(report: Report) -> None:
    if is_off():
        report.warning(f"{SWITCH}={os.environ[SWITCH]} turns the plugin off.", f"unset {SWITCH}")
    for name in TASKS:
        line = name.partition(".")[0]
        if line != "espnet2" and importlib.util.find_spec(line) is None:
            continue  # ESPnet3 comes with 202611
        error = _attempt(name)
        if error is not None:
            report.decoder[line] = {"error": _say(error)}
            again = getattr(error, "name", None) is None and not report.ok  # most likely it is the same again
            mend = "what the errors above say" if again else _how_to_install(_package_of(error))
            report.error(f"{name} cannot be imported ({_say(error)}).", mend)
            continue
        classes = sys.modules[name].decoder_choices.classes
        found = {key: f"{classes[key].__module__}.{classes[key].__qualname__}" for key in classes if "mega" in key}
        report.decoder[line] = found
        if found.get("mega") != PLUGIN_CLASS and not is_off():
            report.error(f"`decoder: mega` of {line} is {found.get('mega')}, not the plugin's.", _how_to_attach())


def _package_of(error: Exception) -> str:
    """The package to install for an import that failed."""
    missing = (getattr(error, "name", None) or "espnet").partition(".")[0]
    return {"distutils": "setuptools"}.get(missing, missing)


def _how_to_attach() -> str:
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return "unset TORCH_DEVICE_BACKEND_AUTOLOAD (or run commands under `python -m espnet_mega_plugin.run`)"
    if "espnet_mega_plugin" not in {point.name for point in entry_points(group="torch.backends")}:
        return "pip install espnet-mega-plugin (or run commands under `python -m espnet_mega_plugin.run`)"
    return 'python -c "import espnet_mega_plugin; espnet_mega_plugin.register()"  (its error says why)'


def _look_at_loss(report: Report) -> None:
    try:
        loss_is_forced()
    except ValueError as error:  # looking further would raise it again: the plugin's import hook asks the same
        report.loss = {WARPRNNT: None, LOSS_SWITCH: os.environ[LOSS_SWITCH], "error": _say(error)}
        report.error(str(error), f"unset {LOSS_SWITCH}")
        return
    error = _attempt(WARPRNNT)
    if error is None and not hasattr(sys.modules[WARPRNNT], "RNNTLoss"):
        error = ImportError(f"{WARPRNNT} has no RNNTLoss")
    report.loss = {WARPRNNT: loss_in_use(), LOSS_SWITCH: os.environ.get(LOSS_SWITCH)}
    if error is not None:
        report.loss["error"] = _say(error)
    if error is None:
        return
    if is_off():
        report.warning(f"{WARPRNNT} cannot be imported ({_say(error)}): no transducer trains.", f"unset {SWITCH}")
    elif report.loss[WARPRNNT] is None:
        report.error(f"{WARPRNNT} is not answered by the plugin's loss: no transducer trains.", _how_to_attach())
    else:
        broken = f"the installed {WARPRNNT} ({report.loss[WARPRNNT]}) is broken ({_say(error)})"
        report.error(f"{broken}: no transducer trains.", f"export {LOSS_SWITCH}=plugin")


def _look_at_device(report: Report) -> None:
    import torch

    from espnet_mega_plugin import recording

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report.device = {"gpu": gpus, "cuda": torch.version.cuda, "triton": version_of("triton")}
    try:
        recording.switched_on()
    except ValueError as error:
        report.error(f"{error} No decoder can be made.", f"unset {recording.SWITCH}")
    if gpus and report.device["triton"] is None:
        report.warning("Triton is not installed: nothing compiled for the GPU can be used.", "pip install triton")


def page(report: Report) -> str:
    """The report for people."""
    lines = ["versions"]
    lines += [f"  {name:<20}{version or 'not installed'}" for name, version in report.versions.items()]
    lines.append("decoder: mega")
    for line, found in report.decoder.items():
        lines += [f"  {line + ' ' + key:<20}{value}" for key, value in found.items()]
    lines.append("loss")
    origin = report.loss.get(WARPRNNT)
    owner = "the plugin's, pure PyTorch" if origin == PLUGIN_LOSS else "a real installation" if origin else "none"
    lines.append(f"  {WARPRNNT:<20}{origin or 'not importable'} ({owner})")
    lines.append("device")
    gpus = ", ".join(report.device.get("gpu") or ()) or "none; ESPnet's commands take --ngpu 0"
    lines.append(f"  {'GPU':<20}{gpus}")
    lines.append(f"  {'Triton':<20}{report.device.get('triton') or 'not installed'}")
    lines.append("")
    for finding in report.findings:
        lines += [f"{finding.level}: {finding.what}", f"    mend: {finding.mend}"]
    lines.append("Nothing needed is missing." if report.ok else "Something needed is missing: see the errors above.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the report; 1 where something needed is missing, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mega_plugin doctor",
        description="Checks what `decoder: mega` and the transducer loss are in this environment, and what is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # what ESPnet's import prints is not the report
        report = examine()
    print(json.dumps({**asdict(report), "ok": report.ok}, indent=2) if options.json else page(report))
    return 0 if report.ok else 1
