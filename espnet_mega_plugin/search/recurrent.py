"""LSTM, GRU and plain recurrent layers, one label further for many prefixes at once, with their states by leaf.

R new prefixes, N layers of all modules together, D hidden units.

Calling a torch module for a single label costs several times its arithmetic on a CPU: it prepares its weights for a
long sequence each time. torch's functions for a single cell do not.

torch's dynamic quantisation rounds what comes in to a range that all rows of a call share: with quantised layers, and
only with them, the last digits of a prefix depend on the others that are scored with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from espnet_mega_plugin.search.leaves import PlaceTensor
from espnet_mega_plugin.search.scorer import Rows

KINDS = ("LSTM", "GRU", "RNN")  # torch's class names, quantised or not


class RecurrentLayers:
    def __init__(self, modules: Iterable[nn.Module]):
        """
        Args:
            modules: nn.LSTM, nn.GRU or nn.RNN with batch_first, or torch's quantised forms; each takes the output of
                the one before. Read anew for each step: changed weights take effect at once.
        """
        self._modules = modules
        first, *_ = modules
        shape = sum(module.num_layers for module in modules), first.hidden_size
        self._states = [PlaceTensor(*shape) for _ in range(2 if _has_cell(first) else 1)]  # hidden; cell

    @property
    def recordable(self) -> bool:
        """Of a hook or a quantised layer nobody knows what it does."""
        return all(map(_is_plain, self._modules))

    def reserve(self, utterances: int, leaves: int) -> None:
        for state in self._states:
            state.reserve(utterances, leaves)

    def move_leaves(self, kept: Tensor) -> None:
        for state in self._states:
            state.move(kept)

    def step(self, x: Tensor, rows: Rows) -> Tensor:
        """Output for new prefixes, from their last label's embedding; their states are kept. (R, E) -> (R, D)"""
        before = [state.of_parents(rows, x) for state in self._states]  # (R, N, D)
        after, layer = [], 0
        for module in self._modules:
            layers = slice(layer, layer + module.num_layers)
            advance = _by_cells if _is_plain(module) else _by_call
            x, states = advance(module, x, [state[:, layers] for state in before])
            after.append(states)
            layer += module.num_layers
        for state, values in zip(self._states, zip(*after, strict=True), strict=True):
            state.put(rows, rows.leaf, torch.cat(values, 1))
        return x


def _has_cell(module: nn.Module) -> bool:
    return isinstance(module, nn.LSTM) or type(module).__name__ == "LSTM"


def _is_plain(module: nn.Module) -> bool:
    """Whether the module does what its weights say; quantised ones and those with hooks (weight norm) do more."""
    hooks = module._forward_pre_hooks or module._forward_hooks
    return type(module) in (nn.LSTM, nn.GRU, nn.RNN) and not hooks and not module.proj_size


def _by_cells(module: nn.Module, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    after = []
    for layer, weights in enumerate(module.all_weights):
        before = [state[:, layer] for state in states]
        if isinstance(module, nn.LSTM):
            x, cell = torch.lstm_cell(x, before, *weights)
            after.append((x, cell))
        elif isinstance(module, nn.GRU):
            x = torch.gru_cell(x, *before, *weights)
            after.append((x,))
        else:
            cell = torch.rnn_tanh_cell if module.nonlinearity == "tanh" else torch.rnn_relu_cell
            x = cell(x, *before, *weights)
            after.append((x,))
    return x, [torch.stack(state, 1) for state in zip(*after, strict=True)]


def _by_call(module: nn.Module, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    if not len(x):
        return x.new_zeros(0, module.hidden_size), states  # torch's modules refuse an empty batch
    states = tuple(state.transpose(0, 1).contiguous() for state in states)
    out, after = module(x[:, None], states if _has_cell(module) else states[0])
    after = after if _has_cell(module) else (after,)
    return out[:, 0], [state.transpose(0, 1) for state in after]
