"""The text that stage train_tokenizer learns its pieces from."""

from pathlib import Path

from espnet_mega_plugin.recipe.kaldi_dir import read_table


def training_text(data_dir: str | Path) -> list[str]:
    """Transcripts of a set made by stage create_dataset."""
    return list(read_table(Path(data_dir) / "text").values())
