"""k2's four functions against the enumeration of paths, finite differences and the standard loss."""

from typing import NamedTuple

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_waiting import NoWaiting
from penalties import assert_no_penalty
from rnnt_problems import random_problem
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from espnet_mega_plugin.rnnt import (
    do_rnnt_pruning,
    get_rnnt_prune_ranges,
    pruned,
    rnnt_loss,
    rnnt_loss_pruned,
    rnnt_loss_smoothed,
)
from espnet_mega_plugin.rnnt.topologies import TOPOLOGIES, log_prob

EXACT = {"atol": 1e-10, "rtol": 1e-10}


class Problem(NamedTuple):
    lm: Tensor  # (B, S+1, C)
    am: Tensor  # (B, T, C)
    symbols: Tensor  # (B, S), -1 beyond the length
    blank: int
    boundary: Tensor  # (B, 4)

    def lengths(self):
        return [(b, int(T), int(S)) for b, (_, _, S, T) in enumerate(self.boundary.tolist())]


def random_simple(B, T, S, C, seed, blank=0, dtype=torch.float64, spread=1.0) -> Problem:
    problem = random_problem(B, T, S, C, seed, blank)
    draw = torch.Generator().manual_seed(seed)
    lm, am = (torch.randn(B, n, C, generator=draw, dtype=torch.float64).to(dtype) * spread for n in (S + 1, T))
    zeros = torch.zeros_like(problem.act_lens)
    boundary = torch.stack([zeros, zeros, problem.label_lens, problem.act_lens], 1)
    return Problem(lm, am, problem.labels, blank, boundary)


def expected_smoothed(problem, lm_only, am_only, rnnt_type, delay_penalty):
    """Costs, path by path."""
    frequency, costs = problem.lm.softmax(-1).mean((0, 1)), []
    for b, T, S in problem.lengths():
        labels = problem.symbols[b, :S].tolist()
        lm, am = problem.lm[b, : S + 1], problem.am[b, :T]
        blank, label = oracles.smoothed_scores(lm, am, labels, problem.blank, lm_only, am_only, frequency)
        label = label + delay_penalty * ((T - 1) / 2 - torch.arange(T, dtype=torch.float64))[:, None]
        costs.append(-oracles.sum_over_paths(blank, label, rnnt_type))
    return torch.stack(costs)


# ---- the lattices ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    U=st.integers(0, 4),
    topology=st.sampled_from(TOPOLOGIES),
    blocked=st.sampled_from([0.0, 0.2, 0.6]),
    seed=st.integers(0, 2**16),
)
def test_lattices_are_the_sum_of_their_paths(B, T, U, topology, blocked, seed):
    draw = torch.Generator().manual_seed(seed)
    blank, label = torch.randn(2, B, T, U + 1, generator=draw, dtype=torch.float64) * 3 - 2
    for plane in (blank, label):
        plane[torch.rand(plane.shape, generator=draw) < blocked] = -torch.inf
    frames = torch.randint(1, T + 1, (B,), generator=draw)
    labels = torch.randint(0, U + 1, (B,), generator=draw)
    for b in range(B):
        for plane in (blank, label):
            plane[b, frames[b] :] = torch.nan
            plane[b, :, labels[b] + 1 :] = torch.nan
    leaves = blank.requires_grad_(), label.requires_grad_()
    score, by_blank, by_label = log_prob(*leaves, frames, labels, topology)
    assert not by_blank.requires_grad and not by_label.requires_grad
    gradients = torch.autograd.grad(score.sum(), leaves)
    for b in range(B):
        Tb, Ub = int(frames[b]), int(labels[b])
        one = blank[b, :Tb, : Ub + 1].detach().requires_grad_(), label[b, :Tb, :Ub].detach().requires_grad_()
        wanted = oracles.sum_over_paths(*one, topology)
        torch.testing.assert_close(score[b], wanted, **EXACT)
        if wanted == -torch.inf:
            assert all((x[b] == 0).all() for x in (*gradients, by_blank, by_label))
            continue
        for found, of_one in zip(gradients, torch.autograd.grad(wanted, one, allow_unused=True), strict=True):
            whole = torch.zeros(T, U + 1, dtype=torch.float64)
            if of_one is not None:  # a plane without an arc on any path
                whole[:Tb, : of_one.shape[1]] = of_one
            torch.testing.assert_close(found[b], whole, **EXACT)


