"""`search_type: maes_batched` and the like in ESPnet's own search, commands and Python interface."""

import copy
import importlib
import math
import pickle

import pytest
import torch
import yaml
from configurations import perturbed
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer, Hypothesis
from espnet2.asr_transducer.decoder.rnn_decoder import RNNDecoder
from espnet2.asr_transducer.decoder.stateless_decoder import StatelessDecoder
from espnet2.asr_transducer.joint_network import JointNetwork
from espnet2.bin.asr_transducer_inference import Speech2Text
from espnet2.lm.seq_rnn_lm import SequentialRNNLM
from espnet2.lm.transformer_lm import TransformerLM
from fresh_python import finish, start
from rounds import Rounds
from tiny_experiment import audio, experiment, table, waveform

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.espnet_search import BatchedBeamSearch
from espnet_mega_plugin.rnnt import rnnt_loss

V, D_ENC, T = 9, 5, 17
OPTIONS = {
    "maes": {"nstep": 2, "expansion_gamma": 2.3, "expansion_beta": 1},
    "tsd": {"max_sym_exp": 3},
    "alsd": {"u_max": 30},
}
DECODERS = {
    "mega": lambda: MEGADecoder(V, 12, 10, 6, 14, 2, num_blocks=2),
    "rnn": lambda: RNNDecoder(V, 6, hidden_size=7),
    "stateless": lambda: StatelessDecoder(V, 6),
}


def problem(decoder: str, blank: float = 1.0):
    """A decoder, a joint network and frames in float64 of which about every other one wants blank."""
    network = perturbed(DECODERS[decoder]()).double().eval()
    joint = perturbed(JointNetwork(V, D_ENC, network.output_size, 16)).double().eval()
    with torch.no_grad():
        joint.lin_out.weight.mul_(3)
        joint.lin_enc.weight[0], joint.lin_enc.bias[0], joint.lin_dec.weight[0] = 0.0, 0.0, 0.0
        joint.lin_enc.weight[0, 0], joint.lin_out.weight[0, 0] = 3.0, 2.0
        joint.lin_out.bias[0] += blank
    return network, joint, random_frames()


def random_frames() -> torch.Tensor:
    frames = torch.randn(T, D_ENC, dtype=torch.float64)
    frames[::2, 0], frames[1::2, 0] = -1.0, 1.0
    return frames


