"""Stage create_dataset: `data/{train_nodev,train_dev,test}`, as stage 1 of ../asr1 makes them."""

from pathlib import Path

from espnet3.components.data.dataset_builder import DatasetBuilder

from espnet_mega_plugin.recipe import mini_an4


class MiniAn4Builder(DatasetBuilder):
    """AN4 is in the wheel of ESPnet 202611; where it is not, its archive is fetched once.

    Every method takes the recipe's folder, and ignores ESPnet3's other arguments.
    """

    def is_source_prepared(self, recipe_dir: str | Path, **_) -> bool:
        try:
            mini_an4.find_source()
        except FileNotFoundError:
            return False
        return True

    def prepare_source(self, recipe_dir: str | Path, **_) -> None:
        mini_an4.fetch()

    def is_built(self, recipe_dir: str | Path, **_) -> bool:
        data = Path(recipe_dir) / "data"
        return all((data / name / "spk2utt").is_file() for name in mini_an4.SETS)  # the last file of each set

    def build(self, recipe_dir: str | Path, **_) -> None:
        mini_an4.make(Path(recipe_dir) / "data")