# ---- the simple loss ------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    S=st.integers(0, 4),
    C=st.integers(2, 5),
    blank=st.integers(-1, 4),
    scales=st.sampled_from([(0.0, 0.0), (0.25, 0.0), (0.0, 0.5), (0.1, 0.2), (1.0, 0.0)]),
    rnnt_type=st.sampled_from(TOPOLOGIES),
    delay_penalty=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_smoothed_loss_is_the_sum_over_paths(B, T, S, C, blank, scales, rnnt_type, delay_penalty, seed):
    blank = min(blank, C - 1)
    problem = random_simple(B, T, S, C, seed, blank % C)
    leaves = problem.lm.requires_grad_(), problem.am.requires_grad_()
    weights = torch.linspace(-1, 2, B, dtype=torch.float64)
    options = dict(rnnt_type=rnnt_type, delay_penalty=delay_penalty)
    wanted = expected_smoothed(problem, *scales, **options)
    given = problem._replace(blank=blank)
    found = rnnt_loss_smoothed(*given[:4], *scales, given.boundary, reduction="none", **options)
    torch.testing.assert_close(found, wanted, **EXACT)
    spelt = wanted.isfinite()
    if not spelt.any():  # more labels than frames
        return
    gradients = torch.autograd.grad((found * weights)[spelt].sum(), leaves)
    expected = torch.autograd.grad((wanted * weights)[spelt].sum(), leaves)
    torch.testing.assert_close(gradients, expected, **EXACT)


@pytest.mark.parametrize("rnnt_type", TOPOLOGIES)
def test_gradients_are_those_of_finite_differences(rnnt_type):
    problem = random_simple(2, 4, 2, 3, seed=2)
    leaves = problem.lm.requires_grad_(), problem.am.requires_grad_()

    def costs(lm, am):
        options = dict(rnnt_type=rnnt_type, delay_penalty=0.1, reduction="none")
        return rnnt_loss_smoothed(lm, am, *problem[2:4], 0.1, 0.2, problem.boundary, **options)

    assert torch.autograd.gradcheck(costs, leaves)


def test_unsmoothed_it_is_the_standard_loss_of_a_sum():
    problem = random_simple(3, 7, 4, 6, seed=3)
    loss = rnnt_loss_smoothed(*problem[:4], 0.0, 0.0, problem.boundary, reduction="none")
    logits = problem.am[:, :, None] + problem.lm[:, None]
    lengths = problem.boundary[:, 3], problem.boundary[:, 2]
    torch.testing.assert_close(loss, rnnt_loss(logits, problem.symbols, *lengths, reduction="none"), **EXACT)


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.1, 0.2)])
def test_float32_keeps_classes_far_below_the_best(scales):
    """lm and am point to other classes, so that every product of their exponentials is below float32's numbers."""
    problem, found = random_simple(2, 4, 3, 50, seed=11, dtype=torch.float32, spread=60.0), []
    for dtype in (torch.float32, torch.float64):
        given = problem._replace(lm=problem.lm.to(dtype).requires_grad_(), am=problem.am.to(dtype).requires_grad_())
        if dtype == torch.float32:
            costs = rnnt_loss_smoothed(*given[:4], *scales, given.boundary, reduction="none")
        else:
            costs = expected_smoothed(given, *scales, "regular", 0.0)
        gradients = torch.autograd.grad(costs.sum(), (given.lm, given.am))
        found.append([x.detach().double() for x in (costs, *gradients)])
    sums = (problem.am - problem.am.amax(2, True))[:, :, None] + (problem.lm - problem.lm.amax(2, True))[:, None]
    assert sums.amax(3).min() < -100  # float32 ends at -103
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rnnt_type", TOPOLOGIES)
def test_returned_posteriors(rnnt_type):
    """They do not know of what happens to the loss afterwards; every path has S labels and takes T frames."""
    problem = random_simple(3, 7, 4, 6, seed=4)
    problem.lm.requires_grad_()
    options = dict(boundary=problem.boundary, rnnt_type=rnnt_type, return_grad=True)
    loss, (px_grad, py_grad) = rnnt_loss_smoothed(*problem[:4], **options)
    assert px_grad.shape == (3, 4, 8 if rnnt_type == "regular" else 7) and py_grad.shape == (3, 5, 7)
    assert not px_grad.requires_grad
    labels, frames = problem.boundary[:, 2].double(), problem.boundary[:, 3].double()
    torch.testing.assert_close(px_grad.sum((1, 2)), labels, **EXACT)
    blanks = {"regular": frames, "modified": frames - labels, "constrained": frames - labels}[rnnt_type]
    torch.testing.assert_close(py_grad.sum((1, 2)), blanks, **EXACT)
    kept = px_grad.clone()
    (loss * 7).backward()
    torch.testing.assert_close(px_grad, kept, atol=0, rtol=0)


