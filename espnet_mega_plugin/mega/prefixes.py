"""What a decoder remembers of label prefixes: each is evaluated once, and all that share a past share its rows.

A `Prefix` is a sequence of labels with what the network made of it: the moving average's state and the output after
the last label (one row of the table `ends`), and a row of keys and values for each label that can still be attended to
(table `labels`, shared with every longer prefix). Rows go back when the last prefix that needs them is forgotten, so
the tables grow with the distinct labels in use. Beside them each prefix lists its rows, 16 bytes a label that it can
attend to: up to `remembered` lists as long as the history are kept.

`PrefixMemory.extend` goes on from prefixes by one label each. It answers from memory where that very prefix has been
extended by that label with these weights; all others are evaluated in one flat step (`step.py`).
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from espnet_mega_plugin.mega.graph import StepGraphs
from espnet_mega_plugin.mega.precision import at_least_float32
from espnet_mega_plugin.mega.rows import Row, Table
from espnet_mega_plugin.mega.state import BlockMemory, MegaMemory
from espnet_mega_plugin.mega.step import Constants, Past, Together, step
from espnet_mega_plugin.mega.weights import Weights
from espnet_mega_plugin.recording import CudaGraphs, RecorderFor

if TYPE_CHECKING:
    from espnet_mega_plugin.mega.network import MegaNetwork

NO_ROWS = np.empty(0, dtype=np.int64)
# Products of a query and a key that may be made for nothing, to save the operations that gathering takes
FOR_NOTHING = 1024


class Tables:
    """The rows of all prefixes, on one device and in one dtype."""

    def __init__(self, network: MegaNetwork):
        weight = network.embed.weight
        exact = at_least_float32(weight.dtype)
        blocks, D = network.num_blocks, network.output_size
        self.device, self.dtype, self.exact = weight.device, weight.dtype, exact
        width = network.mega_att_k_size + network.mega_att_v_size
        of_labels = [(blocks, (width,), weight.dtype)]
        if network.truncation_length is not None:
            of_labels.append((blocks, (D,), exact))  # block inputs
        self.labels = Table(*of_labels, device=weight.device)
        of_ends = [(blocks, (network.mega_ema_num_heads, D), exact), (1, (D,), weight.dtype)]
        self.ends = Table(*of_ends, device=weight.device)

    def fit(self, network: MegaNetwork) -> bool:
        weight = network.embed.weight
        return weight.device == self.device and weight.dtype == self.dtype


class Prefix:
    """A label sequence from some first label on, and what the network made of it."""

    __slots__ = ("__weakref__", "attended", "children", "end", "labels", "length", "padded", "rows", "tables")

    def __init__(self, tables: Tables, end: Row | None, length: int, labels: tuple[Row, ...], attended: int):
        self.tables = tables
        self.end = end  # None before the first label
        self.length = length  # labels so far
        self.labels = labels  # rows of the last labels: as many as the attention or the truncated average can need
        self.attended = attended  # how many of them the next label may attend to
        self.rows = NO_ROWS  # their indices
        self.padded: np.ndarray | None = None  # which of them are padding, where any is
        self.children: dict[int, tuple[int, weakref.ref[Prefix]]] = {}  # by label, with the constants' serial


class PrefixMemory:
    """The prefixes of one decoder.

    Args:
        remembered: how many prefixes are kept that nobody holds a state of, the last used ones. A search asks again for
            what it expanded one or two frames ago.
        recorder_for: makes what records steps of fixed shapes that are replayed (`recording.py`); None: each step runs
            as it is.
    """

    def __init__(self, remembered: int = 1024, recorder_for: RecorderFor | None = None):
        self.remembered, self.recorder_for = remembered, recorder_for
        self._lock = threading.RLock()
        self._tables: Tables | None = None
        self._weights: Weights | None = None  # that the constants were made of
        self._constants: Constants | None = None
        self._graphs: StepGraphs | None = None
        self.evaluated = 0  # prefixes the network was run for, since the decoder was made
        self.forget()

    @property
    def remembered(self) -> int:
        return self._remembered

    @remembered.setter
    def remembered(self, number: int) -> None:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"prefixes.remembered must be an integer of 0 or more; got {number!r}.")
        self._remembered = number

    def forget(self) -> None:
        """Drop all that no state refers to. States handed out stay valid."""
        with self._lock:
            self._recent: OrderedDict[Prefix, None] = OrderedDict()
            self._root: Prefix | None = None
            self._shared: tuple[Prefix | None, np.ndarray, Tensor | None] = (None, NO_ROWS, None)
            self._own = torch.empty(0)
            if self._tables is not None:
                self._tables.labels.shrink()
                self._tables.ends.shrink()

    def begin_anew(self) -> None:
        """`forget`, and let go of what was made of the weights: whoever calls knows that they may be others."""
        with self._lock:
            self._weights = self._constants = self._graphs = None
            self.forget()

    @property
    def tables(self) -> Tables | None:
        return self._tables

    def root(self, network: MegaNetwork) -> Prefix:
        """The prefix before the first label."""
        with self._lock:
            self._fit(network)
            if self._root is None:
                self._root = Prefix(self._tables, None, 0, (), 0)
            return self._root

    def constants(self, network: MegaNetwork) -> Constants:
        """What the weights as they are now mean for a step."""
        with self._lock:
            self._refresh(network)
            return self._constants

    @torch.no_grad()
    def adopt(self, network: MegaNetwork, memory: MegaMemory) -> Prefix:
        """A prefix for one hypothesis' memory that was built by hand or came from elsewhere."""
        with self._lock:
            self._fit(network)
            tables, length = self._tables, memory.positions[0]
            attended = min(network.attended_labels(length), memory.padding.shape[1])
            inputs = memory.blocks[0].inputs
            count = max(attended, 0 if inputs is None else inputs.shape[1])
            rows, (end,) = tables.labels.lend(count), tables.ends.lend(1)
            prefix = Prefix(tables, end, length, tuple(rows), attended)
            indices = _indices(rows)
            prefix.rows = indices[count - attended :]
            padded = memory.padding[0, memory.padding.shape[1] - attended :].cpu().numpy()
            prefix.padded = padded if padded.any() else None
            index = torch.from_numpy(indices).to(tables.device)
            for b, block in enumerate(memory.blocks):
                tables.ends.tensors[0][b, end.index] = block.ema[0].T.to(tables.exact)
                if attended:
                    known = torch.cat([block.keys[0], block.values[0].to(block.keys.dtype)], 1)[-attended:]
                    tables.labels.tensors[0][b, index[count - attended :]] = known.to(tables.device, tables.dtype)
                if inputs is not None and count:
                    seen, held = block.inputs[0].to(tables.device, tables.exact), tables.labels.tensors[1][b]
                    held[index[: count - len(seen)]] = 0.0  # lent before: another label's
                    held[index[count - len(seen) :]] = seen
            return prefix

    def extend(
        self, network: MegaNetwork, prefixes_in: Callable[[Tables], list[Prefix]], labels: list[int]
    ) -> tuple[Tensor, list[Prefix]]:
        """Go on from each prefix by its label.

        Args:
            prefixes_in: gives the prefixes, with rows in these tables: those for the network's device and dtype as they
                are now.
            labels: one for each, of the vocabulary.

        Returns:
            out: decoder output after the label. (B, D)
            extended: the longer prefixes.
        """
        with self._lock:
            self._refresh(network)
            return self._extended(network, prefixes_in(self._tables), labels)

    def memory(self, prefix: Prefix, network: MegaNetwork) -> MegaMemory:
        """What `network.extend` and the documented states take, as new tensors of a batch of one."""
        tables, S = prefix.tables, network.mega_att_k_size
        index = torch.from_numpy(prefix.rows).to(tables.device)
        K = network.truncation_length
        recent = None
        if K is not None:
            recent = torch.from_numpy(_indices(prefix.labels[max(0, len(prefix.labels) - (K - 1)) :])).to(tables.device)
        empty = network.empty_memory(1)
        blocks = []
        for b in range(network.num_blocks):
            if prefix.end is None:
                ema = empty.blocks[b].ema.to(tables.device, tables.exact)
            else:
                ema = tables.ends.tensors[0][b, prefix.end.index].T.clone(memory_format=torch.contiguous_format)[None]
            if prefix.labels:
                rows = tables.labels.tensors[0][b].index_select(0, index)[None]
                keys, values = rows[..., :S].contiguous(), rows[..., S:].contiguous()
                inputs = None if K is None else tables.labels.tensors[1][b].index_select(0, recent)[None]
            else:
                keys, values, inputs = empty.blocks[b].keys, empty.blocks[b].values, empty.blocks[b].inputs
            blocks.append(BlockMemory(ema, keys, values, inputs))
        padded = np.zeros(len(prefix.rows), dtype=bool) if prefix.padded is None else prefix.padded
        return MegaMemory(blocks, torch.from_numpy(padded.copy()).to(tables.device)[None], [prefix.length])

    def fresh(self) -> PrefixMemory:
        """One for another decoder, with nothing remembered."""
        return PrefixMemory(self.remembered, self.recorder_for)

    def __reduce__(self):
        return PrefixMemory, (self.remembered, self.recorder_for)  # a copy, a pickle: remembers nothing

    # -- all below runs under the lock

    def _refresh(self, network: MegaNetwork) -> None:
        """Sees to it that nothing is answered from other weights than the network has now."""
        if self._weights is None or not self._weights.unchanged():
            self._fit(network)
            weights = Weights(network)  # first: should they change while the constants are made, the next call sees it
            with torch.no_grad():
                self._constants = Constants(network)
            self._weights, self._graphs = weights, None

    def _fit(self, network: MegaNetwork) -> None:
        if self._tables is None or not self._tables.fit(network):
            self.forget()
            self._tables, self._weights, self._graphs = Tables(network), None, None

    def _extended(self, network: MegaNetwork, prefixes: list[Prefix], labels: list[int]) -> tuple[Tensor, list[Prefix]]:
        constants = self._constants
        extended = [_known(prefix, label, constants) for prefix, label in zip(prefixes, labels, strict=True)]
        if None in extended:
            pairs = list(zip(prefixes, labels, strict=True))
            new = list(dict.fromkeys(pair for pair, known in zip(pairs, extended, strict=True) if known is None))
            made = dict(zip(new, self._evaluate(network, constants, new), strict=True))
            extended = [known or made[pair] for pair, known in zip(pairs, extended, strict=True)]
        for prefix in extended:
            self._recent[prefix] = None
            self._recent.move_to_end(prefix)
        outputs = self._tables.ends.tensors[1][0]
        if len(extended) == 1:
            out = outputs.narrow_copy(0, extended[0].end.index, 1)
        else:
            ends = torch.tensor([prefix.end.index for prefix in extended])
            out = outputs.index_select(0, ends.to(outputs.device, non_blocking=True))
        while len(self._recent) > self.remembered:
            self._recent.popitem(last=False)
        return out, extended

    @torch.no_grad()
    def _evaluate(self, network: MegaNetwork, constants: Constants, new: list[tuple[Prefix, int]]) -> list[Prefix]:
        tables = self._tables
        prefixes, labels = [prefix for prefix, _ in new], [label for _, label in new]
        padding = [label == network.pad_idx and prefix.length > 0 for prefix, label in new]
        label_rows, end_rows = tables.labels.lend(len(new)), tables.ends.lend(len(new))
        past = self._past(network, constants, prefixes, padding)
        on_device = torch.tensor([labels, [row.index for row in label_rows], [row.index for row in end_rows]])
        label_ids, label_index, end_index = on_device.to(tables.device, non_blocking=True)
        self.evaluated += len(new)
        masked = torch.tensor(padding).to(tables.device, non_blocking=True) if any(padding) else None
        out, fresh = self._step(network, constants, label_ids, masked, past)
        tables.ends.tensors[0].index_copy_(1, end_index, fresh.ema.to(tables.exact))
        tables.labels.tensors[0].index_copy_(1, label_index, fresh.keys_values.to(tables.dtype))
        if fresh.inputs is not None:
            tables.labels.tensors[1].index_copy_(1, label_index, fresh.inputs.to(tables.exact))
        tables.ends.tensors[1].index_copy_(1, end_index, out.to(tables.dtype)[None])
        return [
            _child(network, constants, prefix, label, padded, label_row, end_row)
            for (prefix, label), padded, label_row, end_row in zip(new, padding, label_rows, end_rows, strict=True)
        ]

    def _step(self, network: MegaNetwork, constants: Constants, labels: Tensor, padding: Tensor | None, past):
        elsewhere = self.recorder_for is CudaGraphs and labels.device.type != "cuda"
        if self.recorder_for is None or elsewhere or not isinstance(past, Together):
            return step(network, constants, labels, padding, past)
        if self._graphs is None or self._graphs.recorder_for is not self.recorder_for:
            self._graphs = StepGraphs(network, constants, self.recorder_for)
        return self._graphs(labels, padding, past)

    def _past(self, network: MegaNetwork, constants: Constants, prefixes: list[Prefix], padding: list[bool]):
        """What a step goes on from, in the form that takes least."""
        if len(prefixes) == 1 and prefixes[0].padded is None and not padding[0] and not constants.half:
            return self._line(network, constants, prefixes[0])
        views = [_view(prefix, padded) for prefix, padded in zip(prefixes, padding, strict=True)]
        rows = [view[0] for view in views]
        P = _common(rows)
        own, column = np.unique(np.concatenate([row[P:] for row in rows]), return_inverse=True)
        ema, inputs = self._ema(network, prefixes), self._inputs(network, prefixes)
        if len(rows) * len(own) > FOR_NOTHING or constants.half:
            return Past(ema, inputs, *self._apart(network, constants, prefixes, views, P))

        B, U = len(rows), P + len(own)
        distance = np.full((B, U + B), -1, dtype=np.int64)
        length = np.array([prefix.length for prefix in prefixes])
        distance[:, :P] = length[:, None] - views[0][1][:P]
        if len(own):
            whose = np.repeat(np.arange(B), [len(row) - P for row in rows])
            distance[whose, P + column] = length[whose] - np.concatenate([place[P:] for _, place, _ in views])
        np.fill_diagonal(distance[:, U:], [0 if sees_itself else -1 for *_, sees_itself in views])
        labels = self._gathered_once(prefixes[0], rows[0][:P], len(own) + B)
        if len(own):
            index = torch.from_numpy(own).to(labels.device, non_blocking=True)
            labels[:, P:U] = self._tables.labels.tensors[0].index_select(1, index)
        return Together(ema, inputs, labels, self._bias(network, constants, distance))

    def _line(self, network: MegaNetwork, constants: Constants, prefix: Prefix) -> Together:
        """The past of one prefix that sees all its labels."""
        labels = self._gathered_once(prefix, prefix.rows, 1)
        bias = constants.bias_of_a_line(network, labels.shape[1])[:, None]
        return Together(self._ema(network, [prefix]), self._inputs(network, [prefix]), labels, bias)

    def _bias(self, network: MegaNetwork, constants: Constants, distance: np.ndarray) -> Tensor:
        """Position bias for distances of labels; -inf where one is negative. (blocks, ...)"""
        table = constants.bias(network, int(distance.max()) + 1)
        index = np.where(distance < 0, table.shape[1] - 1, distance).ravel()
        index = torch.from_numpy(index).to(table.device, non_blocking=True)
        return table.index_select(1, index).view(-1, *distance.shape)

    def _apart(self, network, constants: Constants, prefixes: list[Prefix], views: list, P: int):
        """Rows that all have in common, rows gathered for each, position bias: as `Past` takes them."""
        tables, rows = self._tables, [view[0] for view in views]
        T = max(len(row) for row in rows) - P

        # distance of each column's label from the new one; -1: not seen
        places = np.array([prefix.length for prefix in prefixes])
        distance = np.full((len(rows), P + T + 1), -1, dtype=np.int64)
        own = np.zeros((len(rows), T), dtype=np.int64)
        distance[:, :P] = places[:, None] - views[0][1][:P]
        for i, (row, place, sees_itself) in enumerate(views):
            own[i, : len(row) - P] = row[P:]
            distance[i, P : len(row)] = places[i] - place[P:]
            distance[i, -1] = 0 if sees_itself else -1
        index = torch.from_numpy(own).to(tables.device, non_blocking=True).flatten()
        held = tables.labels.tensors[0]
        gathered = self._gathered(held, index).view(held.shape[0], len(rows), T, held.shape[2])
        if constants.half and T:
            # what fills up is another label's, which may be infinite there, and 0 * inf is NaN
            hidden = torch.from_numpy(distance[:, P:-1] < 0).to(tables.device, non_blocking=True)
            gathered = gathered.masked_fill_(hidden[None, :, :, None], 0.0)
        return self._gathered_once(prefixes[0], rows[0][:P]), gathered, self._bias(network, constants, distance)

    def _gathered_once(self, prefix: Prefix, rows: np.ndarray, more: int = 0) -> Tensor:
        """Keys and values of the rows, side by side, and room for more; those of the call before stay there."""
        of_labels = self._tables.labels.tensors[0]
        _, held, buffer = self._shared
        if buffer is None or buffer.shape[1] < len(rows) + more:
            with torch.inference_mode(False):
                # zeros: what is hidden from a softmax still meets a weight of 0, and 0 * NaN is NaN
                buffer = of_labels.new_zeros(of_labels.shape[0], max(64, 2 * len(rows) + more), of_labels.shape[2])
            held = NO_ROWS
        both = min(len(held), len(rows))
        differing = np.flatnonzero(held[:both] != rows[:both])
        kept = int(differing[0]) if len(differing) else both
        if kept < len(rows):
            index = torch.from_numpy(rows[kept:]).to(of_labels.device, non_blocking=True)
            buffer[:, kept : len(rows)] = of_labels.index_select(1, index)
        # The prefix is held so that none of its rows can be lent to another label while the buffer counts on them
        self._shared = (prefix, rows, buffer)
        return buffer[:, : len(rows) + more]

    def _gathered(self, rows: Tensor, index: Tensor) -> Tensor:
        """The rows of an index, in a buffer that the next call fills anew: 75 MB of fresh memory cost more to map than
        to fill."""
        shape = rows.shape[0], len(index), rows.shape[2]
        if self._own.numel() < math.prod(shape) or self._own.dtype != rows.dtype or self._own.device != rows.device:
            with torch.inference_mode(False):
                self._own = rows.new_empty(2 * math.prod(shape))
        return torch.index_select(rows, 1, index, out=self._own[: math.prod(shape)].view(shape))

    def _ema(self, network: MegaNetwork, prefixes: list[Prefix]) -> Tensor | None:
        if network.truncation_length is not None:
            return None
        ends = self._tables.ends
        index = [0 if prefix.end is None else prefix.end.index for prefix in prefixes]
        ema = ends.tensors[0].index_select(1, torch.tensor(index).to(ends.device, non_blocking=True))
        for i, prefix in enumerate(prefixes):
            if prefix.end is None:
                ema[:, i] = 0.0
        return ema

    def _inputs(self, network: MegaNetwork, prefixes: list[Prefix]) -> Tensor | None:
        if network.truncation_length is None:
            return None
        of_labels = self._tables.labels
        recent = [prefix.labels[max(0, len(prefix.labels) - (network.truncation_length - 1)) :] for prefix in prefixes]
        longest = max(len(rows) for rows in recent)
        index = np.zeros((len(recent), longest), dtype=np.int64)
        before = np.ones((len(recent), longest), dtype=bool)
        for i, rows in enumerate(recent):
            index[i, longest - len(rows) :] = _indices(rows)
            before[i, longest - len(rows) :] = False
        if longest == 0:
            shape = len(network.mega_blocks), len(prefixes), 0, network.output_size
            return torch.empty(shape, dtype=self._tables.exact, device=of_labels.device)
        index = torch.from_numpy(index).to(of_labels.device, non_blocking=True)
        inputs = of_labels.tensors[1].index_select(1, index.flatten())
        inputs = inputs.view(inputs.shape[0], *index.shape, -1)
        if not before.any():
            return inputs
        return inputs.masked_fill(torch.from_numpy(before).to(of_labels.device, non_blocking=True)[..., None], 0.0)


