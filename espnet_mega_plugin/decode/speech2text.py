"""Speech recognition in batches with a model that ESPnet trained: ESPnet's `Speech2Text` for lists of waveforms::

speech2text = BatchedSpeech2Text("exp/asr/config.yaml", "exp/asr/valid.loss.ave.pth", device="cuda")
for nbest in speech2text([waveform, another]):
    text, tokens, token_ints, hypothesis = nbest[0]
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.tasks.asr_transducer import ASRTransducerTask
from espnet2.text.build_tokenizer import build_tokenizer
from espnet2.text.cleaner import TextCleaner
from espnet2.text.token_id_converter import TokenIDConverter
from torch import Tensor, nn

from espnet_mega_plugin.attach import attach
from espnet_mega_plugin.decode import encoding, timing
from espnet_mega_plugin.decode.loading import loading
from espnet_mega_plugin.decode.options import DTYPES, ENCODER_BATCHES
from espnet_mega_plugin.decode.streaming import EncoderStream, SpeechStreams, StreamedHypothesis, check_window, chunks
from espnet_mega_plugin.search.hypotheses import Hypothesis
from espnet_mega_plugin.search.language_model import load_language_model, scorer_of_lm
from espnet_mega_plugin.search.ngram import NgramScorer, read_arpa
from espnet_mega_plugin.search.phrases import Phrase, PhraseScorer, read_phrases
from espnet_mega_plugin.search.scorer import Fusion, check_weight
from espnet_mega_plugin.search.search import SEARCH_TYPES, BatchedSearch

Result = tuple[str | None, list[str], list[int], Hypothesis]  # text, tokens, token ids, hypothesis

SEARCH_OPTIONS = (
    *("search_type", "max_sym_exp", "u_max", "nstep", "expansion_gamma", "expansion_beta", "score_norm", "window"),
)

_log = logging.getLogger("espnet_mega_plugin")


class BatchedSpeech2Text:
    """Recognises many utterances at once; the words are those of each utterance alone.

    The first arguments are ESPnet's `Speech2Text`'s, with the same names and defaults.

    Args:
        asr_train_config: config.yaml of the training; None: beside asr_model_file.
        asr_model_file: checkpoint, as valid.loss.ave.pth.
        beam_search_config: ESPnet's names: search_type (maes, the default; greedy, tsd, alsd; `maes_batched` is the
            same as `maes`), nstep, expansion_gamma ... (`BatchedSearch`).
        lm_train_config, lm_file: a language model trained with ESPnet, LSTM or Transformer.
        token_type, bpemodel: None: those of the training.
        device: as cpu, cuda, cuda:1.
        beam_size: hypotheses that are kept.
        dtype: float32, bfloat16, float16 or float64; features are made in float32 at least.
        lm_weight: of the language model.
        quantize_asr_model, quantize_modules, quantize_dtype: dynamic quantisation, on a CPU.
        nbest: hypotheses an utterance, at most.
        streaming: encode chunk by chunk, as the audio would come in.
        decoding_window: length of a chunk, milliseconds of audio at the model's sampling rate.
        left_context: encoder frames before a chunk that its attention sees.
        ngram_file, ngram_weight: n-gram language model over the model's tokens, in ARPA form, plain or gzip.
        phrases: phrases to prefer: a file (one a line, a tab and a weight behind it if wanted), or texts, or pairs of
            text and weight.
        phrase_weight: of phrases without one, nats a label. Neither phrases nor language models change greedy's words,
            or bring in what mAES does not look at (`BatchedSearch`).
        encoder_batches: alone, padded (`encoding.py`), or auto: padded on a GPU where it is exact, else alone.

    Attributes:
        samples_per_frame: samples of the waveform to an encoder frame.
        sampling_rate, seconds_per_frame: of the waveform, of an encoder frame; None where the model has no frontend.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError, ValueError: an argument has a wrong type or value, or a checkpoint is not its configuration's.
    """

    def __init__(
        self,
        asr_train_config: str | Path | None = None,
        asr_model_file: str | Path | None = None,
        beam_search_config: Mapping[str, Any] | None = None,
        lm_train_config: str | Path | None = None,
        lm_file: str | Path | None = None,
        token_type: str | None = None,
        bpemodel: str | None = None,
        device: str = "cpu",
        beam_size: int = 5,
        dtype: str = "float32",
        lm_weight: float = 1.0,
        quantize_asr_model: bool = False,
        quantize_modules: Sequence[str] | None = None,
        quantize_dtype: str = "qint8",
        nbest: int = 1,
        streaming: bool = False,
        decoding_window: int = 640,
        left_context: int = 32,
        *,
        ngram_file: str | Path | None = None,
        ngram_weight: float = 0.5,
        phrases: str | Path | Sequence[str | tuple[str, float]] | None = None,
        phrase_weight: float = 1.0,
        encoder_batches: str = "auto",
    ):
        _check_one_of("dtype", dtype, DTYPES)
        _check_one_of("encoder_batches", encoder_batches, ENCODER_BATCHES)
        weights_of = {"lm_weight": lm_weight, "ngram_weight": ngram_weight, "phrase_weight": phrase_weight}
        for name, weight in weights_of.items():
            check_weight(name, weight)
        for name, flag in {"quantize_asr_model": quantize_asr_model, "streaming": streaming}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False; got {flag!r}.")
        if isinstance(left_context, bool) or not isinstance(left_context, Integral):
            raise TypeError(f"left_context must be an integer, encoder frames; got {left_context!r}.")
        _check_device(device)
        config, weights = _model_files(asr_train_config, asr_model_file)
        search_options = _search_options(beam_search_config)
        attach()
        with loading(asr_train_config=config, asr_model_file=weights):
            model, args = ASRTransducerTask.build_model_from_file(config, weights, device)
            _check_weights_are_of(model, args, config, weights)
        self.asr_model, self.asr_train_args = model.eval(), args
        self.device, self.dtype, self.nbest, self.streaming = device, dtype, nbest, streaming
        self.decoding_window, self.left_context = decoding_window, max(left_context, 0)
        model.encoder.dynamic_chunk_training = False
        # An RWKV decoder's rescale_every is for float16's range alone: without it the outputs are what training had
        if quantize_asr_model:
            self.asr_model = model = _quantized(model, quantize_modules, quantize_dtype, dtype, device)
        else:
            _convert(model, getattr(torch, dtype))

        self.token_type = args.token_type if token_type is None else token_type
        bpemodel = args.bpemodel if bpemodel is None else bpemodel
        self.converter = TokenIDConverter(token_list=model.token_list)
        self.tokenizer = None
        if self.token_type == "bpe" and bpemodel is not None and not Path(bpemodel).is_file():
            raise FileNotFoundError(f"bpemodel: there is no file {bpemodel}, which {config} names unless you do.")
        if self.token_type != "bpe" or bpemodel is not None:
            with loading(token_type=self.token_type, bpemodel=bpemodel):
                self.tokenizer = build_tokenizer(token_type=self.token_type, bpemodel=bpemodel)
                if self.token_type == "bpe":
                    self.tokenizer.tokens2text([])  # ESPnet opens the file when it is first used

        fusion = []
        if lm_file is not None or lm_train_config is not None:
            if lm_file is None:
                raise ValueError("lm_train_config is given without lm_file: name the language model's checkpoint too.")
            beside = Path(lm_file).parent / "config.yaml" if lm_train_config is None else lm_train_config
            with loading(lm_train_config=beside, lm_file=lm_file):
                lm = load_language_model(beside, lm_file, device, dtype, model.token_list)
            fusion.append(Fusion(scorer_of_lm(lm, model.decoder.vocab_size), lm_weight))
        if ngram_file is not None:
            fusion.append(Fusion(NgramScorer(read_arpa(ngram_file), model.token_list, device=device), ngram_weight))
        if phrases is not None:
            labelled = self._phrases(phrases, phrase_weight)
            fusion.append(Fusion(PhraseScorer(labelled, model.decoder.vocab_size, device=device)))
        model.decoder.set_device(torch.device(device))
        self.search = BatchedSearch(
            model.decoder, model.joint_network, beam_size, nbest=nbest, fusion=fusion, **search_options
        )

        self.encoder_batches = _encoder_batches(encoder_batches, model.encoder, device, quantize_asr_model)
        hop = getattr(model.frontend, "hop_length", None)
        self.samples_per_frame = (hop or 1) * encoding.frames_per_frame(model.encoder)
        self.sampling_rate = None if hop is None else _sampling_rate(args)
        self.seconds_per_frame = None if hop is None else self.samples_per_frame / self.sampling_rate
        if streaming:
            self.search.streams()  # refuses a search that cannot
            check_window(model, args.frontend_conf or {}, decoding_window, self.sampling_rate)
            self.encoder_stream()  # refuses an encoder that cannot

    @torch.no_grad()
    def __call__(
        self,
        waveforms: Sequence[np.ndarray | Tensor],
        on_partial: Callable[[int, float, list[Result]], None] | None = None,
    ) -> list[list[Result]]:
        """The n-best list of each utterance, best first.

        Args:
            waveforms: (S,) each, at the sampling rate of the training, -1 .. 1; features (F, D) where the model has no
                frontend; of (S, channels) the first channel, as ESPnet's frontend takes it. In `streaming` mode each
                goes through the encoder chunk by chunk.
            on_partial: in `streaming` mode called after each chunk but the last with the waveform's place in the list,
                the milliseconds done and the results so far.

        Returns:
            an n-best list for each; no words where an utterance is too short for the encoder, and an empty list where
            the model's scores are not numbers.

        Raises:
            TypeError, ValueError: what is given is no list of waveforms, or holds something else than numbers.
        """
        if isinstance(waveforms, (np.ndarray, Tensor)) and waveforms.ndim < 2:
            raise TypeError("expected a list of waveforms; got a single one: write [waveform].")
        if not isinstance(waveforms, Iterable) or isinstance(waveforms, (str, bytes)):
            raise TypeError(f"expected a list of waveforms; got {waveforms!r:.80}.")
        speech = [self.waveform(waveform, f"waveforms[{i}]") for i, waveform in enumerate(waveforms)]
        if self.streaming:
            return self._in_chunks(speech, on_partial)
        results = [self.hypotheses_to_results([Hypothesis(0.0, [0])]) for _ in speech]
        encoder = self.asr_model.encoder
        feats, places = [], []
        for i, waveform in enumerate(speech):
            if encoding.too_short_for_frontend(self.asr_model, len(waveform)):
                continue
            found = encoding.features(self.asr_model, waveform, self._torch_dtype)
            if not encoding.too_short_for_encoder(encoder, found[0].shape[1]):
                feats.append(found)
                places.append(i)
        if feats:
            encode = encoding.encode_padded if self.encoder_batches == "padded" else encoding.encode_alone
            for i, nbest in zip(places, self.search(*encode(encoder, feats)), strict=True):
                results[i] = self.hypotheses_to_results(nbest)
        return results

    def streams(self) -> SpeechStreams:
        """Utterances whose audio comes in pieces, any number at once.

        Raises:
            ValueError: the search type cannot stream.
        """
        return SpeechStreams(self, self.search)

    def hypotheses_to_results(self, nbest: Sequence[Hypothesis]) -> list[Result]:
        """Text (None without a tokenizer), tokens and token ids of each hypothesis, and itself."""
        results = []
        for hypothesis in nbest:
            ids = [label for label in hypothesis.yseq if label != 0]
            tokens = self.converter.ids2tokens(ids)
            text = None if self.tokenizer is None else self.tokenizer.tokens2text(tokens)
            results.append((text, tokens, ids, hypothesis))
        return results

    def times(self, result: Result) -> list[float]:
        """When each token was emitted, seconds; in finished streams never behind the end of the audio.

        Raises:
            ValueError: the model does not tell how long a frame is.
        """
        return [frame * self._seconds() for frame in _places(result[3])]

    def words(self, result: Result) -> list[timing.Word]:
        """The words with their times and confidences; in finished streams they end with the audio at the latest.

        Raises:
            ValueError: the model does not tell how long a frame is.
        """
        hypothesis = result[3]
        space = self.asr_model.sym_space
        seconds, places = self._seconds(), _places(hypothesis)
        found = timing.words(result[1], places, hypothesis.logps, seconds, self.token_type, space)
        if not isinstance(hypothesis, StreamedHypothesis):
            return found
        return [replace(word, end=min(word.end, hypothesis.end * seconds)) for word in found]

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def _torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def waveform(self, given: np.ndarray | Tensor, name: str = "waveform") -> Tensor:
        """What is given as a tensor the frontend takes, of several channels the one it would take.

        Raises:
            TypeError, ValueError: it is no array of finite floating-point numbers, or has channels for samples.
        """
        if not isinstance(given, (np.ndarray, Tensor)):
            raise TypeError(f"{name} must be an array or a tensor; got {type(given).__name__}.")
        dtype = torch.promote_types(self._torch_dtype, torch.float32)
        frontend, shape = self.asr_model.frontend, tuple(given.shape)
        if len(shape) not in (1, 2):
            raise ValueError(f"{name} must be (samples,) or (frames, size); got shape {shape}.")
        # A stream's last chunk may have less samples than channels; eight are too few to be an utterance
        if frontend is not None and len(shape) == 2 and (shape[1] > max(shape[0], 8) or not shape[1]):
            raise ValueError(f"{name} must be (samples,) or (samples, channels); got shape {shape}: transpose it.")
        waveform = _floats(given, name).to(self.device, dtype)
        if waveform.dim() == 2 and _takes_one_channel(frontend):
            waveform = waveform[:, 0]  # the one it takes; streams are padded along the last axis, so no other may be
        if not bool(waveform.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite numbers.")
        return waveform

    def encoder_stream(self) -> EncoderStream:
        return EncoderStream(
            self.asr_model,
            self.asr_train_args.frontend_conf or {},
            self.decoding_window,
            self.left_context,
            self.device,
            self._torch_dtype,
            self.sampling_rate,
        )

    def _in_chunks(self, speech: Sequence[Tensor], on_partial: Callable | None) -> list[list[Result]]:
        streams = self.streams()
        numbers = [streams.open() for _ in speech]
        waiting = {stream: chunks(x, streams.samples) for stream, x in zip(numbers, speech, strict=True)}
        found, step = {}, 0
        while waiting:
            step += 1
            final = {stream for stream, pieces in waiting.items() if len(pieces) == step}
            streams.push({stream: pieces[step - 1] for stream, pieces in waiting.items()}, final)
            found |= {stream: streams.close(stream) for stream in final}
            waiting = {stream: pieces for stream, pieces in waiting.items() if stream not in final}
            for stream in waiting if on_partial is not None else ():
                on_partial(numbers.index(stream), step * self.decoding_window, streams.partial(stream))
        return [found[stream] for stream in numbers]

    def _seconds(self) -> float:
        if self.seconds_per_frame is None:
            raise ValueError("there are no times: the model has no frontend with a hop_length.")
        return self.seconds_per_frame

    def _phrases(self, phrases: str | Path | Sequence, weight: float) -> list[Phrase]:
        if self.tokenizer is None:
            raise ValueError("phrases need a tokenizer: give bpemodel.")
        clean = TextCleaner(getattr(self.asr_train_args, "cleaner", None))
        unknown = self.converter.unk_id

        def labels(text: str) -> list[int]:
            return self.converter.tokens2ids(self.tokenizer.text2tokens(clean(text)))

        if isinstance(phrases, (str, Path)):
            return read_phrases(phrases, labels, unknown, weight)
        if not isinstance(phrases, Iterable):
            raise TypeError(f"phrases must be a file or a list of phrases; got {phrases!r}.")
        pairs = [(one, weight) if isinstance(one, str) else one for one in phrases]
        for place, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ValueError(f"phrases[{place}] must be a text, or a pair of text and weight; got {pair!r}.")
        for text, _ in pairs:
            if not text.strip() or unknown in labels(text):
                raise ValueError(f"phrases: {text!r} is empty or has something the model has no token for.")
        return [(labels(text), given) for text, given in pairs]


def _places(hypothesis: Hypothesis) -> Sequence[float]:
    """Where the frame of each label begins, in encoder frames of the whole utterance."""
    return hypothesis.places if isinstance(hypothesis, StreamedHypothesis) else hypothesis.frames


def _floats(given: np.ndarray | Tensor, name: str) -> Tensor:
    if isinstance(given, Tensor):
        kind = "f" if given.is_floating_point() else "i" if "int" in str(given.dtype) else "?"
    else:
        kind = given.dtype.kind
    if kind != "f":
        hint = ": scale integers to -1 .. 1 (16 bits: divide by 32768)" if kind in "iu" else ""
        raise ValueError(f"{name} must hold floating-point numbers; got {given.dtype}{hint}.")
    if isinstance(given, Tensor):
        return given
    # torch takes neither negative strides nor another machine's byte order nor more than 64 bits
    return torch.from_numpy(np.ascontiguousarray(given, np.float64 if given.itemsize > 4 else np.float32))


def _takes_one_channel(frontend: nn.Module | None) -> bool:
    enhancing = getattr(frontend, "frontend", None)
    return type(frontend) is DefaultFrontend and not (
        enhancing is not None and (enhancing.use_wpe or enhancing.use_beamformer)
    )


def _check_weights_are_of(model: nn.Module, args: Any, config: Path, weights: Path) -> None:
    """ESPnet loads what fits and says nothing of the rest: what another model's file leaves out would be random."""
    given = torch.load(weights, map_location="cpu", weights_only=False)
    given = given.get("module", given)  # a DeepSpeed checkpoint, as ESPnet takes it
    # loading says what differs where modules take other names too, which a comparison of the names would not
    missing, unexpected = model.load_state_dict(given, strict=False)
    # where only what was trained is saved, the rest comes with the parts of the model that were there before
    partly = getattr(args, "use_adapter", False) or getattr(args, "save_strategy", "all") != "all"
    if partly and len(missing) < len(model.state_dict()):
        missing = []
    if not missing and not unexpected:
        return
    differing = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    raise ValueError(
        f"asr_model_file: {weights} does not hold the weights of the model of {config}: {'; '.join(differing)}. Give "
        f"the config.yaml of its training, and weights alone, as valid.loss.ave.pth (checkpoint.pth holds more)."
    )