def test_a_delay_penalty_brings_labels_forward():
    problem = random_simple(1, 20, 4, 6, seed=5)
    t, means = torch.arange(21), []
    for penalty in (0.0, 0.2, 1.0):
        _, (px_grad, _) = rnnt_loss_smoothed(*problem[:4], delay_penalty=penalty, return_grad=True)
        means.append(float((px_grad * t).sum() / px_grad.sum()))
    assert means[0] > means[1] + 0.5 > means[2] + 1


def test_reductions_and_no_boundary():
    problem = random_simple(3, 5, 4, 6, seed=6)._replace(boundary=torch.tensor([[0, 0, 4, 5]] * 3))
    problem = problem._replace(symbols=torch.randint(1, 6, (3, 4)))
    costs = rnnt_loss_smoothed(*problem[:4], boundary=problem.boundary, reduction="none")
    assert costs.shape == (3,)
    torch.testing.assert_close(rnnt_loss_smoothed(*problem[:4], reduction="none"), costs, atol=0, rtol=0)
    torch.testing.assert_close(rnnt_loss_smoothed(*problem[:4]), costs.mean())
    torch.testing.assert_close(rnnt_loss_smoothed(*problem[:4], reduction="sum"), costs.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_and_autocast(dtype):
    problem = random_simple(3, 30, 10, 20, seed=7, dtype=dtype)
    exact = rnnt_loss_smoothed(problem.lm.double(), problem.am.double(), *problem[2:4], boundary=problem.boundary)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rnnt_loss_smoothed(*problem[:4], boundary=problem.boundary)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-5)


# ---- the ranges -----------------------------------------------------------------------------------------------------


def expected_ranges(px_grad, py_grad, boundary, R, step):
    """First rows by loops: the R rows with most blanks that were not entered from below within the frame."""
    (B, S, _), T = px_grad.shape, py_grad.shape[2]
    first = torch.zeros(B, T, dtype=torch.int64)
    for b in range(B):
        S_b, T_b = boundary[b, 2:].tolist()
        for t in range(T):
            gains = [sum(py_grad[b, s : s + R, t]) - (px_grad[b, s - 1, t] if s else 0) for s in range(S + 2 - R)]
            first[b, t] = int(torch.stack(gains).argmax()) if t < T_b - 1 else max(0, S_b - R + 1)
        for t in reversed(range(T - 1)):  # never falls
            first[b, t] = min(first[b, t], first[b, t + 1])
        for t in reversed(range(T - 1)):  # never so low that the next cannot be reached
            first[b, t] = max(first[b, t], first[b, t + 1] - step)
        for t in range(T):  # the first frame has row 0
            first[b, t] = min(first[b, t], step * t)
    return first


