"""What a decoder remembers is good for the weights it was made with: every way to change them that torch sees is seen."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.mega.weights import Weights

SMALL = {"block_size": 12, "linear_size": 12, "qk_size": 6, "v_size": 14, "num_heads": 2, "num_blocks": 2}


@pytest.fixture
def network(seed) -> MEGADecoder:
    return MEGADecoder(5, **SMALL).eval()


def in_place(network):
    with torch.no_grad():
        network.mega_blocks[1][0].proj_v.bias.add_(1.0)


def loaded(network):
    network.load_state_dict({name: tensor + 1 for name, tensor in network.state_dict().items()})


def by_an_optimiser(network):
    network(torch.tensor([[0, 1]])).sum().backward()
    torch.optim.SGD(network.parameters(), lr=1.0).step()


def by_a_fused_optimiser(network):
    network(torch.tensor([[0, 1]])).sum().backward()
    torch.optim.AdamW(network.parameters(), lr=1.0, fused=True).step()


def other_memory(network):
    weight = network.mega_blocks[0][1].linear1.weight
    weight.data = weight.data + 1


def two_swapped(network):
    """The sum of all addresses and the sum of all versions stay what they were."""
    first, second = (network.mega_blocks[b][1].linear1.weight for b in (0, 1))
    first.data, second.data = second.data, first.data


def rounded(network):
    """The same device and dtype as before; without care also the same memory."""
    network.half()
    network.float()


def other_parameter(network):
    network.final_norm.weight = nn.Parameter(network.final_norm.weight.detach().clone())


def other_module(network):
    network.mega_blocks[1][0].proj_h = copy.deepcopy(network.mega_blocks[1][0].proj_h)


def other_activation(network):
    network.mega_blocks[1][0].activation = nn.Tanh()


def parametrised(network):
    nn.utils.parametrizations.weight_norm(network.mega_blocks[0][0].proj_v)


def pruned_again(network):
    """Another mask on the same parameter."""
    prune.l1_unstructured(network.mega_blocks[0][0].multihead_damped_ema, "kernel_projection_matrix", 0.5)


def mask_in_place(network):
    network.mega_blocks[0][0].proj_v.weight_mask.zero_()


def removed(network):
    del network.mega_blocks[1]


def last_one_removed(network):
    *_, module = (module for module in network.modules() if module._parameters)
    *_, name = module._parameters
    delattr(module, name)


@pytest.mark.parametrize(
    "change",
    [
        *(in_place, loaded, by_an_optimiser, by_a_fused_optimiser, other_memory, two_swapped, rounded, other_parameter),
        *(other_module, other_activation, parametrised, removed, last_one_removed),
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_is_seen(network, change):
    weights = Weights(network)
    assert weights.unchanged()
    change(network)
    assert not weights.unchanged()
    assert Weights(network).unchanged()


@pytest.mark.parametrize("change", [pruned_again, mask_in_place], ids=lambda change: change.__name__)
def test_a_change_of_masks_is_seen(network, change):
    for block, _ in network.mega_blocks:
        prune.l1_unstructured(block.proj_v, "weight", 0.3)
        prune.l1_unstructured(block.multihead_damped_ema, "kernel_projection_matrix", 0.3)
    labels = [0, 1, 2]
    state = network.score(labels[:2], network.score(labels[:1], network.init_state(1))[1])[1]
    before, _ = network.score(labels, state)
    change(network)
    states = network.init_state(1)
    for t in range(len(labels)):
        out, states = network.score(labels[: t + 1], states)
    torch.testing.assert_close(out[0], network(torch.tensor([labels]))[0, -1])
    assert not torch.equal(out, before)


def test_other_weights_of_a_quantised_layer_are_seen(network):
    network = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, torch.qint8)
    layer, weights = network.mega_blocks[0][0].proj_v, Weights(network)
    before, _ = network.score([3], network.init_state(1))
    assert weights.unchanged()
    bias = layer.bias()
    layer.set_weight_bias(layer.weight(), bias + 1)
    assert not weights.unchanged()
    assert not torch.equal(network.score([3], network.init_state(1))[0], before)


def test_an_equal_parameter_of_one_number_is_another_one(seed):
    network = MEGADecoder(5, **SMALL, normalization_type="scale_norm")
    weights = Weights(network)
    network.final_norm.scale = nn.Parameter(network.final_norm.scale.detach().clone())
    assert not weights.unchanged()


def test_memory_that_is_free_again_is_not_taken_for_the_old(network):
    for _ in range(20):
        weights = Weights(network)
        rounded(network)
        assert not weights.unchanged()


def test_autocast_is_a_change_while_it_lasts(network):
    weights = Weights(network)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert not weights.unchanged()
            with torch.autocast("cpu", enabled=False):
                assert weights.unchanged()
    assert weights.unchanged()


def test_use_is_no_change(network):
    weights = Weights(network)
    network(torch.tensor([[0, 1, 2]])).sum().backward()
    network.score([0], network.init_state(1))
    network.train()
    copy.deepcopy(network)
    network.to(torch.float32)
    with torch.inference_mode():
        network(torch.tensor([[0, 1, 2]]))
    assert weights.unchanged()


def test_parameters_made_in_inference_mode(seed):
    with torch.inference_mode():
        network = MEGADecoder(5, **SMALL)
    assert not Weights(network).unchanged()  # torch counts no changes of theirs: they may be others at any time