def _known(prefix: Prefix, label: int, constants: Constants) -> Prefix | None:
    made_with, child = prefix.children.get(label, (None, None))
    return child() if made_with == constants.serial else None


def _child(network, constants: Constants, prefix: Prefix, label: int, padded: bool, label_row: Row, end_row: Row):
    length = prefix.length + 1
    attended = min(prefix.attended + 1, network.attended_labels(length))
    kept = max(attended, (network.truncation_length or 1) - 1)
    labels = (*prefix.labels, label_row)
    child = Prefix(prefix.tables, end_row, length, labels[max(0, len(labels) - kept) :], attended)
    rows = np.append(prefix.rows, label_row.index)
    child.rows = rows[len(rows) - attended :]
    if padded or prefix.padded is not None:
        before = np.zeros(len(prefix.rows), dtype=bool) if prefix.padded is None else prefix.padded
        marks = np.append(before, padded)[len(rows) - attended :]
        child.padded = marks if marks.any() else None
    prefix.children[label] = (constants.serial, weakref.ref(child))
    return child


def _view(prefix: Prefix, padding: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    """Which labels the next one sees: their rows, their places, and whether it sees itself."""
    # A chunk's first label starts from nothing, whatever the prefix keeps for the truncated average
    places = np.arange(prefix.length - prefix.attended, prefix.length)
    if prefix.padded is None and not padding:
        return prefix.rows, places, True
    padded = np.zeros(len(prefix.rows), dtype=bool) if prefix.padded is None else prefix.padded
    if padding and padded.all():  # nothing but padding in reach: then padding is seen
        return prefix.rows, places, True
    return prefix.rows[~padded], places[~padded], not padding


def _common(rows: list[np.ndarray]) -> int:
    """How many leading entries all have in common."""
    first, common = rows[0], min(len(row) for row in rows)
    for row in rows[1:]:
        differing = np.flatnonzero(first[:common] != row[:common])
        if len(differing):
            common = int(differing[0])
    return common


def _indices(rows: tuple[Row, ...] | list[Row]) -> np.ndarray:
    return np.fromiter((row.index for row in rows), dtype=np.int64, count=len(rows))
