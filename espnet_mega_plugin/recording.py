"""Operations recorded once and replayed: on a GPU one launch in place of one for each of them.

A CUDA graph repeats its kernels on the addresses and with the shapes it was recorded with, and so repeats what Python
decided meanwhile. What is recorded takes its inputs from, and leaves its results in, tensors that stay where they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

SWITCH = "ESPNET_MEGA_PLUGIN_CUDA_GRAPHS"
RUNS = 3  # of what is to be recorded, before it is


class Recorded(Protocol):
    def replay(self) -> None:
        """Run what was recorded once more, on the same tensors."""


# Records a function without arguments and results; runs it on the way, RUNS times at most
Recorder = Callable[[Callable[[], None]], Recorded]


def cuda_graph(run: Callable[[], None]) -> Recorded:
    """A CUDA graph of a function without arguments and results, which runs a few times."""
    beside = torch.cuda.Stream()  # what is loaded, compiled and allotted at first must not be recorded
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(RUNS):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # other threads (a data loader's) go on with what they do meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


@contextmanager
def casting_anew() -> Iterator[None]:
    """Autocast does without its cache, whose tensors are gone when what was recorded is replayed."""
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caching)


def switched_on() -> bool:
    """Whether the environment asks for CUDA graphs.

    Raises:
        ValueError: its variable is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{SWITCH} in the environment must be 0 or 1; got {value!r}.")
    return value == "1"
