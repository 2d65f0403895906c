"""Speech for tests that no network has to guess at: a word is a tone of its own, so a tiny model learns it by heart."""

import shutil
from pathlib import Path

import numpy as np
import soundfile

from espnet_mega_plugin.recipe.kaldi_dir import DataDir, write_data_dir

REPOSITORY = Path(__file__).resolve().parents[2]
HERTZ = {"A": 300, "BE": 600, "CO": 1000, "DI": 1500, "EK": 2200, "FU": 3000}


def spoken(sentence: str, rate: int = 16000) -> np.ndarray:
    """0.25 s of tone a word, 0.05 s of near silence around each."""
    time = np.arange(int(0.25 * rate)) / rate
    pause = np.zeros(int(0.05 * rate))
    sound = [pause]
    for word in sentence.split():
        sound += [0.5 * np.sin(2 * np.pi * HERTZ[word] * time), pause]
    sound = np.concatenate(sound)
    return sound + 1e-3 * np.random.default_rng(0).standard_normal(len(sound))


def corpus(folder: Path, sentences: list[str], speakers: int = 2, rate: int = 16000, prefix: str = "") -> DataDir:
    """A data directory with a WAV file for each sentence."""
    wav, text, speaker = {}, {}, {}
    for i, sentence in enumerate(sentences):
        name = f"{prefix}s{i % speakers}-{i:03}"
        wav[name] = str(folder / "wav" / f"{name}.wav")
        text[name], speaker[name] = sentence, f"{prefix}s{i % speakers}"
        Path(wav[name]).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(wav[name], spoken(sentence, rate), rate, subtype="PCM_16")
    data = DataDir(wav, text, speaker)
    write_data_dir(folder, data)
    return data


def recipe(root: Path, defaults: str) -> Path:
    """A recipe below `root`, on a copy of the repository's engine and configurations, with `defaults` in its run.sh."""
    shutil.copytree(REPOSITORY / "egs" / "TEMPLATE", root / "egs" / "TEMPLATE")
    shutil.copytree(REPOSITORY / "conf", root / "egs" / "tones" / "asr1" / "conf")
    folder = root / "egs" / "tones" / "asr1"
    shutil.copy(REPOSITORY / "egs" / "mini_an4" / "asr1" / "path.sh", folder)
    script = folder / "run.sh"
    script.write_text(
        f'#!/usr/bin/env bash\ncd "$(dirname "$0")"\nexec ../../TEMPLATE/asr1/asr.sh {defaults} "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return folder
