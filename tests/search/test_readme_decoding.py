"""The README's Python about decoding runs as printed, on an experiment in the place it names."""

import re
from pathlib import Path

from tiny_experiment import experiment, waveform

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_python_block_runs(tmp_path, monkeypatch, capsys, seed):
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "BatchedSpeech2Text" in b)
    monkeypatch.chdir(tmp_path)
    made = experiment(tmp_path / "exp" / "asr", seed)
    Path(made["asr_model_file"]).rename(tmp_path / "exp" / "asr" / "valid.loss.ave.pth")
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {"waveform": waveform(0.7, seed), "another": waveform(0.4, seed + 1)})
    assert len(capsys.readouterr().out.splitlines()) == 2
