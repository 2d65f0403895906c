"""ESPnet's own searches over the plugin's decoder equal the same searches over a decoder without any state.

The oracle runs `forward` over each whole prefix: whatever a search does with states, caches and batches, n-best lists
and scores must be those.
"""

import pytest
import torch
from configurations import perturbed
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
from espnet2.asr_transducer.decoder.abs_decoder import AbsDecoder
from espnet2.asr_transducer.joint_network import JointNetwork
from espnet2.lm.seq_rnn_lm import SequentialRNNLM
from rounds import Rounds

from espnet_mega_plugin.decoder import MEGADecoder

V, D_ENC, T = 7, 5, 13
TABLE = 512  # positions: `default` has no cap, of 600 searches here the longest branch had 97 labels
SEARCHES = {
    "default": {"search_type": "default"},
    "tsd": {"search_type": "tsd", "max_sym_exp": 3},
    "alsd": {"search_type": "alsd", "u_max": 9},
    "maes": {"search_type": "maes", "nstep": 2, "expansion_gamma": 2.3, "expansion_beta": 1},
}
DECODERS = {
    "simple": {},
    "rotary-truncated": {"rel_pos_bias_type": "rotary", "truncation_length": 3},
    "chunk": {"chunk_size": 3, "rel_pos_bias_type": "rotary"},
    "past-max-positions": {"max_positions": 3},
    "window-past-max-positions": {"attention_window": 3, "max_positions": 3, "pre_norm": True},
    "pre-norm": {"pre_norm": True, "rel_pos_bias_type": "rotary"},
}


class ForwardOnly(AbsDecoder):
    """Scores a hypothesis by `forward` over all its labels; its states are empty."""

    def __init__(self, network: MEGADecoder):
        super().__init__()
        self.network, self.vocab_size, self.device = network, network.vocab_size, network.device
        self.known = {}  # forward is a function of the prefix alone

    def forward(self, labels):
        return self.network(labels)

    def score(self, label_sequence, states):
        if tuple(label_sequence) not in self.known:
            self.known[tuple(label_sequence)] = self.network(torch.tensor([label_sequence]))[:, -1]
        return self.known[tuple(label_sequence)], None

    def batch_score(self, hyps):
        return torch.cat([self.score(hyp.yseq, None)[0] for hyp in hyps]), None

    def set_device(self, device):
        pass

    def init_state(self, batch_size):
        return None

    def select_state(self, states, idx):
        return None

    def create_batch_states(self, new_states):
        return None


def extended(network: MEGADecoder, blocks: int) -> MEGADecoder:
    """The same decoder with a table long enough for forward, filled as scoring goes on past max_positions."""
    longer = MEGADecoder(V, 12, 10, 6, 14, 2, max_positions=TABLE, num_blocks=blocks).double().eval()
    weights = network.state_dict()
    for b in range(blocks):
        name = f"mega_blocks.{b}.0.rel_pos_bias.relative_position_bias"
        known = weights[name][: (len(weights[name]) + 1) // 2]
        weights[name] = torch.cat([known[:1].expand(TABLE - len(known)), known, known.new_zeros(TABLE - 1)])
    longer.load_state_dict(weights)
    return longer


def random_frames() -> torch.Tensor:
    frames = torch.randn(T, D_ENC, dtype=torch.float64)
    frames[::2, 0], frames[1::2, 0] = -1.0, 1.0
    return frames


def searches(decoder_options: dict, search_options: dict, lm=None, nbest=5, seed=0):
    """The search over the plugin's decoder, the one over the oracle, and frames that make both busy."""
    torch.manual_seed(seed)
    options = {"max_positions": TABLE, **decoder_options}
    network = perturbed(MEGADecoder(V, 12, 10, 6, 14, 2, num_blocks=2, **options)).double().eval()
    joint = perturbed(JointNetwork(V, D_ENC, 12, 16)).double().eval()
    with torch.no_grad():
        # Every other frame wants blank. `default` has no cap on labels a frame: without a fair chance of blank on the
        # others it needs thousands of expansions.
        joint.lin_out.weight.mul_(3)
        joint.lin_enc.weight[0], joint.lin_enc.bias[0], joint.lin_dec.weight[0] = 0.0, 0.0, 0.0
        joint.lin_enc.weight[0, 0] = 3.0
        joint.lin_out.weight[0, 0] = 2.0
        joint.lin_out.bias[0] += 4.0 if search_options["search_type"] == "default" else 1.0
    short = options["max_positions"] < TABLE and "attention_window" not in options  # then forward would refuse
    oracle = ForwardOnly(extended(network, 2) if short else network)
    common = {"beam_size": 4, "lm": lm, "lm_weight": 0.1, "nbest": nbest, **search_options}
    frames = random_frames()
    return BeamSearchTransducer(network, joint, **common), BeamSearchTransducer(oracle, joint, **common), frames


def assert_same_nbest(got, want) -> None:
    assert len(want) > 0
    assert [hyp.yseq for hyp in got] == [hyp.yseq for hyp in want]
    for a, b in zip(got, want, strict=True):
        assert float(a.score) == pytest.approx(float(b.score), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("with_lm", [False, True], ids=["alone", "lm"])
@torch.no_grad()
def test_nbest_is_that_of_the_forward_only_decoder(decoder, search, with_lm, seed):
    lm = SequentialRNNLM(V, unit=6, nlayers=1).eval() if with_lm else None
    trials = Rounds(least=2)
    for trial in trials:
        ours, oracle, frames = searches(DECODERS[decoder], SEARCHES[search], lm, seed=seed + trial)
        for _ in range(2):  # a second utterance with the same search object
            got, want = ours(frames), oracle(frames)
            assert_same_nbest(got, want)
            trials.enough |= any(len(hyp.yseq) > 1 for hyp in got)  # the searches did emit labels
            frames = random_frames()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("search", ["default", "tsd", "maes"])  # ESPnet refuses alsd when streaming
@torch.no_grad()
def test_streaming_in_chunks_is_the_whole_utterance(decoder, search, seed):
    ours, oracle, frames = searches(DECODERS[decoder], SEARCHES[search], seed=seed)
    whole = oracle(frames)
    for part in frames[:-3].split(4):
        ours(part, is_final=False)
    assert_same_nbest(ours(frames[-3:], is_final=True), whole)
    assert ours.decoder.score_cache == {}


@pytest.mark.parametrize("search", SEARCHES)
@torch.no_grad()
def test_one_decoder_in_two_searches(search, seed):
    """Interleaved streams over one decoder do not see each other."""
    if search == "alsd":
        pytest.skip("ESPnet's alsd does not stream")
    ours, oracle, frames = searches(DECODERS["simple"], SEARCHES[search], seed=seed)
    other = BeamSearchTransducer(ours.decoder, ours.joint_network, beam_size=4, nbest=5, **SEARCHES[search])
    more = random_frames()
    for a, b in zip(frames[:-3].split(4), more[:-3].split(4), strict=True):
        ours(a, is_final=False)
        other(b, is_final=False)
    assert_same_nbest(ours(frames[-3:]), oracle(frames))
    assert_same_nbest(other(more[-3:]), oracle(more))
