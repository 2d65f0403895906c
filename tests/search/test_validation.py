"""CER and WER in validation: the batched search gives the figures of ESPnet's ErrorCalculator."""

import argparse

import pytest
import torch
from configurations import perturbed
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
from espnet2.asr_transducer.decoder.rnn_decoder import RNNDecoder
from espnet2.asr_transducer.error_calculator import ErrorCalculator
from espnet2.asr_transducer.joint_network import JointNetwork
from espnet2.tasks.asr_transducer import ASRTransducerTask
from espnet2.utils.get_default_kwargs import get_default_kwargs
from replicas import replica
from tiny_experiment import DECODERS, TOKENS, configuration

from espnet_mega_plugin.espnet_search import BatchedErrorCalculator
from espnet_mega_plugin.model import SEARCHES, MegaTransducerModel


def model(decoder: str, **conf):
    options = {**configuration(decoder), "frontend": None, "normalize": None, "input_size": 12}
    made = ASRTransducerTask.build_model(
        argparse.Namespace(**options, model_conf={"report_cer": True, "report_wer": True, **conf})
    )
    perturbed(made)
    with torch.no_grad():
        made.joint_network.lin_enc.weight.mul_(8)
        made.joint_network.lin_out.weight.mul_(3)
    return made.eval()


def twins(decoder: str, *searches: str, **conf):
    found = [model(decoder, validation_search=search, **conf) for search in searches]
    for other in found[1:]:
        other.load_state_dict(found[0].state_dict())
    return found


def batch():
    speech, lengths = 3 * torch.randn(4, 83, 12), torch.tensor([83, 60, 71, 80])
    text = torch.randint(2, len(TOKENS) - 1, (4, 9))
    text_lengths = torch.tensor([9, 1, 4, 7])
    text[torch.arange(9) >= text_lengths[:, None]] = -1
    return speech, lengths, text, text_lengths


def rates(network, data) -> tuple[float, float]:
    stats = network(*data)[1]
    return float(stats["cer_transducer"]), float(stats["wer_transducer"])


@pytest.mark.parametrize(("decoder", "nstep"), [*((decoder, 2) for decoder in DECODERS), ("rnn", 1)])
def test_figures_are_espnets_while_the_weights_change(decoder, nstep, seed):
    torch.manual_seed(seed)
    ours, theirs = twins(decoder, "maes", "espnet", validation_nstep=nstep)
    for _ in range(2):
        data = batch()
        found, wanted = rates(ours, data), rates(theirs, data)
        assert found == wanted and wanted[0] > 0
        with torch.no_grad():  # as a training between two validations does
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                a.add_(0.05 * torch.randn_like(a))
                b.copy_(a)
    assert type(ours.error_calculator) is BatchedErrorCalculator and type(theirs.error_calculator) is ErrorCalculator


def test_greedy_is_maes_with_a_beam_of_one_and_no_more(seed):
    torch.manual_seed(seed)
    ours, theirs = twins("mega", "greedy", "espnet")
    data = batch()
    wanted = ErrorCalculator(theirs.decoder, theirs.joint_network, TOKENS, "<space>", "<blank>", 2, True, True)
    wanted.beam_search = BeamSearchTransducer(
        theirs.decoder, theirs.joint_network, beam_size=1, search_type="maes", nstep=2, expansion_beta=0
    )
    theirs.error_calculator = wanted
    with torch.no_grad():
        assert rates(ours, data) == rates(theirs, data)


def test_a_pruned_loss_of_one_label_a_frame_is_validated_so(seed):
    torch.manual_seed(seed)
    ours, theirs = twins(
        "rnn", "maes", "espnet", use_k2_pruned_loss=True, k2_pruned_loss_args={"loss_type": "modified"}
    )
    data = batch()
    assert rates(ours, data) == rates(theirs, data)
    assert ours.error_calculator.beam_search.nstep == 1


def test_training_and_models_without_a_report_decode_nothing():
    network = model("rnn")
    network.train()(*batch())
    assert network.error_calculator is None
    network = model("rnn", report_cer=False, report_wer=False)
    assert network(*batch())[1]["cer_transducer"] is None and network.error_calculator is None


def test_an_unknown_search_is_refused_and_the_parser_knows_the_key():
    with pytest.raises(
        ValueError, match="model_conf: validation_search must be one of 'maes', 'greedy', 'espnet'; got 'tsd'"
    ):
        model("rnn", validation_search="tsd")
    assert get_default_kwargs(MegaTransducerModel)["validation_search"] == SEARCHES[0] == "maes"


def test_small_vocabularies_and_empty_references():
    """Where ESPnet's calculator refuses or divides by zero."""
    tokens = ["<blank>", "▁a", "b"]
    decoder, joint = RNNDecoder(3, 4, hidden_size=4).eval(), perturbed(JointNetwork(3, 5, 4, 6)).eval()
    calculator = BatchedErrorCalculator(decoder, joint, tokens, "<space>", "<blank>", report_cer=True, report_wer=True)
    frames, lengths = torch.randn(2, 9, 5), torch.tensor([9, 4])
    cer, wer = calculator(frames, torch.zeros(2, 0, dtype=torch.int32), lengths)
    nbest = [lists[0].yseq[1:] for lists in calculator.beam_search(frames, lengths)]
    text = ["".join(tokens[label] for label in labels) for labels in nbest]
    assert cer == sum(map(len, text)) and wer == sum(len(t.replace("▁", " ").split()) for t in text)
    assert calculator.calculate_cer([""], [""]) == calculator.calculate_wer([""], [""]) == 0.0
    assert calculator.calculate_cer(["ab"], ["a"]) == 1.0


@pytest.mark.parametrize("decoder", ["mega", "rnn"])
@torch.no_grad()
def test_a_replica_of_data_parallel_validates(decoder, seed):
    """ESPnet runs `--ngpu N` without multiprocessing_distributed so; replicas have no parameters."""
    whole = model(decoder)
    speech, lengths, text, text_lengths = batch()
    (_, want, _), (_, found, _) = (one(speech, lengths, text, text_lengths) for one in (whole, replica(whole)))
    for name in ("loss", "cer_transducer", "wer_transducer"):
        torch.testing.assert_close(found[name], want[name])
