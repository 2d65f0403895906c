"""Recordings and transcripts of one set, for ESPnet3's DataOrganizer."""

from pathlib import Path

import soundfile
from espnet3.components.data.base_dataset import BaseDataset
from espnet3.contract import Field

from espnet_mega_plugin.recipe.kaldi_dir import read_data_dir

RECIPE = Path(__file__).resolve().parents[1]


class MiniAn4(BaseDataset):
    """One set of `<recipe>/data`; an item is `{"speech": samples at 16 kHz (T,) float32, "text": words}`.

    Args:
        split: train_nodev, train_dev or test.
        named: an item also has "utt_id", which decoding writes down; ESPnet's collation in training takes no such key.
        data_dir: where the sets are.

    Raises:
        FileNotFoundError: the set is not there; stage create_dataset makes it.
    """

    fields = (Field("speech", "audio"), Field("text", "text"), Field("utt_id", "text", optional=True))

    def __init__(self, split: str, named: bool = False, data_dir: str | Path = RECIPE / "data"):
        directory = Path(data_dir) / split
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such set; run `python run.py --stages create_dataset ...` first.")
        self.data = read_data_dir(directory)
        self.utterances = self.data.utterances()
        self.named = named

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict:
        utterance = self.utterances[int(index)]
        speech, _ = soundfile.read(self.data.wav[utterance], dtype="float32")
        item = {"speech": speech, "text": self.data.text[utterance]}
        return {**item, "utt_id": utterance} if self.named else item
