"""Pictures in ESPnet's training: `--num_att_plot N` draws a MEGA decoder too.

ESPnet's trainer draws the attention classes it knows by name, which no transducer of it contains, for the first N
validation utterances of each epoch. Its method stays: the utterances it reads are drawn as they pass by. The trainer's
class is not replaced by another, because ESPnet's DeepSpeed training accepts no other than its own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from espnet_mega_plugin.mega.network import MegaNetwork
from espnet_mega_plugin.pictures.figures import Places, draw_attention, draw_kernels


def add_pictures(trainer: type) -> None:
    """Makes `plot_attention` of ESPnet's Trainer draw MEGA decoders as well; once is enough."""
    theirs = vars(trainer)["plot_attention"].__func__
    if getattr(theirs, "_espnet_mega_plugin", False):
        return

    @functools.wraps(theirs)
    def plot_attention(cls, model, output_dir, summary_writer, iterator, reporter, options):
        if isinstance(getattr(model, "decoder", None), MegaNetwork) and not options.no_forward_run:
            epoch = reporter.get_epoch()
            places = Places(f"{epoch}ep", output_dir, summary_writer, epoch, options.use_wandb)
            iterator = drawn(iterator, model, places)
            if not _espnet_draws(model):  # then its forward pass, with the search for CER and WER, would be for nothing
                options = replace(options, no_forward_run=True)
        return theirs(cls, model, output_dir, summary_writer, iterator, reporter, options)

    plot_attention._espnet_mega_plugin = True
    trainer.plot_attention = classmethod(plot_attention)


def _espnet_draws(model: nn.Module) -> bool:
    """Whether a module of the model is of a class that ESPnet takes attention weights from."""
    theirs = vars(importlib.import_module("espnet2.main_funcs.calculate_all_attentions"))
    kinds = [kind for kind in theirs.values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    attentions = tuple(kind for kind in kinds if kind is not theirs["AbsESPnetModel"])
    return any(isinstance(module, attentions) for module in model.modules())


def drawn(batches: Iterable, model: nn.Module, places: Places) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Hands on ESPnet's batches and draws their utterances, and the kernels once."""
    for ids, batch in batches:
        for utterance, labels in utterances(ids, batch):
            draw_attention(model.decoder, utterance, labels, token_names(model), places)
        yield ids, batch
    draw_kernels(model.decoder, places)


def utterances(ids: Iterable[str], batch: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and labels of a batch as ESPnet collates it; none where it holds no text."""
    if "text" in batch:
        for utterance, labels, length in zip(ids, batch["text"], batch["text_lengths"], strict=True):
            yield utterance, labels[: int(length)]


def token_names(model: nn.Module) -> list[str]:
    """The model's vocabulary; numbers where a model of one's own keeps none."""
    return getattr(model, "token_list", None) or [str(number) for number in range(model.decoder.vocab_size)]


def folder(exp_dir: str | Path) -> Path:
    """ESPnet's folder for pictures of attention."""
    return Path(exp_dir) / "att_ws"
