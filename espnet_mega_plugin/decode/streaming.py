"""Any number of utterances whose audio comes in pieces: the encoder chunk by chunk as ESPnet's, one search for all.

ESPnet's encoder keeps what a stream left behind inside its blocks; here each stream holds its own and lends it to the
encoder for the time of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from espnet2.asr_transducer.frontend.online_audio_processor import OnlineAudioProcessor
from torch import Tensor, nn

from espnet_mega_plugin.search.hypotheses import Hypothesis
from espnet_mega_plugin.search.search import BatchedSearch


@dataclass
class StreamedHypothesis(Hypothesis):
    """`places` says where in the utterance the frame of each label begins, in encoder frames of the whole.

    The frames of a stream are others: ESPnet leaves out the first and last of each chunk, and where a chunk is no
    multiple of an encoder frame, it looks at a part twice or not at all.
    """

    places: list[float] = field(default_factory=list)


class EncoderStream:
    """The encoder outputs of one utterance, chunk by chunk; the same as ESPnet's `Speech2Text.streaming_decode` has."""

    def __init__(
        self,
        model: nn.Module,
        frontend_conf: dict,
        decoding_window: int,
        left_context: int,
        device: str,
        dtype: torch.dtype,
    ):
        """
        Args:
            decoding_window: length of a chunk, milliseconds.
            left_context: encoder frames before a chunk that its attention sees.
        """
        self._encoder, self._left_context, self._dtype = model.encoder, left_context, dtype
        self._audio = OnlineAudioProcessor(
            model._extract_feats,
            model.normalize,
            decoding_window,
            model.encoder.embed.subsampling_factor,
            frontend_conf,
            device,
        )
        self.samples = self._audio.decoding_samples  # of a chunk
        self.places: list[float] = []  # where each frame so far begins, in encoder frames of the whole
        self._features = 0  # feature frames so far
        self._done = torch.tensor([[0]], device=device)
        self._encoder.reset_cache(left_context, device=device)
        self._caches = [block.cache for block in self._encoder.encoders.blocks]

    @torch.no_grad()
    def __call__(self, samples: Tensor, is_final: bool) -> Tensor:
        """Encoder frames of the next chunk. (S,) -> (T, D)"""
        before = 0 if self._audio.feats is None else self._audio.feats.shape[1]  # seen, and given once more
        feats, length = self._audio.compute_features(samples, is_final)
        first, self._features = self._features - before, self._features - before + feats.shape[1]
        blocks = self._encoder.encoders.blocks
        for block, cache in zip(blocks, self._caches, strict=True):
            block.cache = _in_dtype(cache, self._dtype)
        out = self._encoder.chunk_forward(feats.to(self._dtype), length, self._done, left_context=self._left_context)
        self._caches = [block.cache for block in blocks]
        self._done = self._done + out.shape[1]
        factor = self._encoder.embed.subsampling_factor
        self.places += [first / factor + i for i in range(1, out.shape[1] + 1)]
        return out[0]


def chunks(speech: Tensor, samples: int) -> list[Tensor]:
    """An utterance as ESPnet cuts it: the last chunk is shorter than a window, perhaps empty."""
    whole = len(speech) // samples
    return [speech[i * samples : (i + 1) * samples] for i in range(whole + 1)]


class SpeechStreams:
    """Open streams side by side, each joining and leaving when it likes; made by `BatchedSpeech2Text.streams`.

    A chunk has `samples` samples; only the last one of a stream may have less.
    """

    def __init__(self, speech2text, search: BatchedSearch):
        self._speech2text, self._search = speech2text, search.streams()
        self._encoders: dict[int, EncoderStream] = {}
        self.samples = speech2text.encoder_stream().samples

    def open(self) -> int:
        """Begin a stream; returns its number."""
        stream = self._search.open()
        self._encoders[stream] = self._speech2text.encoder_stream()
        return stream

    def push(self, chunks: Mapping[int, Tensor], final: frozenset | set = frozenset()) -> None:
        """The next chunk of some streams, and the search as far as they reach.

        Args:
            chunks: waveform of each stream that has one. (S,)
            final: the streams for which it is the last one.

        Raises:
            KeyError: a stream that is not open.
            ValueError: a chunk of another length.
        """
        encoded = {}
        for stream, samples in chunks.items():
            if stream not in self._encoders:
                raise KeyError(f"stream {stream!r} is not open; open are {sorted(self._encoders)}.")
            if len(samples) > self.samples or (len(samples) < self.samples and stream not in final):
                raise ValueError(
                    f"a chunk of stream {stream} has {len(samples)} samples; expected {self.samples} "
                    f"(decoding_window), or less for the last one."
                )
            encoded[stream] = self._encoders[stream](self._speech2text.waveform(samples), stream in final)
        self._search.push(encoded)

    def partial(self, stream: int) -> list[tuple]:
        """The n-best results so far, best first, as ESPnet's tuples."""
        return self._results(stream, self._search.partial(stream))

    def close(self, stream: int) -> list[tuple]:
        """End a stream; its n-best results."""
        results = self._results(stream, self._search.close(stream))
        del self._encoders[stream]
        return results

    def _results(self, stream: int, nbest: Sequence[Hypothesis]) -> list[tuple]:
        places = self._encoders[stream].places
        streamed = [StreamedHypothesis(**vars(h), places=[places[frame] for frame in h.frames]) for h in nbest]
        return self._speech2text.hypotheses_to_results(streamed)


def _in_dtype(cache: Tensor | list | None, dtype: torch.dtype):
    """ESPnet begins caches in float32 whatever the model is in."""
    if isinstance(cache, list):
        return [_in_dtype(one, dtype) for one in cache]
    return cache.to(dtype) if isinstance(cache, Tensor) else cache
