"""Linear layers for the few rows of a beam on the CPU, their weights packed once for the library's products.

A step of some hypotheses is bound by reading the weights, and a plain product reads row-major weights at a third of the
memory's speed. The 51 MB of the default size's layers, in ms, plain and packed:

    rows           1          2          5          20          100
    1 thread   4.3 | 3.2  6.4 | 4.0  7.0 | 2.9  10.1 | 6.7   33.6 | 26.1
    2 threads  4.2 | 1.4  6.3 | 1.6  6.3 | 1.7   8.4 | 3.4   22.7 | 13.6      torch 2.12.1, AMD EPYC

One or two rows are better off as two columns behind the plain weights (a single one is doubled), where the library is
MKL: 3.5 and 3.1 ms on one thread, where packed weights take 4.3 to 4.6 and 5.1; 2.5 and 2.2 on two.
(`python tests/bench/bench_packed.py` repeats all of it.)

The price is a second copy of these weights. Packing is torch's own (oneDNN, the operators its compiler uses when it
freezes weights); where a build of torch lacks it, the layers run as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 16  # the number of rows the layout is chosen for; 8 to 32 measured alike from 1 to 100 rows, 1 not
COLUMNS = 2 if torch.backends.mkl.is_available() else 0  # so many rows, and fewer, are columns
SMALLEST = 1 << 17  # weights; the packed product costs 10 microseconds more to call, which a small layer does not earn


class PackedLayers:
    """The linear layers of a network, as their weights are now."""

    def __init__(self, network: nn.Module):
        self._packed: dict[nn.Module, Tensor] = {}
        if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return
        for layer in network.modules():
            if type(layer) is not nn.Linear or layer.weight.numel() < SMALLEST:
                continue
            weight = layer.weight.detach()
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                try:
                    self._packed[layer] = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
                except RuntimeError:  # a processor oneDNN has no layout for
                    return

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._packed

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What ``layer(x)`` gives, to rounding. (B, in) to (B, out)"""
        weight = self._packed.get(layer)
        if (
            weight is None  # small, quantised, parametrised, wrapped, of another type or elsewhere
            or x.dtype != torch.float32
            or x.shape[0] == 0
            or torch.is_autocast_enabled("cpu")
            or layer._forward_hooks
            or layer._forward_pre_hooks
        ):
            return layer(x)
        rows = x.shape[0]
        if rows <= COLUMNS and layer.bias is not None:
            columns = (x if rows == COLUMNS else torch.cat([x] * COLUMNS)).t()
            return torch.addmm(layer.bias.unsqueeze(1), layer.weight, columns)[:, :rows].t().contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
