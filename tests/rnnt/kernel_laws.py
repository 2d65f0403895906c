"""What the Triton kernels have to obey, on CPU tensors: test_kernels.py runs this file in Triton's interpreter."""

import pytest
import torch
from penalties import assert_no_penalty
from rnnt_problems import inside, random_problem

from espnet_mega_plugin.rnnt import kernels, reference, rnnt_loss, wavefront
from espnet_mega_plugin.rnnt.kernels import triton_rnnt_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # log(0) is meant
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def given(problem):
    """As the loss's door hands it on: classes in the labels' padding, too."""
    return problem._replace(labels=torch.where(problem.labels < 0, problem.blank, problem.labels))


def costs_and_gradient(method, problem, weights=None, leaf=True, **options):
    acts = problem.acts.clone().requires_grad_()
    costs = method(acts if leaf else acts * 1, *problem[1:], **options)
    weights = torch.ones_like(costs) if weights is None else weights.to(costs.dtype)
    return costs.detach(), torch.autograd.grad(costs, acts, weights)[0]


@pytest.mark.parametrize(
    "shape, blank, fastemit_lambda, dtype",
    [
        ((3, 5, 3, 5), 0, 0.0, torch.float64),
        ((2, 4, 3, 4), 3, 0.3, torch.float64),
        ((1, 1, 0, 2), 1, 0.1, torch.float64),
        ((2, 4, 0, 3), 0, 0.1, torch.float64),
        ((2, 1, 3, 3), 0, 0.1, torch.float64),
        ((2, 3, 7, 6), 2, 0.0, torch.float32),
        ((2, 12, 4, 33), 1, 0.1, torch.float32),
        ((2, 5, 3, 20), 0, 0.0, torch.bfloat16),
        ((2, 5, 3, 20), 0, 0.0, torch.float16),
    ],
)
def test_it_is_the_reference(shape, blank, fastemit_lambda, dtype):
    problem = given(random_problem(*shape, seed=1, blank=blank, dtype=dtype))
    exact = problem.with_acts(problem.acts.double())
    weights = torch.linspace(-1, 2, shape[0])
    wanted = costs_and_gradient(reference.costs, exact, weights, fastemit_lambda=fastemit_lambda)
    costs, gradient = costs_and_gradient(triton_rnnt_loss, problem, weights, False, fastemit_lambda=fastemit_lambda)
    assert costs.dtype == wavefront.accumulator(dtype) and gradient.dtype == dtype
    torch.testing.assert_close(costs.double(), wanted[0], atol=TOLERANCE[costs.dtype], rtol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted[1], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert (gradient[~inside(problem)] == 0).all()


def test_the_loss_takes_it_as_a_method():
    problem = random_problem(3, 4, 2, 5, seed=12)
    found = []
    for method in ("triton", "reference"):
        acts = problem.acts.clone().requires_grad_()
        loss = rnnt_loss(acts * 1, *problem[1:], fastemit_lambda=0.1, method=method)
        found.append((loss.detach(), torch.autograd.grad(loss, acts)[0]))
    torch.testing.assert_close(*found, atol=1e-10, rtol=1e-10)


def test_several_parts_of_a_row(monkeypatch):
    monkeypatch.setattr(kernels, "MOST_CLASSES_AT_ONCE", 4)
    problem = given(random_problem(2, 3, 2, 11, seed=2, blank=10))
    problem.acts[0, 0, 0, :5] = -torch.inf  # a whole part and more
    wanted = costs_and_gradient(reference.costs, problem)
    assert wanted[0].isfinite().all()
    torch.testing.assert_close(costs_and_gradient(triton_rnnt_loss, problem), wanted, atol=1e-10, rtol=1e-10)


def test_more_than_1024_rows():
    """The lattice alone: one wide program, against the lattice in float64."""
    from espnet_mega_plugin.rnnt.lattice import shares

    B, T, U1 = 1, 3, 1030
    N = T + U1 - 1
    blank, label = -torch.rand(2, B, T, U1) * 3
    frames, labels = torch.tensor([2]), torch.tensor([1027])
    t, u = torch.arange(T)[:, None], torch.arange(U1)
    planes = []
    for plane in (blank, label):
        skewed = torch.full((B, N, U1), torch.nan)
        skewed[:, t + u, u] = plane
        planes.append(skewed)
    stay, log_prob = torch.empty(B, N, U1), torch.empty(B)
    kernels.lattice[(B,)](*planes, stay, frames, labels, log_prob, U1, N, WIDTH=2048, WANTED=True)
    wanted = shares(blank.double(), label.double(), frames, labels, True)
    torch.testing.assert_close(log_prob.double(), wanted.log_prob, rtol=1e-6, atol=0)
    for skewed, by_arc in zip(planes, (wanted.blank, wanted.label), strict=True):
        found = skewed[:, t + u, u].double()
        carried = by_arc > 0
        torch.testing.assert_close(found[carried], by_arc[carried], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("T, U, rounding", [(50, 6, 1e-6), (1000, 2, 1.5e-7)])
def test_float32_keeps_its_precision_over_many_diagonals(T, U, rounding):
    problem = given(random_problem(1, T, U, 3, seed=3, dtype=torch.float32))
    wanted = costs_and_gradient(wavefront.costs, problem.with_acts(problem.acts.double()))
    costs, gradient = costs_and_gradient(triton_rnnt_loss, problem)
    torch.testing.assert_close(costs.double(), wanted[0], rtol=rounding, atol=0)
    assert (gradient - wanted[1]).norm() < 2e-5 * wanted[1].norm()


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6, -1e6])
def test_a_constant_added_to_all_logits_costs_no_digits(offset):
    """Eighths, which float32 keeps beside 1e6."""
    problem = given(random_problem(2, 6, 4, 7, seed=13, dtype=torch.float32))
    moved = problem.with_acts((problem.acts * 8).round() / 8 + offset)
    wanted = costs_and_gradient(reference.costs, moved.with_acts(moved.acts.double()), fastemit_lambda=0.2)
    costs, gradient = costs_and_gradient(triton_rnnt_loss, moved, fastemit_lambda=0.2)
    torch.testing.assert_close(costs.double(), wanted[0], rtol=1e-6, atol=0)
    assert (gradient - wanted[1]).norm() < 2e-6 * wanted[1].norm()


