"""A step that was recorded gives what the step gives, for whatever sizes it is replayed with."""

import pytest
import torch
from configurations import configurations, perturbed
from hypothesis import given, settings
from hypothesis import strategies as st
from replayed import Replayed, replaying

from espnet_mega_plugin.decoder import MEGADecoder
from espnet_mega_plugin.mega import graph
from espnet_mega_plugin.mega.graph import StepGraphs
from espnet_mega_plugin.mega.step import Constants, Together, step
from espnet_mega_plugin.recording import CudaGraphs


def made_up(model: MEGADecoder, B: int, U: int) -> tuple[torch.Tensor, torch.Tensor, Together]:
    """B hypotheses that see any of U labels."""
    blocks, D, K = model.num_blocks, model.output_size, model.truncation_length
    ema = inputs = None
    if K is None:
        ema = torch.randn(blocks, B, model.mega_ema_num_heads, D, dtype=torch.float64)
    else:
        inputs = torch.randn(blocks, B, min(K - 1, U), D, dtype=torch.float64)
    width = model.mega_att_k_size + model.mega_att_v_size
    bias = torch.randn(blocks, B, U + B, dtype=torch.float64)
    hidden = torch.rand(B, U + B) < 0.4
    hidden[:, U:] = ~torch.eye(B, dtype=torch.bool)
    bias.masked_fill_(hidden, float("-inf"))
    table = torch.randn(blocks, U + B, width, dtype=torch.float64)
    padding = torch.rand(B) < 0.3
    return torch.randint(model.vocab_size, (B,)), padding, Together(ema, inputs, table, bias)


@settings(max_examples=60)
@given(configuration=configurations, seed=st.integers(0, 2**31), data=st.data())
def test_a_replayed_step_is_the_step(configuration, seed, data):
    torch.manual_seed(seed)
    sizes = st.tuples(st.sampled_from([1, 2, 3, 5, 8, 31, 33]), st.sampled_from([0, 1, 7, 63, 64, 65, 130]))
    padded = st.booleans()
    check(MEGADecoder(**configuration), data.draw(st.lists(st.tuples(sizes, padded), min_size=1, max_size=5)))


@pytest.mark.parametrize("options", [{}, {"truncation_length": 5}], ids=lambda options: "-".join(options) or "all")
def test_what_an_earlier_step_left_is_not_read(options, seed):
    check(small(**options), [((4, 60), True), ((3, 7), True), ((4, 1), False), ((3, 0), False), ((4, 64), True)])


def check(model: MEGADecoder, asked: list[tuple[tuple[int, int], bool]]) -> None:
    """Steps of these sizes, with padding or without."""
    model = perturbed(model).double().eval()
    with torch.no_grad():
        constants = Constants(model)
        graphs = StepGraphs(model, constants, replaying)
        for (B, U), padded in asked:
            labels, padding, past = made_up(model, B, U)
            padding = padding if padded else None
            found, fresh = graphs(labels, padding, past)
            found, fresh = found.clone(), [None if x is None else x.clone() for x in fresh]
            want, left = step(model, constants, labels, padding, past)
            torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
            for mine, its in zip(fresh, left, strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def small(**options) -> MEGADecoder:
    return MEGADecoder(7, block_size=12, linear_size=10, qk_size=6, v_size=14, num_blocks=2, **options).eval()


def test_a_decoder_records_few_steps_and_anew_where_its_weights_change(seed):
    model, count = small(), []

    def recorder(run):
        count.append(1)
        return Replayed(run)

    model.prefixes.recorder_for = lambda device: recorder

    def ask():
        model.score_cache = {}
        state = model.init_state(1)
        for length in range(1, 70):
            out, state = model.score([1] * length, state)
        return out[0]

    torch.testing.assert_close(ask(), model(torch.ones(1, 69, dtype=torch.long))[0, -1])
    assert len(count) == 2, "up to 64 labels before the new one, and up to 128"
    ask()
    assert len(count) == 2
    with torch.no_grad():
        model.embed.weight.mul_(1.1)
    torch.testing.assert_close(ask(), model(torch.ones(1, 69, dtype=torch.long))[0, -1])
    assert len(count) == 4


def test_under_autocast(seed):
    model = small()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        want = model.score([3], model.init_state(1))[0]
        model.prefixes.recorder_for = replaying
        model.score_cache = {}
        state = model.init_state(1)
        out, state = model.score([3], state)
        torch.testing.assert_close(out, want)


def test_the_switch(monkeypatch, seed):
    assert not small().cuda_graphs
    monkeypatch.setenv("ESPNET_MEGA_PLUGIN_CUDA_GRAPHS", "1")
    model = small()
    assert model.cuda_graphs
    torch.testing.assert_close(  # on a CPU there are none, and nothing is recorded
        model.score([0], model.init_state(1))[0], model(torch.zeros(1, 1, dtype=torch.long))[0], check_stride=False
    )
    model.cuda_graphs = False
    assert model.prefixes.recorder_for is None
    monkeypatch.setenv("ESPNET_MEGA_PLUGIN_CUDA_GRAPHS", "yes")
    with pytest.raises(ValueError, match="ESPNET_MEGA_PLUGIN_CUDA_GRAPHS .* 0 or 1; got 'yes'"):
        small()


def test_sizes_between_are_filled_up():
    assert [graph._at_least(n, 1) for n in (1, 2, 3, 5, 32)] == [1, 2, 4, 8, 32]
    assert [graph._at_least(n, 64) for n in (0, 64, 65, 4096)] == [64, 64, 128, 4096]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_is_the_step(seed):
    model = small().cuda()
    labels, found = torch.randint(7, (3, 90)), []
    for on in (False, True):
        model.cuda_graphs = on
        model.score_cache = {}
        states = [model.init_state(1) for _ in labels]
        for length in range(1, labels.shape[1] + 1):
            outs = [model.score(row[:length].tolist(), states[i]) for i, row in enumerate(labels)]
            states = [after for _, after in outs]
        found.append(torch.cat([out for out, _ in outs]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_graph_of_another_device_than_the_current_one():
    x = torch.zeros(3, device="cuda:1")
    recorded = CudaGraphs(x.device)(lambda: x.add_(1))
    assert torch.cuda.current_device() == 0
    before = x.clone()
    recorded.replay()
    torch.testing.assert_close(x, before + 1)
