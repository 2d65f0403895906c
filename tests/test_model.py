"""The plugin's model class through ESPnet's own task: the pruned loss without k2."""

import argparse
import sys
import types

import pytest
import torch
from espnet2.asr_transducer.espnet_transducer_model import ESPnetASRTransducerModel
from espnet2.tasks.asr_transducer import ASRTransducerTask

from espnet_mega_plugin.model import MegaTransducerModel
from espnet_mega_plugin.rnnt import pruned, rnnt_loss

CONFIGURATION = {
    "token_list": ["<blank>", "a", "b", "c", "d", "<sos/eos>"],
    "input_size": 12,
    "frontend": None,
    "specaug": None,
    "normalize": None,
    "encoder_conf": {
        "input_conf": {"vgg_like": False, "conv_size": 4, "subsampling_factor": 2},
        "body_conf": [{"block_type": "conv1d", "output_size": 8, "kernel_size": 1}],
    },
    "decoder": "mega",
    "decoder_conf": {"block_size": 8, "linear_size": 8, "qk_size": 4, "v_size": 8, "num_heads": 2, "num_blocks": 1},
    "joint_network_conf": {"joint_space_size": 8},
    "scheduler_conf": {"warmup_steps": 4},
    "init": None,
}


def model(**pruned_loss_args) -> ESPnetASRTransducerModel:
    conf = {
        "use_k2_pruned_loss": bool(pruned_loss_args),
        "k2_pruned_loss_args": pruned_loss_args,
        "fastemit_lambda": 0.0,
    }
    return ASRTransducerTask.build_model(argparse.Namespace(**CONFIGURATION, model_conf=conf)).train()


def batch():
    speech, lengths = torch.randn(3, 41, 12), torch.tensor([41, 30, 37])
    labels = torch.tensor([[1, 2, 2, 4], [3, -1, -1, -1], [4, 1, -1, -1]])
    return speech, lengths, labels, torch.tensor([4, 1, 2])


def test_the_task_builds_the_plugins_model():
    built = model()
    assert type(built) is MegaTransducerModel and isinstance(built, ESPnetASRTransducerModel)


def test_pruned_loss_that_keeps_all_rows_is_the_standard_loss(seed):
    torch.manual_seed(seed)
    network = model(prune_range=9, simple_loss_scaling=0.0, loss_type="regular")
    network.steps_num = 100  # warm-up is over: the simple loss has weight 0
    data = batch()
    loss, _, _ = network(*data)
    encoded, frames = network.encode(data[0], data[1])
    labels = data[2].clamp(min=0)
    decoded = network.decoder(torch.nn.functional.pad(labels, (1, 0)))
    logits = network.joint_network(encoded.unsqueeze(2), decoded.unsqueeze(1))
    want = rnnt_loss(logits, labels, frames, data[3], fastemit_lambda=0.0)
    torch.testing.assert_close(loss.reshape(1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["regular", "modified", "constrained"])
def test_espnets_own_method_gives_the_same_with_a_k2(loss_type, seed, monkeypatch):
    """ESPnet's method, k2's functions being ours: weights, warm-up and masks are the same at every step."""

    class RaggedTensor:
        def __init__(self, rows):
            self.rows = [torch.tensor(row) for row in rows]

        def to(self, device):
            return self

        def pad(self, mode, padding_value):
            return torch.nn.utils.rnn.pad_sequence(self.rows, batch_first=True, padding_value=padding_value)

    k2 = types.ModuleType("k2")
    k2.RaggedTensor = RaggedTensor
    for name in ("rnnt_loss_smoothed", "get_rnnt_prune_ranges", "do_rnnt_pruning", "rnnt_loss_pruned"):
        setattr(k2, name, getattr(pruned, name))
    torch.manual_seed(seed)
    ours = model(prune_range=2, simple_loss_scaling=0.4, lm_scale=0.2, am_scale=0.1, loss_type=loss_type)
    data = batch()
    for step in range(7):  # through the warm-up of 4 steps and beyond
        ours.steps_num = step - 1
        loss, _, _ = ours(*data)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "k2", k2)
            patch.setattr(
                MegaTransducerModel,
                "_calc_k2_transducer_pruned_loss",
                ESPnetASRTransducerModel._calc_k2_transducer_pruned_loss,
            )
            ours.steps_num = step - 1
            want, _, _ = ours(*data)
        torch.testing.assert_close(loss, want)
    loss.backward()
    for name, parameter in ours.named_parameters():
        if "out_pos" not in name:  # ESPnet's conv1d block has it for attention blocks behind it
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
