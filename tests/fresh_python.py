"""Commands in a Python of their own: this interpreter, its packages, and only the variables a test names."""

import os
import subprocess
import sys
from pathlib import Path

OURS = "espnet_mega_plugin.decoder.MEGADecoder"
THEIRS = "espnet2.asr_transducer.decoder.mega_decoder.MEGADecoder"
LOSS = "espnet_mega_plugin.rnnt.warprnnt"

# A module `which.py`: what the process that imports it would train with
WHICH = """
import importlib.util
from espnet2.tasks.asr_transducer import decoder_choices
spec = importlib.util.find_spec("warprnnt_pytorch")
lines = [f"{name} {kind.__module__}.{kind.__qualname__}" for name, kind in decoder_choices.classes.items()]
which = "\\n".join([*lines, f"loss {spec and spec.origin}"])
"""


def start(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """Starts `python ARGUMENTS` in the folder `cwd`, where no checkout of the package lies."""
    ours = ("ESPNET_MEGA_PLUGIN", "_ESPNET_MEGA_PLUGIN", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHON")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    pipe = subprocess.PIPE
    env = {**clean, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, text=True, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """Waits; gives stdout and stderr, and fails where the exit status is another than expected."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"exit status {process.returncode}, expected {status}\n{out}\n{err}"
    return out, err


def python(*arguments: str, cwd: Path, status: int = 0, **environment: str) -> tuple[str, str]:
    """Runs `python ARGUMENTS` to its end."""
    return finish(start(*arguments, cwd=cwd, **environment), status)
