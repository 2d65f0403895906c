"""What a CUDA graph does, on a CPU: the operations of one run, repeated on the same tensors.

Whatever the host decided in that run stays decided. Refused are an operation that reads a number from the device, as it
is while a graph is captured, and autocast's cache, whose tensors a graph would read when they are gone.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Replayed(TorchDispatchMode):
    def __init__(self, run: Callable[[], None]):
        super().__init__()
        self.operations = []
        self.casting = torch.is_autocast_enabled("cpu")
        with self:
            run()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in READING:
            raise RuntimeError(f"{operation} reads a number from the device: a graph can't be captured.")
        if self.casting and torch.is_autocast_cache_enabled():
            raise RuntimeError(f"{operation} may read what autocast keeps, which is gone when a graph is replayed.")
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for operation, args, kwargs, result in self.operations:
                again = operation(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def replaying(device: torch.device) -> type[Replayed]:
    """In place of `CudaGraphs`."""
    return Replayed
