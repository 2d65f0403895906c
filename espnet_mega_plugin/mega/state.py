"""What a decoder remembers of the labels before: a value, never changed in place, never holding a graph.

ESPnet's searches hold a state as a list with one dict a block. The keys of that dict:

    ema_state    h of the moving average                                   (D, N), float32 or better
    prev_key     keys of the labels in a later label's reach               (W, qk_size)
    prev_value   values of the same labels                                 (W, v_size)
    prev_pad     true where such a label was padding (embed_pad)           (W,) bool
    position     how many labels the state has seen                        () int64, on the CPU
    prev_input   with truncation_length K: the EMA's last K-1 inputs       (W', D), float32 or better

W counts all labels so far; with chunk_size those of the chunk that has begun; with attention_window at most
attention_window - 1.

These are the shapes for one hypothesis; a batch has one more dimension in front, shorter histories stand at the
right end, and what is in front of them is not attended to, whatever numbers it holds: the position tells.

Only the first three are needed to build a state by hand; then every row of `prev_key` counts as a label, but for a
state of a single row that is zero in all blocks, which is what ESPnet documents as the state before the first label.

Positions live on the CPU so that cutting a row out of a batch waits for no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMemory:
    """A batch's memory of one block. Histories are aligned at the right end."""

    ema: Tensor  # (B, D, N)
    keys: Tensor  # (B, W, qk_size)
    values: Tensor  # (B, W, v_size)
    inputs: Tensor | None  # (B, W', D) with a truncation length


@dataclass(frozen=True)
class MegaMemory:
    """A batch's memory of all blocks."""

    blocks: list[BlockMemory]
    padding: Tensor  # (B, W) bool: the label behind that key was padding
    positions: list[int]  # labels seen by each row


Documented = list[dict[str, Tensor]]
# Dimensions of each key for one hypothesis
RANKS = {"ema_state": 2, "prev_key": 2, "prev_value": 2, "prev_pad": 1, "position": 0, "prev_input": 2}
KINDS = {"prev_pad": "booleans", "position": "integers"}  # of the others: floating-point numbers


def check_shapes(states: Documented, widths: dict[str, tuple[int, ...]]) -> None:
    """Refuse a state whose tensors do not fit each other or the network.

    Args:
        states: one dict a block, with all keys.
        widths: of each key, the dimensions that the network decides; those before them are rows and batch.

    Raises:
        TypeError, ValueError: the message names block and key, what came and what was expected.
    """
    batches = {}
    position = states[0]["position"].reshape(-1).tolist()
    for b, state in enumerate(states):
        rows = {}
        for name, width in widths.items():
            shape, where = state[name].shape, f"{name} of block {b}"
            kind = KINDS.get(name, "floating-point numbers")
            if kind != _kind(state[name]):
                raise TypeError(f"{where} must hold {kind}; got {state[name].dtype}.")
            ranks = RANKS[name], RANKS[name] + 1
            fits = len(shape) in ranks and (not width or tuple(shape[-len(width) :]) == width)
            if not fits:
                expected = [*["W"][: RANKS[name] - len(width)], *map(str, width)]
                raise ValueError(f"{where} must be ({', '.join(expected)}), or a batch of them; got {tuple(shape)}.")
            batches[where] = shape[0] if len(shape) == ranks[1] else 1
            if name in ("prev_key", "prev_value", "prev_pad"):
                rows[where] = shape[-1 - len(width)]
        if len(set(rows.values())) > 1:
            raise ValueError(f"a state has one row of each for a label; got {_listed(rows)} rows.")
    if len(set(batches.values())) > 1:
        raise ValueError(f"all of a state is of the same hypotheses; got {_listed(batches)} hypotheses.")
    for b, state in enumerate(states):
        if state["position"].reshape(-1).tolist() != position:
            raise ValueError(
                f"position is the same in all blocks; got {position} in block 0, "
                f"{state['position'].reshape(-1).tolist()} in block {b}."
            )


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "booleans"
    return "floating-point numbers" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integers"


def _listed(counts: dict[str, int]) -> str:
    """One key for each count."""
    return ", ".join({count: f"{where}: {count}" for where, count in counts.items()}.values())


def stack_right(rows: list[Tensor]) -> Tensor:
    """Rows of different lengths (n, *) as one batch, aligned at the right end, zeros in front. (B, max n, *)"""
    longest = max(row.shape[0] for row in rows)
    if all(row.shape[0] == longest for row in rows):
        return torch.stack(rows)
    dtype = rows[0].dtype
    for row in rows[1:]:
        dtype = torch.promote_types(dtype, row.dtype)
    stacked = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:], dtype=dtype)
    for index, row in enumerate(rows):
        stacked[index, longest - row.shape[0] :] = row
    return stacked
