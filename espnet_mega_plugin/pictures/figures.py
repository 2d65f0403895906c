"""The figures, and where they go.

L labels, D block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from espnet_mega_plugin.mega.network import MegaNetwork
from espnet_mega_plugin.pictures.weights import attention_weights, ema_kernels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KERNEL_LABELS = 50  # label distances of a kernel picture, the same in every epoch so that they can be compared
LEGIBLE = 50  # labels that can be named on an axis


@dataclass(frozen=True)
class Places:
    """Where pictures go: PNG files below `folder`, TensorBoard's `writer`, wandb; each only where it is given."""

    when: str  # in the files' names: "3ep" in an epoch, as ESPnet has it, or a checkpoint's name
    folder: Path | None = None
    writer: Any = None  # torch.utils.tensorboard.SummaryWriter
    step: int | None = None
    wandb: bool = False

    def put(self, figure: Figure, name: str, utterance: str | None = None) -> None:
        """Writes one figure everywhere; ESPnet's names: `<utterance>/<name>.<when>.png`, tag `<name>_<utterance>`."""
        from matplotlib.image import imsave

        pixels = _pixels(figure)  # drawn once, which takes longer than all the rest
        if self.folder is not None:
            path = self.folder / (utterance or "") / f"{name}.{self.when}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            imsave(path, pixels)
        tag = f"{name}_{utterance}" if utterance else name
        if self.writer is not None:
            self.writer.add_image(tag, pixels, self.step, dataformats="HWC")
        if self.wandb:
            import wandb

            wandb.log({f"attention plot/{tag}": wandb.Image(pixels)})


def draw_attention(
    network: MegaNetwork, utterance: str, labels: Sequence[int] | Tensor, tokens: Sequence[str], places: Places
) -> None:
    """One picture of all blocks' attention over an utterance.

    Args:
        network: the decoder, in eval mode.
        utterance: its name.
        labels: of the utterance, without the start label. (L - 1,)
        tokens: the vocabulary.
        places: where the picture goes.
    """
    labels = [0, *(int(label) for label in labels)]  # ESPnet's transducers start with blank, which is 0
    figure = attention_figure(attention_weights(network, labels), [tokens[label] for label in labels], utterance)
    places.put(figure, "decoder.attention", utterance)


def draw_kernels(network: MegaNetwork, places: Places, length: int = KERNEL_LABELS) -> None:
    """One picture of all blocks' EMA kernels."""
    places.put(kernel_figure(ema_kernels(network, length)), "decoder.ema_kernels")


def attention_figure(weights: Sequence[Tensor], tokens: Sequence[str], title: str = "") -> Figure:
    """A panel for each block: rows attend to columns; brightness is the share, from 0 to the panel's largest.

    Args:
        weights: of each block. (L, L)
        tokens: the labels' names. (L,)
    """
    figure, panels = _panels(len(weights))
    for number, (panel, shares) in enumerate(zip(panels, weights, strict=True)):
        image = panel.imshow(shares.numpy(), aspect="auto", vmin=0.0, interpolation="nearest")
        panel.set(title=f"block {number}", xlabel="attended label", ylabel="label")
        if len(tokens) <= LEGIBLE:
            panel.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6, parse_math=False)
            panel.set_yticks(range(len(tokens)), tokens, fontsize=6, parse_math=False)
        figure.colorbar(image, ax=panel)
    figure.suptitle(title, parse_math=False)
    return figure


def kernel_figure(kernels: Sequence[Tensor]) -> Figure:
    """A panel for each block: a row is a channel's response over label distance; far-reaching channels stand below.

    Args:
        kernels: of each block. (D, distances)
    """
    figure, panels = _panels(len(kernels))
    for number, (panel, kernel) in enumerate(zip(panels, kernels, strict=True)):
        largest = float(kernel.abs().max()) or 1.0
        rows, colours = kernel[by_reach(kernel)].numpy(), {"cmap": "RdBu", "vmin": -largest, "vmax": largest}
        image = panel.imshow(rows, aspect="auto", interpolation="nearest", **colours)
        panel.set(title=f"block {number}", xlabel="distance in labels", ylabel="channels, by reach")
        figure.colorbar(image, ax=panel)
    figure.suptitle("EMA kernels")
    return figure


def by_reach(kernel: Tensor) -> Tensor:
    """The channels in the order of their reach, the mean distance of what they answer to. (D, distances) -> (D,)"""
    size = kernel.abs()
    distance = torch.arange(kernel.shape[1], dtype=kernel.dtype)
    reach = (size * distance).sum(1) / size.sum(1).clamp(min=torch.finfo(kernel.dtype).tiny)
    return torch.argsort(reach, stable=True)


def _panels(count: int) -> tuple[Figure, list]:
    """A figure with `count` panels, at most four in a row. It belongs to no pyplot, so nothing has to be closed."""
    from matplotlib.figure import Figure

    columns = min(count, 4)
    rows = -(-count // columns)
    width, height = 5.0 * columns, 4.5 * rows  # inches
    figure = Figure(figsize=(width, height))
    # matplotlib's own layouts draw everything twice
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.3 / width, bottom=0.8 / height, top=1 - 0.8 / height, wspace=0.2, hspace=0.4
    )
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
