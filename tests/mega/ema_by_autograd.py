"""The moving average in other forms, as torch differentiates them, and what a graph keeps: for tests and benchmarks."""

import torch

from espnet_mega_plugin.mega.ema import MultiHeadDampedEMA


class ByAutograd(MultiHeadDampedEMA):
    """The same forward in plain operations, which torch differentiates."""

    def kernel(self, length):
        weight, decay, project = self.coefficients()
        lag = torch.arange(min(length, self.truncation_length or length)).to(decay)
        return torch.einsum("dnl,dn->dl", weight[..., None] * torch.exp(lag * decay[..., None].log()), project)

    def forward(self, x, padding):
        L = x.shape[0]
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            seen = x.permute(1, 2, 0).masked_fill(padding[:, None], 0.0).to(exact)
            spectrum = torch.fft.rfft(seen, n=2 * L) * torch.fft.rfft(self.kernel(L).to(exact), n=2 * L)
            y = torch.fft.irfft(spectrum, n=2 * L)[..., :L].to(x.dtype)
        return self.activation(y.permute(2, 0, 1) + x * self.residual_weight)


class ByScan(MultiHeadDampedEMA):
    """Chunks of 32 labels as products with the kernel's Toeplitz matrix, the state carried from chunk to chunk.

    Up to 32 labels that is the direct sum. ESPnet's numbers to rounding, not to the bit.
    """

    CHUNK = 32

    def forward(self, x, padding):
        (L, B, D), exact = x.shape, torch.promote_types(x.dtype, torch.float32)
        weight, decay, project = self.coefficients()
        C = min(self.CHUNK, L)
        chunks = -(-L // C)
        lag = torch.arange(C, device=x.device)
        powers = decay[..., None] ** lag  # (D, N, C)
        kernel = torch.einsum("dnl,dn->dl", powers, weight * project)
        back = lag[:, None] - lag
        toeplitz = kernel[:, back.clamp(min=0)].masked_fill(back < 0, 0.0)  # (D, C, C)
        seen = x.masked_fill(padding.T[..., None], 0.0).to(exact)
        seen = torch.nn.functional.pad(seen, (0, 0, 0, 0, 0, chunks * C - L))
        seen = seen.view(chunks, C, B, D).permute(3, 1, 0, 2).reshape(D, C, chunks * B)
        y = torch.bmm(toeplitz, seen)
        if chunks > 1:
            left = torch.bmm(weight[..., None] * powers.flip(2), seen).view(D, -1, chunks, B)
            states = [torch.zeros_like(left[:, :, 0])]
            for chunk in range(chunks - 1):
                states.append((decay**C)[..., None] * states[-1] + left[:, :, chunk])
            carried = torch.stack(states, 2).view(D, -1, chunks * B)
            y = y + torch.bmm((project * decay)[:, None] * powers.transpose(1, 2), carried)
        y = y.view(D, C, chunks, B).permute(2, 1, 3, 0).reshape(chunks * C, B, D)[:L]
        return self.activation(y.to(x.dtype) + x * self.residual_weight)


def kept_bytes(ema, x, padding) -> int:
    """What the graph holds beyond the input and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, padding, *ema.parameters())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: an address must not be used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ema(x, padding)
    return sum(size for address, (size, _) in found.items() if address not in known)
