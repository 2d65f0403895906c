"""The moving average: convolution = recurrence = the double sum of its definition; gradients; goldens from ESPnet."""

import json
import math
from pathlib import Path

import pytest
import torch
from ema_by_autograd import ByScan
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_mega_plugin.mega import MegaNetwork
from espnet_mega_plugin.mega.ema import MultiHeadDampedEMA

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def by_definition(ema: MultiHeadDampedEMA, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """y[b, t, d] = sum over heads and lags, written with math and loops. x (B, L, D)"""
    B, L, D = x.shape
    N = ema.damping_factor.shape[1]
    K = ema.truncation_length or L
    sigmoid = lambda v: 1 / (1 + math.exp(-v))  # noqa: E731
    out = torch.zeros_like(x)
    for d in range(D):
        for n in range(N):
            p = sigmoid(ema.damping_factor[d, n, 0].item())
            q = 1 - p * sigmoid(ema.decay_factor[d, n, 0].item())
            gain = (
                p * ema.ema_expansion_matrix[d, n, 0].item() * ema.kernel_projection_matrix[d, n].item() / math.sqrt(N)
            )
            for b in range(B):
                for t in range(L):
                    for lag in range(min(t + 1, K)):
                        if not padding[b, t - lag]:
                            out[b, t, d] += gain * q**lag * x[b, t - lag, d].item()
    return out + ema.residual_weight * x


@settings(max_examples=30)
@given(
    L=st.integers(1, 7),
    D=st.integers(1, 3),
    N=st.integers(1, 3),
    K=st.sampled_from([None, 1, 2, 4, 9]),
    s=st.integers(0, 2**31 - 1),
)
@torch.no_grad()
def test_convolution_and_recurrence_are_the_definition(L, D, N, K, s):
    torch.manual_seed(s)
    ema = MultiHeadDampedEMA(D, N, torch.nn.Identity(), K).double()
    x, padding = torch.randn(2, L, D, dtype=torch.float64), torch.rand(2, L) < 0.2
    want = by_definition(ema, x, padding)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ema(x.transpose(0, 1), padding).transpose(0, 1), want, **exact)
    inputs = None if K is None else x.new_zeros(2, 0, D)
    out, _, _ = ema.extend(x, padding, x.new_zeros(2, D, N), inputs)
    torch.testing.assert_close(out, want, **exact)


@pytest.mark.parametrize("L", [1, 2, 31, 32, 33, 64, 97])
@torch.no_grad()
def test_the_form_in_chunks_that_the_benchmark_times_is_the_same_average(L, seed):
    ema = MultiHeadDampedEMA(3, 2, torch.nn.SiLU(), None).double()
    scan = ByScan(3, 2, torch.nn.SiLU(), None).double()
    scan.load_state_dict(ema.state_dict())
    x, padding = torch.randn(L, 2, 3, dtype=torch.float64), torch.rand(2, L) < 0.2
    torch.testing.assert_close(scan(x, padding), ema(x, padding), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("K", [None, 3])
def test_gradients_by_finite_differences(K, seed):
    torch.manual_seed(seed)
    ema = MultiHeadDampedEMA(2, 2, torch.nn.SiLU(), K).double()
    x = torch.randn(4, 1, 2, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False, False, True, False]])
    parameters = list(ema.parameters())
    torch.autograd.gradcheck(lambda x, *_: ema(x, padding), (x, *parameters))


def numbered(shape: torch.Size, offset: int) -> torch.Tensor:
    """Weights that any language can write down: sin(0), sin(1), … from an offset, made small."""
    count = math.prod(shape)
    return (0.3 * torch.sin(torch.arange(offset, offset + count, dtype=torch.float64))).reshape(shape)


def golden_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights, offset = {}, 0
    for name, value in network.state_dict().items():
        weights[name] = numbered(value.shape, offset).to(value.dtype)
        offset += value.numel()
    weights["embed.weight"][0] = 0
    return weights


@pytest.mark.parametrize("name", ["simple", "rotary_chunk", "truncated_rms"])
def test_forward_of_espnets_class_on_written_down_weights(name):
    golden = json.loads((GOLDEN / "mega_forward.json").read_text())[name]
    network = MegaNetwork(**golden["configuration"]).eval()
    network.load_state_dict(golden_weights(network))
    with torch.no_grad():
        out = network(torch.tensor(golden["labels"]))
    torch.testing.assert_close(out, torch.tensor(golden["out"]), rtol=1e-5, atol=1e-5)
