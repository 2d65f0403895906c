"""Where float32 is the least: the moving average, its state, softmax and the rotary angles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half types, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast turns products on a device into; None where it is off."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Operations keep their inputs' dtype inside; a device without autocast (meta) has nothing to turn off."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
