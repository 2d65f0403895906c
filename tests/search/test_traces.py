"""The record of how a hypothesis took its labels: entries by number, and what a search reports of frames and labels."""

import random

import pytest
import torch
from search_problems import (
    SEARCH_TYPES,
    most_labels_a_frame,
    network_problem,
    random_lengths,
    random_options,
    tabled_problem,
)

from espnet_mega_plugin.search.hypotheses import Traces


def test_entries_lead_back_to_the_start():
    """Against lists, over growth, more utterances, and when what leads to none of some entries is dropped."""
    traces = Traces(2, torch.device("cpu"))
    paths = [[(-1, [])] for _ in range(2)]  # of each utterance: entries and what leads to them
    for step in range(60):
        if step == 30:
            traces.widen(5)
            paths += [[(-1, [])] for _ in range(3)]
        if step % 17 == 16:
            H = 5
            kept = [random.sample(some, H) for some in paths]
            wanted = torch.rand(len(paths), H) < 0.8
            entry = traces.compacted(torch.tensor([[entry for entry, _ in row] for row in kept]), wanted)
            assert traces.used <= H * step  # of each at most one label a step
            paths = [
                [(-1, [])] + [(int(entry[b, h]), path) for h, (_, path) in enumerate(row) if wanted[b, h]]
                for b, row in enumerate(kept)
            ]
        C = random.randint(1, 9)
        chosen = [[random.choice(some) for _ in range(C)] for some in paths]
        labels, frames = torch.randint(1, 50, (len(paths), C)), torch.full((len(paths), C), step)
        logps = torch.randn(len(paths), C, dtype=torch.float64)
        before = torch.tensor([[entry for entry, _ in row] for row in chosen])
        entries = traces.add(before, labels, frames, logps)
        for b, row in enumerate(chosen):
            for c, (_, path) in enumerate(row):
                paths[b].append((int(entries[b, c]), [*path, (int(labels[b, c]), step, float(logps[b, c]))]))
    for some in paths:
        random.shuffle(some)
    asked = random.sample(range(len(paths)), 4)
    lists = traces.read({b: [(float(i), entry) for i, (entry, _) in enumerate(paths[b])] for b in asked})
    for b, found in zip(asked, lists, strict=True):
        for i, (one, (_, path)) in enumerate(zip(found, paths[b], strict=True)):
            assert one.score == i
            assert one.yseq == [0, *(label for label, _, _ in path)]
            assert list(zip(one.yseq[1:], one.frames, one.logps, strict=True)) == path


def assert_trace_is_an_alignment(one, T, log_probs, most):
    """Labels in turn, frames that do not go back, each label's log-probability where it was taken, and no alignment
    more probable than all of them together."""
    labels = tuple(one.yseq[1:])
    assert len(one.frames) == len(one.logps) == len(labels)
    assert one.frames == sorted(one.frames) and all(0 <= t < T for t in one.frames)
    if most is not None:
        assert all(one.frames.count(t) <= most for t in set(one.frames))
    recomputed = [log_probs(t, labels[:u])[labels[u]] for u, t in enumerate(one.frames)]
    assert one.logps == pytest.approx(recomputed, rel=1e-9, abs=1e-9)
    blanks = sum(log_probs(t, labels[: sum(frame <= t for frame in one.frames)])[0] for t in range(T))
    assert sum(one.logps) + blanks <= one.score + 1e-9


@pytest.mark.parametrize("search_type", SEARCH_TYPES)
def test_what_is_reported_is_an_alignment(search_type):
    problems = [tabled_problem(random_lengths(3)) for _ in range(8)]
    problems += [network_problem(kind, [9, 13, 4]) for kind in ("simple", "stateless")]
    for problem in problems:
        options = random_options(search_type, problem.V)
        for nbest, T, log_probs in zip(problem.found(options), problem.lengths, problem.log_probs, strict=True):
            for one in nbest:
                assert_trace_is_an_alignment(one, T, log_probs, most_labels_a_frame(options))
