"""The numbers of the pictures, taken from the network as it computes them.

L labels, D block size, C labels of a chunk (all L without chunks), K keys that a chunk's queries can see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espnet_mega_plugin.mega.network import MegaNetwork


@torch.no_grad()
def attention_weights(network: MegaNetwork, labels: Tensor | Sequence[int]) -> list[Tensor]:
    """What each block attends to, over one label sequence.

    These are the weights of `forward` itself: a hook reads what enters the dropout of attention weights, so a network
    that is not asked does nothing for it. The mode of the network is the caller's: in eval mode there is no dropout.

    Args:
        network: the decoder.
        labels: one sequence that begins with the start label (blank). (L,) int

    Returns:
        a matrix for each block, float32 on the CPU: row t holds the shares of the labels 0..t in what the block
        attends to at label t. They sum to 1. (L, L)

    Raises:
        TypeError, ValueError: labels are no sequence of at least one integer, or not in the vocabulary.
    """
    labels = torch.as_tensor(labels, device=network.embed.weight.device)
    if labels.dim() != 1 or not len(labels):
        raise ValueError(f"labels must be one sequence (L,) of a label or more; got shape {tuple(labels.shape)}.")
    read: list[Tensor] = []

    def listen(module: nn.Module, inputs: tuple[Tensor]) -> None:
        read.append(inputs[0][0])

    hooks = [block.dropout_attn.register_forward_pre_hook(listen) for block, _ in network.mega_blocks]
    try:
        network(labels[None])
    finally:
        for hook in hooks:
            hook.remove()
    return [_laid_out(weights, len(labels)).float().cpu() for weights in read]


@torch.no_grad()
def ema_kernels(network: MegaNetwork, length: int) -> list[Tensor]:
    """How each channel of each block's moving average answers, 0, 1, ... labels later, to one label.

    Args:
        network: the decoder.
        length: number of label distances.

    Returns:
        the EMA's kernel for each block, float32 on the CPU; 0 beyond a truncation_length. (D, length)
    """
    kernels = [block.multihead_damped_ema.kernel(length) for block, _ in network.mega_blocks]
    return [nn.functional.pad(kernel, (0, length - kernel.shape[1])).float().cpu() for kernel in kernels]


def _laid_out(weights: Tensor, L: int) -> Tensor:
    """Chunks of queries put in their places. The keys of a chunk are its own C and the K - C before them.

    (chunks, C, K) -> (L, L)
    """
    chunks, C, K = weights.shape
    before = K - C
    whole = weights.new_zeros(chunks * C, before + chunks * C)
    for chunk, own in enumerate(weights):
        whole[chunk * C : (chunk + 1) * C, chunk * C : chunk * C + K] = own
    return whole[:L, before : before + L]
