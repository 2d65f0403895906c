"""The moving average as torch differentiates it, and what a graph of it keeps: for tests and benchmarks."""

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
