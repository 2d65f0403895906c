"""A corpus recipe in its small form: a copy of the repository's recipe, run on a few seconds of tones."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tones import REPOSITORY

# A tiny model, two updates
TINY = (
    "--ngpu 0 --nj 1 --train_threads 1 --nbpe 14 --asr_config conf/mini_an4_tiny.yaml "
    "--asr_args '--max_epoch 1 --num_iters_per_epoch 2 --model_conf report_cer=false --model_conf report_wer=false'"
)


def copied(corpus: str, root: Path) -> Path:
    """`egs/<corpus>/asr1` below `root`, with the engine and the configurations beside it as in the repository."""
    for name in ("conf", "egs/TEMPLATE", f"egs/{corpus}"):
        ignored = shutil.ignore_patterns("data", "dump", "exp", "downloads")
        shutil.copytree(REPOSITORY / name, root / name, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    return root / "egs" / corpus / "asr1"


def run(folder: Path, *arguments: str, status: int = 0) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [str(folder / "run.sh"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == status, done.stdout
    return done.stdout


def stages_done(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"Stage (\d+): done in", output)]
