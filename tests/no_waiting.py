"""Says where code would make the host wait for a GPU, without one: used inside torch's FakeTensorMode."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Refuses copies between devices that make the host wait; torch's fake tensors refuse to tell values and sizes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and found.device != args[0].device:
            assert kwargs.get("non_blocking"), f"a copy to {found.device} that waits"
        if function in (torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default):
            assert args[2].device == args[0].device, f"a number that is copied to {args[0].device}, which waits"
        if function is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            assert (args[2:] or [(kwargs or {}).get("non_blocking")])[0], "a copy in place that waits"
        return found
