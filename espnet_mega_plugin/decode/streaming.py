"""Any number of utterances whose audio comes in pieces: the encoder chunk by chunk as ESPnet's, one search for all.

ESPnet's encoder keeps what a stream left behind inside its blocks; here each stream holds its own and lends it to the
encoder for the time of a chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from espnet2.asr_transducer.frontend.online_audio_processor import OnlineAudioProcessor
from torch import Tensor, nn

from espnet_mega_plugin.decode.encoding import too_short_for_input, turn
from espnet_mega_plugin.search.hypotheses import Hypothesis
from espnet_mega_plugin.search.search import BatchedSearch


@dataclass
class StreamedHypothesis(Hypothesis):
    """`places` says where in the utterance the frame of each label begins, in encoder frames of the whole.

    The frames of a stream are others: ESPnet leaves out the first and last of each chunk, and where a chunk is no
    multiple of an encoder frame, it looks at a part twice or not at all.

    ESPnet fills a last chunk up with silence, and labels may come there. In a finished stream `end` is where the audio
    ends, in the same unit, and such labels are placed at the last frame that begins before it.
    """

    places: list[float] = field(default_factory=list)
    end: float = math.inf  # as long as the stream goes on


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
        sampling_rate: int,
    ):
        """
        Args:
            decoding_window: length of a chunk, milliseconds.
            left_context: encoder frames before a chunk that its attention sees.
            sampling_rate: of the audio.
        """
        self._encoder, self._left_context, self._dtype = model.encoder, left_context, dtype
        self._audio = OnlineAudioProcessor(
            model._extract_feats,
            model.normalize,
            decoding_window,
            model.encoder.embed.subsampling_factor,
            frontend_conf,
            device,
            sampling_rate,
        )
        self.samples = self._audio.decoding_samples  # of a chunk
        self.places: list[float] = []  # where each frame so far begins, in encoder frames of the whole
        self.heard, self.finished = 0, False  # samples so far, and whether they are all
        self._features = 0  # feature frames so far
        self._done = torch.tensor([[0]], device=device)
        with turn(self._encoder):
            self._encoder.reset_cache(left_context, device=device)
            self._caches = [block.cache for block in self._encoder.encoders.blocks]

    @torch.no_grad()
    def __call__(self, samples: Tensor, is_final: bool) -> Tensor:
        """Encoder frames of the next chunk. (S,) -> (T, D)"""
        before = 0 if self._audio.feats is None else self._audio.feats.shape[1]  # seen, and given once more
        feats, length = self._audio.compute_features(samples, is_final)
        first, self._features = self._features - before, self._features - before + feats.shape[1]
        blocks = self._encoder.encoders.blocks
        with turn(self._encoder):
            for block, cache in zip(blocks, self._caches, strict=True):
                block.cache = _in_dtype(cache, self._dtype)
            feats = feats.to(self._dtype)
            out = self._encoder.chunk_forward(feats, length, self._done, left_context=self._left_context)
            self._caches = [block.cache for block in blocks]
        self.heard, self.finished = self.heard + len(samples), is_final
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

    A chunk has `samples` samples; only the last one of a stream may have less. Threads may have streams of their own
    with one recogniser, but must not share one `SpeechStreams`.
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
        """The next chunk of some streams, and the search as far as they reach. All chunks are taken or none.

        Args:
            chunks: waveform of each stream that has one. (S,), or (S, channels), of which the first is taken
            final: the streams that end here, with their chunk or, where they have none, without one.

        Raises:
            KeyError: a stream that is not open.
            TypeError, ValueError: a chunk of another length, or that is no waveform; a stream that has ended.
        """
        for stream in (*chunks, *final):
            if self._encoder(stream).finished:
                raise ValueError(f"stream {stream} had its last chunk (final) before; close it and open another one.")
        given = {**dict.fromkeys(final, torch.zeros(0)), **chunks}
        given = {stream: self._chunk(stream, samples, stream in final) for stream, samples in given.items()}
        self._search.push({stream: self._encoders[stream](x, stream in final) for stream, x in given.items()})

    def partial(self, stream: int) -> list[tuple]:
        """The n-best results so far, best first, as ESPnet's tuples."""
        return self._results(stream, self._search.partial(stream))

    def close(self, stream: int) -> list[tuple]:
        """End a stream; its n-best results. What was pushed without `final` is heard to its end first."""
        encoder = self._encoder(stream)
        if encoder.heard and not encoder.finished:
            self.push({}, final={stream})
        results = self._results(stream, self._search.close(stream))
        del self._encoders[stream]
        return results

    def _results(self, stream: int, nbest: Sequence[Hypothesis]) -> list[tuple]:
        encoder = self._encoders[stream]
        end = encoder.heard / self._speech2text.samples_per_frame if encoder.finished else math.inf
        last = max(0, math.ceil(end) - 1) if encoder.finished else math.inf
        places = [min(place, last) for place in encoder.places]
        streamed = [StreamedHypothesis(**vars(h), places=[places[frame] for frame in h.frames], end=end) for h in nbest]
        return self._speech2text.hypotheses_to_results(streamed)

    def _encoder(self, stream: int) -> EncoderStream:
        if stream not in self._encoders:
            raise KeyError(f"stream {stream!r} is not open; open are {sorted(self._encoders)}.")
        return self._encoders[stream]

    def _chunk(self, stream: int, samples: Tensor, is_final: bool) -> Tensor:
        chunk = self._speech2text.waveform(samples, f"the chunk of stream {stream}")
        if chunk.dim() != 1:
            raise ValueError(f"the chunk of stream {stream} must be (samples,); got shape {tuple(chunk.shape)}.")
        if len(chunk) > self.samples or (len(chunk) < self.samples and not is_final):
            raise ValueError(
                f"a chunk of stream {stream} has {len(chunk)} samples; expected {self.samples} "
                f"(decoding_window), or less for the last one."
            )
        return chunk


