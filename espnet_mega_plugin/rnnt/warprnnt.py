"""Stands in for ``warprnnt_pytorch`` where warp-transducer is not installed: the two names its callers import.

Same argument names, order, defaults and result shapes. What differs: int64 lengths, half types and padding beyond the
longest utterance are accepted, and what warp-transducer answers with garbage is refused (see `loss.py`).
"""

from espnet_mega_plugin.rnnt.loss import RNNTLoss, rnnt_loss

__all__ = ["RNNTLoss", "rnnt_loss"]
