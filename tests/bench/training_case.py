"""What a training step of a decoder is, for every benchmark that times one; torch only."""

from collections.abc import Callable

import torch


def case(decoder: torch.nn.Module, batch: int, length: int, autocast: bool) -> tuple[Callable, Callable]:
    """Forward and backward of a decoder over the same labels and with the same gradient of its output."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(1, decoder.vocab_size, (batch, length), generator=draw)
    labels[:, 0] = 0
    device = decoder.embed.weight.device
    labels = labels.to(device)
    gradient = torch.randn(batch, length, decoder.output_size, generator=draw).to(device)
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    decoder.train()  # without dropout, which is off by default

    def forward(_) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return decoder(labels)

    def backward(out: torch.Tensor) -> tuple:
        return torch.autograd.grad(out, parameters, gradient.to(out.dtype), allow_unused=True)

    return forward, backward
