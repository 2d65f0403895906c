"""One Fusion serves any number of searches at once: none of them sees what another one remembers."""

import pytest
import torch
from espnet2.asr_transducer.decoder.stateless_decoder import StatelessDecoder
from espnet2.asr_transducer.joint_network import JointNetwork
from espnet2.lm.seq_rnn_lm import SequentialRNNLM
from espnet2.lm.transformer_lm import TransformerLM

from espnet_mega_plugin.search.language_model import AnyLM, scorer_of_lm
from espnet_mega_plugin.search.phrases import PhraseScorer
from espnet_mega_plugin.search.scorer import Fusion
from espnet_mega_plugin.search.search import BatchedSearch

V = 7


def scorer(kind: str):
    if kind == "phrases":
        return PhraseScorer([([1, 2, 3], 2.0), ([2, 2], 1.0)], V)
    if kind == "transformer":
        return scorer_of_lm(TransformerLM(V, pos_enc=None, embed_unit=8, att_unit=8, head=2, unit=8, layer=1).eval(), V)
    lm = SequentialRNNLM(V, unit=8, nlayers=1, rnn_type="lstm").eval()
    return AnyLM(lm, V) if kind == "any" else scorer_of_lm(lm, V)


@pytest.mark.parametrize("weight", [0.7, -0.4])
@pytest.mark.parametrize("kind", ["phrases", "lstm", "transformer", "any"])
@torch.no_grad()
def test_a_search_beside_an_open_stream_changes_nothing(kind, weight):
    torch.manual_seed(0)
    decoder = StatelessDecoder(V, embed_size=8).eval()
    joint = JointNetwork(V, 6, 8, joint_space_size=9).eval()
    for p in (*decoder.parameters(), *joint.parameters()):
        torch.nn.init.normal_(p)
    search = BatchedSearch(decoder, joint, 3, nbest=3, fusion=Fusion(scorer(kind), weight))
    mine, other = torch.randn(1, 14, 6), torch.randn(3, 9, 6)
    alone = search(mine)[0]
    streams = search.streams()
    stream = streams.open()
    streams.push({stream: mine[0, :6]})
    search(other)
    streams.push({stream: mine[0, 6:]})
    found = streams.close(stream)
    assert [h.yseq for h in found] == [h.yseq for h in alone]
    torch.testing.assert_close([h.score for h in found], [h.score for h in alone], rtol=1e-4, atol=1e-4)


def test_a_stream_may_go_in_and_out_of_inference_mode():
    torch.manual_seed(1)
    search = BatchedSearch(
        StatelessDecoder(V, embed_size=8).eval(), JointNetwork(V, 6, 8, joint_space_size=9).eval(), 3
    )
    frames = torch.randn(12, 6)
    whole = search(frames[None])[0]
    streams = search.streams()
    with torch.inference_mode():
        stream = streams.open()
        streams.push({stream: frames[:5] * 1})
    streams.push({stream: frames[5:9]})
    with torch.inference_mode():
        streams.push({stream: frames[9:] * 1})
    assert [h.yseq for h in streams.close(stream)] == [h.yseq for h in whole]
