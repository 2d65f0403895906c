"""mini_an4 as ESPnet3 reads it: eight recordings of CMU's AN4."""

from .builder import MiniAn4Builder as DatasetBuilder
from .dataset import MiniAn4 as Dataset

__all__ = ["Dataset", "DatasetBuilder"]
