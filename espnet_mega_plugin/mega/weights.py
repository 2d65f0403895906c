"""Whether a network may give other numbers than before: cheap to ask, as every label that is scored asks.

Seen are a change in place as autograd sees it (`load_state_dict`, any in-place operation), an optimiser's step (a fused
one writes behind autograd's back), another tensor behind a parameter, another parameter, another submodule, autocast
switched; buffers (masks of pruning) as parameters, and other weights of a quantised layer. Not seen is any other write
behind autograd's back: through `.data`, through a NumPy view, by torch's fused optimiser functions called by hand; nor
what is no weight: a hook, a function or a plain attribute of a layer.
"""

from __future__ import annotations

from itertools import chain, count
from operator import attrgetter, is_

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from espnet_mega_plugin.replica import own_parameters

_version = attrgetter("_version")
_counted = count(1)
_steps = 0  # of all optimisers


def _stepped(*_: object) -> None:
    global _steps
    _steps = next(_counted)


register_optimizer_step_post_hook(_stepped)


class Weights:
    """A network's weights as they are when this is made."""

    def __init__(self, network: nn.Module):
        # Views of each module's own dicts of submodules, parameters, buffers: a walk through a network takes far longer
        modules = [*network.modules()]
        own = [*map(own_parameters, modules), *(module._buffers for module in modules)]
        self._held = [held.values() for held in (*(module._modules for module in modules), *own) if held]
        self._entries = [*chain.from_iterable(self._held)]
        by_identity = {id(one): one for held in own for one in held.values() if one is not None}
        self._parameters = [*by_identity.values()]  # and buffers
        # A quantised layer's weights are an object outside of both
        self._quantised = [(own, own["_packed_params"]) for own in map(vars, modules) if "_packed_params" in own]
        # Made in inference mode they have no number that grows, so they may be others at any time
        self._unseen = any(map(torch.Tensor.is_inference, self._parameters))
        self._steps = _steps
        self._changes = self._changes_now()
        # Held, so that no tensor made later lies where one of these does
        self._tensors = [parameter.detach() for parameter in self._parameters]
        self._places = self._places_now()
        kind = self._parameters[0].device.type
        self._autocasts = kind if torch.amp.is_autocast_available(kind) else None
        self._autocast = self._autocast_now()

    def unchanged(self) -> bool:
        return (
            not self._unseen
            and self._steps == _steps
            and sum(map(len, self._held)) == len(self._entries)
            and all(map(is_, chain.from_iterable(self._held), self._entries))
            and all(own.get("_packed_params") is held for own, held in self._quantised)
            and self._changes_now() == self._changes
            and self._places_now() == self._places
            and self._autocast_now() == self._autocast
        )

    def _autocast_now(self) -> torch.dtype | None:
        """As `precision.autocast_dtype`, without asking again whether the device has it."""
        if self._autocasts is None or not torch.is_autocast_enabled(self._autocasts):
            return None
        return torch.get_autocast_dtype(self._autocasts)

    def _places_now(self) -> list[int]:
        return [*map(torch.Tensor.data_ptr, self._parameters)]

    def _changes_now(self) -> int:
        return 0 if self._unseen else sum(map(_version, self._parameters))  # a parameter's own number only grows
