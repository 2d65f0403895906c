"""Made-up utterances that a transducer reads labels off as a trained one does; torch only.

Each class has a direction in the joint space. A frame points to blank, the two frames of a label to the label, one
label in four has another beside it. The prediction network adds nothing but its last two labels, taken off: they are
not said again. Sizes are chosen so that searches ask for about as much as with a model of 16 % word errors: ESPnet's
default search for 1,500 rows of 250 prefixes in 10 s, tsd for 3,700 of 2,000, alsd for 1,500, mAES for 400.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

LENGTH = 3.0
BLANK, LABEL, OTHER, NOISE = 13.0, 18.0, 16.0, 1.0


class Joint(nn.Module):
    """The parts of ESPnet's joint network, by its names."""

    def __init__(self, V: int, encoder_size: int, decoder_size: int, J: int):
        super().__init__()
        self.lin_enc, self.lin_dec = nn.Linear(encoder_size, J), nn.Linear(decoder_size, J)
        self.lin_out, self.joint_activation = nn.Linear(J, V), nn.Tanh()


class MadeUp(NamedTuple):
    frames: list[Tensor]  # encoder output of each utterance. (T, J)
    joint: nn.Module
    vectors: Tensor  # the prediction network's output is the sum of the last two labels' (V, D)
    said: list[list[int]]


def utterances(count: int, V: int, D: int, T: int, labels: int, seed: int = 0, joint_class: type = Joint) -> MadeUp:
    """For decoders with D output channels."""
    draw = torch.Generator().manual_seed(seed)
    J = D // 2
    directions = torch.nn.functional.normalize(torch.randn(V, J, generator=draw), dim=1) / LENGTH
    joint = joint_class(V, J, D, J).eval()
    with torch.no_grad():
        for linear in (joint.lin_enc, joint.lin_dec):
            nn.init.eye_(linear.weight)
            linear.bias.zero_()
        joint.lin_out.weight.copy_(LENGTH**2 * directions)
        joint.lin_out.bias.zero_()
    spoken, said_in = [], []
    for _ in range(count):
        frames = NOISE / LENGTH * torch.randn(T, J, generator=draw) + BLANK * directions[0]
        drawn = torch.randint(1, V, (labels, 2), generator=draw).tolist()
        for u, (said, beside) in enumerate(drawn):
            t = (2 * u + 1) * T // (2 * labels)
            frames[t : t + 2] += LABEL * directions[said] + (u % 4 == 0) * OTHER * directions[beside]
        spoken.append(frames)
        said_in.append([said for said, _ in drawn])
    vectors = torch.zeros(V, D)
    vectors[1:, :J] = -LABEL * directions[1:]
    return MadeUp(spoken, joint, vectors, said_in)


def wrong(found: list[list], said: list[list]) -> float:
    """Edit distance of what was found to what was said, in percent of it."""
    pairs = list(zip(found, said, strict=True))
    return 100 * sum(distance(*pair) for pair in pairs) / max(1, sum(map(len, said)))


def distance(a: list, b: list) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


class FollowingScorer:
    """A prediction network at work in a batched search that is shown `vectors` for it."""

    def __init__(self, scorer, vectors: Tensor):
        self._scorer, self._vectors = scorer, vectors
        self.rows = self.calls = 0

    def __getattr__(self, name: str):
        return getattr(self._scorer, name)

    def extend(self, rows, tree) -> Tensor:
        self._scorer.extend(rows, tree)
        self.rows, self.calls = self.rows + len(rows.node), self.calls + 1
        before = self._vectors[tree.label[rows.utterance, rows.parent.clamp(min=0)]]
        return self._vectors[rows.label] + torch.where((rows.parent >= 0)[:, None], before, 0.0)
