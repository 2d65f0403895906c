"""On a GPU a round of a search asks the device for nothing: neither a number nor how many there are of something."""

import pytest
import torch
from espnet2.asr_transducer.joint_network import JointNetwork
from no_waiting import NoWaiting
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.search.algorithm import EVERY
from espnet_mega_plugin.search.hypotheses import Traces
from espnet_mega_plugin.search.search import BatchedSearch
from espnet_mega_plugin.search.tree import LabelTree

SIZES = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 3, "num_blocks": 2}
OPTIONS = [{}, {"chunk_size": 4}, {"attention_window": 5}, {"truncation_length": 3}, {"embed_pad": 5}]


def search(search_type: str, B: int = 4, T: int = 9, **options):
    """A search that has its frames, on a CUDA device that is not there."""
    decoder = MEGADecoder(12, **SIZES, **options)
    joint = JointNetwork(12, 10, 16, joint_space_size=14)
    found = BatchedSearch(decoder, joint, beam_size=3, search_type=search_type)._search(B, torch.device("cuda"))
    found.start(torch.ones(B, dtype=torch.bool))
    found.frames.set(found.joint.frames(torch.randn(B, T, 10)), torch.full((B,), T))
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("search_type", ["greedy", "maes", "tsd"])
@torch.no_grad()
def test_rounds_do_not_wait(search_type, options):
    with FakeTensorMode(), torch.device("cuda"):
        found = search(search_type, **options)
        # what the host sees to between the rounds
        room = EVERY * found._most_a_round
        found.tree._grow(room + 2, room + 2)
        found.traces._grow(room)
        found._rounds_ahead = EVERY
        with NoWaiting():
            for _ in range(EVERY):
                found._make_room(found._most_a_round)
                found._round()
        assert found.hypotheses.score.device.type == "cuda"


@torch.no_grad()
@pytest.mark.parametrize("asked", [LabelTree.taken, Traces.used.fget, lambda search: search.frames.left.any().item()])
def test_what_is_asked_between_rounds_waits(asked):
    with FakeTensorMode(), torch.device("cuda"):
        found = search("maes")
        of = {"taken": found.tree, "used": found.traces}.get(asked.__name__, found)
        with pytest.raises(DataDependentOutputException):
            asked(of)
