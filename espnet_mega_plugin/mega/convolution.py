"""The moving average of whole sequences: its kernel, one causal convolution by FFT, and the residual.

B batch, L labels, D channels, N heads, K <= L lags of the kernel. Capitals for spectra:

    kernel[s]           = sum over N of project * decay**s * weight
    out[t]              = sum over s of kernel[s] * seen[t-s] + residual * x[t]           Y = X K
    grad of seen[s]     = sum over t of kernel[t-s] * g[t]                                conj(K) G
    grad of kernel[s]   = sum over batch and t of seen[t-s] * g[t]                        sum over batch of conj(X) G

where `seen` is x with zeros at padding. The forward passes are ESPnet's operations on the same numbers in the same
layout (where a vectorised activation ends its vectors and which number dropout draws depend on it), so the values are
ESPnet's to the bit. Automatic differentiation would turn each real transform into a complex one of full length and
keep the spectra and all powers of the decay; the backward passes here take real transforms and keep the inputs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espnet_mega_plugin.mega.precision import without_autocast
from espnet_mega_plugin.once import once_differentiable

CACHED = 1 << 20  # bytes of spectrum: on a CPU larger ones leave the cache, and malloc asks the system for each anew


def pulse_response(weight: Tensor, log_decay: Tensor, project: Tensor, length: int) -> Tensor:
    """The kernel: sum over N of project * exp(lag * log_decay) * weight, all (D, N), for `length` lags. (D, K)"""
    apply = _kernel if torch.jit.is_tracing() else _PulseResponse.apply  # a trace cannot hold Python's backward
    return apply(weight, log_decay, project, length)


def causal_convolution(x: Tensor, padding: Tensor, kernel: Tensor, residual: Tensor) -> Tensor:
    """out[t] = sum over s of kernel[s] * seen[t-s] + residual * x[t].

    Args:
        x: input. (L, B, D)
        padding: true where a label is not seen. (B, L)
        kernel: K <= L lags; its dtype is the one of the transforms, float32 or better. (D, K)
        residual: weight of the label itself, padding or not. (D,)

    Returns:
        out: the convolution in the dtype of `x`, plus the residual. (L, B, D), in memory (B, D, L)

    Can be differentiated once: a gradient of a gradient raises a RuntimeError.
    """
    apply = _convolve if torch.jit.is_tracing() else _CausalConvolution.apply
    return apply(x, padding, kernel, residual)


def same_layout_for_gradient(x: Tensor) -> Tensor:
    """x itself, of (L, B, D) and in memory (B, D, L); its gradient comes in that layout, too, however it is given.

    What runs backward between here and the convolution then reads and writes memory in order.
    """
    return x if torch.jit.is_tracing() else _SameLayout.apply(x)


class _PulseResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, log_decay: Tensor, project: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(weight, log_decay, project)
        return _kernel(weight, log_decay, project, length)

    @staticmethod
    @once_differentiable()
    def backward(ctx, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        weight, log_decay, project = saved
        lag = _lags(grad.shape[1], log_decay)
        with without_autocast(grad.device):
            powers = torch.exp(lag * log_decay[..., None])
            # over the lags: sums of powers * grad and of powers * lag * grad, in one product
            sums, moments = torch.bmm(powers, torch.stack([grad, lag * grad], -1)).unbind(-1)
            return sums * project, moments * weight * project, sums * weight, None


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, padding: Tensor, kernel: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(x, padding, kernel, residual)
        return _convolve(x, padding, kernel, residual)

    @staticmethod
    @once_differentiable()
    def backward(ctx, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, padding, kernel, residual = saved
        L, exact = x.shape[0], kernel.dtype
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        with without_autocast(x.device):
            x, grad = _channels_first(x), _channels_first(grad).to(exact)
            of_kernel = torch.fft.rfft(kernel, n=2 * L).conj_physical_()
            correlation, grad_residual = torch.zeros_like(of_kernel), torch.zeros_like(residual, dtype=exact)
            parts, room = _parts_and_room(x, exact)
            for rows in parts:
                of_grad = _spectrum(grad[rows], room)
                to_x = torch.fft.irfft(of_grad * of_kernel, n=2 * L)[..., :L].masked_fill_(padding[rows, None], 0.0)
                grad_x[:, rows] = to_x.addcmul_(grad[rows], residual[:, None].to(exact)).permute(2, 0, 1)
                grad_residual += (grad[rows] * x[rows]).sum((0, 2))
                # X conj(G), the conjugate of what is wanted: it can be made in place
                correlation += _spectrum(x[rows], room, padding[rows]).mul_(of_grad.conj_physical_()).sum(0)
            grad_kernel = torch.fft.irfft(correlation.conj_physical_(), n=2 * L)[:, : kernel.shape[1]]
        return grad_x, None, grad_kernel, grad_residual.to(residual.dtype)


class _SameLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _channels_first(grad).permute(2, 0, 1)


def _kernel(weight: Tensor, log_decay: Tensor, project: Tensor, length: int) -> Tensor:
    powers = torch.exp(_lags(length, log_decay) * log_decay[..., None])
    return torch.einsum("dnl,dn->dl", weight[..., None] * powers, project)


def _convolve(x: Tensor, padding: Tensor, kernel: Tensor, residual: Tensor) -> Tensor:
    (L, B, D), x = x.shape, _channels_first(x)
    of_kernel = torch.fft.rfft(kernel, n=2 * L)
    out = x.new_empty(B, D, L, dtype=torch.promote_types(x.dtype, residual.dtype))
    parts, room = _parts_and_room(x, kernel.dtype)
    for rows in parts:
        of_y = _spectrum(x[rows], room, padding[rows]).mul_(of_kernel)
        y = torch.fft.irfft(of_y, n=2 * L)[..., :L].to(x.dtype)
        out[rows] = y + x[rows] * residual[:, None]
    return out.permute(2, 0, 1)


def _lags(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype)


def _parts_and_room(x: Tensor, exact: torch.dtype) -> tuple[list[slice], Tensor]:
    """Rows of the batch to transform together, and zeros for their signals. x (B, D, L) -> room (rows, D, 2 * L)

    Few rows on a CPU; all of them on other devices and where a graph is made for any batch size.
    """
    B, D, L = x.shape
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        count, parts = B, [slice(None)]
    else:
        count = max(1, min(B, CACHED // (D * 2 * L * exact.itemsize)))
        parts = [slice(b, b + count) for b in range(0, B, count)]
    # 2 * L: a shorter transform wraps around and lets the end of the sequence leak into its start
    return parts, x.new_zeros(count, D, 2 * L, dtype=exact)


def _spectrum(x: Tensor, room: Tensor, padding: Tensor | None = None) -> Tensor:
    """Of x, with zeros at padding and behind its end. (B, D, L) -> (B, D, L + 1)"""
    room = room[: x.shape[0]]
    seen = room[..., : x.shape[2]].copy_(x)
    if padding is not None:
        seen.masked_fill_(padding[:, None], 0.0)
    return torch.fft.rfft(room)


def _channels_first(x: Tensor) -> Tensor:
    """(L, B, D) -> (B, D, L), contiguous; a view where x lies so in memory."""
    L, B, D = x.shape
    turned = x.permute(1, 2, 0)
    if torch.compiler.is_compiling() or turned.is_contiguous():
        return turned.contiguous()
    # as a matrix: torch transposes those by blocks, two to three times as fast as it copies three dimensions
    return x.reshape(L, B * D).t().contiguous().view(B, D, L)