def _check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")


def _check_device(device: str) -> None:
    if not isinstance(device, str):  # ESPnet refuses a torch.device, without its name
        raise TypeError(f"device must be a text, as cpu or cuda; got {device!r}.")
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # the first: a torch without CUDA
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device must be one that torch has here, as cpu or cuda; got {device!r}: {reason}") from error


def _model_files(config: str | Path | None, weights: str | Path | None) -> tuple[Path, Path]:
    if weights is None:
        raise ValueError("asr_model_file is missing: name the checkpoint, as exp/asr_train/valid.loss.ave.pth.")
    weights = Path(weights)
    config = weights.parent / "config.yaml" if config is None else Path(config)
    for name, file in (("asr_model_file", weights), ("asr_train_config", config)):
        if not file.is_file():
            raise FileNotFoundError(f"{name}: there is no file {file}.")
    return config, weights


def _search_options(config: Mapping[str, Any] | None) -> dict:
    """ESPnet's beam_search_config as arguments of BatchedSearch."""
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"beam_search_config must be a mapping such as {{search_type: maes}}; got {config!r}.")
    options = dict(config or {})
    options.pop("streaming", None)  # ESPnet's search has it; the option streaming says it here
    unknown = sorted(set(options) - set(SEARCH_OPTIONS))
    if unknown:
        raise ValueError(f"beam_search_config: {', '.join(unknown)} not known; known are {', '.join(SEARCH_OPTIONS)}.")
    search_type = str(options.get("search_type", "maes")).removesuffix("_batched")
    if search_type == "default":
        raise ValueError(
            "beam_search_config: search_type default is not there in batches: it has no cap on the labels of a frame. "
            "maes gives better results in less time; ESPnet's own command still has it."
        )
    _check_one_of("beam_search_config: search_type", search_type, SEARCH_TYPES)
    return {**options, "search_type": search_type}


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """The model to a dtype, but features at float32 at least: there are no Fourier transforms in half precision."""
    model.to(dtype)
    for part in (model.frontend, model.normalize):
        if part is not None:
            part.to(torch.promote_types(dtype, torch.float32))


