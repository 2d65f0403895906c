"""The joint network on picked pairs of encoder frames and label prefixes.

ESPnet's joint network is lin_out(activation(lin_enc(frame) + lin_dec(prefix))). A search meets each frame with several
prefixes and each prefix with several frames, so both are projected once and only the sums are made for pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Joint:
    def __init__(self, joint_network: nn.Module):
        """
        Raises:
            TypeError: the joint network lacks a part of ESPnet's JointNetwork.
        """
        parts = ("lin_enc", "lin_dec", "lin_out", "joint_activation")
        missing = [name for name in parts if not callable(getattr(joint_network, name, None))]
        if missing:
            raise TypeError(
                f"joint_network ({type(joint_network).__name__}) has no {', '.join(missing)}: the batched search needs "
                f"ESPnet's JointNetwork. Search with ESPnet's own types (default, tsd, alsd, maes) instead."
            )
        self.frames, self.prefixes = joint_network.lin_enc, joint_network.lin_dec
        self._activation, self._out = joint_network.joint_activation, joint_network.lin_out

    def __call__(self, pairs: Tensor) -> Tensor:
        """Log-probabilities for sums of a projected frame and a prefix. (R, J) -> (R, V), float32 or better"""
        logits = self._out(self._activation(pairs))
        return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
