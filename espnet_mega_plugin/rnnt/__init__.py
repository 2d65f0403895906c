"""The RNN-T loss: torch only, nothing to compile."""

from espnet_mega_plugin.rnnt.fused import fused_rnnt_loss
from espnet_mega_plugin.rnnt.loss import METHODS, RNNTLoss, rnnt_loss
from espnet_mega_plugin.rnnt.pruned import (
    do_rnnt_pruning,
    get_rnnt_prune_ranges,
    rnnt_loss_pruned,
    rnnt_loss_smoothed,
)

__all__ = [
    "METHODS",
    "RNNTLoss",
    "do_rnnt_pruning",
    "fused_rnnt_loss",
    "get_rnnt_prune_ranges",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_smoothed",
]
