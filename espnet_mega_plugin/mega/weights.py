"""Whether a network may give other numbers than before: a value that changes with its weights, cheap to ask for.

Seen are a change in place as autograd sees it (`load_state_dict`, optimisers, any in-place operation), another tensor
behind a parameter, another parameter, another submodule. Not seen is a write behind autograd's back, through `.data`.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter

import torch
from torch import nn

from espnet_mega_plugin.mega.precision import autocast_dtype

_VERSION = attrgetter("_version")


class Weights:
    """A walk over a network's modules takes 0.25 ms for four blocks; this one is repeated only if a module changed."""

    def __init__(self):
        self._modules: list[dict] = []  # each module's own dicts of submodules and parameters
        self._entries: list[int] = []  # which objects were in them
        self._parameters: list[nn.Parameter] = []

    def now(self, network: nn.Module) -> tuple:
        if not self._modules or self._entries != self._objects():
            self._walk(network)
        weight = self._parameters[0]
        return (
            weight.device,
            weight.dtype,
            autocast_dtype(weight.device),
            self._versions(),
            sum(map(torch.Tensor.data_ptr, self._parameters)),
        )

    def _walk(self, network: nn.Module) -> None:
        self._modules = [held for m in network.modules() for held in (m._modules, m._parameters) if held]
        self._parameters = list(network.parameters())
        self._entries = self._objects()

    def _objects(self) -> list[int]:
        return [*map(id, chain.from_iterable(map(dict.values, self._modules)))]

    def _versions(self) -> int:
        try:
            return sum(map(_VERSION, self._parameters))
        except RuntimeError:  # tensors made in inference mode have none
            return sum(p._version for p in self._parameters if not p.is_inference())
