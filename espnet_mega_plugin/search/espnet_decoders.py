"""ESPnet's prediction networks as scorers of a batched search.

`scorer_of` knows three ways: a decoder's own `label_scorer`; tensors for all rows at once for ESPnet's RNN and
stateless decoders; the public methods of any other decoder of ESPnet's transducer task (RWKV, one of your own).
Dropout is off in the first two whatever the module's mode. R new prefixes, D output size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espnet_mega_plugin.search.leaves import LeafObjects, labels_of, own
from espnet_mega_plugin.search.recurrent import RecurrentLayers
from espnet_mega_plugin.search.scorer import LabelScorer, Rows
from espnet_mega_plugin.search.tree import LabelTree


def scorer_of(decoder: nn.Module) -> LabelScorer:
    """What scores label prefixes with this decoder.

    Args:
        decoder: one with `label_scorer()`, or any decoder with the methods of ESPnet's `AbsDecoder`.

    Raises:
        TypeError: it lacks a method that is needed.
    """
    if callable(getattr(decoder, "label_scorer", None)):
        return decoder.label_scorer()
    # By name, so that ESPnet need not be imported. Of a subclass nobody knows what it changed: its methods tell.
    ours = {
        "espnet2.asr_transducer.decoder.rnn_decoder.RNNDecoder": RecurrentDecoder,
        "espnet2.asr_transducer.decoder.stateless_decoder.StatelessDecoder": EmbeddingDecoder,
    }
    return ours.get(f"{type(decoder).__module__}.{type(decoder).__qualname__}", AnyDecoder)(decoder)


class EmbeddingDecoder(LabelScorer):
    """ESPnet's StatelessDecoder: the last label's embedding; there is nothing to remember."""

    reach = 0  # labels back that nodes are looked at
    recordable = True

    def __init__(self, decoder: nn.Module):
        self._decoder = decoder

    @torch.no_grad()
    def extend(self, rows: Rows, tree: LabelTree) -> Tensor:
        return self._decoder.embed(labels_of(rows))


class RecurrentDecoder(LabelScorer):
    """ESPnet's RNNDecoder, LSTM or GRU, in the dtype of its weights; quantised layers too."""

    reach = 0

    def __init__(self, decoder: nn.Module):
        self._decoder = decoder
        self._layers = RecurrentLayers(decoder.rnn)

    @property
    def recordable(self) -> bool:
        return self._layers.recordable

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        self._layers.reserve(utterances, leaves)

    @torch.no_grad()
    def extend(self, rows: Rows, tree: LabelTree) -> Tensor:
        return self._layers.step(self._decoder.embed(labels_of(rows)), rows)

    def move_leaves(self, kept: Tensor) -> None:
        self._layers.move_leaves(kept)


@dataclass
class LabelsAndState:
    """The part of ESPnet's `Hypothesis` that decoders read."""

    yseq: list[int]
    dec_state: Any


class AnyDecoder(LabelScorer):
    """Any decoder through the methods ESPnet's own searches call: init_state, batch_score, select_state.

    States are kept in the dtype of the weights: those that ESPnet's decoders make are float32 whatever the weights are,
    and scoring with them fails in half precision.
    """

    reach = 0

    def __init__(self, decoder: nn.Module):
        needed = ("init_state", "batch_score", "select_state", "output_size", "parameters")
        missing = [name for name in needed if not hasattr(decoder, name)]
        if missing:
            raise TypeError(
                f"decoder ({type(decoder).__name__}) has no {', '.join(missing)}. A batched search takes decoders with "
                f"the methods of ESPnet's AbsDecoder and output_size, or with label_scorer()."
            )
        self._decoder, self._leaves = decoder, LeafObjects()

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        self._leaves.reserve(utterances, leaves)

    @torch.no_grad()
    def extend(self, rows: Rows, tree: LabelTree) -> Tensor:
        weight = next((p for p in self._decoder.parameters() if p.is_floating_point()), None)
        dtype, device = (None, rows.label.device) if weight is None else (weight.dtype, weight.device)
        if hasattr(self._decoder, "set_device"):
            self._decoder.set_device(device)
        new = self._leaves.of_parents(rows)
        if not new:
            return torch.zeros(len(rows.label), self._decoder.output_size, dtype=dtype, device=device)
        hypotheses = [self._extended(prefix.before, prefix.label, dtype) for prefix in new]
        out, states = self._decoder.batch_score(hypotheses)
        for i, (prefix, hypothesis) in enumerate(zip(new, hypotheses, strict=True)):
            state = own(self._decoder.select_state(states, i), dtype)
            self._leaves.put(prefix, LabelsAndState(hypothesis.yseq, state))
        if rows.valid is None:
            return out
        return out.new_zeros(len(rows.label), out.shape[1]).masked_scatter(rows.valid[:, None], out)

    def _extended(self, before: LabelsAndState | None, label: int, dtype: torch.dtype | None) -> LabelsAndState:
        if before is None:
            return LabelsAndState([label], own(self._decoder.init_state(1), dtype))
        return LabelsAndState([*before.yseq, label], before.dec_state)

    def move_leaves(self, kept: Tensor) -> None:
        self._leaves.move(kept)