@settings(max_examples=60)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 12),
    S=st.integers(0, 9),
    s_range=st.integers(1, 12),
    rnnt_type=st.sampled_from(TOPOLOGIES),
    spread=st.sampled_from([0.3, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_ranges(B, T, S, s_range, rnnt_type, spread, seed):
    problem = random_simple(B, T, S, 6, seed, spread=spread)
    boundary = problem.boundary
    if rnnt_type != "regular":  # labels that can be spelt: one a frame
        boundary[:, 3] = boundary[:, 3].maximum(boundary[:, 2])
        problem = problem._replace(am=problem.am.repeat(1, 10, 1)[:, : max(T, S)])
    options = dict(boundary=boundary, rnnt_type=rnnt_type)
    loss, grads = rnnt_loss_smoothed(*problem[:4], 0.0, 0.0, return_grad=True, reduction="none", **options)
    grads = [(grad * 2**20).round() / 2**20 for grad in grads]  # sums are exact, so are ties
    ranges = get_rnnt_prune_ranges(*grads, boundary, s_range)
    R = ranges.shape[2]
    first, step = ranges[..., 0], R - 1 if rnnt_type == "regular" else 1
    assert (ranges == first[..., None] + torch.arange(R)).all()
    assert min(s_range, S + 1) <= R <= S + 1 and ranges.min() >= 0 and ranges.max() <= S
    moves = first.diff(dim=1)
    assert (moves >= 0).all() and (moves <= step).all() and (first[:, 0] == 0).all()
    for b, T_b, S_b in problem.lengths():
        assert S_b in ranges[b, T_b - 1]
    torch.testing.assert_close(first, expected_ranges(*grads, boundary, R, step), atol=0, rtol=0)

    am, lm = do_rnnt_pruning(problem.am, problem.lm, ranges)
    pruned_loss = rnnt_loss_pruned(am + lm, problem.symbols, ranges, 0, reduction="none", **options)
    assert pruned_loss.isfinite().all() and (pruned_loss >= loss - 1e-9).all()  # some paths are gone, not all
    if R == S + 1:
        torch.testing.assert_close(pruned_loss, loss, **EXACT)


def test_ranges_follow_the_posteriors():
    """All of it in one path: its rows are kept wherever R rows can."""
    rows = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 5])
    py_grad = torch.nn.functional.one_hot(rows, 6).T[None].double()
    px_grad = torch.zeros(1, 5, 13, dtype=torch.float64)
    boundary = torch.tensor([[0, 0, 5, 12]])
    for s_range in (2, 3, 4):
        ranges = get_rnnt_prune_ranges(px_grad, py_grad, boundary, s_range)
        assert ranges.shape == (1, 12, s_range) and (ranges[0] == rows[:, None]).any(1).all()


# ---- pruning and the pruned loss ------------------------------------------------------------------------------------


def test_pruning_picks_cells():
    am, lm = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    ranges = torch.tensor([[0, 0, 1, 3], [0, 2, 2, 3]])[..., None] + torch.arange(2)
    am_pruned, lm_pruned = do_rnnt_pruning(am, lm, ranges)
    b = torch.arange(2)[:, None, None]
    torch.testing.assert_close(lm_pruned, lm[b, ranges], atol=0, rtol=0)
    torch.testing.assert_close(am_pruned, am[:, :, None].expand(2, 4, 2, 3), atol=0, rtol=0)
    weights = torch.randn_like(lm_pruned)
    gradients = [torch.autograd.grad((x * weights).sum(), lm, retain_graph=True)[0] for x in (lm_pruned, lm[b, ranges])]
    torch.testing.assert_close(*gradients, **EXACT)


def all_rows(problem):
    B, T, U1, _ = problem.acts.shape
    return torch.arange(U1).expand(B, T, U1)


def boundary_of(problem):
    zeros = torch.zeros_like(problem.act_lens)
    return torch.stack([zeros, zeros, problem.label_lens, problem.act_lens], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 7, 5, 6), (3, 5, 0, 4), (1, 1, 0, 2), (2, 1, 3, 5), (2, 40, 12, 30)])
def test_with_all_rows_it_is_the_standard_loss(shape, dtype):
    problem = random_problem(*shape, seed=8, blank=1, dtype=dtype)
    weights = torch.linspace(-1, 2, shape[0]) if dtype != torch.float64 else torch.linspace(-1, 2, shape[0]).double()
    found = []
    for way in ("pruned", "standard"):
        logits = problem.acts.clone().requires_grad_()
        if way == "pruned":
            options = dict(boundary=boundary_of(problem), reduction="none")
            costs = rnnt_loss_pruned(logits, problem.labels, all_rows(problem), 1, **options)
        else:
            costs = rnnt_loss(logits, *problem[1:], reduction="none", fastemit_lambda=0.0, threshold=0.0)
        found.append((costs.detach(), torch.autograd.grad(costs, logits, weights)[0]))
    tolerance = EXACT if dtype == torch.float64 else {}
    torch.testing.assert_close(*found, **tolerance)


