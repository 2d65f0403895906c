"""Problems for the loss: ragged, with garbage wherever nothing may be read."""

from typing import NamedTuple

import torch
from torch import Tensor

from espnet_mega_plugin.rnnt import METHODS

# The methods that CPU tensors can be given to; "triton" is held to its laws by kernel_laws.py and test_kernels.py.
ON_CPU = sorted(set(METHODS) - {"triton"})


class Problem(NamedTuple):
    """Arguments of `rnnt_loss`, in its order."""

    acts: Tensor  # (B, T, U+1, V), NaN outside the lengths
    labels: Tensor  # (B, U), -1 beyond the length
    act_lens: Tensor
    label_lens: Tensor
    blank: int

    def with_acts(self, acts: Tensor) -> "Problem":
        return self._replace(acts=acts)

    def only(self, b: int) -> "Problem":
        """Utterance b alone, without padding."""
        T, U = int(self.act_lens[b]), int(self.label_lens[b])
        cut = self.acts[b : b + 1, :T, : U + 1], self.labels[b : b + 1, :U]
        return Problem(*cut, self.act_lens[b : b + 1], self.label_lens[b : b + 1], self.blank)


def random_problem(
    B: int, T: int, U: int, V: int, seed: int, blank: int = 0, spread: float = 2.0, dtype: torch.dtype = torch.float64
) -> Problem:
    """Lengths from 1 and 0 up, the first utterance the longest."""
    draw = torch.Generator().manual_seed(seed)
    act_lens = torch.randint(1, T + 1, (B,), generator=draw)
    label_lens = torch.randint(0, U + 1, (B,), generator=draw)
    act_lens[:1], label_lens[:1] = T, U
    labels = torch.randint(1, V, (B, U), generator=draw)
    labels = torch.where(labels == blank, 0, labels)  # every class but the blank
    acts = (torch.randn(B, T, U + 1, V, generator=draw, dtype=torch.float64) * spread).to(dtype)
    for b in range(B):
        acts[b, act_lens[b] :] = torch.nan
        acts[b, :, label_lens[b] + 1 :] = torch.nan
        labels[b, label_lens[b] :] = -1
    return Problem(acts, labels, act_lens, label_lens, blank)


def inside(problem: Problem) -> Tensor:
    """Which cells lie within the lengths. (B, T, U+1)"""
    _, T, U1, _ = problem.acts.shape
    frames = torch.arange(T)[:, None] < problem.act_lens[:, None, None]
    return frames & (torch.arange(U1) <= problem.label_lens[:, None, None])
