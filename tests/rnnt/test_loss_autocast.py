"""The model's standard loss under autocast: it reads the logits in the type they have, and autocast stays outside."""

import pytest
import torch
from test_model import batch, model

from espnet_mega_plugin import RNNTLoss


@pytest.mark.parametrize("choice", ["standard", "auto"])
def test_the_standard_loss_runs_outside_autocast(choice):
    network, seen = model(transducer_loss=choice), []
    network.joint_network.lin_out.register_forward_hook(lambda *_: None)  # 'auto' then needs the logits
    network.criterion_transducer = RNNTLoss()
    network.criterion_transducer.register_forward_pre_hook(
        lambda _, given: seen.append((given[0].dtype, torch.is_autocast_enabled("cpu")))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = network(*batch())
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(torch.bfloat16, False)]
    loss.backward()
