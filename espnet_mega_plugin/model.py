"""ESPnet's transducer model with the pruned loss that needs no k2.

`model_conf: {use_k2_pruned_loss: true, k2_pruned_loss_args: {...}}` keeps ESPnet's keys and meaning; the four functions
behind it are `rnnt/pruned.py`. `loss_type: modified` allows one label a frame, so that labels cannot come in bursts
which a search with a cap on labels a frame would cut.
"""

from __future__ import annotations

import logging

import torch
from espnet2.asr_transducer.espnet_transducer_model import ESPnetASRTransducerModel
from torch import Tensor

from espnet_mega_plugin.rnnt.pruned import (
    do_rnnt_pruning,
    get_rnnt_prune_ranges,
    rnnt_loss_pruned,
    rnnt_loss_smoothed,
)


class MegaTransducerModel(ESPnetASRTransducerModel):
    """ESPnet's model; only the pruned loss is computed by the plugin's functions instead of k2's."""

    def _calc_k2_transducer_pruned_loss(
        self,
        encoder_out: Tensor,
        decoder_out: Tensor,
        labels: Tensor,
        encoder_out_len: Tensor,
        decoder_out_len: Tensor,
        prune_range: int = 5,
        simple_loss_scaling: float = 0.5,
        lm_scale: float = 0.0,
        am_scale: float = 0.0,
        loss_type: str = "regular",
        reduction: str = "mean",
        padding_idx: int = 0,
    ) -> Tensor:
        """Simple loss over all rows, then the joint network's loss over the `prune_range` rows it points to.

        B utterances, T frames, U labels. Over the first `warmup_steps` (the scheduler's) steps the weight of the
        joint network's loss rises from 0.1 to 1 and that of the simple loss falls from 1 to `simple_loss_scaling`,
        as in ESPnet.

        Args:
            encoder_out: (B, T, D_enc)
            decoder_out: (B, U+1, D_dec)
            labels: padded with the model's ignore_id. (B, U)
            encoder_out_len, decoder_out_len: frames and labels of each utterance. (B,)
            prune_range: rows kept in each frame.
            simple_loss_scaling: final weight of the simple loss.
            lm_scale, am_scale: shares of the simpler models that smooth the simple loss.
            loss_type: regular, modified (at most one label a frame) or constrained.
            reduction: mean, sum or none.
            padding_idx: class of the blank.
        """
        if self.fastemit_lambda > 0.0 and self.steps_num < 0:
            logging.info("The pruned loss has no FastEmit: fastemit_lambda is not used.")
        self.steps_num += 1
        warm = min(1.0, self.steps_num / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        boundary = torch.zeros(len(labels), 4, dtype=torch.int64, device=encoder_out.device)
        boundary[:, 2], boundary[:, 3] = decoder_out_len, encoder_out_len
        symbols = labels.masked_fill(labels == self.ignore_id, padding_idx)

        simple, posteriors = rnnt_loss_smoothed(
            self.lm_proj(decoder_out).float(),
            self.am_proj(encoder_out).float(),
            symbols,
            padding_idx,
            lm_only_scale=lm_scale,
            am_only_scale=am_scale,
            boundary=boundary,
            rnnt_type=loss_type,
            reduction=reduction,
            return_grad=True,
        )
        ranges = get_rnnt_prune_ranges(*posteriors, boundary, prune_range)
        joint = self.joint_network(
            *do_rnnt_pruning(self.joint_network.lin_enc(encoder_out), self.joint_network.lin_dec(decoder_out), ranges),
            no_projection=True,
        )
        pruned = rnnt_loss_pruned(
            joint.float(), symbols, ranges, padding_idx, boundary, rnnt_type=loss_type, reduction=reduction
        )
        return (1 - warm * (1 - simple_loss_scaling)) * simple + (0.1 + 0.9 * warm) * pruned
