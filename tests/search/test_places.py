"""With fixed shapes a step has places for so many labels: where more could be taken, the search is made again."""

import logging
import random

import pytest
from search_problems import assert_same, fixed_shapes, random_options, tabled_problem

from espnet_mega_plugin.search.maes import Maes


@pytest.mark.parametrize("attempt", range(3))
def test_a_search_without_enough_places_is_made_again(attempt, seed, monkeypatch):
    random.seed(seed + attempt)
    problem = tabled_problem([5, 0, 8], V=9, peak=0.3)
    options = {**random_options("maes", 9, beam_size=2), "nstep": 2, "expansion_gamma": 9.0, "expansion_beta": 3}
    wanted = problem.found(options)
    asked = []
    places = Maes.short_of_places
    monkeypatch.setattr(Maes, "short_of_places", lambda self: asked.append(self.most) or places(self))
    with fixed_shapes(room_for_all=False):
        found = problem.found(options)
    print(asked)
    assert_same(found, wanted)
    assert asked == sorted(asked) and asked[0] == 2 * 5


def test_a_stream_without_enough_places_says_so_once(caplog):
    random.seed(5)
    problem = tabled_problem([9], V=9, peak=0.1)
    options = {"search_type": "maes", "beam_size": 3, "nstep": 2, "expansion_gamma": 9.0, "expansion_beta": 1}
    with fixed_shapes(room_for_all=False), caplog.at_level(logging.WARNING, "espnet_mega_plugin"):
        streams = problem.search(options).streams()
        stream = streams.open()
        for frame in problem.utterance(0):
            streams.push({stream: frame[None]})
    assert sum("least probable" in record.getMessage() for record in caplog.records) == 1
