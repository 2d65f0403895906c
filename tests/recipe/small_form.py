"""A corpus recipe in its small form: a copy of the repository's recipe, run on a few seconds of tones."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tones import REPOSITORY

from espnet_mega_plugin.recipe.kaldi_dir import read_table

# A tiny model, two updates; a search with a cap on the labels of a frame, which a model that knows nothing needs
TINY = (
    "--ngpu 0 --nj 1 --inference_nj 1 --train_threads 1 --nbpe 14 --asr_config conf/mini_an4_tiny.yaml "
    "--asr_args '--max_epoch 1 --num_iters_per_epoch 2 --model_conf report_cer=false --model_conf report_wer=false' "
    "--inference_config conf/decode_maes.yaml"
)
PLAIN, BATCHED = (f"decode_maes_{kind}asr_model_valid.loss.ave" for kind in ("", "batched_"))


def copied(corpus: str, root: Path) -> Path:
    """`egs/<corpus>/asr1` below `root`, with the engine and the configurations beside it as in the repository."""
    for name in ("conf", "egs/TEMPLATE", f"egs/{corpus}"):
        ignored = shutil.ignore_patterns("data", "dump", "exp", "downloads")
        shutil.copytree(REPOSITORY / name, root / name, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    return root / "egs" / corpus / "asr1"


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(folder / "run.sh"), *arguments],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *arguments: str, status: int = 0) -> str:
    return finish(start(folder, *arguments), status)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    try:
        output = process.communicate()[0]
    except BaseException:  # the tests are stopped; a Ctrl-C does not reach a session of its own
        os.killpg(process.pid, signal.SIGTERM)
        raise
    print(output)
    assert process.returncode == status, output
    return output


def run_together(*calls: tuple[Path, list[str]]) -> list[str]:
    """Runs that do not need one another, at the same time: most of their time ESPnet's import takes, on one core."""
    return [finish(process) for process in [start(folder, *arguments) for folder, arguments in calls]]


def interrupted(folder: Path, exp: str, *arguments: str) -> str:
    """Run, and press Ctrl-C in the training's second epoch; the training's log as it is then."""
    log = folder / exp / "train.log"
    process = start(folder, *arguments)
    give_up = time.monotonic() + 600
    while not (log.exists() and re.search(r"INFO: 2/\d+epoch started", log.read_text())):
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all that run.sh has started
    finish(process, 128 + signal.SIGINT)
    return log.read_text()


def stages_done(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"Stage (\d+): done in", output)]


def decoded(folder: Path, exp: Path, tag: str, test_set: str) -> dict[str, dict[str, str]]:
    """What stage 12 says of each utterance of a test set, all of them being there: file -> utterance -> words, score."""
    wanted = list(read_table(folder / "dump/raw" / test_set / "wav.scp"))
    names = ("text", "token", "token_int", "score")
    found = {name: read_table(exp / tag / test_set / name, empty_values=True) for name in names}
    assert all(list(table) == wanted for table in found.values()), found
    assert all(math.isfinite(float(score)) for score in found["score"].values())
    return found


def same_words(found: dict[str, dict[str, str]], wanted: dict[str, dict[str, str]]) -> None:
    """And there are words: two empty results would tell nothing."""
    assert found["text"] == wanted["text"] and found["token_int"] == wanted["token_int"]
    assert any(found["text"].values()), "nothing was decoded in any utterance"
    scores = [{utterance: float(score) for utterance, score in each["score"].items()} for each in (found, wanted)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-4)


def scored(exp: Path, tag: str, test_set: str) -> tuple[int, int]:
    """Utterances and words of the line that RESULTS.md has of a decoding, in the table of the words."""
    table = (exp / "RESULTS.md").read_text().split("### WER")[1].split("###")[0]
    (line,) = [line for line in table.splitlines() if line.startswith(f"|{tag}/{test_set}|")]
    utterances, words = line.split("|")[2:4]
    return int(utterances), int(words)
