"""The three ways to keep rows by utterance and place against a Python dict, through random lives of many utterances."""

import random

import pytest
import torch

from espnet_mega_plugin.mega.places import STEP, Dense, Pieces, Slots

BLOCKS, ROW = 2, (3,)


class Kept:
    """What a tree does to a scorer's places: some are put, utterances begin anew, what is needed moves to the front."""

    def __init__(self, kind: type, dtype: torch.dtype, seed: int):
        self.random, self.draw = random.Random(seed), torch.Generator().manual_seed(seed)
        self.held = kind(BLOCKS, ROW, torch.empty(0, dtype=dtype))
        self.dtype, self.utterances, self.places = dtype, 0, 0
        self.values: list[list[torch.Tensor]] = []  # of each utterance, (BLOCKS, *ROW) by place

    def reserve(self, utterances: int, places: int) -> None:
        self.utterances, self.places = max(self.utterances, utterances), max(self.places, places)
        self.values += [[] for _ in range(self.utterances - len(self.values))]
        self.held.reserve(self.utterances, self.places)

    def put(self) -> None:
        count = [self.random.randrange(min(4, self.places - len(values)) + 1) for values in self.values]
        utterance = torch.tensor([b for b, n in enumerate(count) for _ in range(n)], dtype=torch.long)
        place = torch.tensor([len(self.values[b]) + i for b, n in enumerate(count) for i in range(n)], dtype=torch.long)
        value = torch.randn(BLOCKS, len(place), *ROW, generator=self.draw, dtype=torch.float64)
        if isinstance(self.held, Pieces):
            for b, n in enumerate(count):
                self.held.fit(b, len(self.values[b]) + n)
                self.held.of[b][:, place[utterance == b]] = value[:, utterance == b].to(self.dtype)
        elif isinstance(self.held, Dense) and self.random.random() < 0.5:
            for b in range(BLOCKS):
                self.held.put_in_block(b, self.held.index(utterance, place, None), value[b])
        else:
            self.held.put(utterance, place, value, None)
        for row, b in enumerate(utterance.tolist()):
            self.values[b].append(value[:, row].to(self.dtype))

    def begin_anew(self) -> None:
        b = self.random.randrange(self.utterances)
        self.values[b] = []
        if not isinstance(self.held, Dense):
            self.held.clear(b)

    def move(self) -> None:
        needed = [[i for i in range(len(v)) if i == 0 or self.random.random() < 0.6] for v in self.values]
        used = max(map(len, needed))
        if used:
            self.held.move(torch.tensor([rows + [0] * (used - len(rows)) for rows in needed]))
        self.values = [[v[i] for i in rows] for v, rows in zip(self.values, needed, strict=True)]

    def check(self) -> None:
        for b, values in enumerate(self.values):
            if not values:
                continue
            place = torch.arange(len(values))
            utterance = torch.full_like(place, b)
            if isinstance(self.held, Pieces):
                found = self.held.of[b][:, : len(values)]
            else:
                found = self.held.get(utterance, place)
            assert torch.equal(found, torch.stack(values, 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Dense, Pieces, Slots])
def test_a_place_holds_what_was_put_there(kind, dtype, seed):
    print(f"seed {seed}")
    kept = Kept(kind, dtype, seed)
    kept.reserve(1, 5)
    for _ in range(60):
        kept.reserve(kept.utterances + (kept.random.random() < 0.1), kept.places + kept.random.choice((0, 0, 3)))
        kept.random.choices((kept.put, kept.begin_anew, kept.move), (6, 1, 3))[0]()
        kept.check()


@pytest.mark.parametrize("kind", [Pieces, Slots])
def test_what_is_needed_no_more_takes_no_memory(kind):
    """Many come and go; three places an utterance are needed at a time, and ten are new."""
    held = kind(BLOCKS, ROW, torch.empty(0))
    B, needed, new = 16, 3, 10
    held.reserve(B, needed + new)
    kept = torch.tensor([[0, 5, 9]] * B)
    utterance, place = (x.flatten() for x in torch.meshgrid(torch.arange(B), torch.arange(new), indexing="ij"))
    for _ in range(250):
        if kind is Pieces:
            for b in range(B):
                held.fit(b, needed + new)
        else:
            held.put(utterance, needed + place, torch.zeros(BLOCKS, len(place), *ROW), None)
        held.move(kept)
    a_row = BLOCKS * ROW[0] * 4
    assert held.bytes <= a_row * 9 / 8 * (B * (needed + new) + STEP * (B if kind is Pieces else 1))


def test_a_long_piece_that_is_needed_no_more_becomes_short():
    held = Pieces(BLOCKS, ROW, torch.empty(0))
    held.reserve(2, 500)
    held.fit(0, 500)
    held.fit(1, 20)
    held.of[0][:, 499] = 7.0
    held.move(torch.tensor([[0, 499]] * 2).masked_fill(torch.tensor([[False], [True]]), 0))
    assert (held.of[0][:, 1] == 7.0).all()
    assert held.of[0].shape[1] <= 2 + STEP and held.of[1].shape[1] <= 32


def test_slots_shrink_after_a_peak():
    held, value = Slots(BLOCKS, ROW, torch.empty(0)), torch.randn(BLOCKS, 2, *ROW)
    held.reserve(32, 40)
    utterance, place = (x.flatten() for x in torch.meshgrid(torch.arange(32), torch.arange(40), indexing="ij"))
    held.put(utterance, place, torch.zeros(BLOCKS, 32 * 40, *ROW), None)
    for b in range(32):
        held.clear(b)
    held.put(torch.tensor([5, 5]), torch.tensor([0, 3]), value, None)
    kept = torch.zeros(32, 2, dtype=torch.long)
    kept[5, 1] = 3
    held.move(kept)
    assert torch.equal(held.get(torch.tensor([5, 5]), torch.tensor([0, 1])), value)
    assert held.tensor.shape[1] <= 4 * STEP
    held.put(utterance[:40], place[:40], torch.ones(BLOCKS, 40, *ROW), None)  # writes over none of these
    assert torch.equal(held.get(torch.tensor([5, 5]), torch.tensor([0, 1])), value)


def test_what_all_have_in_front_stays_where_it_is(monkeypatch):
    """Also where an utterance has little: moving all of a table for it would be slow."""
    held = Dense(BLOCKS, ROW, torch.empty(0))
    held.reserve(3, 50)
    held.tensor.normal_()
    before = held.tensor.clone()
    kept = torch.arange(40).repeat(3, 1)
    kept[0, 38:] = torch.tensor([45, 47])
    kept[2, 1:] = 0
    written = []
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda self, index, value: written.append(value.shape))
    held.move(kept)
    assert written == [(3, 2, *ROW)] * BLOCKS
    monkeypatch.undo()
    held.move(kept)
    assert torch.equal(held.tensor[:, 0, :40], before[:, 0, kept[0]])
    assert torch.equal(held.tensor[:, 1], before[:, 1])
