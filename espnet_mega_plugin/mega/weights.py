"""Whether a network may give other numbers than before: cheap to ask, as every label that is scored asks.

Seen are a change in place as autograd sees it (`load_state_dict`, optimisers, any in-place operation), another tensor
behind a parameter, another parameter, another submodule, autocast switched. Not seen is a write behind autograd's back,
through `.data`.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_

import torch
from torch import nn

from espnet_mega_plugin.mega.precision import autocast_dtype

_version = attrgetter("_version")


class Weights:
    """A network's weights as they are when this is made."""

    def __init__(self, network: nn.Module):
        # Each module's own dicts of submodules and parameters: a walk through a network takes far longer than these
        self._dicts = [held for module in network.modules() for held in (module._modules, module._parameters) if held]
        self._entries = [*chain.from_iterable(map(dict.values, self._dicts))]
        self._parameters = list(network.parameters())
        self._versions = self._versions_now()
        # Held, so that no tensor made later lies where one of these does
        self._tensors = [parameter.detach() for parameter in self._parameters]
        self._places = self._places_now()
        self._device = self._parameters[0].device
        self._autocast = autocast_dtype(self._device)

    def unchanged(self) -> bool:
        return (
            sum(map(len, self._dicts)) == len(self._entries)
            and all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._entries))
            and self._versions_now() == self._versions
            and self._places_now() == self._places
            and autocast_dtype(self._device) == self._autocast
        )

    def _places_now(self) -> list[int]:
        return [*map(torch.Tensor.data_ptr, self._parameters)]

    def _versions_now(self) -> list[int]:
        try:
            return [*map(_version, self._parameters)]
        except RuntimeError:  # tensors made in inference mode have none
            return [parameter._version for parameter in self._parameters if not parameter.is_inference()]
