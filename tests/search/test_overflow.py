"""A label whose keys and values are beyond float16 loses its own prefixes and no other."""

import contextlib

import pytest
import torch
from configurations import perturbed
from random_tree import RandomTree
from rounds import Rounds

from espnet_mega_plugin.decoder import MEGADecoder

V, LARGE = 6, 3


@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["", "fixed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float16", "autocast"])
@pytest.mark.parametrize("options", [{}, {"truncation_length": 3}], ids=lambda options: "-".join(options) or "all")
def test_prefixes_without_the_label_are_those_of_forward(options, autocast, fixed_shapes, seed):
    model = perturbed(MEGADecoder(V, 12, 10, 6, 14, num_heads=2, num_blocks=2, **options)).eval()
    with torch.no_grad():
        model.embed.weight[LARGE] *= 3e5
        if not autocast:
            model.embed.weight.clamp_(-6e4, 6e4)  # as large as a weight can be
            model.half()
    whole = MEGADecoder(V, 12, 10, 6, 14, num_heads=2, num_blocks=2, **options).eval()
    whole.load_state_dict(model.state_dict())
    casting = torch.autocast("cpu", dtype=torch.float16) if autocast else contextlib.nullcontext()
    lost, rounds = 0, Rounds(30, 300)
    with torch.no_grad(), casting:
        tree = RandomTree(model.label_scorer(), V, seed, fixed_shapes)
        for labels, out in tree._grow(rounds):
            if LARGE in labels:
                lost += not out.isfinite().all()
                continue
            with torch.autocast("cpu", enabled=False):
                want = whole(torch.tensor([[0, *labels]]))[0, -1]
            torch.testing.assert_close(out.float(), want, rtol=2e-2, atol=2e-2)
            rounds.enough = lost > 0 and tree.moves > 0
