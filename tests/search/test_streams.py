"""Streams: whatever pieces the frames come in and whoever else is there, a stream gives what the whole gives."""

import copy
import random

import pytest
import torch
from rounds import Rounds
from search_problems import (
    WINDOWS,
    assert_same,
    fixed_shapes,
    network_problem,
    random_options,
    tabled_problem,
)

from espnet_mega_plugin.search import search as search_module

TYPES = ("greedy", "maes", "tsd")


@pytest.mark.parametrize("search_type", TYPES)
def test_pieces_of_any_size_are_the_whole(search_type):
    problem = tabled_problem([9])
    search = problem.search(random_options(search_type, problem.V), window=4)
    [whole] = search(problem.encoder_out)
    for size in range(1, 11):
        streams = search.streams()
        stream = streams.open()
        for piece in problem.utterance(0).split(size):
            streams.push({stream: piece})
        assert_same([streams.close(stream)], [whole])


def assert_streams_are_searches(problem, options, most_at_once: int) -> None:
    """Each utterance is a stream, several of them at once, each coming, pushing and leaving when it likes. What one has
    so far is what a search over its frames so far gives; that it stays what it was."""
    search = problem.search(options, window=random.choice(WINDOWS))
    streams, waiting, open_, kept = search.streams(), list(range(len(problem.lengths))), {}, []
    random.shuffle(waiting)
    while waiting or open_:
        if waiting and len(open_) < most_at_once and random.random() < 0.5:
            open_[streams.open()] = [waiting.pop(), 0]
        pushed = {}
        for stream, (b, done) in list(open_.items()):
            if done == problem.lengths[b] and random.random() < 0.7:
                assert_same([streams.close(stream)], search(problem.utterance(b)[None]))
                del open_[stream]
            elif random.random() < 0.7:
                more = min(random.choice((0, 1, 1, 3, 6)), problem.lengths[b] - done)
                pushed[stream] = problem.utterance(b)[done : done + more]
                open_[stream][1] += more
        streams.push(pushed)
        assert len(streams) == len(open_)
        if open_:
            stream, (b, done) = random.choice(list(open_.items()))
            partial = streams.partial(stream)
            assert_same([partial], search(problem.utterance(b)[None, :done]))
            kept.append((partial, copy.deepcopy(partial)))
    assert kept
    for partial, as_it_was in kept:
        assert partial == as_it_was
        assert [one.score for one in partial] == sorted((one.score for one in partial), reverse=True)


@pytest.mark.parametrize("search_type", TYPES)
def test_streams_come_and_go(search_type, monkeypatch):
    monkeypatch.setattr(search_module, "TIDY", 30)  # the record is cleared many times
    for _ in range(2):
        problem = tabled_problem([random.choice((0, 1, 5, 10)) for _ in range(8)])
        assert_streams_are_searches(problem, random_options(search_type, problem.V), most_at_once=4)


@pytest.mark.parametrize("kind", ["simple", "rotary-truncated", "chunk", "window", "stateless", "lstm"])
def test_streams_come_and_go_over_networks(kind):
    problem = network_problem(kind, [8, 3, 0, 6])
    assert_streams_are_searches(problem, random_options("maes", problem.V, beam_size=3) | {"nstep": 2}, most_at_once=3)


@pytest.mark.parametrize("search_type", TYPES)
def test_streams_come_and_go_with_fixed_shapes(search_type):
    problem = tabled_problem([random.choice((0, 1, 5)) for _ in range(6)])
    options = random_options(search_type, problem.V, beam_size=2) | {"nstep": 2}
    with fixed_shapes():
        assert_streams_are_searches(problem, options, most_at_once=3)
    problem = network_problem("simple", [5, 3])
    with fixed_shapes():
        assert_streams_are_searches(problem, options | {"expansion_beta": 0}, most_at_once=2)


def test_a_stream_that_ended_leaves_nothing_behind():
    """The one after a long stream, in its place or in another, takes no more memory than it does alone."""
    problem = network_problem("simple", [300, 40], seed=0)  # the first one has labels enough
    search = problem.search({"search_type": "maes", "beam_size": 3, "expansion_gamma": 5.0})

    def bytes_after(streams, stream) -> int:
        for piece in problem.utterance(1).split(4):
            streams.push({stream: piece})
        return streams._search.predictions._decoder.bytes

    alone = search.streams()
    needed = bytes_after(alone, alone.open())
    for waits in (False, True):
        streams = search.streams()
        long = [streams.open() for _ in range(6)]
        streams.push(dict.fromkeys(long, problem.utterance(0)))
        peak = streams._search.predictions._decoder.bytes
        other = streams.open() if waits else None
        for stream in long:
            streams.close(stream)
        found = bytes_after(streams, other if waits else streams.open())
        assert found <= 3 * needed < peak / 2, (found, needed, peak)


