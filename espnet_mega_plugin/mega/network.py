"""The MEGA prediction network: embedding, layers of (MEGA block, feed-forward), final normalisation.

B batch, L labels, D block size, W remembered labels, C labels of a chunk.

One truth: `forward` over a whole label sequence. `extend` goes on from a memory by any number of labels, for a batch of
any histories, and gives what `forward` gives at those places (tests/mega/test_laws.py).

A label equal to `pad_idx` after the first place is padding: it adds nothing to the moving average, and a query sees it
only where its reach (the labels up to its own; of those, its chunk or its attention window) holds nothing else. That is
ESPnet's rule but for a chunk that begins with padding and holds a label later: there ESPnet's softmax is over nothing
and NaN.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from espnet_mega_plugin.mega.activation import build_activation
from espnet_mega_plugin.mega.arguments import check_arguments
from espnet_mega_plugin.mega.block import MegaBlock, Reach, with_labels_before
from espnet_mega_plugin.mega.feed_forward import NormalizedPositionwiseFeedForward
from espnet_mega_plugin.mega.normalization import build_normalization
from espnet_mega_plugin.mega.position_bias import build_position_bias
from espnet_mega_plugin.mega.precision import at_least_float32
from espnet_mega_plugin.mega.state import BlockMemory, MegaMemory


class MegaNetwork(nn.Module):
    """Arguments, defaults and parameter names are those of ESPnet's MEGADecoder, which `decoder.py` explains.

    Two more, off by default, change no parameter: `attention_window` and `pre_norm`.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int = 512,
        linear_size: int = 1024,
        qk_size: int = 128,
        v_size: int = 1024,
        num_heads: int = 4,
        rel_pos_bias_type: str = "simple",
        max_positions: int = 2048,
        truncation_length: int | None = None,
        normalization_type: str = "layer_norm",
        normalization_args: dict | None = None,
        activation_type: str = "swish",
        activation_args: dict | None = None,
        chunk_size: int = -1,
        num_blocks: int = 4,
        dropout_rate: float = 0.0,
        embed_dropout_rate: float = 0.0,
        att_dropout_rate: float = 0.0,
        ema_dropout_rate: float = 0.0,
        ffn_dropout_rate: float = 0.0,
        embed_pad: int = 0,
        attention_window: int | None = None,
        pre_norm: bool = False,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        arguments["normalization_args"] = normalization_args = {} if normalization_args is None else normalization_args
        arguments["activation_args"] = activation_args = {} if activation_args is None else activation_args
        check_arguments(arguments)
        super().__init__()

        # Attributes ESPnet's class has
        self.vocab_size, self.output_size = vocab_size, block_size
        self.chunk_size, self.num_blocks, self.pad_idx = chunk_size, num_blocks, embed_pad
        self.mega_num_heads = self.mega_ema_num_heads = num_heads
        self.mega_att_k_size, self.mega_att_v_size, self.mega_ema_size = qk_size, v_size, block_size
        self.truncation_length = truncation_length
        self.attention_window = attention_window

        activation = build_activation(activation_type, **activation_args)
        normalization = functools.partial(build_normalization, normalization_type, block_size, **normalization_args)
        reach = chunk_size if chunk_size > 0 else max_positions
        position_bias = functools.partial(build_position_bias, rel_pos_bias_type, qk_size, reach)

        self.embed = nn.Embedding(vocab_size, block_size, padding_idx=embed_pad)
        self.dropout_embed = nn.Dropout(embed_dropout_rate)
        self.mega_blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    MegaBlock(
                        block_size,
                        num_heads,
                        qk_size,
                        v_size,
                        activation,
                        normalization(),
                        position_bias,
                        truncation_length,
                        dropout_rate,
                        att_dropout_rate,
                        ema_dropout_rate,
                        pre_norm,
                    ),
                    NormalizedPositionwiseFeedForward(
                        block_size, linear_size, activation, normalization(), ffn_dropout_rate, pre_norm
                    ),
                ]
            )
            for _ in range(num_blocks)
        )
        self.final_norm = normalization()
        # After all other draws, so that a seed gives ESPnet's weights everywhere else
        for block, _ in self.mega_blocks:
            block.espnet_initialization_fn()

    def forward(self, labels: Tensor) -> Tensor:
        """Encode whole label sequences.

        Args:
            labels: label sequences that begin with the start label, padded at the end with `pad_idx`. (B, L) int

        Returns:
            out: one row for each label; row t depends on labels 0..t only. (B, L, D)

        Raises:
            TypeError, ValueError: labels are no (B, L) integers, or (on a CPU) outside the vocabulary.
            ValueError: L exceeds `max_positions` (rel_pos_bias_type simple; no chunks, no shorter attention window).
        """
        labels = self._checked(labels)
        B, L = labels.shape
        if labels.numel() == 0:
            return self.embed(labels)
        C = self.chunk_size if 0 < self.chunk_size < L else L
        if L % C:
            labels = nn.functional.pad(labels, (0, C - L % C), value=self.pad_idx)
        padding = labels == self.pad_idx
        padding[:, 0] = False
        bands = self.attention_window is not None and self._goes_in_bands(L)
        if bands:
            hidden = _hidden_in_bands(padding, self.attention_window)
        else:
            hidden = _hidden_in_chunks(padding.view(B, -1, C), self.attention_window)

        x = self.dropout_embed(self.embed(labels)).transpose(0, 1)
        for block, feed_forward in self.mega_blocks:
            x = feed_forward(block(x, padding, hidden, bands))
        return self.final_norm(x).transpose(0, 1)[:, :L]

    def empty_memory(self, batch_size: int) -> MegaMemory:
        """What is remembered before the first label, on the parameters' device and in their dtype."""
        weight = self.embed.weight
        exact = at_least_float32(weight.dtype)
        blocks = [
            BlockMemory(
                ema=weight.new_zeros(batch_size, self.output_size, self.mega_ema_num_heads, dtype=exact),
                keys=weight.new_zeros(batch_size, 0, self.mega_att_k_size),
                values=weight.new_zeros(batch_size, 0, self.mega_att_v_size),
                inputs=None
                if self.truncation_length is None
                else weight.new_zeros(batch_size, 0, self.output_size, dtype=exact),
            )
            for _ in range(self.num_blocks)
        ]
        return MegaMemory(blocks, weight.new_zeros(batch_size, 0, dtype=torch.bool), [0] * batch_size)

    def extend(self, labels: Tensor, memory: MegaMemory) -> tuple[Tensor, MegaMemory]:
        """Go on from a memory by L labels for each row. No dropout in any mode; `memory` is not modified.

        Args:
            labels: new labels. (B, L) int
            memory: of the labels before, B rows, each with a history of its own length.

        Returns:
            out: one row for each new label: what `forward` gives there over the whole sequence. (B, L, D)
            memory: of all labels so far.

        Past `max_positions` (where `forward` refuses) distances beyond the table use its last entry.
        """
        labels = self._checked(labels)
        B, L = labels.shape
        x = self.embed(labels)
        if labels.numel() == 0:
            return x, memory
        padding = labels == self.pad_idx
        first = [row for row, position in enumerate(memory.positions) if position == 0]
        if first:
            padding[first, 0] = False
        all_padding = torch.cat([memory.padding, padding], 1)
        reach = self._reach(memory.positions, all_padding, L)
        blocks = []
        for (block, feed_forward), block_memory in zip(self.mega_blocks, memory.blocks, strict=True):
            x, block_memory = block.extend(x, padding, reach, block_memory)
            x = feed_forward.extend(x)
            blocks.append(block_memory)
        kept = all_padding[:, all_padding.shape[1] - reach.kept :]
        return self.final_norm(x), MegaMemory(blocks, kept, [position + L for position in memory.positions])

    def attended_labels(self, position: int) -> int:
        """How many of `position` labels the next label can still attend to."""
        if self.attention_window is not None:
            return min(position, self.attention_window - 1)
        return position % self.chunk_size if self.chunk_size > 0 else position

    def _goes_in_bands(self, L: int) -> bool:
        """Whether attention computes a band around the diagonal instead of masking all L x L pairs.

        It does where the table of positions does not reach L, and where the band is less work.
        """
        window, table = self.attention_window, self.mega_blocks[0][0].rel_pos_bias.max_positions
        if table is not None and L > table:
            return window <= table  # else the bias refuses L
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return False  # one graph for all lengths, and how many chunks there are depends on the length
        return L > 2 * window

    def _reach(self, positions: list[int], padding: Tensor, L: int) -> Reach:
        W = padding.shape[1] - L
        device = padding.device
        place = torch.arange(-W, L, device=device)  # of each key, counted from the first new label
        distance = place[W:, None] - place
        # remembered labels stand right before the new ones; what is in front of them was never there
        remembered = torch.tensor([self.attended_labels(p) for p in positions]).to(device, non_blocking=True)
        offset = remembered[:, None] + place  # (B, W + L) place in the chunk where the memory ends
        out_of_reach = (distance < 0) | (offset < 0)[:, None]
        if self.attention_window is not None:
            out_of_reach = out_of_reach | (distance >= self.attention_window)
        if self.chunk_size > 0:
            chunk = offset.div(self.chunk_size, rounding_mode="floor")
            out_of_reach = out_of_reach | (chunk[:, W:, None] != chunk[:, None])
        hidden = _hide_padding(out_of_reach, padding[:, None])
        kept = max([0, *(self.attended_labels(p + L) for p in positions)])
        return Reach(hidden, distance.clamp(min=0), kept)

    def _checked(self, labels: Tensor) -> Tensor:
        if (
            not isinstance(labels, Tensor)
            or labels.is_floating_point()
            or labels.is_complex()
            or labels.dtype == torch.bool
        ):
            kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be a tensor of integers (B, L); got {kind}.")
        if labels.dim() != 2:
            raise ValueError(f"labels must be (B, L): label sequences in a batch; got shape {tuple(labels.shape)}.")
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in torch.aminmax(labels))
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"labels must lie in 0 .. vocab_size - 1 = {self.vocab_size - 1}; got values from {low} to {high}. "
                    f"Padding is marked by {self.pad_idx} (embed_pad), not by -1."
                )
        return labels.long()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Refuse weights that do not fit, by ValueError: ESPnet loads with strict=False and would decode garbage.

        Not missing is what is not trained: ESPnet's `save_strategy` may leave it out.
        """
        own = {prefix + key: value for key, value in self.state_dict().items()}
        given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        missing = own.keys() - given.keys()
        trained = {prefix + name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if missing.isdisjoint(trained):
            missing = set()
        problems = {
            "missing": sorted(missing),
            "unexpected": sorted(given.keys() - own.keys()),
            "of another shape": [
                f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
                for key in sorted(own.keys() & given.keys())
                if hasattr(given[key], "shape") and hasattr(own[key], "shape") and given[key].shape != own[key].shape
            ],
        }
        if any(problems.values()):
            listed = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
            raise ValueError(
                f"The checkpoint does not fit this MEGA decoder: {listed}. Build the decoder with the decoder_conf the "
                f"checkpoint was trained with (its config.yaml); to take over only a part of the weights use "
                f"--init_param with --ignore_init_mismatch true. A save_strategy that leaves weights out goes with a "
                f"decoder that is not trained: freeze_param: [decoder]."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _hidden_in_chunks(padding: Tensor, window: int | None) -> Tensor:
    """Which keys each query must not see, inside each chunk. padding (B, chunks, C) -> (B, chunks, C, C)"""
    C = padding.shape[-1]
    everything = torch.ones(C, C, dtype=torch.bool, device=padding.device)
    out_of_reach = everything.triu(1)
    if window is not None:
        out_of_reach = out_of_reach | everything.tril(-window)
    return _hide_padding(out_of_reach, padding[:, :, None])


def _hidden_in_bands(padding: Tensor, window: int) -> Tensor:
    """The same for a window, chunk by chunk, so that nothing grows with the square of the length.

    A chunk is `window` queries; its keys are theirs and those of the window - 1 labels before. The last one is filled
    up. (B, L) -> (B, chunks, C, C-1 + C)
    """
    L, C = padding.shape[1], window
    chunks = L // C + 1  # filled up by one label at least: torch.compile takes filling up by none for a copy in order
    key = torch.arange(1 - window, C, device=padding.device)  # place, counted from a chunk's first query
    distance = key[window - 1 :, None] - key
    before_first = C * torch.arange(chunks, device=padding.device)[:, None] + key < 0  # (chunks, C-1 + C)
    out_of_reach = (distance < 0) | (distance >= window) | before_first[:, None]
    padding = nn.functional.pad(padding, (0, chunks * C - L), value=True).view(-1, chunks, C, 1)
    return _hide_padding(out_of_reach, with_labels_before(padding).transpose(2, 3))


def _hide_padding(out_of_reach: Tensor, padding: Tensor) -> Tensor:
    """Hide padding keys too, but from a query that would then see nothing: it sees the padding within its reach."""
    hidden = out_of_reach | padding
    return torch.where(hidden.all(-1, keepdim=True), out_of_reach, hidden)
