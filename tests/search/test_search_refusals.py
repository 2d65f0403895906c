"""What a search does not take: one exception that names the argument, what came and what is accepted."""

import math

import pytest
import torch
from search_problems import assert_same, network_problem, tabled_problem

from espnet_mega_plugin.search.scorer import Fusion
from espnet_mega_plugin.search.search import BatchedSearch

ARGUMENTS = [  # V is 6
    ({"search_type": "default"}, ValueError, "search_type must be one of greedy, maes, tsd, alsd; got 'default'"),
    ({"search_type": None}, ValueError, "search_type .* got None"),
    ({"beam_size": 0}, ValueError, "beam_size must be at least 1; got 0"),
    ({"beam_size": 2.0}, TypeError, "beam_size must be an integer; got 2.0"),
    ({"beam_size": True}, TypeError, "beam_size must be an integer; got True"),
    ({"beam_size": "5"}, TypeError, "beam_size must be an integer; got '5'"),
    ({"beam_size": 5, "expansion_beta": 2}, ValueError, "expansion_beta is 7, but the model has 6 tokens"),
    ({"beam_size": 6, "search_type": "tsd"}, ValueError, "beam_size .* is 7, but the model has 6 tokens"),
    ({"beam_size": 6, "search_type": "alsd"}, ValueError, "beam_size .* is 7, but the model has 6 tokens"),
    ({"max_sym_exp": 1}, ValueError, "max_sym_exp must be at least 2; got 1"),
    ({"u_max": -1}, ValueError, "u_max must be at least 0; got -1"),
    ({"nstep": 0}, ValueError, "nstep must be at least 1; got 0"),
    ({"nstep": None}, TypeError, "nstep must be an integer; got None"),
    ({"expansion_beta": -1}, ValueError, "expansion_beta must be at least 0; got -1"),
    ({"expansion_gamma": -0.1}, ValueError, "expansion_gamma must not be negative; got -0.1"),
    ({"expansion_gamma": math.nan}, ValueError, "expansion_gamma .* got nan"),
    ({"expansion_gamma": "2.3"}, TypeError, "expansion_gamma must be a number; got '2.3'"),
    ({"expansion_gamma": "1e5"}, TypeError, "got '1e5', a text; in YAML write 100000.0"),  # as PyYAML reads it
    ({"expansion_gamma": "wide"}, TypeError, r"expansion_gamma must be a number; got 'wide'\.$"),
    ({"expansion_gamma": "inf"}, TypeError, r"expansion_gamma must be a number; got 'inf'\.$"),
    ({"expansion_gamma": None}, TypeError, r"expansion_gamma must be a number; got None\.$"),
    ({"nbest": 0}, ValueError, "nbest must be at least 1; got 0"),
    ({"window": 0}, ValueError, "window must be at least 1; got 0"),
    ({"fusion": ["lm"]}, TypeError, r"fusion holds Fusion\(scorer, weight\) entries; got str"),
    ({"score_norm": "false"}, TypeError, "score_norm must be True or False; got 'false'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS, ids=lambda value: str(value)[:40])
def test_arguments(arguments, error, message):
    problem = tabled_problem([3], V=6)
    with pytest.raises(error, match=message):
        BatchedSearch(problem.decoder, problem.joint, **{"beam_size": 2, **arguments})


def test_networks():
    problem = tabled_problem([3], V=6)
    with pytest.raises(TypeError, match=r"joint_network \(Linear\) has no lin_enc, lin_dec, lin_out, joint_activation"):
        BatchedSearch(problem.decoder, torch.nn.Linear(2, 2), beam_size=2)
    for no_decoder in (torch.nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match=r"decoder must be .* has no vocab_size"):
            BatchedSearch(no_decoder, problem.joint, beam_size=2)


FRAMES = torch.zeros(2, 3, 1, dtype=torch.float64)
INPUTS = [
    ((FRAMES[0],), ValueError, r"encoder_out must be \(B, T, D\); got shape \(3, 1\)"),
    ((FRAMES.long(),), TypeError, "encoder_out must be a floating-point tensor"),
    ((FRAMES.tolist(),), TypeError, "encoder_out must be a floating-point tensor"),
    ((FRAMES, torch.tensor([1, 2, 3])), ValueError, r"lengths must be \(2,\).* got shape \(3,\)"),
    ((FRAMES, torch.tensor([1, 4])), ValueError, r"lengths must lie in 0 .. 3.* got \[1, 4\]"),
    ((FRAMES, torch.tensor([-1, 2])), ValueError, r"lengths must lie in 0 .. 3.* got \[-1, 2\]"),
    ((FRAMES, torch.tensor([1.0, 2.0])), TypeError, "lengths must be a tensor of integers"),
    ((FRAMES, torch.tensor([True, False])), TypeError, "lengths must be a tensor of integers"),
    ((FRAMES, [1, 2]), TypeError, "lengths must be a tensor of integers"),
]


@pytest.mark.parametrize(("inputs", "error", "message"), INPUTS, ids=lambda value: str(value)[:40])
def test_inputs(inputs, error, message):
    problem = tabled_problem([3], V=6)
    with pytest.raises(error, match=message):
        problem.search({"beam_size": 2})(*inputs)


def test_frames_of_another_size():
    problem = network_problem("simple", [3])
    search = problem.search({"beam_size": 2})
    with pytest.raises(ValueError, match="encoder_out must hold 5 numbers a frame, .* got 4"):
        search(problem.encoder_out[..., :4])
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(TypeError, match=f"encoder_out must be of joint_network's dtype, .*64; got {dtype}"):
            search(problem.encoder_out.to(dtype))
    streams = search.streams()
    stream, other = streams.open(), streams.open()
    with pytest.raises(TypeError, match=f"frames of stream {other} must be of joint_network's dtype, torch.float64"):
        streams.push({stream: problem.utterance(0), other: problem.utterance(0).float()})
    with pytest.raises(ValueError, match=f"frames of stream {stream} must hold 5 numbers a frame, .* got 4"):
        streams.push({stream: problem.utterance(0)[:, :4]})
    good = problem.utterance(0)
    with pytest.raises(ValueError, match=rf"frames of stream {other} must be \(T, .*\); got shape \(3,\)"):
        streams.push({stream: good, other: good[:, 0]})
    with pytest.raises(TypeError, match=f"frames of stream {other} must be a floating-point tensor"):
        streams.push({stream: good, other: good.tolist()})
    with (
        torch.autocast("cpu"),
        pytest.raises(TypeError, match=r"of one dtype; got torch\.float32 and torch\.float64\."),
    ):
        streams.push({stream: good, other: good.float()})
    streams.push({stream: good})  # what was refused left nothing behind
    assert_same([streams.close(stream)], search(good[None]))
    assert streams.partial(other)[0].yseq == [0]


def test_fusion_may_be_one_or_several():
    problem = tabled_problem([3], V=6)
    fusion = Fusion(object(), 0.5)
    for given in (fusion, [fusion], (fusion,)):
        assert BatchedSearch(problem.decoder, problem.joint, beam_size=2, fusion=given).fusion == (fusion,)
    for given in (None, [], ()):
        assert BatchedSearch(problem.decoder, problem.joint, beam_size=2, fusion=given).fusion == ()
