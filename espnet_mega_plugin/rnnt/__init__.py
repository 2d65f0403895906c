"""The RNN-T loss: torch only, nothing to compile."""

from espnet_mega_plugin.rnnt.fused import fused_rnnt_loss
from espnet_mega_plugin.rnnt.loss import METHODS, RNNTLoss, rnnt_loss

__all__ = ["METHODS", "RNNTLoss", "fused_rnnt_loss", "rnnt_loss"]
