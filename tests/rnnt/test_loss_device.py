"""The way other devices go, without asking for lengths: the same results, and no synchronisation."""

from contextlib import nullcontext

import pytest
import torch
from no_waiting import NoWaiting
from rnnt_problems import inside, random_problem
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from espnet_mega_plugin.rnnt import (
    arguments,
    do_rnnt_pruning,
    fused,
    fused_rnnt_loss,
    get_rnnt_prune_ranges,
    pruned,
    rnnt_loss,
    rnnt_loss_pruned,
    rnnt_loss_smoothed,
    wavefront,
)
from espnet_mega_plugin.rnnt.topologies import TOPOLOGIES


@pytest.fixture
def other_device(monkeypatch):
    """CPU tensors treated as those of a device that reading from would synchronise, in tiles of a few rows."""
    monkeypatch.setattr(wavefront, "lengths_are_free", lambda logits: False)
    monkeypatch.setattr(arguments, "_values_are_free", lambda *tensors: False)
    monkeypatch.setattr(wavefront, "DEVICE_TILE_BYTES", 4096)


def costs_and_gradient(problem, leaf=True, weights=None, **options):
    acts = problem.acts.clone().requires_grad_()
    costs = rnnt_loss(acts if leaf else acts * 1, *problem[1:], reduction="none", **options)
    weights = torch.ones_like(costs) if weights is None else weights
    return costs.detach(), torch.autograd.grad(costs, acts, weights)[0]


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 2, 4), (3, 40, 10, 30), (1, 1, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_results(other_device, dtype, shape, leaf):
    problem = random_problem(*shape, seed=41, dtype=dtype)
    weights = torch.linspace(-1, 2, shape[0], dtype=dtype)
    wanted = costs_and_gradient(problem, weights=weights, method="reference", check=True)
    got = costs_and_gradient(problem, leaf, weights)
    torch.testing.assert_close(got, wanted, atol=1e-10 if dtype == torch.float64 else 2e-6, rtol=1e-5)
    assert (got[1][~inside(problem)] == 0).all()


def test_half_types(other_device):
    problem = random_problem(3, 9, 4, 8, seed=42, dtype=torch.bfloat16)
    wanted = costs_and_gradient(problem, method="reference", check=True)
    for leaf in (True, False):
        torch.testing.assert_close(costs_and_gradient(problem, leaf), wanted, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "name, b, value", [("act_lens", 1, 0), ("act_lens", 0, 10), ("label_lens", 2, -1), ("label_lens", 1, 9)]
)
def test_unchecked_lengths_give_nan_to_their_utterance(other_device, name, b, value):
    problem = random_problem(3, 9, 4, 8, seed=43)._replace(labels=torch.ones(3, 4, dtype=torch.int64))
    lens = getattr(problem, name).clone()
    lens[b] = value
    wrong = problem._replace(**{name: lens})
    costs, gradient = costs_and_gradient(wrong)
    assert costs.isnan().tolist() == [other == b for other in range(3)]
    assert gradient[b].isnan().any()
    with pytest.raises(ValueError, match=f"{name} must be .* utterance {b} has {value}"):
        rnnt_loss(*wrong, check=True)


@pytest.mark.parametrize("value", [-1, 0, 8, 10**9])
def test_unchecked_labels_give_nan_to_their_utterance(other_device, value):
    problem = random_problem(3, 9, 4, 8, seed=44)
    labels = problem.labels.clone()
    labels[0, 2] = value
    costs, gradient = costs_and_gradient(problem._replace(labels=labels))
    assert costs.isnan().tolist() == [True, False, False]
    assert gradient[0].isnan().any() and gradient[1:].isfinite().all()


def fake_joint():
    """Arguments of `fused_rnnt_loss`, lengths last."""
    joint = [torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((3, 7, 4), (3, 5, 4), (11, 4), (11,))]
    labels = torch.ones(3, 4, dtype=torch.int32, device="cuda")
    return *joint, labels, *(torch.full((3,), n, device="cuda") for n in (7, 4))


class Unlaunched:
    """A kernel that is launched on fake tensors: Triton could not read these."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture(params=["wavefront", "triton"])
def method(request, monkeypatch):
    """The ways of the fused loss between its products, on fake tensors."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed: its host code is not tested")
        from espnet_mega_plugin.rnnt import fused_kernels, kernels

        for module, names in ((kernels, ("row_statistics", "lattice", "gradient")), (fused_kernels, ("hidden", "sums", "exceeding"))):  # fmt: skip
            for name in names:
                monkeypatch.setattr(module, name, Unlaunched())
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    return request.param


