"""The moving average in training: ESPnet's bits forward, automatic differentiation's numbers backward, for less."""

import copy
import io
import shutil

import pytest
import torch
from ema_by_autograd import ByAutograd, kept_bytes
from espnet2.asr_transducer.decoder.modules.mega.multi_head_damped_ema import MultiHeadDampedEMA as EspnetEMA
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from espnet_mega_plugin.mega import MegaNetwork, convolution
from espnet_mega_plugin.mega.ema import MultiHeadDampedEMA


def build(D=5, N=3, K=None, dtype=torch.float32, cls=MultiHeadDampedEMA, activation=None) -> torch.nn.Module:
    return cls(D, N, activation or torch.nn.SiLU(), K).to(dtype)


def problem(L=11, B=3, D=5, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, padding (anywhere but first) and the gradient of the output."""
    x = torch.randn(L, B, D, dtype=dtype, requires_grad=True)
    padding = torch.rand(B, L) < 0.3
    padding[:, :1] = False
    return x, padding, torch.randn(L, B, D).to(dtype)


def gradients(ema, x, padding, grad) -> list[torch.Tensor]:
    return list(torch.autograd.grad(ema(x, padding), [x, *ema.parameters()], grad))


def relative_error(got: list, want: list, least: float = 0.0) -> float:
    """The worst tensor's. least: what one is held against at least, as a share of the largest norm."""
    norms = torch.stack([tensor.double().norm() for tensor in want])
    errors = torch.stack([(a.double() - b.double()).norm() for a, b in zip(got, want, strict=True)])
    return (errors / norms.clamp(min=max(1e-30, least * norms.max().item()))).max().item()


# -- values: ESPnet's


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 3, 8, 33]), st.integers(1, 5)),
    K=st.sampled_from([None, 1, 2, 7, 50]),
    part=st.sampled_from([1, 4000, convolution.CACHED]),
    time_first=st.booleans(),
    s=st.integers(0, 2**31 - 1),
)
def test_forward_is_espnets_bits_in_espnets_layout(shape, K, part, time_first, s):
    """However the batch is cut into parts; in memory as ESPnet's, which later operations' bits depend on."""
    torch.manual_seed(s)
    L, B, D, N = shape
    ours, theirs = build(D, N, K), build(D, N, K, cls=EspnetEMA)
    theirs.load_state_dict(ours.state_dict())
    x, padding, _ = problem(L, B, D)
    if not time_first:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "CACHED", part)
        got = ours(x, padding)
    want, _ = theirs(x, padding[:, None])
    assert torch.equal(got, want) and got.dtype == want.dtype
    sizes = [i for i in range(3) if got.shape[i] > 1]
    assert [got.stride(i) for i in sizes] == [want.stride(i) for i in sizes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_forward_is_that_of_plain_operations_in_any_dtype(dtype, autocast, parameters, seed):
    ours = build(K=4, dtype=parameters or dtype)
    plain = build(K=4, dtype=parameters or dtype, cls=ByAutograd)
    plain.load_state_dict(ours.state_dict())
    x, padding, _ = problem(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got, want = ours(x, padding), plain(x, padding)
    assert got.dtype == want.dtype and torch.equal(got, want)


# -- gradients


@pytest.mark.parametrize("L, B, K", [(1, 2, None), (6, 2, None), (5, 2, 3), (4, 2, 9), (4, 0, None), (5, 1, 1)])
@pytest.mark.parametrize("part", [1, convolution.CACHED])
def test_gradients_by_finite_differences(L, B, K, part, seed, monkeypatch):
    monkeypatch.setattr(convolution, "CACHED", part)
    ema = build(3, 2, K, torch.float64)
    x, padding, _ = problem(L, B, 3, torch.float64)
    torch.autograd.gradcheck(lambda x, *_: ema(x, padding), (x, *ema.parameters()))


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 3, 33]), st.integers(1, 5)),
    K=st.sampled_from([None, 1, 2, 7, 50]),
    part=st.sampled_from([1, 4000, convolution.CACHED]),
    layout=st.permutations(range(3)),
    s=st.integers(0, 2**31 - 1),
)
def test_gradients_are_autograds(shape, K, part, layout, s):
    """In float64 to rounding, whatever way the gradient lies in memory; in float32 as near to those as autograd's."""
    torch.manual_seed(s)
    L, B, D, N = shape
    ours, plain = build(D, N, K), build(D, N, K, cls=ByAutograd)
    plain.load_state_dict(ours.state_dict())
    x, padding, grad = problem(L, B, D)
    grad = grad.permute(layout).contiguous().permute([layout.index(i) for i in range(3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "CACHED", part)
        single = gradients(ours, x, padding, grad)
        exact = copy.deepcopy(plain).double()
        want = gradients(exact, x.detach().double().requires_grad_(), padding, grad.double())
        double = gradients(copy.deepcopy(ours).double(), x.detach().double().requires_grad_(), padding, grad.double())
    for got, expected in zip(double, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    # A sum over few channels may cancel to a thirtieth of what it is made of, and its rounding stays
    automatic = relative_error(gradients(plain, x, padding, grad), want, least=0.1)
    assert relative_error(single, want, least=0.1) < 3 * automatic + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", ["off", "forward", "both"])
def test_gradients_in_lower_precision_and_under_autocast(dtype, autocast, seed):
    """Each in its tensor's dtype, and no further from float64's than automatic differentiation's."""
    ours, plain = build(dtype=dtype), build(dtype=dtype, cls=ByAutograd)
    plain.load_state_dict(ours.state_dict())
    x, padding, grad = problem(dtype=dtype)
    exact = gradients(copy.deepcopy(plain).double(), x.detach().double().requires_grad_(), padding, grad.double())
    found = []
    for ema in (ours, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast != "off"):
            out = ema(x, padding)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast == "both"):
            found.append(torch.autograd.grad(out, [x, *ema.parameters()], grad))
        assert [g.dtype for g in found[-1]] == [dtype] * 6
    assert relative_error(found[0], exact) < 1.5 * relative_error(found[1], exact) + 4 * torch.finfo(dtype).eps


def test_backward_within_autocast_is_backward_outside(seed):
    ema = build()
    x, padding, grad = problem()
    want = gradients(ema, x, padding, grad)
    out = ema(x, padding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out, [x, *ema.parameters()], grad)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_decay_of_zero_has_a_gradient():
    ema = build()
    with torch.no_grad():
        ema.damping_factor.fill_(20.0), ema.decay_factor.fill_(20.0)
    assert all(g.isfinite().all() for g in gradients(ema, *problem()))


def test_padding_is_neither_seen_nor_blamed(seed):
    """What stands at padding, even NaN, reaches no other label; only the residual sends a gradient there."""
    ema = build(activation=torch.nn.Identity())
    x, padding, grad = problem()
    want = gradients(ema, x, padding, grad)
    torch.testing.assert_close(want[0][padding.t()], (grad * ema.residual_weight)[padding.t()])
    poisoned = x.detach().masked_fill(padding.t()[..., None], float("nan")).requires_grad_()
    for got, expected in zip(gradients(ema, poisoned, padding, grad)[:-1], want[:-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    ema = build()
    x, padding, _ = problem()
    sources = [x, *ema.parameters()]
    for source in sources:
        out = ema(x, padding).sum()
        (first,) = torch.autograd.grad(out, source, create_graph=True)
        for other in sources:  # its own gradient comes without error, were only the penalty's left out
            with pytest.raises(RuntimeError, match="A gradient of a gradient was asked for"):
                torch.autograd.grad(out + first.square().sum(), other, retain_graph=True)


@pytest.mark.parametrize("frozen", ["input", "weights", "kernel", "residual"])
def test_what_is_frozen_has_no_gradient_and_the_rest_its_own(frozen, seed):
    ema = build()
    x, padding, grad = problem()
    names = ["x", *dict(ema.named_parameters())]
    want = dict(zip(names, gradients(ema, x, padding, grad), strict=True))
    x = x.detach().requires_grad_(frozen != "input")
    for name, parameter in ema.named_parameters():
        is_residual = name == "residual_weight"
        parameter.requires_grad_(
            {"weights": False, "kernel": is_residual, "residual": not is_residual}.get(frozen, True)
        )
    ema(x, padding).backward(grad)
    for name, tensor in {"x": x, **dict(ema.named_parameters())}.items():
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, want[name], rtol=0, atol=0)


# -- what is kept, and the tools that look into it


@pytest.mark.parametrize("L", [1, 16, 64])
def test_less_memory_is_kept_than_by_autograd(L):
    """The activation's input and the kernel, little more; automatic differentiation keeps the spectra, too."""
    x, padding, _ = problem(L, 4, 32)
    bound = x.nbytes + 32 * (L + 30) * 4 + 1000
    ours = kept_bytes(build(32), x, padding)
    assert ours <= bound and ours < kept_bytes(build(32, cls=ByAutograd), x, padding)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_copies(reentrant, seed):
    ema = build()
    x, padding, grad = problem()
    want = gradients(ema, x, padding, grad)
    again = copy.deepcopy(ema)
    checkpoint(again, x, padding, use_reentrant=reentrant).backward(grad)
    for got, expected in zip([x.grad, *(p.grad for p in again.parameters())], want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here"),
                pytest.mark.slow,
            ],
        ),
    ],
)
def test_compiled_training_is_one_graph_for_any_shape(backend, seed):
    ema = build()
    compiled = torch.compile(ema, fullgraph=True, dynamic=True, backend=backend)
    for L, B in ((7, 2), (12, 5)):
        x, padding, grad = problem(L, B)
        for got, want in zip(gradients(compiled, x, padding, grad), gradients(ema, x, padding, grad), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_trace_can_be_saved(seed):
    network = MegaNetwork(11, 8, 8, 4, 8, 2, num_blocks=2).eval()
    labels = torch.randint(1, 11, (2, 9))
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, (labels,), check_trace=False), file)
    file.seek(0)
    other = torch.randint(1, 11, (2, 9))
    torch.testing.assert_close(torch.jit.load(file)(other), network(other))


@pytest.mark.gpu
def test_no_synchronisation_with_the_host():
    ema = build().cuda()
    x, padding, grad = (t.detach().cuda() for t in problem())
    x.requires_grad_()
    gradients(ema, x, padding, grad)  # plans of the transforms
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(ema, x, padding, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
