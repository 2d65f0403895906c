"""Linear layers for the few rows of a beam on the CPU, their weights packed once for the library's products.

A step of some hypotheses is bound by reading the weights, and a plain product reads row-major weights at a third of the
memory's speed. The 51 MB of the default size's layers, in ms, plain and through this file
(`python tests/bench/bench_packed.py`):

    rows           1          2          3          5          20           100
    1 thread   5.2 | 4.6  7.8 | 4.5  9.0 | 3.8  7.3 | 3.5  10.5 | 7.1   32.6 | 25.8
    2 threads  4.8 | 2.5  6.5 | 4.3  7.9 | 3.7  5.5 | 3.6   7.8 | 5.3   23.3 | 15.6     torch 2.12.1, AMD EPYC

One or two rows gain little from packing on one thread; where the library is MKL they run as two columns behind the
plain weights, a single one doubled.

MKL on Intel's processors reads the plain weights of few rows as fast as memory gives them, and a step alternates
between no two copies then, which share the cache badly. There only more rows meet packed weights.

The price is a second copy of these weights. Packing is torch's own (oneDNN, the operators its compiler uses when it
freezes weights); where a build of torch lacks it, the layers run as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espnet_mega_plugin.processor import runs_mkl_well

ROWS = 16  # the number of rows the layout is chosen for; 8 to 32 measured alike from 1 to 100 rows, 1 not
FEW = 7 if runs_mkl_well() else 0  # so many rows, and fewer, run as they are
COLUMNS = 2 if torch.backends.mkl.is_available() else 0  # so many rows, and fewer, are columns
SMALLEST = 1 << 17  # weights; the packed product costs 10 microseconds more to call, which a small layer does not earn


class PackedLayers:
    """The linear layers of a network, as their weights are now."""

    def __init__(self, network: nn.Module):
        # A module's own call takes as long as the product where few numbers meet
        plain = (one for one in network.modules() if type(one) is nn.Linear and "forward" not in vars(one))
        self._plain = {layer: (layer.weight, layer.bias) for layer in plain}
        self._packed: dict[nn.Module, Tensor] = {}
        if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return
        for layer, (weight, _) in self._plain.items():
            if weight.numel() >= SMALLEST and weight.device.type == "cpu" and weight.dtype == torch.float32:
                try:
                    self._packed[layer] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
                except RuntimeError:  # a processor oneDNN has no layout for
                    return

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._packed

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What ``layer(x)`` gives, to rounding. (B, in) to (B, out)"""
        plain = self._plain.get(layer)
        if plain is None or layer._forward_hooks or layer._forward_pre_hooks:  # quantised, parametrised, wrapped ...
            return layer(x)
        # asked first: the number of rows of a layer that is never packed stays free in an exported graph
        if layer not in self._packed or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(x, *plain)
        rows = x.shape[0]
        if rows == 0 or rows <= FEW:
            return nn.functional.linear(x, *plain)
        if rows <= COLUMNS and layer.bias is not None:
            columns = (x if rows == COLUMNS else torch.cat([x] * COLUMNS)).t()
            return torch.addmm(layer.bias.unsqueeze(1), layer.weight, columns)[:, :rows].t().contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, self._packed[layer], layer.bias, "none", [], "")
