"""Pictures in Lightning's training, which is ESPnet3's.

    trainer:
        callbacks:
        -   _target_: espnet_mega_plugin.pictures.callback.MegaPictures
            exp_dir: ${exp_dir}

in conf/training.yaml.
"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.callbacks import Callback

from espnet_mega_plugin.mega.network import MegaNetwork
from espnet_mega_plugin.pictures.figures import Places, draw_attention, draw_kernels
from espnet_mega_plugin.pictures.trainer import folder, token_names, utterances


class MegaPictures(Callback):
    """Draws attention and EMA kernels of a MEGA decoder after every validation, as ESPnet's `--num_att_plot` does.

    Args:
        exp_dir: the pictures go to `<exp_dir>/att_ws`, and to TensorBoard where it logs.
        num_att_plot: how many validation utterances; 0 draws nothing at all.

    Raises:
        TypeError: the model that is trained has no MEGA decoder.
    """

    def __init__(self, exp_dir: str | Path, num_att_plot: int = 3):
        self.exp_dir, self.num_att_plot = exp_dir, num_att_plot
        self._first: list = []  # (utterance, labels) of the validation in progress

    def on_validation_start(self, trainer, pl_module) -> None:
        self._first = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        wanted = self.num_att_plot - len(self._first)
        if wanted > 0 and trainer.is_global_zero:
            self._first += list(utterances(*batch))[:wanted]

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking or not self._first:
            return
        model = pl_module.model
        if not isinstance(model.decoder, MegaNetwork):
            kind = type(model.decoder).__qualname__
            raise TypeError(
                f"MegaPictures draws MEGA decoders (decoder: mega), and this model's is {kind}: take the callback out "
                "of trainer.callbacks."
            )
        epoch = trainer.current_epoch + 1
        boards = (logger.experiment for logger in trainer.loggers)
        writer = next((board for board in boards if hasattr(board, "add_image")), None)
        places = Places(f"{epoch}ep", folder(self.exp_dir), writer, epoch)
        for utterance, labels in self._first:
            draw_attention(model.decoder, utterance, labels, token_names(model), places)
        draw_kernels(model.decoder, places)
        self._first = []
