"""The loss over all alignments of the other topologies: one label a frame at most."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rnnt_problems import ON_CPU, inside, random_problem

from espnet_mega_plugin.rnnt import RNNTLoss, fused_rnnt_loss, reference, rnnt_loss

FRAME_BY_FRAME = ("modified", "constrained")
FAST = [name for name in ON_CPU if name != "reference"]
EXACT = {"atol": 1e-10, "rtol": 1e-10}
sizes = {"T": st.integers(1, 5), "U": st.integers(0, 5), "V": st.integers(2, 5), "blank": st.integers(0, 4)}


def costs_and_gradient(problem, fastemit_lambda=0.0, weights=None, **options):
    leaf = problem.acts.detach().clone().requires_grad_()
    costs = rnnt_loss(leaf * 1, *problem[1:], reduction="none", fastemit_lambda=fastemit_lambda, **options)
    possible = costs.isfinite()
    if not possible.any():
        return costs.detach(), torch.zeros_like(leaf)
    weights = torch.ones_like(costs) if weights is None else weights
    (gradient,) = torch.autograd.grad(costs[possible], leaf, weights[possible])
    return costs.detach(), gradient


@settings(max_examples=60)
@given(**sizes, topology=st.sampled_from(FRAME_BY_FRAME), seed=st.integers(0, 2**16))
def test_reference_is_the_sum_over_paths(T, U, V, blank, topology, seed):
    problem = random_problem(2, T, U, V, seed, blank % V)
    acts = problem.acts.requires_grad_()
    costs = reference.costs(acts, *problem[1:], topology=topology)
    for b in range(2):
        one = problem.only(b)
        scores = one.acts[0].log_softmax(-1)
        labels = one.labels[0]
        at_label = scores[:, torch.arange(len(labels)), labels]
        wanted = -oracles.sum_over_paths(scores[..., problem.blank], at_label, topology)
        torch.testing.assert_close(costs[b], wanted)
        if wanted.isfinite():
            pair = (torch.autograd.grad(cost, acts, retain_graph=True)[0] for cost in (costs[b], wanted))
            torch.testing.assert_close(*pair, **EXACT, equal_nan=True)


@settings(max_examples=40)
@given(T=st.integers(1, 5), U=st.integers(0, 4), seed=st.integers(0, 2**16))
def test_constrained_are_the_regular_alignments_with_one_label_a_frame_at_most(T, U, seed):
    problem = random_problem(1, T, U, 4, seed)
    paths, scores = oracles.alignment_scores(problem.acts[0], problem.labels[0].tolist(), 0)
    allowed = []
    for path, score in zip(paths, scores, strict=True):
        frames = [t for t, _, is_label in path if is_label]
        if len(set(frames)) == len(frames):
            allowed.append(score)
    cost = rnnt_loss(*problem, reduction="sum", fastemit_lambda=0.0, topology="constrained")
    wanted = -torch.stack(allowed).logsumexp(0) if allowed else torch.tensor(torch.inf, dtype=torch.float64)
    torch.testing.assert_close(cost[0], wanted)
    assert (cost == torch.inf) == (U > T)


@pytest.mark.parametrize("method", FAST)
@settings(max_examples=80)
@given(
    B=st.integers(1, 4),
    **sizes,
    topology=st.sampled_from(FRAME_BY_FRAME),
    fastemit_lambda=st.sampled_from([0.0, 0.01, 1.5]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_every_method_is_the_reference(method, B, T, U, V, blank, topology, fastemit_lambda, spread, seed):
    problem = random_problem(B, T, U, V, seed, blank % V, spread)
    weights = torch.randn(B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = {"fastemit_lambda": fastemit_lambda, "weights": weights, "topology": topology}
    wanted = costs_and_gradient(problem, method="reference", **options)
    got = costs_and_gradient(problem, method=method, **options)
    torch.testing.assert_close(got[0], wanted[0], **EXACT)
    cells = inside(problem)
    torch.testing.assert_close(got[1][cells], wanted[1][cells], **EXACT)
    assert (got[1][~cells] == 0).all()


@pytest.mark.parametrize("topology", FRAME_BY_FRAME)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_is_standard(topology, dtype, seed):
    torch.manual_seed(seed)
    B, T, U, V, J = 3, 9, 5, 11, 7
    enc, dec, weight, bias = (
        torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((B, T, J), (B, U + 1, J), (V, J), (V,))
    )
    labels = torch.randint(1, V, (B, U))
    others = labels, torch.tensor([T, 4, 6]), torch.tensor([U, 0, 4])
    options = {"reduction": "none", "fastemit_lambda": 0.3, "topology": topology}
    weights = torch.randn(B, dtype=dtype)
    leaves = enc, dec, weight, bias
    fused = fused_rnnt_loss(*leaves, *others, torch.tanh, **options)
    logits = torch.tanh(enc[:, :, None] + dec[:, None]) @ weight.T + bias
    standard = rnnt_loss(logits, *others, **options)
    bounds = EXACT if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(fused, standard, **bounds)
    gradients = [torch.autograd.grad(costs, leaves, weights) for costs in (fused, standard)]
    torch.testing.assert_close(*gradients, **bounds)


@pytest.mark.parametrize("topology", FRAME_BY_FRAME)
def test_more_labels_than_frames_cost_infinity_and_teach_nothing(topology):
    problem = random_problem(2, 3, 4, 5, seed=1)
    problem = problem._replace(act_lens=torch.tensor([3, 3]), label_lens=torch.tensor([4, 2]))
    problem = problem._replace(labels=torch.ones(2, 4, dtype=torch.long))
    acts = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    costs = rnnt_loss(acts * 1, *problem[1:], reduction="none", topology=topology)
    assert costs[0] == torch.inf and costs[1].isfinite()
    (gradient,) = torch.autograd.grad(costs.sum(), acts)
    assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


@pytest.mark.parametrize("topology", FRAME_BY_FRAME)
def test_nan_is_visible_in_its_utterance_alone(topology):
    problem = random_problem(2, 4, 3, 5, seed=2)
    acts = problem.acts.clone()
    acts[0, 1, 1, 2] = torch.nan
    costs, gradient = costs_and_gradient(problem.with_acts(acts), topology=topology)
    assert costs.isnan().tolist() == [True, False]
    assert not gradient[1].isnan().any()


def test_finite_differences(seed):
    torch.manual_seed(seed)
    acts = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    others = torch.ones(2, 3, dtype=torch.long), torch.tensor([4, 3]), torch.tensor([3, 1])
    for topology in FRAME_BY_FRAME:
        torch.autograd.gradcheck(
            lambda x, topology=topology: rnnt_loss(x, *others, fastemit_lambda=0.0, topology=topology), acts
        )


def test_refusals():
    problem = random_problem(1, 3, 2, 4, seed=3)
    with pytest.raises(ValueError, match="topology must be one of 'regular', 'modified', 'constrained'; got 'free'"):
        rnnt_loss(*problem, topology="free")
    with pytest.raises(ValueError, match="topology must be one of"):
        RNNTLoss(topology="free")
    with pytest.raises(ValueError, match="'triton' knows the regular topology alone; got topology 'modified'"):
        RNNTLoss(topology="modified", method="triton")
