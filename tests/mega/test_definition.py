"""forward and the step by step way of it are the definition, with every option, also where ESPnet has none."""

import definition
import pytest
import torch
from configurations import CHOICES, build, configurations, perturbed, random_labels, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_mega_plugin.mega import MegaNetwork

SWISH = {"activation_type": "swish", "activation_args": {}}


def assert_defined(configuration: dict, seed: int, L: int, padding: bool) -> None:
    network = build(configuration, seed)
    labels = random_labels(configuration, 2, L, padding)
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    want = torch.stack([torch.from_numpy(definition.output(weights, row, configuration)) for row in labels.tolist()])
    memory, steps = network.empty_memory(2), []
    with torch.no_grad():
        out = network(labels)
        for part in labels.split(1, 1):
            step, memory = network.extend(part, memory)
            steps.append(step)
    torch.testing.assert_close(out, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-8, atol=1e-8)


@settings(max_examples=60)
@given(configuration=configurations, seed=seeds, L=st.integers(1, 12), padding=st.booleans())
def test_any_configuration_is_the_definition(configuration, seed, L, padding):
    assert_defined({**configuration, **SWISH}, seed, L, padding)


@pytest.mark.parametrize("rel_pos_bias_type", ["simple", "rotary"])
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("truncation_length", [None, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_a_window_is_the_definition_far_past_its_table_and_in_padding(
    rel_pos_bias_type, pre_norm, truncation_length, window, seed
):
    """As a mask (up to twice the window) and in bands (seven times the longest); runs of padding longer than a window."""
    configuration = {
        **{name: values[0] for name, values in CHOICES.items()},
        "rel_pos_bias_type": rel_pos_bias_type,
        "pre_norm": pre_norm,
        "truncation_length": truncation_length,
        "attention_window": window,
        "normalization_type": "layer_norm",
        "qk_size": 4,
        **SWISH,
    }
    for L, max_positions in ((window + 1, 40), (2 * window, 40), (37, 5)):
        # a vocabulary of 2: every second label is padding
        assert_defined({**configuration, "max_positions": max_positions}, seed, L, padding=True)


@pytest.mark.parametrize("option", [{"attention_window": 2}, {"pre_norm": True}])
def test_options_change_the_output_and_no_weight(option, seed):
    plain = perturbed(MegaNetwork(9, 8, 8, 4, 8, 2, num_blocks=2)).eval()
    with_option = MegaNetwork(9, 8, 8, 4, 8, 2, num_blocks=2, **option).eval()
    assert [(k, v.shape, v.dtype) for k, v in plain.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in with_option.state_dict().items()
    ]
    with_option.load_state_dict(plain.state_dict())
    labels = torch.randint(1, 9, (2, 7))
    difference = (with_option(labels) - plain(labels)).abs().amax((0, 2))
    first_change = option.get("attention_window", 0)
    assert (difference[:first_change] < 1e-5).all() and (difference[first_change:] > 1e-5).all()
