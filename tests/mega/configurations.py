"""Random decoders and label batches for the laws: every option of the constructor, awkward sizes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from espnet_mega_plugin.mega import MegaNetwork
from espnet_mega_plugin.mega.activation import BUILDERS
from espnet_mega_plugin.mega.normalization import EPS

LONGEST = 13
CHOICES = {
    "vocab_size": (2, 3, 17),
    "block_size": (3, 8, 11),
    "linear_size": (1, 7),
    "qk_size": (2, 6),
    "v_size": (1, 9),
    "num_heads": (1, 2, 5),
    "rel_pos_bias_type": ("simple", "rotary"),
    "max_positions": (LONGEST, 40),
    "truncation_length": (None, 1, 2, 5, 40),
    "normalization_type": tuple(EPS),
    "normalization_args": ({}, {"eps": 1e-3}, {"partial": 0.5}, {"eps": None, "partial": None}),
    "activation_type": tuple(BUILDERS),
    "activation_args": (
        {},
        {"swish_beta": 1.5, "smish_alpha": 2.0, "smish_beta": 0.5, "ftswish_threshold": -0.4},
        {"hardtanh_min_val": -2, "hardtanh_max_val": 3, "leakyrelu_neg_slope": 0.2, "ftswish_mean_shift": 0.1},
        {"softplus_beta": 2.0, "softplus_threshold": 10, "swish_beta": 0.5},
    ),
    "chunk_size": (-1, 1, 2, 3, 5, 40),
    "num_blocks": (1, 2, 3),
    "dropout_rate": (0.0, 0.3),
    "embed_dropout_rate": (0.0, 0.3),
    "att_dropout_rate": (0.0, 0.3),
    "ema_dropout_rate": (0.0, 0.3),
    "ffn_dropout_rate": (0.0, 0.3),
    "embed_pad": (0, 1),
    "attention_window": (None, 1, 2, 3, 5, 40),
    "pre_norm": (False, True),
}
OURS_ALONE = ("attention_window", "pre_norm")  # ESPnet's class does not have them


def _any_of(*names: str) -> dict:
    return {name: st.sampled_from(CHOICES[name]) for name in names}


_reach = st.one_of(  # chunks and a window exclude each other
    st.fixed_dictionaries({**_any_of("chunk_size"), "attention_window": st.none()}),
    st.fixed_dictionaries({**_any_of("attention_window"), "chunk_size": st.just(-1)}),
)
_rest = st.fixed_dictionaries(_any_of(*(CHOICES.keys() - {"chunk_size", "attention_window"})))
configurations = st.builds(lambda rest, reach: {**rest, **reach}, _rest, _reach)
espnet_configurations = configurations.map(lambda all_: {k: v for k, v in all_.items() if k not in OURS_ALONE})
seeds = st.integers(0, 2**31 - 1)


def perturbed(network: torch.nn.Module) -> torch.nn.Module:
    """Weights as after training: no bias is zero, padding's embedding still is."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("embed"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def build(configuration: dict, seed: int, cls=MegaNetwork, dtype=torch.float64) -> torch.nn.Module:
    torch.manual_seed(seed)
    return perturbed(cls(**configuration)).to(dtype).eval()


def random_labels(configuration: dict, B: int, L: int, padding: bool = False) -> torch.Tensor:
    """Start label 0, then labels that are no padding (with `padding`: any). Two labels make many repeats."""
    labels = torch.randint(0, configuration["vocab_size"], (B, L))
    if not padding:
        pad = configuration["embed_pad"]
        labels[labels == pad] = (pad + 1) % configuration["vocab_size"]
    labels[:, :1] = 0
    return labels