@pytest.mark.parametrize("activation", [torch.tanh, torch.nn.SiLU()], ids=["tanh", "silu"])
def test_fused_loss_without_synchronisation(monkeypatch, activation, method):
    """With lengths from the CPU and threshold 0; otherwise it waits for numbers of cells, and only for these."""
    monkeypatch.setattr(fused, "fastest", lambda *_: method)
    with FakeTensorMode(), NoWaiting():
        joint = fake_joint()
        with pytest.raises(DynamicOutputShapeException, match="nonzero"):
            fused_rnnt_loss(*joint, activation, threshold=0)
        monkeypatch.setattr(fused, "_count", lambda *_: 3 * 7 * 5)
        with pytest.raises(DynamicOutputShapeException, match="nonzero"):
            fused_rnnt_loss(*joint, activation)
        with torch.no_grad():
            fused_rnnt_loss(*joint, activation)
        costs = fused_rnnt_loss(*joint, activation, reduction="none", threshold=0)
        assert costs.device.type == "cuda" and costs.shape == (3,)
        # the engine would want a real device for its streams, also for an activation that PyTorch computes
        if activation is torch.tanh or method == "triton":
            inner = costs.grad_fn.next_functions[0][0]
            gradients = inner._forward_cls.backward(inner, torch.ones_like(costs))
            assert [x.shape for x in gradients[:4]] == [x.shape for x in joint[:4]]


def test_lengths_on_the_cpu_tell_the_number_of_cells(other_device):
    frames, labels = torch.tensor([7, 2, 9]), torch.tensor([4, 0, 1], dtype=torch.int32)
    logits = arguments.unbuilt((3, 7, 5, 11), torch.zeros(1))
    assert fused._count(frames, labels, logits) == 7 * 5 + 2 + 7 * 2  # 9 frames are refused, or cut where unchecked
    assert fused._count(frames.to("meta"), labels, logits) is None


@pytest.mark.parametrize("rnnt_type", TOPOLOGIES)
def test_pruned_loss_without_synchronisation(monkeypatch, rnnt_type):
    """With a boundary on the CPU; otherwise only the number of rows is waited for."""
    with FakeTensorMode(), NoWaiting():
        lm, am = (torch.randn(3, n, 11, device="cuda", requires_grad=True) for n in (5, 7))
        symbols = torch.ones(3, 4, dtype=torch.int64, device="cuda")
        boundary = torch.zeros(3, 4, dtype=torch.int64, device="cuda")
        _, grads = rnnt_loss_smoothed(lm, am, symbols, 0, 0.1, 0.1, boundary, rnnt_type, return_grad=True)
        with pytest.raises(DataDependentOutputException):
            get_rnnt_prune_ranges(*grads, boundary, 3)
        monkeypatch.setattr(pruned, "_fewest_rows", lambda boundary: 2)
        for lengths in (boundary, None):  # None is a boundary on the CPU
            ranges = get_rnnt_prune_ranges(*grads, lengths, 3)
            logits = sum(do_rnnt_pruning(am, lm, ranges))
            loss = rnnt_loss_pruned(logits, symbols, ranges, 0, lengths, rnnt_type, reduction="none")
            assert loss.device.type == "cuda" and ranges.shape == (3, 7, 3)


def test_no_synchronisation():
    """torch's fake CUDA tensors have no values: whatever would wait for one raises."""
    with FakeTensorMode(), NoWaiting():
        acts = torch.randn(3, 7, 5, 11, device="cuda", requires_grad=True) * 1
        labels = torch.ones(3, 4, dtype=torch.int32, device="cuda")
        act_lens, label_lens = (torch.full((3,), n, device="cuda") for n in (7, 4))
        costs = rnnt_loss(acts, labels, act_lens, label_lens, reduction="none", method="wavefront")
        assert costs.device.type == "cuda" and costs.shape == (3,)
        # the engine would want a real device for its streams
        inner = costs.grad_fn.next_functions[0][0]
        gradient = wavefront._Costs.backward(inner, torch.ones_like(costs))[0]
        assert gradient.device.type == "cuda" and gradient.shape == acts.shape
        with pytest.raises(AssertionError, match="a copy to cpu that waits"):
            rnnt_loss(acts, labels, act_lens, label_lens, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_real_device(dtype):
    problem = random_problem(3, 40, 10, 30, seed=45, dtype=dtype)
    wanted = costs_and_gradient(problem._replace(acts=problem.acts.double()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device = [x.cuda() if isinstance(x, torch.Tensor) else x for x in problem]
        acts = on_device[0].requires_grad_()
        costs = rnnt_loss(acts * 1, *on_device[1:], reduction="none")
        (gradient,) = torch.autograd.grad(costs, acts, torch.ones_like(costs))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(costs.cpu().double(), wanted[0], atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(gradient.cpu().double(), wanted[1], atol=tolerance, rtol=tolerance)
