"""A step of fixed shapes, recorded once and replayed (`recording.py`).

A step's inputs are copied to where the recorded one reads them, filled up to the next of a few sizes: places no
hypothesis has, labels nobody sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espnet_mega_plugin.mega.step import Constants, Fresh, Together, step
from espnet_mega_plugin.recording import Recorder, RecorderFor, casting_anew

if TYPE_CHECKING:
    from espnet_mega_plugin.mega.network import MegaNetwork

HYPOTHESES, LABELS = 32, 4096  # the largest sizes that are recorded; a step beyond them runs as it is
FEWEST = 64  # labels; sizes between are powers of two, so that a decoder records some dozens of steps at most


class StepGraphs:
    """The recorded steps of a network with the weights as they are."""

    def __init__(self, network: MegaNetwork, constants: Constants, recorder_for: RecorderFor):
        self.network, self.constants, self.recorder_for = network, constants, recorder_for
        self._recorder = recorder_for(network.embed.weight.device)
        self._steps: dict[tuple[int, int], _Step] = {}

    def __call__(self, labels: Tensor, padding: Tensor | None, past: Together) -> tuple[Tensor, Fresh]:
        """As `step` with these constants. The result is overwritten by the next call."""
        B, U = len(labels), past.labels.shape[1] - len(labels)
        if B > HYPOTHESES or U > LABELS:
            return step(self.network, self.constants, labels, padding, past)
        size = _at_least(B, 1), _at_least(U, FEWEST)
        if size not in self._steps:
            self._steps[size] = _Step(self.network, self.constants, self._recorder, *size, past)
        return self._steps[size](labels, padding, past)


class _Step:
    """A recorded step of B hypotheses and U labels before them, and where it reads and writes."""

    def __init__(self, network: MegaNetwork, constants: Constants, recorder: Recorder, B: int, U: int, like: Together):
        K, D = network.truncation_length, network.output_size
        with torch.inference_mode(False):
            new = like.labels.new_zeros
            self.labels = new(B, dtype=torch.long)
            self.padding = new(B, dtype=torch.bool)
            self.ema = None if like.ema is None else like.ema.new_zeros(len(like.ema), B, *like.ema.shape[2:])
            self.inputs = None if K is None else like.inputs.new_zeros(network.num_blocks, B, K - 1, D)
            table = new(like.labels.shape[0], U + B, like.labels.shape[2])
            bias = like.bias.new_full((len(like.bias), B, U + B), float("-inf"))
        self.past = Together(self.ema, self.inputs, table, bias)
        self.U, self.result = U, None

        def run() -> None:
            with casting_anew():
                self.result = step(network, constants, self.labels, self.padding, self.past)

        self._hide_all()
        with torch.no_grad():
            self.recorded = recorder(run)

    def _hide_all(self) -> None:
        self.past.bias.fill_(float("-inf"))
        # a place no hypothesis has sees itself: a softmax over nothing is NaN
        self.past.bias[:, :, self.U :].diagonal(dim1=1, dim2=2).zero_()

    @torch.no_grad()
    def __call__(self, labels: Tensor, padding: Tensor | None, past: Together) -> tuple[Tensor, Fresh]:
        B, table, bias = len(labels), self.past.labels, self.past.bias
        U = past.labels.shape[1] - B
        self.labels[:B] = labels
        self.padding.zero_()
        if padding is not None:
            self.padding[:B] = padding
        if self.ema is not None:
            self.ema[:, :B] = past.ema
        if self.inputs is not None:
            before = past.inputs.shape[2]
            self.inputs.zero_()  # in front of the first label
            self.inputs[:, :B, self.inputs.shape[2] - before :] = past.inputs
        table[:, :U] = past.labels[:, :U]
        self._hide_all()
        bias[:, :B, :U] = past.bias[:, :, :U]
        bias[:, :B, self.U : self.U + B] = past.bias[:, :, U:]
        self.recorded.replay()
        out, fresh = self.result
        return out[:B], Fresh(*(None if x is None else x[:, :B] for x in fresh))


def _at_least(count: int, fewest: int) -> int:
    """The next power of two."""
    return max(fewest, 1 << max(0, count - 1).bit_length())
