"""A replica as DataParallel makes them for each GPU, on the CPU: torch's own broadcast wants several devices."""

from collections import OrderedDict

from torch import nn


def replica(module: nn.Module) -> nn.Module:
    """What torch/nn/parallel/replicate.py makes of a module; its parameters are plain tensors, no leaves."""
    modules = list(module.modules())
    copies = {one: one._replicate_for_data_parallel() for one in modules}
    for one, copied in copies.items():
        copied._former_parameters = OrderedDict()
        for name, child in one._modules.items():
            setattr(copied, name, None if child is None else copies[child])
        for name, parameter in one._parameters.items():
            held = None if parameter is None else parameter.clone()
            setattr(copied, name, held)
            if held is not None:
                copied._former_parameters[name] = held
        for name, buffer in one._buffers.items():
            setattr(copied, name, buffer)
    return copies[module]