def test_a_row_that_is_masked_as_a_whole_has_its_classes_alike():
    for mask in (-1e30, torch.finfo(torch.float32).min):
        problem = given(random_problem(1, 4, 3, 7, seed=14, dtype=torch.float32))
        problem.acts[0, 3, 3] = mask  # on every path
        wanted = costs_and_gradient(reference.costs, problem.with_acts(problem.acts.double()))
        costs, gradient = costs_and_gradient(triton_rnnt_loss, problem)
        torch.testing.assert_close(costs.double(), wanted[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), wanted[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_are_visible_in_their_utterance_alone(value):
    problem = given(random_problem(3, 3, 2, 4, seed=4, dtype=torch.float32))
    problem.acts[1, int(problem.act_lens[1]) - 1, 0, 2] = value
    costs, gradient = costs_and_gradient(triton_rnnt_loss, problem, leaf=False)
    assert costs.isnan().tolist() == [False, True, False]
    valid = inside(problem)
    for b in range(3):
        assert gradient[b][valid[b]].isnan().all() == (b == 1)
        assert (gradient[b][~valid[b]] == 0).all()


def test_masked_arcs_and_labels_without_a_path():
    problem = given(random_problem(3, 4, 2, 4, seed=5))
    problem.acts[0, 1, 0, 0] = -torch.inf
    problem.acts[0, 2, 1, problem.labels[0, 1]] = -torch.inf
    wanted = costs_and_gradient(wavefront.costs, problem)
    torch.testing.assert_close(costs_and_gradient(triton_rnnt_loss, problem), wanted, atol=1e-10, rtol=1e-10)
    problem.acts[0, :, 1, problem.labels[0, 1]] = -torch.inf
    costs, gradient = costs_and_gradient(triton_rnnt_loss, problem)
    assert costs[0] == torch.inf and (gradient[0] == 0).all()
    torch.testing.assert_close((costs[1:], gradient[1:]), (wanted[0][1:], wanted[1][1:]), atol=1e-10, rtol=1e-10)


def test_threshold_gives_exact_zeros():
    problem = given(random_problem(1, 12, 4, 3, seed=6, spread=4.0))
    whole, banded = (costs_and_gradient(triton_rnnt_loss, problem, threshold=at)[1] for at in (0.0, 1e-3))
    dropped = (banded == 0).all(-1)
    assert dropped.any() and not dropped.all()
    torch.testing.assert_close(banded[~dropped], whole[~dropped], atol=0, rtol=0)
    assert whole[dropped].abs().max() <= 1e-3


def test_fresh_memory_is_not_read():
    problem = given(random_problem(2, 4, 3, 5, seed=7, dtype=torch.float32))
    plain = costs_and_gradient(triton_rnnt_loss, problem)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        filled = costs_and_gradient(triton_rnnt_loss, problem)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(filled, plain, atol=0, rtol=0)


# ---- inside autograd ------------------------------------------------------------------------------------------------


def test_the_gradient_takes_the_place_of_the_logits_once():
    problem = given(random_problem(2, 3, 2, 4, seed=8))
    acts = problem.acts.nan_to_num(0.0).requires_grad_() * 1
    loss = triton_rnnt_loss(acts, *problem[1:]).sum()
    loss.backward(retain_graph=True)
    wanted = costs_and_gradient(wavefront.costs, problem)[1]
    torch.testing.assert_close(acts.detach(), wanted, atol=1e-10, rtol=1e-10)
    with pytest.raises(RuntimeError, match=r"overwritten before its backward.*inplace=False"):
        loss.backward()


def test_elsewhere_backward_may_run_again():
    problem = given(random_problem(2, 3, 2, 4, seed=9))
    wanted = costs_and_gradient(wavefront.costs, problem)[1]
    leaf = problem.acts.clone().requires_grad_()
    for acts, options in ((leaf, {}), (leaf * 1, {"inplace": False})):
        loss = triton_rnnt_loss(acts, *problem[1:], **options).sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            torch.testing.assert_close(gradient, wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(leaf.detach(), problem.acts, atol=0, rtol=0, equal_nan=True)


def test_a_gradient_penalty_is_refused():
    problem = given(random_problem(2, 3, 2, 4, seed=15))
    leaf = problem.acts.nan_to_num(0.0).requires_grad_()
    assert_no_penalty(triton_rnnt_loss(leaf, *problem[1:]), leaf)
    for inplace in (True, False):
        acts = leaf * 1
        assert_no_penalty(triton_rnnt_loss(acts, *problem[1:], inplace=inplace), acts, leaf)


def test_any_strides():
    problem = given(random_problem(2, 3, 2, 4, seed=10))
    swapped = problem.with_acts(problem.acts.transpose(1, 3).contiguous().transpose(1, 3))
    wanted = costs_and_gradient(wavefront.costs, problem)
    torch.testing.assert_close(costs_and_gradient(triton_rnnt_loss, swapped), wanted, atol=1e-10, rtol=1e-10)
    base = swapped.acts.clone(memory_format=torch.preserve_format).requires_grad_()
    costs = triton_rnnt_loss(base.transpose(0, 1).transpose(0, 1) * 1, *problem[1:])
    torch.testing.assert_close(torch.autograd.grad(costs.sum(), base)[0], wanted[1], atol=1e-10, rtol=1e-10)


def test_value_alone():
    problem = given(random_problem(2, 3, 2, 4, seed=11))
    with torch.no_grad():
        costs = triton_rnnt_loss(problem.acts.clone().requires_grad_(), *problem[1:])
    assert costs.grad_fn is None
    torch.testing.assert_close(costs, wavefront.costs(*problem), atol=1e-10, rtol=1e-10)
