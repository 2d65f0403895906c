"""A random test whose point is lost unless something happens goes on until it has happened."""

from __future__ import annotations

from collections.abc import Iterator


class Rounds:
    """Goes on for `least` rounds, and until `enough` is set to true in the loop; fails where `most` are not enough."""

    def __init__(self, least: int = 1, most: int = 30):
        self.least, self.most, self.enough = least, most, False

    def __iter__(self) -> Iterator[int]:
        for n in range(self.most):
            if n >= self.least and self.enough:
                return
            yield n
        assert self.enough, f"in {self.most} rounds what this test is about did not happen"
