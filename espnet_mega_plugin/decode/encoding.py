"""Encoder outputs of several utterances, each what ESPnet's encoder gives for it alone.

ESPnet's encoder is not safe with padding: the frontend mirrors an utterance's end (`center` of its STFT), where in a
batch there is padding; 202511 does not shorten the padding mask with the subsampling, so that attention and
convolutions read padding; the VGG input block pads its convolutions. So there are two ways:

- `alone`: one utterance after the other through ESPnet's own encoder. On a CPU it is also the faster one.
- `padded`: features and input block alone, then the encoder's blocks for all at once, with masks of the right length.
  Equal to `alone` but for rounding; refused for encoders of which that is not known.

B utterances, F feature frames, T encoder frames, D encoder size.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from espnet2.asr_transducer.encoder.blocks.branchformer import Branchformer
from espnet2.asr_transducer.encoder.blocks.conformer import Conformer
from espnet2.asr_transducer.encoder.blocks.conv1d import Conv1d
from espnet2.asr_transducer.encoder.blocks.conv_input import ConvInput
from espnet2.asr_transducer.encoder.blocks.ebranchformer import EBranchformer
from espnet2.asr_transducer.encoder.encoder import Encoder
from espnet2.asr_transducer.utils import check_short_utt
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

MASKED = (Conformer, Branchformer, EBranchformer)  # blocks that read nothing behind a mask


_turns: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


def turn(encoder: nn.Module) -> threading.Lock:
    """To be held while the encoder works: one thread at a time.

    ESPnet's blocks keep things on themselves between two lines of a forward (the attention its weights, as `attn`, the
    streaming blocks their `cache`), which another thread in the same encoder would change. The locks are not kept in
    the model, so that it can be copied and pickled.
    """
    return _turns.setdefault(encoder, threading.Lock())


def features(model: nn.Module, waveform: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalised features of one utterance, (1, F, D_feats) in `dtype`, and their number. (1,)

    Args:
        waveform: (S,) or (S, channels); features (F, D_feats) where the model has no frontend.
    """
    length = torch.tensor([len(waveform)], device=waveform.device)
    found, length = model._extract_feats(waveform[None].clone(), length)  # normalisation writes into what it is given
    if model.normalize is not None:
        found, length = model.normalize(found, length)
    return found.to(dtype), length


def too_short_for_frontend(model: nn.Module, samples: int) -> bool:
    """Whether an utterance is empty, or the frontend cannot mirror its ends."""
    stft = getattr(model.frontend, "stft", None)
    return samples <= (stft.n_fft // 2 if getattr(stft, "center", False) else 0)


def too_short_for_input(encoder: nn.Module, frames: int) -> bool:
    """Whether the input block makes no frame of so many feature frames."""
    # ESPnet's check alone is too low for a factor of 2, what its layers need alone too low for VGG
    return check_short_utt(encoder.embed.subsampling_factor, frames)[0] or _behind_input(encoder, frames) < 1


def too_short_for_encoder(encoder: nn.Module, frames: int) -> bool:
    """Whether so many feature frames give no encoder frame."""
    if too_short_for_input(encoder, frames):
        return True
    frames = _behind_input(encoder, frames)
    for block in encoder.encoders.blocks:
        if isinstance(block, Conv1d):
            frames = _behind(block.conv, frames + block.lorder)  # causal blocks put zeros in front
    return frames < 1


def _behind_input(encoder: nn.Module, frames: int) -> int:
    for layer in encoder.embed.conv:
        frames = _behind(layer, frames)
    return frames


def _behind(layer: nn.Module, frames: int) -> int:
    """Frames that a layer makes of so many; less than 1: it cannot."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.MaxPool2d)):
        return frames
    sizes = layer.kernel_size, layer.stride, layer.padding, layer.dilation  # of time alone, or time first
    kernel, stride, padding, dilation = (size if isinstance(size, int) else size[0] for size in sizes)
    steps = frames + 2 * padding - dilation * (kernel - 1) - 1
    if not getattr(layer, "ceil_mode", False):
        return steps // stride + 1
    found = -(-steps // stride) + 1
    return found - ((found - 1) * stride >= frames + padding)  # the last window must begin within


def encode_alone(encoder: nn.Module, feats: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Encoder outputs, padded with zeros (B, T, D), and their lengths. (B,)"""
    with turn(encoder):
        found = [encoder(x, length)[0][0] for x, length in feats]
    return pad_sequence(found, batch_first=True), _lengths(found)


def encode_padded(encoder: nn.Module, feats: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The same for all at once; what is behind an utterance's length means nothing."""
    with turn(encoder):
        embedded = [encoder.embed(x)[0][0] for x, _ in feats]
        lengths, x = _lengths(embedded), pad_sequence(embedded, batch_first=True)
        pos_enc = encoder.pos_enc(x)
        for block in encoder.encoders.blocks:
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            x, _, pos_enc = block(x, pos_enc, padding)
            if isinstance(block, Conv1d) and not block.lorder:
                lengths = lengths - block.padding  # its first and last frames see too little to be kept
        return encoder.encoders.norm_blocks(x), lengths


def why_not_padded(encoder: nn.Module) -> str | None:
    """What of this encoder may read padding, or turns positions by it; None: `encode_padded` is exact."""
    if type(encoder) is not Encoder or type(encoder.embed) is not ConvInput:
        return f"the encoder is no Encoder of ESPnet's with its ConvInput but {type(encoder).__qualname__}"
    for block in encoder.encoders.blocks:
        if type(block) is Conv1d:
            if block.stride != 1 or (block.lorder and block.lorder != block.padding):
                return "a conv1d block has a stride, or is causal and dilated"
        elif type(block) not in MASKED:
            return f"a block is a {type(block).__qualname__}"
    return None


def frames_per_frame(encoder: nn.Module) -> int:
    """Feature frames to one encoder frame: the input block's factor times the strides of conv1d blocks."""
    factor = encoder.embed.subsampling_factor
    for block in encoder.encoders.blocks:
        factor *= block.stride if isinstance(block, Conv1d) else 1
    return factor


def _lengths(found: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(x) for x in found], device=found[0].device)
