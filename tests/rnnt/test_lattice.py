"""The lattice against the enumeration of its paths."""

import json
from pathlib import Path

import oracles
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_mega_plugin.rnnt.lattice import shares

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "warp_transducer_1x2x3x5.json").read_text())


def enumerated(blank, label, T, U):
    """log P and the posteriors of the arcs of one utterance, path by path."""
    paths = list(oracles.alignments(T, U))
    scores = torch.stack([sum((label if arc else blank)[t, u] for t, u, arc in path) for path in paths])
    by_blank, by_label = torch.zeros_like(blank), torch.zeros_like(label)
    if scores.max() > -torch.inf:
        for path, share in zip(paths, scores.softmax(0), strict=True):
            for t, u, arc in path:
                (by_label if arc else by_blank)[t, u] += share
    return scores.logsumexp(0), by_blank, by_label


@settings(max_examples=60)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    U=st.integers(0, 4),
    blocked=st.sampled_from([0.0, 0.2, 0.6]),
    blocking=st.sampled_from([-torch.inf, -1e30]),
    seed=st.integers(0, 2**16),
)
def test_shares_are_those_of_the_enumerated_paths(B, T, U, blocked, blocking, seed):
    draw = torch.Generator().manual_seed(seed)
    blank, label = torch.randn(2, B, T, U + 1, generator=draw, dtype=torch.float64) * 3 - 2
    for plane in (blank, label):
        plane[torch.rand(plane.shape, generator=draw) < blocked] = blocking
    T_b, U_b = torch.randint(1, T + 1, (B,), generator=draw), torch.randint(0, U + 1, (B,), generator=draw)
    for b in range(B):
        for plane in (blank, label):
            plane[b, T_b[b] :] = torch.nan
            plane[b, :, U_b[b] + 1 :] = torch.nan
        label[b, :, U_b[b] :] = torch.nan
    log_prob, by_blank, by_label = shares(blank, label, T_b, U_b, posteriors=True)
    torch.testing.assert_close(shares(blank, label, T_b, U_b, posteriors=False).log_prob, log_prob)
    for b, (frames, labels) in enumerate(zip(T_b.tolist(), U_b.tolist(), strict=True)):
        wanted = enumerated(blank[b], label[b], frames, labels)
        torch.testing.assert_close(log_prob[b], wanted[0])
        if wanted[0] > -1e20:  # where a path has to cross -1e30, what the others add is rounded away
            torch.testing.assert_close((by_blank[b], by_label[b]), wanted[1:])


def test_warp_transducers_arc_posteriors():
    scores = torch.tensor(GOLDEN["acts"], dtype=torch.float64).log_softmax(-1)
    label = torch.zeros_like(scores[..., 0])
    label[..., 0], label[..., 1] = scores[..., 0, 1], scores[..., 1, 2]
    _, by_blank, by_label = shares(scores[..., 0], label, torch.tensor([2]), torch.tensor([2]), posteriors=True)
    wanted = -torch.tensor(GOLDEN["gradient_to_log_probs"], dtype=torch.float64)
    torch.testing.assert_close(by_blank, wanted[..., 0])
    torch.testing.assert_close(by_label[..., :2], torch.stack([wanted[..., 0, 1], wanted[..., 1, 2]], -1))


def test_long_and_wide():
    """Thousands of diagonals neither drift nor overflow: with the same arc everywhere, P is a binomial coefficient."""
    T, U = 700, 1300
    plane = torch.full((1, T, U + 1), -0.7, dtype=torch.float64)
    log_prob, by_blank, by_label = shares(plane, plane, torch.tensor([T]), torch.tensor([U]), posteriors=True)
    terms = torch.tensor([T + U, T, U + 1], dtype=torch.float64)
    paths = terms.lgamma() @ torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(log_prob[0], paths - 0.7 * (T + U))
    torch.testing.assert_close(by_blank.sum(), torch.tensor(float(T), dtype=torch.float64))
    torch.testing.assert_close(by_label.sum(), torch.tensor(float(U), dtype=torch.float64))
