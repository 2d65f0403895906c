"""The label prefixes a batched search has in hand, as tensors: one tree for each utterance.

B utterances, N nodes and M leaves an utterance has room for, C prefixes asked for at once.

Equal label sequences are one node: `find` looks a prefix up by its parent and last label before a new one is made. So
two hypotheses have the same labels where they have the same node, and what a scorer keeps of a prefix is there once.

Nodes and leaves are handed out in order. When many are needed no more (with fixed shapes, as on a GPU: when the room is
used up), those that hypotheses still need move to the front (their ancestors for the nodes, they themselves for the
leaves), and the scorers are told. All tensors stay where they are until there is more room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espnet_mega_plugin.search.scorer import LabelScorer, Rows

START = 0  # node of the start label
STEP, FIXED_STEP = 16, 64  # nodes by which the room of an utterance grows; and leaves, with fixed shapes
# How many there may be before what is needed no more is given up: so many times those that were needed the last time,
# and so many more for each utterance, for FEW where they are fewer. With smaller numbers prefixes are made a second
# time that were just given up; larger ones take memory: a node of the default MEGA 18 KiB, a leaf 32
NODES, LEAVES, FEW = (1.0625, 24), (1.25, 8), 4


class LabelTree:
    def __init__(self, utterances: int, device: torch.device, scorers: Sequence[LabelScorer], reach: int | None = None):
        """
        Args:
            reach: how many labels back a scorer still looks at nodes; None: all.
        """
        self.device, self.scorers, self.reach = device, scorers, reach
        self.utterances, self.nodes, self.leaves = utterances, 0, 0
        self._needed_nodes = self._needed_leaves = 0  # of all utterances, when others were given up
        # The most any utterance has taken; with fixed shapes all that may be handed out
        self.used_nodes = self.used_leaves = 0
        # Fixed shapes: rows are never picked out by a mask, because their number would have to be read from the device.
        # Between two calls of `make_room` nothing here hangs on what was taken: the same operations on the same tensors
        self.fixed_shapes = device.type != "cpu"
        empty = torch.zeros(utterances, 0, dtype=torch.long, device=device)
        self.parent, self.label, self.depth, self.leaf, self.owner = (empty.clone() for _ in range(5))
        self.lineage = torch.zeros(utterances, 0, 0, dtype=torch.bool, device=device)  # [b, i, j]: j is i or above it
        self.node_count = torch.zeros(utterances, dtype=torch.long, device=device)
        self.leaf_count = torch.zeros(utterances, dtype=torch.long, device=device)
        self._place = torch.arange(utterances, device=device)[:, None]

    @property
    def spare(self) -> int:
        """The last place is never handed out where rows that are not valid have to be written somewhere (`put`)."""
        return int(self.fixed_shapes)

    def taken(self) -> tuple[int, int]:
        """The most nodes and leaves any utterance has taken. With fixed shapes this waits for a GPU."""
        if not self.fixed_shapes:
            return self.used_nodes, self.used_leaves
        if not self.nodes:
            return 0, 0
        nodes, leaves = torch.stack((self.node_count.max(), self.leaf_count.max())).tolist()
        return nodes, leaves

    def reserve(self, nodes: int, leaves: int) -> None:
        """Make room for so many more nodes and leaves an utterance, whatever they are. May wait, as `taken`."""
        taken_nodes, taken_leaves = self.taken()
        need_nodes, need_leaves = taken_nodes + nodes + self.spare, taken_leaves + leaves + self.spare
        if need_nodes > self.nodes or need_leaves > self.leaves:
            more_nodes, more_leaves = (FIXED_STEP, FIXED_STEP) if self.fixed_shapes else (STEP, 4)
            self._grow(_room(self.nodes, need_nodes, more_nodes), _room(self.leaves, need_leaves, more_leaves))

    def widen(self, utterances: int) -> None:
        """More utterances side by side; they have nothing until `start`."""
        more = utterances - self.utterances
        pad = torch.nn.functional.pad
        self.parent, self.label, self.depth, self.leaf, self.owner = (
            pad(t, (0, 0, 0, more)) for t in (self.parent, self.label, self.depth, self.leaf, self.owner)
        )
        self.lineage = pad(self.lineage, (0, 0, 0, 0, 0, more))
        self.node_count, self.leaf_count = pad(self.node_count, (0, more)), pad(self.leaf_count, (0, more))
        self.utterances = utterances
        self._place = torch.arange(utterances, device=self.device)[:, None]
        for scorer in self.scorers:
            scorer.reserve(utterances, self.nodes, self.leaves)

    def start(self, begin: Tensor) -> Rows:
        """Forget everything of some utterances and give each its start.

        Args:
            begin: which. (B,) bool
        """
        if not self.nodes:
            self.reserve(1, 1)
        if not self.fixed_shapes:
            self.used_nodes, self.used_leaves = max(1, self.used_nodes), max(1, self.used_leaves)
        mask = begin[:, None]
        for tensor, value in ((self.parent, -2), (self.label, 0), (self.depth, 0), (self.leaf, -1), (self.owner, -1)):
            tensor.masked_fill_(mask, value)
        self.parent[:, START] = -1
        self.lineage.masked_fill_(mask[..., None], False)
        self.lineage[:, START, START] = True
        self.leaf[:, START] = torch.where(begin, 0, self.leaf[:, START])
        self.owner[:, 0] = torch.where(begin, START, self.owner[:, 0])
        self.node_count.masked_fill_(begin, 1)
        self.leaf_count.masked_fill_(begin, 1)
        here = self._place[:, 0]
        none, zero = torch.full_like(here, -1), torch.zeros_like(here)
        if self.fixed_shapes:
            return Rows(here, zero, zero, none, none, zero, begin)
        here = here[begin]
        none, zero = none[: len(here)], zero[: len(here)]
        return Rows(here, zero, zero, none, none, zero)

    def find(self, parent: Tensor, label: Tensor) -> Tensor:
        """The node of each prefix, -1 where there is none. (B, C), (B, C) -> (B, C)"""
        n = self.used_nodes
        same = (self.parent[:, None, :n] == parent[..., None]) & (self.label[:, None, :n] == label[..., None])
        # the start has parent -1, as has no prefix in question; places not in use have parent -2
        found, node = same.max(-1)
        return torch.where(found & (parent >= 0), node, -1)

    def add(self, wanted: Tensor, parent: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Rows]:
        """Give prefixes a node and a leaf.

        The caller has reserved C nodes and leaves, or as many as are wanted of an utterance.

        Args:
            wanted: false where there is nothing. (B, C) bool
            parent, label: the prefix; no two wanted ones of an utterance are the same. (B, C)
            known: what `find` gave for it. (B, C)

        Returns:
            node: of each prefix; any number where it is not wanted. (B, C)
            rows: those that have to be scored, because they are new or their leaf was given up.
        """
        new = wanted & (known < 0)
        node = torch.where(new, self.node_count[:, None] + new.cumsum(1) - 1, known).clamp(min=0)
        score = wanted & (new | (self.leaf.gather(1, known.clamp(min=0)) < 0))
        leaf = (self.leaf_count[:, None] + score.cumsum(1) - 1).clamp(min=0)
        self.node_count += new.sum(1)
        self.leaf_count += score.sum(1)
        if not self.fixed_shapes:
            self.used_nodes, self.used_leaves = int(self.node_count.max()), int(self.leaf_count.max())

        rows = self._rows(score, node, leaf, parent, label)
        if len(rows.node):
            self._write(rows)
        return node, rows

    def _rows(self, score: Tensor, node: Tensor, leaf: Tensor, parent: Tensor, label: Tensor) -> Rows:
        utterance = self._place.expand_as(node)
        parent_leaf = self.leaf.gather(1, parent.clamp(min=0))
        columns = (utterance, node, leaf, parent, parent_leaf, label)
        if self.fixed_shapes:
            return Rows(*(column.reshape(-1) for column in columns), score.reshape(-1))
        return Rows(*(column[score] for column in columns))

    def _write(self, rows: Rows) -> None:
        b, i = rows.utterance, rows.node
        for tensor, value in (
            (self.parent, rows.parent),
            (self.label, rows.label),
            (self.depth, self.depth[b, rows.parent.clamp(min=0)] + 1),
            (self.leaf, rows.leaf),
        ):
            put(tensor, b, i, value, rows.valid)
        put(self.owner, b, rows.leaf, i, rows.valid)
        lineage = self.lineage[b, rows.parent.clamp(min=0)]
        lineage.scatter_(1, i[:, None], True)  # by an index, a number would wait for a GPU
        put(self.lineage, b, i, lineage, rows.valid)

    # --- room -------------------------------------------------------------------------------------------------------

    def make_room(self, nodes: int, leaves: int, live: Tensor, wanted: Tensor, again: int = 0) -> Tensor:
        """Room for so many more of both, by giving up what is needed no more, or by growing.

        Args:
            live: nodes of the hypotheses in hand. (B, H)
            wanted: false where there is none. (B, H) bool
            again: prefixes of an utterance that no hypothesis needs and that may soon be asked for all the same.

        Returns:
            live: the same nodes by their new numbers. (B, H)
        """
        if not self.fixed_shapes:
            # no more than there are: an utterance may have begun anew since
            self._needed_nodes = min(self._needed_nodes, int(self.node_count.sum()))
            self._needed_leaves = min(self._needed_leaves, int(self.leaf_count.sum()))
            if self._many(self.node_count, self._needed_nodes, NODES, again):
                live = self._compact_nodes(live, wanted)
                self._needed_nodes = int(self.node_count.sum())
            if self._many(self.leaf_count, self._needed_leaves, LEAVES, again):
                self._compact_leaves(live, wanted)
                self._needed_leaves = int(self.leaf_count.sum())
            self.reserve(nodes, leaves)
            return live
        taken_nodes, taken_leaves = self.taken()
        if taken_nodes + nodes + self.spare > self.nodes:
            live = self._compact_nodes(live, wanted)
            nodes += FIXED_STEP  # or what little was given up would be taken soon, and all be moved again
        if taken_leaves + leaves + self.spare > self.leaves:
            self._compact_leaves(live, wanted)
            leaves += FIXED_STEP
        self.reserve(nodes, leaves)
        return live

    def less_is_needed(self) -> None:
        """Hypotheses are gone: where many prefixes are left, the next `make_room` gives up those of these."""
        self._needed_nodes = self._needed_leaves = 0

    def _many(self, count: Tensor, needed: int, most: tuple[float, int], again: int) -> bool:
        times, more = most
        return int(count.sum()) > times * needed + max(more, again) * max(FEW, self.utterances)

    def _compact_nodes(self, live: Tensor, wanted: Tensor) -> Tensor:
        index = live.clamp(min=0)
        lines = self.lineage[self._place, index] & wanted[..., None]
        if self.reach is not None:
            depth = self.depth.gather(1, index)
            shallowest = depth.masked_fill(~wanted, torch.iinfo(depth.dtype).max).amin(1)
            # from the shallowest hypothesis on all are kept, or a prefix of another one would be made a second time
            first = torch.minimum(depth + 1 - self.reach, shallowest[:, None])
            lines &= self.depth[:, None] >= first[..., None]
        keep = lines.any(1)
        keep[:, START] = True
        used = int(keep.sum(1).max())  # waits for a GPU
        kept, old_to_new = _order(keep, used)
        free = torch.arange(used, device=self.device) >= keep.sum(1, keepdim=True)

        parent = self.parent.gather(1, kept)
        new_parent = torch.where(parent >= 0, old_to_new.gather(1, parent.clamp(min=0)), parent)
        # out of reach, and taken up by another node: nothing may be found under it
        new_parent = torch.where((parent >= 0) & ~keep.gather(1, parent.clamp(min=0)), -2, new_parent)
        self.parent.fill_(-2)[:, :used] = new_parent.masked_fill(free, -2)
        for tensor, nothing in ((self.label, 0), (self.depth, 0), (self.leaf, -1)):
            moved = tensor.gather(1, kept).masked_fill(free, nothing)
            tensor.fill_(nothing)[:, :used] = moved
        rows = self.lineage[self._place, kept].gather(2, kept[:, None].expand(-1, used, -1))
        self.lineage.fill_(False)[:, :used, :used] = rows & ~(free[..., None] | free[:, None])
        owner = self.owner.clamp(min=0)
        owned = (self.owner >= 0) & keep.gather(1, owner)
        self.owner.copy_(torch.where(owned, old_to_new.gather(1, owner), -1))
        self.node_count.copy_(keep.sum(1))
        if not self.fixed_shapes:
            self.used_nodes = used
        for scorer in self.scorers:
            scorer.move_nodes(kept.masked_fill(free, START))
        return torch.where(wanted, old_to_new.gather(1, index), live)

    def _compact_leaves(self, live: Tensor, wanted: Tensor) -> None:
        leaf = self.leaf.gather(1, live.clamp(min=0))
        keep = torch.zeros(self.utterances, self.leaves + 1, dtype=torch.bool, device=self.device)
        keep.scatter_(1, torch.where(wanted & (leaf >= 0), leaf, self.leaves), True)
        keep = keep[:, :-1]
        used = max(1, int(keep.sum(1).max()))  # waits for a GPU
        kept, _ = _order(keep, used)
        free = torch.arange(used, device=self.device) >= keep.sum(1, keepdim=True)
        owner = self.owner.gather(1, kept).masked_fill(free, -1)
        self.owner.fill_(-1)[:, :used] = owner
        # -1 would be the last node: those without an owner write to a place more, which is cut off
        target = torch.where(self.owner >= 0, self.owner, self.nodes)
        leaf = self.leaf.new_full((self.utterances, self.nodes + 1), -1)
        leaf.scatter_(1, target, torch.arange(self.leaves, device=self.device).expand_as(target))
        self.leaf.copy_(leaf[:, :-1])
        self.leaf_count.copy_(keep.sum(1))
        if not self.fixed_shapes:
            self.used_leaves = used
        for scorer in self.scorers:
            scorer.move_leaves(kept.masked_fill(free, 0))

    def _grow(self, nodes: int, leaves: int) -> None:
        more_nodes, more_leaves = nodes - self.nodes, leaves - self.leaves
        pad = torch.nn.functional.pad
        self.parent[:, self.nodes - self.spare :] = -2  # the spare place is now one like any other
        self.parent = pad(self.parent, (0, more_nodes), value=-2)
        self.label, self.depth = pad(self.label, (0, more_nodes)), pad(self.depth, (0, more_nodes))
        self.leaf = pad(self.leaf, (0, more_nodes), value=-1)
        self.owner = pad(self.owner, (0, more_leaves), value=-1)
        self.lineage = pad(self.lineage, (0, more_nodes, 0, more_nodes))
        self.nodes, self.leaves = nodes, leaves
        if self.fixed_shapes:
            self.used_nodes, self.used_leaves = nodes - self.spare, leaves - self.spare
        for scorer in self.scorers:
            scorer.reserve(self.utterances, nodes, leaves)


def put(tensor: Tensor, utterance: Tensor, place: Tensor, value: Tensor, valid: Tensor | None) -> None:
    """tensor[utterance, place] = value, in place; where `valid` is false nothing is written."""
    if valid is not None:
        # What is not valid writes to its utterance's last place, which `LabelTree` never hands out there
        place = torch.where(valid, place, tensor.shape[1] - 1)
    tensor[utterance, place] = value.to(tensor.dtype)


def _room(now: int, need: int, step: int) -> int:
    """Doubled while it is small; then in steps."""
    if need <= now:
        return now
    return max(2 * now if now < 4 * step else 0, -(-need // step) * step)


def _order(keep: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """Where the kept ones were, in order, and where each goes. (B, N) bool -> (B, used), (B, N)"""
    kept = torch.argsort(~keep, dim=1, stable=True)[:, :used]
    return kept, (keep.cumsum(1) - 1).clamp(min=0)
