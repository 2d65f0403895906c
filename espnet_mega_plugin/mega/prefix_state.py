"""A state as ESPnet's searches carry it: a list with one dict a block, built when somebody looks into it.

Searches only hand states on. Until one is looked into it is no more than its prefixes, and scoring goes on from these.
Once looked into it is an ordinary list of ordinary dicts, which its holder may change: from then on it counts as built
by hand, and scoring reads what is in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from espnet_mega_plugin.mega.prefixes import Prefix
from espnet_mega_plugin.mega.state import Documented

_looking_in = threading.Lock()


class PrefixState(list):
    __slots__ = ("_build", "_prefixes")

    def __init__(self, prefixes: tuple[Prefix, ...], build: Callable[[tuple[Prefix, ...]], Documented]):
        """
        Args:
            prefixes: one for each hypothesis.
            build: makes the documented dicts of the prefixes.
        """
        super().__init__()
        self._prefixes: tuple[Prefix, ...] | None = prefixes
        self._build = build

    @property
    def prefixes(self) -> tuple[Prefix, ...] | None:
        """The hypotheses' prefixes; None once the state was looked into."""
        return self._prefixes

    def look(self) -> None:
        prefixes = self._prefixes
        if prefixes is None:
            return
        built = self._build(prefixes)
        with _looking_in:  # another thread may look, or score, meanwhile: it must find the prefixes or all dicts
            if self._prefixes is not None:
                super().extend(built)
                self._prefixes = None

    def __radd__(self, other: list) -> list:
        return [*other, *self]

    def __reduce_ex__(self, protocol):
        return list, (list(self),)


def _looking(name: str) -> Callable[..., Any]:
    of_a_list = getattr(list, name)

    def method(self, *args, **kwargs):
        self.look()
        return of_a_list(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, of_a_list.__doc__
    return method


for _name in (
    *("__len__", "__iter__", "__reversed__", "__getitem__", "__contains__", "__eq__", "__ne__", "__repr__"),
    *("__add__", "__iadd__", "__mul__", "__rmul__", "__imul__", "__setitem__", "__delitem__"),
    *("__lt__", "__le__", "__gt__", "__ge__"),
    *("append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse", "sort"),
):
    setattr(PrefixState, _name, _looking(_name))