def check_window(model: nn.Module, frontend_conf: dict, window: float, rate: int | None) -> None:
    """
    Raises:
        ValueError: the model has no frontend, or a first chunk so long would give no encoder frame.
    """
    if model.frontend is None or rate is None:
        raise ValueError("streaming cuts waveforms into chunks; this model takes features: it has no frontend.")
    factor = model.encoder.embed.subsampling_factor
    audio = OnlineAudioProcessor(None, None, 0, factor, frontend_conf, "cpu", rate)  # for its sizes

    def enough(milliseconds: float) -> bool:
        return _frames_of_first_chunk(round(milliseconds * rate / 1000), model, audio) > 0

    if isinstance(window, Real) and not isinstance(window, bool) and math.isfinite(window) and enough(window):
        return
    least = next(milliseconds for milliseconds in itertools.count(1) if enough(milliseconds))
    raise ValueError(
        f"decoding_window must be at least {least} milliseconds, so that a first chunk gives this encoder a frame; "
        f"got {window!r}."
    )


def _frames_of_first_chunk(samples: int, model: nn.Module, audio: OnlineAudioProcessor) -> int:
    """Encoder frames that ESPnet's `OnlineAudioProcessor` and `chunk_forward` make of it; below 1: an error there."""
    stft = getattr(model.frontend, "stft", None)
    used = samples - (samples - audio.win_hop_sz) % audio.hop_sz
    if samples < audio.win_hop_sz or used <= audio.n_fft // 2:
        return 0
    centred = getattr(stft, "center", True)
    feats = (used if centred else used - audio.n_fft) // audio.hop_sz + 1 - audio.trim_val
    if too_short_for_input(model.encoder, feats):
        return 0
    weight = next(model.encoder.embed.parameters())
    given = torch.zeros(1, feats, model.frontend.output_size(), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        return model.encoder.embed(given)[0].shape[1] - 2  # chunk_forward leaves the first and the last one out


def _in_dtype(cache: Tensor | list | None, dtype: torch.dtype):
    """ESPnet begins caches in float32 whatever the model is in."""
    if isinstance(cache, list):
        return [_in_dtype(one, dtype) for one in cache]
    return cache.to(dtype) if isinstance(cache, Tensor) else cache
