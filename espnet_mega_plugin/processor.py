"""Which processor this is, where a library is quick on one and slow on another; the numbers are where it is asked."""

import functools
from pathlib import Path

import torch


@functools.cache
def runs_mkl_well() -> bool:
    """Whether torch's products and exponentials are MKL's and this is an Intel processor, for which that is made.

    Asked of the processor and not of a clock, so that two runs on one machine round alike.
    """
    try:
        return torch.backends.mkl.is_available() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False