def _quantized(model: nn.Module, names: Sequence[str] | None, kind: str, dtype: str, device: str) -> nn.Module:
    kinds = {"Linear": nn.Linear, "LSTM": nn.LSTM}
    if isinstance(names, str):
        raise TypeError(f"quantize_modules must be a list of layers, as [Linear]; got {names!r}.")
    names = ["Linear"] if names is None else list(names)
    for name in names:
        _check_one_of("quantize_modules", name, tuple(kinds))
    _check_one_of("quantize_dtype", kind, ("qint8", "float16"))
    if dtype != "float32" or torch.device(device).type != "cpu":
        raise ValueError(f"quantize_asr_model works on a CPU in float32; got device {device!r}, dtype {dtype!r}.")
    if torch.backends.quantized.engine == "none":
        engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
        if not engines:
            raise ValueError("quantize_asr_model: this build of torch has no engine for quantised layers.")
        torch.backends.quantized.engine = engines[0]
    quantize = torch.ao.quantization.quantize_dynamic
    return quantize(model, {kinds[name] for name in names}, dtype=getattr(torch, kind)).eval()


def _encoder_batches(wanted: str, encoder: nn.Module, device: str, quantized: bool) -> str:
    reason = "a quantised encoder scales a batch as one" if quantized else encoding.why_not_padded(encoder)
    if wanted == "padded" and reason:
        raise ValueError(f"encoder_batches: padded would change the words: {reason}. Write alone or auto.")
    if wanted != "auto":
        return wanted
    return "padded" if reason is None and torch.device(device).type != "cpu" else "alone"


def _sampling_rate(args: Any) -> int:
    rate = (args.frontend_conf or {}).get("fs", 16000)
    if isinstance(rate, str):  # 16k, as ESPnet's YAMLs write it
        rate = float(rate[:-1]) * 1000 if rate.lower().endswith("k") else float(rate)
    return int(rate)