def assert_same(found, wanted) -> None:
    assert [hyp.yseq for hyp in found] == [hyp.yseq for hyp in wanted]
    assert [hyp.score for hyp in found] == pytest.approx([float(hyp.score) for hyp in wanted], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("search", OPTIONS)
@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_nbest_is_that_of_espnets_search(decoder, search, seed, caplog):
    torch.manual_seed(seed)
    networks = Rounds()  # some say nothing but blank
    for _ in networks:
        network, joint, frames = problem(decoder, 4.0 if search == "alsd" else 1.0)
        if decoder == "rnn":  # ESPnet's states are float32 in any model
            network, joint, frames = network.float(), joint.float(), frames.float()
        common = {"beam_size": 4, "nbest": 4, **OPTIONS[search]}
        theirs = BeamSearchTransducer(network, joint, search_type=search, **common)
        ours = BeamSearchTransducer(network, joint, search_type=f"{search}_batched", **common)
        assert type(theirs) is BeamSearchTransducer and type(ours) is BatchedBeamSearch
        for _ in range(4):  # utterances, with the same object
            found, wanted = ours(frames), theirs(frames)
            if "by blank alone" in caplog.text:
                caplog.clear()  # alsd, with all labels in the first frames: ESPnet's hypotheses are unfinished there
            elif frames.dtype == torch.float64:
                assert_same(found, wanted)
            else:
                assert [hyp.yseq for hyp in found[:1]] == [hyp.yseq for hyp in wanted[:1]]
            networks.enough |= len(wanted[0].yseq) > 1 or search == "alsd"  # some label was found
            assert all(
                isinstance(hyp, Hypothesis) and len(hyp.frames) == len(hyp.logps) == len(hyp.yseq) - 1 for hyp in found
            )
            frames = random_frames().to(frames.dtype)


@pytest.mark.parametrize("search", ["maes", "tsd", "greedy"])
@torch.no_grad()
def test_chunks_are_the_whole_and_partial_results_stay_as_they_were(search, seed):
    torch.manual_seed(seed)
    network, joint, frames = problem("mega")
    ours = BeamSearchTransducer(network, joint, 4, search_type=f"{search}_batched", nbest=4, streaming=True)
    whole = ours(frames)
    for _ in range(2):
        ours(torch.randn_like(frames), is_final=False)
        ours.reset_cache()  # forgets a stream
        partial = [ours(chunk, is_final=False) for chunk in frames[:-5].split(4)]
        before = copy.deepcopy(partial)
        assert_same(ours(frames[-5:]), whole)
        assert partial == before
        for hypotheses in partial:
            scores = [hyp.score for hyp in hypotheses]
            assert scores == sorted(scores, reverse=True)


@torch.no_grad()
def test_language_models_that_espnet_hands_over(seed):
    torch.manual_seed(seed)
    network, joint, frames = problem("mega")
    lm = SequentialRNNLM(V, unit=6, nlayers=1).eval()
    found, wanted = (
        BeamSearchTransducer(network, joint, 4, lm, 0.7, search, nbest=4)(frames) for search in ("maes_batched", "maes")
    )
    assert [hyp.yseq for hyp in found] == [hyp.yseq for hyp in wanted]
    assert [hyp.score for hyp in found] == pytest.approx([float(hyp.score) for hyp in wanted], rel=1e-5, abs=1e-5)
    lm = TransformerLM(V, embed_unit=8, att_unit=8, head=2, unit=8, layer=1).eval()  # ESPnet refuses it
    without = BeamSearchTransducer(network, joint, 4, search_type="maes_batched")(frames)
    weighed = BeamSearchTransducer(network, joint, 4, lm=lm, lm_weight=0.0, search_type="maes_batched")(frames)
    assert_same(weighed, without)


def test_what_cannot_be_is_refused_by_name():
    network, joint, _ = problem("rnn")
    with pytest.raises(ValueError, match="beam_size"):
        BeamSearchTransducer(network, joint, 0, search_type="maes_batched")
    with pytest.raises(ValueError, match="alsd needs the whole utterance"):
        BeamSearchTransducer(network, joint, 4, search_type="alsd_batched", streaming=True)
    with pytest.raises(NotImplementedError):
        BeamSearchTransducer(network, joint, 4, search_type="other_batched")


def test_searches_are_copied_and_pickled(seed):
    torch.manual_seed(seed)
    network, joint, frames = problem("rnn")
    ours = BeamSearchTransducer(network, joint, 4, search_type="maes_batched")
    theirs = BeamSearchTransducer(network, joint, 4, search_type="maes")
    for search in (ours, theirs):
        for again in (copy.deepcopy(search), pickle.loads(pickle.dumps(search))):
            assert type(again) is type(search)
    assert_same(pickle.loads(pickle.dumps(ours))(frames), ours(frames))


# --- ESPnet's commands


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drop-in")
    return folder, {
        "whole": experiment(folder / "whole", 11),
        "streaming": experiment(folder / "streaming", 5, streaming=True),
        "scp": audio(folder / "audio", [0.7, 1.28, 0.5], 0),
    }


@pytest.mark.parametrize("mode", ["whole", "streaming"])
def test_espnets_unmodified_command_writes_the_same(mode, made):
    folder, parts = made
    command = importlib.import_module("espnet2.bin.asr_transducer_inference")
    streaming = (
        ["--streaming", "true", "--decoding_window", "640", "--left_context", "8"] if mode == "streaming" else []
    )
    for search_type in ("maes", "maes_batched"):
        config = folder / f"{search_type}.yaml"
        config.write_text(
            yaml.safe_dump({"beam_size": 4, "nbest": 3, "beam_search_config": {"search_type": search_type}})
        )
        options = [word for name, value in parts[mode].items() for word in (f"--{name}", value)]
        data = ["--data_path_and_name_and_type", f"{parts['scp']},speech,sound", "--num_workers", "0"]
        output = ["--output_dir", str(folder / mode / search_type)]
        command.main(["--config", str(config), *options, *data, *output, *streaming])
    for n in (1, 2, 3):
        ours, theirs = (folder / mode / search / f"{n}best_recog" for search in ("maes_batched", "maes"))
        for name in ("text", "token", "token_int"):
            assert (ours / name).read_text() == (theirs / name).read_text()
        found, wanted = ({k: float(v) for k, v in table(at / "score").items()} for at in (ours, theirs))
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    text = table(folder / mode / "maes" / "1best_recog" / "text")
    assert len(text) == 3 and any(len(t) > 3 for t in text.values()), text


def test_espnets_speech2text_takes_it_and_gives_times(made):
    _, parts = made
    results = []
    for search_type in ("maes", "maes_batched"):
        speech2text = Speech2Text(**parts["whole"], beam_search_config={"search_type": search_type})
        results.append(speech2text.hypotheses_to_results(speech2text(waveform(1.0, 7)))[0])
    (text, tokens, ids, hypothesis), theirs = results[1], results[0]
    assert (text, tokens, ids) == theirs[:3] and len(hypothesis.frames) == len(ids)


@pytest.mark.parametrize("search_type", ["default", "tsd", "alsd", "maes", "maes_batched"])
@torch.no_grad()
def test_espnets_speech2text_quantises_the_decoder(search_type, made):
    """`--quantize_asr_model true`: the score is about what the quantised network itself gives the labels.

    Not more exactly, as int8 products have one scale for all rows of a call, and a search makes other calls; where
    labels a frame have no cap, random weights make more of that, and only that there is a result is asked.
    """
    _, parts = made
    options = {"quantize_asr_model": True, "quantize_modules": ["Linear", "LSTM"], **parts["whole"]}
    speech2text = Speech2Text(**options, beam_search_config={"search_type": search_type})
    model = speech2text.asr_model
    assert any("quantized" in type(one).__module__ for one in model.decoder.modules())
    speech = torch.from_numpy(waveform(1.0, 7))
    best = speech2text(speech)[0]
    labels = [label for label in best.yseq if label != 0]
    frames = model.encode(speech[None], torch.tensor([len(speech)]))[0]
    logits = model.joint_network(frames[:, :, None], model.decoder(torch.tensor([[0, *labels]]))[:, None])
    lengths = torch.tensor([frames.shape[1]]), torch.tensor([len(labels)])
    want = -float(rnnt_loss(logits, torch.tensor([labels]).view(1, -1), *lengths, reduction="sum"))
    assert labels and math.isfinite(best.score)
    if search_type not in ("default", "alsd"):
        assert len(labels) > 2 and float(best.score) == pytest.approx(want, rel=0.15, abs=1.5)


HALF_IMPORTED = """
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer  # this is what imports torch
import importlib, sys
if len(sys.argv) > 1:
    import espnet2.tasks.asr_transducer
from espnet2.asr_transducer.decoder.stateless_decoder import StatelessDecoder
from espnet2.asr_transducer.joint_network import JointNetwork
parts = StatelessDecoder(6, 4), JointNetwork(6, 3, 4, 5), 2
try:
    for search in (BeamSearchTransducer, importlib.reload(sys.modules[BeamSearchTransducer.__module__]).BeamSearchTransducer):
        made = search(*parts, search_type="maes_batched")
        print(type(made).__name__, isinstance(made, search), type(search(*parts, search_type="maes")) is search)
except NotImplementedError as error:
    print(error)
"""


def test_it_is_attached_late_again_and_not_at_all_when_off(tmp_path):
    attached = start("-c", HALF_IMPORTED, "with its task", cwd=tmp_path)
    off = start("-c", HALF_IMPORTED, cwd=tmp_path, ESPNET_MEGA_PLUGIN="0")
    assert finish(attached)[0].endswith("BatchedBeamSearch True True\n" * 2)  # 202511 says something of its own first
    assert finish(off)[0] == "Specified search type (maes_batched) is not supported.\n"