@settings(max_examples=50)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    S=st.integers(0, 4),
    C=st.integers(2, 5),
    R=st.integers(1, 5),
    rnnt_type=st.sampled_from(TOPOLOGIES),
    delay_penalty=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_pruned_loss_is_the_sum_over_paths_in_its_ranges(B, T, S, C, R, rnnt_type, delay_penalty, seed):
    problem, R = random_simple(B, T, S, C, seed), min(R, S + 1)
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, R, C, generator=draw, dtype=torch.float64)
    for b, T_b, _ in problem.lengths():
        logits[b, T_b:] = torch.nan
    logits.requires_grad_()
    ranges = torch.randint(0, S + 2 - R, (B, T), generator=draw).sort(1).values[..., None] + torch.arange(R)
    options = dict(rnnt_type=rnnt_type, delay_penalty=delay_penalty, reduction="none")
    found = rnnt_loss_pruned(logits, problem.symbols, ranges, 0, problem.boundary, **options)
    scores, wanted = logits.log_softmax(-1), []
    for b, T_b, S_b in problem.lengths():
        blank, label = ([[torch.tensor(-torch.inf).double()] * (S + 1) for _ in range(T)] for _ in range(2))
        for t in range(T_b):
            for r in range(R):
                s = int(ranges[b, t, r])
                blank[t][s] = scores[b, t, r, 0]
                if s < S_b:
                    symbol = int(problem.symbols[b, s])
                    label[t][s] = scores[b, t, r, symbol] + delay_penalty * ((T_b - 1) / 2 - t)
        blank, label = (torch.stack([torch.stack(row) for row in plane[:T_b]]) for plane in (blank, label))
        wanted.append(-oracles.sum_over_paths(blank[:, : S_b + 1], label[:, :S_b], rnnt_type))
    wanted = torch.stack(wanted)
    torch.testing.assert_close(found, wanted, **EXACT)
    spelt = wanted.isfinite()
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert (gradient[~spelt] == 0).all()
    if spelt.any():
        expected = torch.autograd.grad(wanted[spelt].sum(), logits)[0]
        for b, T_b, _ in problem.lengths():
            torch.testing.assert_close(gradient[b, :T_b], expected[b, :T_b].nan_to_num(0.0), **EXACT)
            assert (gradient[b, T_b:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_way_of_other_devices_gives_the_same(monkeypatch, dtype):
    """CPU tensors treated as those of a device that reading from would synchronise."""
    problem = random_problem(3, 7, 4, 6, seed=10, dtype=dtype)
    found = []
    for free in (True, False):
        monkeypatch.setattr(pruned.wavefront, "lengths_are_free", lambda logits, free=free: free)
        logits = problem.acts.clone().requires_grad_()
        options = dict(boundary=boundary_of(problem), reduction="none")
        costs = rnnt_loss_pruned(logits, problem.labels, all_rows(problem), 0, **options)
        found.append((costs.detach(), torch.autograd.grad(costs, logits, torch.tensor([1.0, -2.0, 0.5]).to(costs))[0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rnnt_type", TOPOLOGIES)
def test_gradcheck_of_the_pruned_loss(rnnt_type):
    logits = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    symbols, boundary = torch.tensor([[1, 2], [2, -1]]), torch.tensor([[0, 0, 2, 4], [0, 0, 1, 3]])
    ranges = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])[..., None] + torch.arange(2)

    def costs(logits):
        return rnnt_loss_pruned(logits, symbols, ranges, 0, boundary, rnnt_type, reduction="none")

    assert costs(logits).isfinite().all()
    assert torch.autograd.gradcheck(costs, logits)


def test_the_four_functions_train_a_joint_network():
    """As in ESPnet: both losses summed; every parameter's gradient is finite and the loss falls."""
    torch.manual_seed(9)
    problem = random_simple(3, 12, 5, 8, seed=9, dtype=torch.float32)
    lin_lm, lin_am, output = (torch.nn.Linear(8, 8) for _ in range(3))
    parameters = [*lin_lm.parameters(), *lin_am.parameters(), *output.parameters()]
    optimizer, losses = torch.optim.Adam(parameters, lr=0.03), []
    for _ in range(30):
        lm, am = lin_lm(problem.lm), lin_am(problem.am)
        simple, grads = rnnt_loss_smoothed(lm, am, *problem[2:4], boundary=problem.boundary, return_grad=True)
        ranges = get_rnnt_prune_ranges(*grads, problem.boundary, 3)
        am_pruned, lm_pruned = do_rnnt_pruning(am, lm, ranges)
        logits = output(torch.tanh(am_pruned + lm_pruned))
        loss = 0.5 * simple + rnnt_loss_pruned(logits, problem.symbols, ranges, 0, problem.boundary)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("rnnt_type", TOPOLOGIES)
def test_a_gradient_penalty_is_refused(rnnt_type):
    problem = random_simple(2, 5, 3, 6, seed=14)
    lm, am = problem.lm.requires_grad_(), problem.am.requires_grad_()
    options = dict(boundary=problem.boundary, rnnt_type=rnnt_type)
    assert_no_penalty(rnnt_loss_smoothed(lm, am, *problem[2:4], **options), am, lm)
    logits, ranges = am[:, :, None] + lm[:, None], torch.arange(4).expand(2, 5, 4)
    assert_no_penalty(rnnt_loss_pruned(logits, problem.symbols, ranges, 0, **options), logits, am, lm)


@pytest.mark.parametrize("offset", [1e4, -1e6, 1e12, 1e17, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_added_to_all_logits_costs_no_digits(dtype, offset):
    """What is lost is lost in the logits: of these, the pruned loss is the definition's."""
    problem = random_simple(2, 5, 3, 6, seed=15, dtype=dtype)
    logits, ranges = (problem.am[:, :, None] + problem.lm[:, None] + offset), torch.arange(4).expand(2, 5, 4)
    leaves = logits.clone().requires_grad_(), logits.double().requires_grad_()
    costs = rnnt_loss_pruned(leaves[0], problem.symbols, ranges, 0, problem.boundary, reduction="none")
    lengths = problem.boundary[:, 3], problem.boundary[:, 2]
    right = rnnt_loss(leaves[1], problem.symbols, *lengths, 0, "none", 0.0, method="reference")
    rounding = 2e-6 if dtype == torch.float32 else 2e-10  # `wavefront.LARGE`
    torch.testing.assert_close(costs.detach().double(), right.detach(), rtol=rounding, atol=0)
    found, wanted = (torch.autograd.grad(c.sum(), leaf)[0] for c, leaf in zip((costs, right), leaves, strict=True))
    assert (found.double() - wanted).norm() < rounding * wanted.norm()


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_constants_added_to_encoder_and_decoder_cost_the_simple_loss_no_digits(offset):
    problem = random_simple(2, 5, 3, 6, seed=16, dtype=torch.float32)
    lm, am = ((x * 8).round() / 8 for x in problem[:2])  # eighths, which float32 keeps beside 1e6
    found = []
    for moved in (0.0, offset):
        leaves = (lm + moved).requires_grad_(), (am - 2 * moved).requires_grad_()
        loss = rnnt_loss_smoothed(*leaves, *problem[2:4], boundary=problem.boundary)
        found.append((loss.detach(), torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


# ---- the door -------------------------------------------------------------------------------------------------------

SIMPLE = dict(
    lm=torch.zeros(2, 4, 6),
    am=torch.zeros(2, 5, 6),
    symbols=torch.tensor([[1, 2, 3], [4, 5, -1]]),
    termination_symbol=0,
    boundary=torch.tensor([[0, 0, 3, 5], [0, 0, 2, 3]]),
)
PRUNED = dict(
    logits=torch.zeros(2, 5, 2, 6),
    ranges=torch.arange(2).expand(2, 5, 2),
    **{name: SIMPLE[name] for name in ("symbols", "termination_symbol", "boundary")},
)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(symbols=torch.tensor([[1, 2, 3], [4, 6, -1]])), ValueError, r"symbols\[1, 1\] = 6 is outside"),
        (dict(symbols=torch.tensor([[1, 2, 3], [0, 5, -1]])), ValueError, r"symbols\[1, 0\] = 0 is the"),
        (dict(boundary=torch.zeros(2, 3)), ValueError, r"boundary must be \(B, 4\) = \(2, 4\)"),
        (dict(boundary=torch.tensor([[0, 0, 3, 5], [0, 1, 2, 3]])), ValueError, r"boundary must begin with 0, 0"),
        (
            dict(boundary=torch.tensor([[0, 0, 3, 6], [0, 0, 2, 3]])),
            ValueError,
            r"boundary\[:, 3\] must be from 1 to 5",
        ),
        (
            dict(boundary=torch.tensor([[0, 0, 3, 5], [0, 0, 4, 3]])),
            ValueError,
            r"boundary\[:, 2\] must be from 0 to 3",
        ),
        (dict(termination_symbol=6), ValueError, r"termination_symbol must be a class from 0"),
        (dict(rnnt_type="simple"), ValueError, r"rnnt_type must be one of 'regular', 'modified', 'constrained'"),
        (dict(reduction="avg"), ValueError, r"reduction must be one of"),
        (dict(delay_penalty=-1.0), ValueError, r"delay_penalty must be a finite number from 0 up; got -1.0"),
        (dict(delay_penalty="1"), TypeError, r"delay_penalty must be a finite number from 0 up; got str"),
        (dict(reduction=None), ValueError, r"reduction must be one of 'none', 'mean', 'sum'; got None"),
        (dict(symbols=[[1]]), (TypeError, ValueError), r"symbols must be .*; got list"),
        (dict(symbols=torch.tensor([1, 2])), ValueError, r"symbols must be \(B, [SU]\), B = 2 .*; got \(2,\)"),
        (dict(boundary=[[0, 0, 3, 5]]), ValueError, r"boundary must be \(B, 4\) .*; got list"),
    ],
)
def test_refused_by_both_losses(wrong, error, message):
    for loss, good in ((rnnt_loss_smoothed, SIMPLE), (rnnt_loss_pruned, PRUNED)):
        with pytest.raises(error, match=message):
            loss(**{**good, **wrong})


def test_refused_by_one():
    for wrong, message in (
        (dict(lm=torch.zeros(2, 4)), r"lm must be a tensor of three dimensions; got \(2, 4\)"),
        (dict(lm=torch.zeros(2, 4, 5)), r"lm must be \(B, S\+1, C\) with B = 2 and C = 6.*got \(2, 4, 5\)"),
        (dict(am_only_scale=1.5), r"am_only_scale must be 1 at most together; got 0.1 and 1.5"),
        (dict(lm_only_scale=0.95), r"lm_only_scale and am_only_scale must be 1 at most together"),
        (dict(lm_only_scale=-0.1), r"lm_only_scale must be a finite number from 0 up; got -0.1"),
        (dict(am_only_scale=float("nan")), r"am_only_scale must be a finite number from 0 up; got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            rnnt_loss_smoothed(**{**SIMPLE, **wrong})
    for wrong, message in (
        (dict(lm_only_scale="a"), "lm_only_scale must be a finite number from 0 up; got str"),
        (dict(am_only_scale=None), "am_only_scale must be a finite number from 0 up; got NoneType"),
        (dict(am_only_scale=True), "am_only_scale must be a finite number from 0 up; got bool"),
        (dict(lm=SIMPLE["lm"].long()), "lm must be floating point; got torch.int64"),
        (dict(am=SIMPLE["am"].long()), "am must be floating point; got torch.int64"),
    ):
        with pytest.raises(TypeError, match=message):
            rnnt_loss_smoothed(**{**SIMPLE, **wrong})
    for wrong, error, message in (
        (dict(logits=torch.zeros(2, 5, 6)), ValueError, r"logits must be \(B, T, R, C\); got \(2, 5, 6\)"),
        (dict(ranges=torch.zeros(2, 5, 3, dtype=torch.int64)), ValueError, r"ranges must be \(B, T, R\) = \(2, 5, 2\)"),
        (dict(ranges=torch.full((2, 5, 2), 4)), ValueError, r"ranges must be from 0 to S = 3; got 4 to 4"),
        (dict(ranges=torch.zeros(2, 5, 2)), TypeError, r"ranges must be int64"),
        (dict(ranges=None), ValueError, r"ranges must be a tensor of three dimensions; got NoneType"),
        (dict(logits=None), ValueError, r"logits must be \(B, T, R, C\); got NoneType"),
    ):
        with pytest.raises(error, match=message):
            rnnt_loss_pruned(**{**PRUNED, **wrong})
    grads = torch.zeros(2, 3, 6), torch.zeros(2, 4, 5)
    for s_range in (0, 2.0, True):
        with pytest.raises(ValueError, match="s_range must be an int from 1 up"):
            get_rnnt_prune_ranges(*grads, SIMPLE["boundary"], s_range)
    with pytest.raises(ValueError, match=r"px_grad must be \(B, S, T \+ 1\)"):
        get_rnnt_prune_ranges(grads[0][..., :4], grads[1], SIMPLE["boundary"], 2)
    for grads_given in ((None, grads[1]), (grads[0], grads[1][0])):
        with pytest.raises(ValueError, match="p[xy]_grad must be a tensor of three dimensions"):
            get_rnnt_prune_ranges(*grads_given, SIMPLE["boundary"], 2)
    for beyond in ([0, 0, 4, 5], [0, 0, 3, 6], [0, 0, -1, 5]):
        with pytest.raises(ValueError, match="boundary must hold 0 to S = 3 labels and 0 to T = 5 frames"):
            get_rnnt_prune_ranges(*grads, torch.tensor([beyond] * len(SIMPLE["boundary"])), 2)


def test_pruning_refuses():
    am, lm, ranges = SIMPLE["am"], SIMPLE["lm"], PRUNED["ranges"]
    for wrong, message in (
        ((am, lm, None), r"ranges must be a tensor of three dimensions; got NoneType"),
        ((am, lm, ranges[0]), r"ranges must be a tensor of three dimensions; got \(5, 2\)"),
        ((am, [0.0], ranges), r"lm must be a tensor of three dimensions; got list"),
        ((am[0], lm, ranges), r"am must be a tensor of three dimensions; got \(5, 6\)"),
        ((am, lm, ranges[:, :4]), r"ranges must be \(B, T, R\) .* = \(2, 5\) as in am; got \(2, 4, 2\)"),
        ((am, lm, ranges + 3), r"ranges must be from 0 to S = 3; got 3 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            do_rnnt_pruning(*wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(symbols=torch.tensor([[1, 2, 3], [4, 9, -1]])), r"symbols\[1, 1\] = 9 is outside"),
        (dict(boundary=torch.tensor([[0, 0, 3, 5], [0, 0, 4, 3]])), r"boundary\[:, 2\] must be from 0 to 3"),
        (dict(boundary=torch.tensor([[0, 0, 3, 5], [0, 1, 2, 3]])), r"boundary must begin with 0, 0"),
    ],
)
def test_unchecked_utterances_at_fault_are_nan(wrong, message, monkeypatch):
    """CPU tensors treated as those of a device that reading from would synchronise."""
    monkeypatch.setattr(pruned.arguments, "_values_are_free", lambda *tensors: False)
    for loss, good in ((rnnt_loss_smoothed, SIMPLE), (rnnt_loss_pruned, PRUNED)):
        arguments = {**good, **wrong}
        assert loss(**arguments, reduction="none", check=False).isnan().tolist() == [False, True]
        with pytest.raises(ValueError, match=message):
            loss(**arguments, check=True)


def test_a_check_on_a_device_waits_for_it():
    """torch's fake CUDA tensors have no values: what asks for one raises, and without a check nothing does."""
    with FakeTensorMode(), NoWaiting():
        lm, am, logits = (torch.randn(2, *shape, 6, device="cuda") for shape in ((4,), (5,), (5, 2)))
        symbols = torch.ones(2, 3, dtype=torch.int64, device="cuda")
        boundary, ranges = (torch.zeros(2, *n, dtype=torch.int64, device="cuda") for n in ((4,), (5, 2)))
        for check in (None, False):
            rnnt_loss_smoothed(lm, am, symbols, 0, boundary=boundary, check=check)
            rnnt_loss_pruned(logits, symbols, ranges, 0, boundary, check=check)
        with pytest.raises(DataDependentOutputException):
            rnnt_loss_smoothed(lm, am, symbols, 0, boundary=boundary, check=True)
        with pytest.raises(DataDependentOutputException):
            pruned._rows_exist(ranges, 4, True)


def test_empty_batch():
    none = torch.zeros(0, 3, dtype=torch.int64)
    lm, am = torch.zeros(0, 4, 6, requires_grad=True), torch.zeros(0, 5, 6, requires_grad=True)
    loss, grads = rnnt_loss_smoothed(lm, am, none, 0, reduction="sum", return_grad=True)
    ranges = get_rnnt_prune_ranges(*grads, None, 2)
    assert loss == 0 and ranges.shape == (0, 5, 2)
    logits = sum(do_rnnt_pruning(am, lm, ranges))
    assert rnnt_loss_pruned(logits, none, ranges, 0, reduction="sum") == 0