def test_the_record_of_a_long_stream_holds_what_is_needed(monkeypatch):
    problem = network_problem("stateless", [600], seed=0)
    search = problem.search({"search_type": "maes", "beam_size": 3, "expansion_gamma": 5.0})
    used = {}
    for tidy in (50, 10**9):
        monkeypatch.setattr(search_module, "TIDY", tidy)
        streams = search.streams()
        stream, used[tidy] = streams.open(), 0
        for piece in problem.utterance(0).split(4):
            streams.push({stream: piece})
            used[tidy] = max(used[tidy], streams._search.traces.used)
        labels = len(streams.close(stream)[0].yseq) - 1
    assert labels > 20 and used[50] < 50 + 3 * labels < used[10**9] / 10, (used, labels)


def test_a_stream_without_frames_has_the_start_alone():
    problem = tabled_problem([3])
    streams = problem.search({"search_type": "maes"} | {"beam_size": 1}).streams()
    stream = streams.open()
    [one] = streams.partial(stream)
    assert (one.yseq, one.score, one.frames) == ([0], 0.0, [])
    assert streams.close(stream) == [one]


def test_a_stream_whose_scores_are_no_numbers_leaves_the_others_alone():
    problem = tabled_problem([6, 6])
    search = problem.search(random_options("maes", problem.V))
    streams = search.streams()
    good, bad = streams.open(), streams.open()
    for t in range(6):
        piece = problem.utterance(0)[t : t + 1]
        streams.push({good: piece, bad: torch.full_like(piece, torch.nan)})
    assert streams.close(bad) == []
    fresh = streams.open()  # in the same place
    streams.push({fresh: problem.utterance(1)})
    for stream, b in ((good, 0), (fresh, 1)):
        assert_same([streams.close(stream)], search(problem.utterance(b)[None]))


def test_streams_that_are_not_open_are_refused():
    problem = tabled_problem([3])
    streams = problem.search({"search_type": "maes", "beam_size": 1}).streams()
    stream = streams.open()
    streams.close(stream)
    for call in (streams.close, streams.partial, lambda stream: streams.push({stream: problem.utterance(0)})):
        with pytest.raises(KeyError, match=f"stream {stream} is not open"):
            call(stream)
    other = streams.open()
    assert other != stream  # a number is not given twice


def test_alsd_has_no_streams():
    problem = tabled_problem([3])
    with pytest.raises(ValueError, match="alsd needs the whole utterance"):
        problem.search({"search_type": "alsd", "beam_size": 1}).streams()


@pytest.mark.parametrize("search_type", TYPES)
def test_pushing_goes_on_after_an_error(search_type, monkeypatch):
    """Out of memory, say. What the stream found is lost; the next one is as if nothing had been."""
    monkeypatch.setattr(search_module, "TIDY", 20)
    rounds = Rounds(least=6)
    for _ in rounds:
        problem = network_problem("lstm", [30, 7])
        with torch.no_grad():
            problem.joint.lin_out.bias[0] -= 3
        options = random_options(search_type, problem.V, beam_size=3)
        options |= {"nstep": 2, "expansion_gamma": 2.3, "expansion_beta": 1, "max_sym_exp": 4}
        with fixed_shapes():
            whole = problem.found(options)
            streams = problem.search(options).streams()
            stream, left = streams.open(), random.randint(3, 40)
            working = streams._search.joint

            class Failing:
                frames, prefixes = working.frames, working.prefixes

                def __call__(self, pairs, working=working):
                    nonlocal left
                    left -= 1
                    if left == 0:
                        raise MemoryError
                    return working(pairs)

            streams._search.joint = Failing()
            for piece in problem.utterance(0).split(random.randint(1, 5)):
                try:
                    streams.push({stream: piece})
                except MemoryError:
                    rounds.enough = True
            streams.close(stream)
            stream = streams.open()
            streams.push({stream: problem.utterance(1)})
            assert_same([streams.close(stream)], whole[1:])
