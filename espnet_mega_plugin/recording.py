"""Operations recorded once and replayed: on a GPU one launch in place of one for each of them.

A CUDA graph repeats its kernels on the addresses and with the shapes it was recorded with, and so repeats what Python
decided meanwhile. What is recorded takes its inputs from, and leaves its results in, tensors that stay where they are.
"""

from __future__ import annotations

import os
import threading
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
RecorderFor = Callable[[torch.device], Recorder]


class CudaGraphs:
    """Records CUDA graphs on a device.

    Each owner of graphs has one of its own, and lets go of its graphs together or one after the other: a graph that
    goes takes cuBLAS' workspace of its stream along, and others of that stream would still write there.
    """

    _one_at_a_time = threading.Lock()  # torch captures one graph in a process

    def __init__(self, device: torch.device):
        self.device, self._stream = device, torch.cuda.Stream(device)

    def __reduce__(self):
        return CudaGraphs, (self.device,)  # a copy has a stream of its own

    def __call__(self, run: Callable[[], None]) -> Recorded:
        # Of another device than the current one nothing would be captured, without a word
        with self._one_at_a_time, torch.cuda.device(self.device):
            stream, current = self._stream, torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(RUNS):  # what is loaded, compiled and allotted at first must not be recorded
                    run()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # other threads (a data loader's) go on with what they do meanwhile
            capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            # the outer context, because torch does not go back to the current stream where a capture fails
            with torch.cuda.stream(current), capture:
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
