"""Random searches: options, and batches over a table or over networks; what a search returns next to the plain one's."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import dataclass
from typing import Any

import plain
import pytest
import torch
from configurations import perturbed
from espnet2.asr_transducer.decoder.rnn_decoder import RNNDecoder
from espnet2.asr_transducer.decoder.stateless_decoder import StatelessDecoder
from espnet2.asr_transducer.joint_network import JointNetwork
from search_oracles import log_probs_of, numbered_frames, random_table, shifted, tabled

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.search import search as search_module
from espnet_mega_plugin.search.maes import Maes
from espnet_mega_plugin.search.search import BatchedSearch
from espnet_mega_plugin.search.tree import LabelTree

SEARCH_TYPES = ("greedy", "maes", "tsd", "alsd")
WINDOWS = (1, 2, 5, 64)
D_ENC = 5

MEGA = {
    "simple": {},
    "rotary-truncated": {"rel_pos_bias_type": "rotary", "truncation_length": 3},
    "chunk": {"chunk_size": 3, "rel_pos_bias_type": "rotary"},
    "window": {"attention_window": 3, "pre_norm": True},
    "window-truncated": {"attention_window": 2, "truncation_length": 4, "num_heads": 1},
    "padding-is-a-label": {"embed_pad": 1, "normalization_type": "rms_norm", "num_blocks": 1},
}
DECODERS = (*MEGA, "stateless", "lstm", "gru")


def random_options(search_type: str, V: int, beam_size: int | None = None) -> dict[str, Any]:
    beam_size = beam_size or random.randint(1, min(5, V - 1))
    options = {"search_type": search_type, "beam_size": beam_size, "nbest": random.choice((1, 3, 20))}
    if search_type == "maes":
        gamma = random.choice((0.5, 1.0, 2.3, 5.0, 10.0))
        options |= {
            "nstep": random.randint(1, 3 if gamma < 5 else 2),
            "expansion_gamma": gamma,
            "expansion_beta": random.randint(0, min(3, V - beam_size)),
        }
    elif search_type == "greedy":
        options |= {"nstep": random.randint(1, 3)}
    elif search_type == "tsd":
        options |= {"max_sym_exp": random.randint(2, 4)}
    else:
        options |= {"u_max": random.choice((0, 1, 3, 50))}
    return options


def most_labels_a_frame(options: dict) -> int | None:
    """None: no cap but u_max."""
    return {
        "greedy": lambda: options["nstep"],
        "maes": lambda: options["nstep"],
        "tsd": lambda: options["max_sym_exp"] - 1,
        "alsd": lambda: None,
    }[options["search_type"]]()


@dataclass
class Problem:
    """Utterances and the networks that score them; `log_probs[b]` is what plain searches take."""

    V: int
    decoder: Any
    joint: Any
    encoder_out: torch.Tensor  # poisoned behind the lengths
    lengths: list[int]
    log_probs: list

    def search(self, options: dict, **more) -> BatchedSearch:
        return BatchedSearch(self.decoder, self.joint, **options, **more)

    def found(self, options: dict, **more) -> list:
        return self.search(options, **more)(self.encoder_out, torch.tensor(self.lengths))

    def utterance(self, b: int) -> torch.Tensor:
        return self.encoder_out[b, : self.lengths[b]]


def random_lengths(B: int, longest: int = 9) -> list[int]:
    """Some, 0 and 1 among them at times; one at least is no shorter than half the longest."""
    lengths = [random.choice((0, 1, random.randint(1, longest))) for _ in range(B - 1)]
    lengths.append(random.randint((longest + 1) // 2, longest))
    random.shuffle(lengths)
    return lengths


def tabled_problem(lengths: list[int], V: int | None = None, peak: float | None = None, table=None) -> Problem:
    """Every frame of every utterance behind any labels has log-probabilities of its own, flat or peaked."""
    V = V or random.randint(3, 6)
    peak = peak or random.choice((0.3, 1.0, 4.0))
    table = table or random_table(V, peak, random.choice((-1.0, 1.0, 2.0)) * peak, random.randrange(2**31))
    encoder_out, _, first = numbered_frames(lengths)
    return Problem(V, *tabled(table, V), encoder_out, lengths, [shifted(table, start) for start in first])


def network_problem(kind: str, lengths: list[int], V: int = 7, seed: int | None = None) -> Problem:
    """Networks in float64 with no bias at zero; half the frames want blank."""
    torch.manual_seed(random.randrange(2**31) if seed is None else seed)
    decoder = perturbed(_decoder(kind, V)).double().eval()
    joint = perturbed(JointNetwork(V, D_ENC, decoder.output_size, 16)).double().eval()
    with torch.no_grad():
        joint.lin_out.weight.mul_(3)
        joint.lin_enc.weight[0, 0] = 3.0
        joint.lin_out.weight[0, 0] = 2.0
        joint.lin_out.bias[0] += 1.0
    encoder_out = torch.randn(len(lengths), max(lengths), D_ENC, dtype=torch.float64)
    encoder_out[:, ::2, 0], encoder_out[:, 1::2, 0] = -1.0, 1.0
    for b, length in enumerate(lengths):
        encoder_out[b, length:] = math.nan
    log_probs = [log_probs_of(outputs_of(decoder), joint, encoder_out[b, :length]) for b, length in enumerate(lengths)]
    return Problem(V, decoder, joint, encoder_out, lengths, log_probs)


def _decoder(kind: str, V: int):
    if kind == "stateless":
        return StatelessDecoder(V, 6)
    if kind in ("lstm", "gru"):
        return RNNDecoder(V, 6, 7, rnn_type=kind, num_layers=2)
    return MEGADecoder(V, 12, 10, 6, 14, **{"num_heads": 2, "num_blocks": 2, **MEGA[kind]})


def outputs_of(decoder):
    """A prediction network over whole label sequences. (1, U+1) -> (1, U+1, D)"""
    if not isinstance(decoder, RNNDecoder):
        return decoder

    def outputs(labels):  # ESPnet's forward has states in float32
        x = decoder.embed(labels)
        for layer in decoder.rnn:
            x = layer(x)[0]
        return x

    return outputs


def assert_same_nbest(got, want: list[plain.Hypothesis], traces: bool = True) -> None:
    assert [tuple(one.yseq) for one in got] == [(0, *one.labels) for one in want]
    assert [one.score for one in got] == pytest.approx([one.score for one in want], rel=1e-9, abs=1e-9)
    if traces:
        for one, other in zip(got, want, strict=True):
            assert one.frames == list(other.frames)
            assert one.logps == pytest.approx(list(other.logps), rel=1e-9, abs=1e-9)


def assert_same(got: list, want: list) -> None:
    """N-best lists of the same utterances, from two searches."""
    assert len(got) == len(want)
    for some, others in zip(got, want, strict=True):
        assert_same_nbest(
            some, [plain.Hypothesis(one.score, tuple(one.yseq[1:]), one.frames, one.logps) for one in others]
        )


class FixedTree(LabelTree):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fixed_shapes = True


class RoomyMaes(Maes):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.most = self.beam_size * self.tokens**self.nstep


@contextlib.contextmanager
def fixed_shapes(room_for_all: bool = True):
    """Shapes as on a GPU, where none may depend on numbers that only the device knows.

    Args:
        room_for_all: of mAES, whether each label that a hypothesis may take has a place; else there are so many
            places as on a GPU, and the least probable labels may have none.
    """
    search_module.LabelTree, search_module.Maes = FixedTree, RoomyMaes if room_for_all else Maes
    try:
        yield
    finally:
        search_module.LabelTree, search_module.Maes = LabelTree, Maes
