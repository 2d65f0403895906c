"""The README's Python runs as printed, and its relative links and make targets exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(capsys):
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "MEGADecoder" in b)
    exec(compile(block, "README.md", "exec"), {})
    assert "torch.Size([1, 4, 64])" in capsys.readouterr().out


def test_links_and_make_targets_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_yaml_key_of_the_decoder_is_explained():
    import inspect

    from espnet_mega_plugin.decoder import MEGADecoder

    for name in inspect.signature(MEGADecoder).parameters:
        assert name == "vocab_size" or f"`{name}`" in README, name


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z_]+@", README)
