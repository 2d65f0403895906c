"""The loops are the definition: the sum over all alignments, and its gradient."""

import json
from pathlib import Path

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rnnt_problems import ON_CPU, random_problem

from espnet_mega_plugin.rnnt import reference, rnnt_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "warp_transducer_1x2x3x5.json").read_text())


def test_number_of_alignments():
    assert len(list(oracles.alignments(4, 3))) == 20  # (T - 1 + U choose U)


@settings(max_examples=60)
@given(
    T=st.integers(1, 4),
    U=st.integers(0, 3),
    V=st.integers(2, 4),
    blank=st.integers(0, 3),
    fastemit_lambda=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_reference_is_the_sum_over_alignments(T, U, V, blank, fastemit_lambda, seed):
    problem = random_problem(2, T, U, V, seed, blank % V)
    acts = problem.acts.requires_grad_()
    costs = reference.costs(acts, *problem[1:], fastemit_lambda)
    (gradient,) = torch.autograd.grad(costs.sum(), acts)
    for b in range(2):
        one = problem.only(b)
        logits, labels = one.acts[0].detach(), one.labels[0].tolist()
        torch.testing.assert_close(costs[b], oracles.sum_over_alignments(logits, labels, problem.blank))
        wanted = oracles.fastemit_gradient(logits, labels, problem.blank, fastemit_lambda)
        torch.testing.assert_close(gradient[b, : len(logits), : len(labels) + 1], wanted)


@pytest.mark.parametrize("method", ON_CPU)
def test_warp_transducers_example(method):
    acts = torch.tensor(GOLDEN["acts"], dtype=torch.float64, requires_grad=True)
    others = [torch.tensor(GOLDEN[name], dtype=torch.int32) for name in ("labels", "act_lens", "label_lens")]
    loss = rnnt_loss(acts, *others, blank=GOLDEN["blank"], reduction="sum", fastemit_lambda=0.0, method=method)
    loss.backward()
    torch.testing.assert_close(loss.item(), GOLDEN["cost"], atol=1e-6, rtol=0)
    wanted = torch.tensor(GOLDEN["gradient_to_logits"], dtype=torch.float64)
    torch.testing.assert_close(acts.grad, wanted, atol=1e-6, rtol=0)  # theirs was float32
