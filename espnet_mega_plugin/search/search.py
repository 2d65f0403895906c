"""Transducer search for a batch of utterances, and for any number of streams.

B utterances, T frames, D encoder size, V tokens.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import torch
from torch import Tensor, nn

from espnet_mega_plugin.recording import CudaGraphs, Recorder, RecorderFor, switched_on
from espnet_mega_plugin.replica import device_of
from espnet_mega_plugin.search.algorithm import Algorithm
from espnet_mega_plugin.search.alsd import Alsd
from espnet_mega_plugin.search.espnet_decoders import scorer_of
from espnet_mega_plugin.search.frames import Frames
from espnet_mega_plugin.search.hypotheses import Hypothesis
from espnet_mega_plugin.search.joint import Joint
from espnet_mega_plugin.search.maes import Maes
from espnet_mega_plugin.search.predictions import Predictions
from espnet_mega_plugin.search.scorer import Fusion, all_fusions
from espnet_mega_plugin.search.tree import LabelTree
from espnet_mega_plugin.search.tsd import Tsd

SEARCH_TYPES = ("greedy", "maes", "tsd", "alsd")

TIDY = 4096  # entries of an utterance's record after which a stream drops those that lead to no hypothesis any more

_log = logging.getLogger("espnet_mega_plugin")


class BatchedSearch:
    """N-best lists of whole batches; arguments have ESPnet's names and defaults (`BeamSearchTransducer`).

    Each search gives what ESPnet's algorithm of the same name gives for each utterance alone, hypothesis by hypothesis
    and score by score, wherever that is right (the README lists where it is not). `greedy` takes the best token, at
    most `nstep` labels a frame: mAES with a beam of 1 and no more candidates. What is fused changes its scores, never
    its labels. mAES, too, chooses the tokens it looks at (`beam_size + expansion_beta` of them, within
    `expansion_gamma` of the best) before anything is added: no bonus brings another one in.

    Args:
        decoder: the prediction network: the plugin's MEGA decoder or any of ESPnet's.
        joint_network: ESPnet's.
        beam_size: hypotheses that are kept.
        search_type: greedy, maes, tsd or alsd.
        max_sym_exp: tsd: one more than the labels a hypothesis may take at a frame.
        u_max: alsd: most labels expected.
        nstep: maes and greedy: labels a hypothesis may take at a frame.
        expansion_gamma: maes: how much less probable than the best token (nats) another one may be.
        expansion_beta: maes: tokens looked at beyond beam_size.
        score_norm: order the n-best list by score over the number of labels, the start label counted.
        nbest: length of the lists, at most.
        fusion: language models, phrases ... that add to the labels' scores (`search/scorer.py`).
        window: frames looked at together; changes nothing but the time.
        cuda_graphs: whether rounds of greedy, maes and tsd over whole utterances on a GPU are recorded as CUDA graphs
            and replayed; changes nothing but the time. None: where the environment says
            ESPNET_MEGA_PLUGIN_CUDA_GRAPHS=1.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it and what is accepted.
    """

    def __init__(
        self,
        decoder: nn.Module,
        joint_network: nn.Module,
        beam_size: int = 5,
        search_type: str = "maes",
        max_sym_exp: int = 3,
        u_max: int = 50,
        nstep: int = 2,
        expansion_gamma: float = 2.3,
        expansion_beta: int = 2,
        score_norm: bool = False,
        nbest: int = 1,
        fusion: Fusion | Sequence[Fusion] | None = None,
        window: int = 8,
        cuda_graphs: bool | None = None,
    ):
        for name, value, least in (
            ("beam_size", beam_size, 1),
            ("max_sym_exp", max_sym_exp, 2),
            ("u_max", u_max, 0),
            ("nstep", nstep, 1),
            ("expansion_beta", expansion_beta, 0),
            ("nbest", nbest, 1),
            ("window", window, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer; got {value!r}.")
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}.")
        if not isinstance(score_norm, bool):
            raise TypeError(f"score_norm must be True or False; got {score_norm!r}.")
        if not isinstance(cuda_graphs, (bool, type(None))):
            raise TypeError(f"cuda_graphs must be True, False or None; got {cuda_graphs!r}.")
        if isinstance(expansion_gamma, bool) or not isinstance(expansion_gamma, (int, float)):
            hint = _without_exponent(expansion_gamma)
            raise TypeError(f"expansion_gamma must be a number; got {expansion_gamma!r}{hint}.")
        if not expansion_gamma >= 0:
            raise ValueError(f"expansion_gamma must not be negative; got {expansion_gamma}.")
        if search_type not in SEARCH_TYPES:
            raise ValueError(f"search_type must be one of {', '.join(SEARCH_TYPES)}; got {search_type!r}.")
        vocab_size = getattr(decoder, "vocab_size", None)
        if not isinstance(vocab_size, int):
            raise TypeError(
                f"decoder must be one of ESPnet's or the plugin's; {type(decoder).__name__} has no vocab_size."
            )
        if search_type == "greedy":
            beam_size, expansion_beta = 1, 0
        tokens = beam_size + expansion_beta if search_type == "maes" else beam_size + (search_type != "greedy")
        if tokens > vocab_size:
            of = "beam_size + expansion_beta" if search_type == "maes" else "beam_size + 1 (blank)"
            raise ValueError(f"{of} is {tokens}, but the model has {vocab_size} tokens. Take a smaller beam_size.")
        self.decoder, self.joint_network = decoder, joint_network
        self.beam_size, self.search_type, self.nbest, self.score_norm = beam_size, search_type, nbest, score_norm
        self.max_sym_exp, self.u_max, self.window = max_sym_exp, u_max, window
        self.nstep, self.expansion_gamma, self.expansion_beta = nstep, expansion_gamma, expansion_beta
        self.fusion = all_fusions(fusion)
        if search_type == "greedy" and self.fusion:
            _log.warning(
                "search_type greedy takes the most probable token whatever language models, n-grams and phrases add: "
                "they change its scores, not its labels. Search with maes to have them heard."
            )
        graphs = switched_on() if cuda_graphs is None else cuda_graphs
        self.recorder_for: RecorderFor | None = CudaGraphs if graphs else None
        self._recorders: dict[tuple[torch.device, int], Recorder] = {}  # of a device and a thread
        self._said_unfit = False
        Joint(joint_network)  # refuses a joint network it cannot take apart

    @torch.no_grad()
    def __call__(self, encoder_out: Tensor, lengths: Tensor | None = None) -> list[list[Hypothesis]]:
        """Search whole utterances.

        Args:
            encoder_out: encoder output; what is behind an utterance's length is not read. (B, T, D)
            lengths: frames of each utterance; None: T. (B,) int

        Returns:
            n-best list of each utterance, best first; an empty list, and a warning, where its scores are not numbers.

        Raises:
            TypeError, ValueError: shapes, lengths or the dtype do not fit.
        """
        lengths = _checked_lengths(encoder_out, lengths)
        _check_frames(self.joint_network, "encoder_out", encoder_out)
        B = encoder_out.shape[0]
        if B == 0:
            return []
        search, places = None, None
        while search is None or places is not None:
            search = self._search(B, encoder_out.device, places)
            search.recorder = self._recorder(search)
            search.start(torch.ones(B, dtype=torch.bool, device=encoder_out.device))
            search.frames.set(search.joint.frames(encoder_out), lengths)
            search.advance()
            places = search.short_of_places()  # on a GPU, where posteriors are very flat: once more, with more room
        return self._nbest(search, range(B), final=True)

    def streams(self) -> Streams:
        """Utterances whose frames come in pieces.

        Raises:
            ValueError: alsd, which goes through an utterance by the length of its alignment, cannot do that.
        """
        if self.search_type == "alsd":
            raise ValueError("search_type alsd needs the whole utterance: stream with greedy, maes or tsd.")
        return Streams(self)

    def _search(self, utterances: int, device: torch.device, places: int | None = None) -> Algorithm:
        joint, scorer = Joint(self.joint_network), scorer_of(self.decoder)
        predictions = Predictions(scorer, joint, self.fusion)
        reaches = [getattr(one, "reach", None) for one in (scorer, *(fused.scorer for fused in self.fusion))]
        reach = None if None in reaches else max(reaches)
        tree = LabelTree(utterances, device, [predictions], reach)
        arguments = joint, predictions, tree, Frames(utterances, device), self.beam_size
        if self.search_type == "tsd":
            return Tsd(*arguments, self.max_sym_exp)
        if self.search_type == "alsd":
            return Alsd(*arguments, self.u_max)
        return Maes(*arguments, self.nstep, self.expansion_gamma, self.expansion_beta, self.window, places)

    def _recorder(self, search: Algorithm) -> Recorder | None:
        """What records the rounds of a search, where they can be recorded."""
        device = search.tree.device
        elsewhere = self.recorder_for is CudaGraphs and device.type != "cuda"
        if self.recorder_for is None or elsewhere or isinstance(search, Alsd):  # alsd counts its steps in Python
            return None
        unfit = search.predictions.not_recordable
        if unfit:
            if not self._said_unfit:
                self._said_unfit = True
                _log.warning(
                    "Rounds of the search are not recorded: %s goes through prefixes one by one, in Python.",
                    " and ".join(unfit),
                )
            return None
        whose = device, threading.get_ident()
        if whose not in self._recorders:
            self._recorders[whose] = self.recorder_for(device)
        return self._recorders[whose]

    def _nbest(self, search: Any, utterances: Sequence[int], final: bool) -> list[list[Hypothesis]]:
        # what alsd has found ended one after the other, and has what fusion adds at the end
        ended = isinstance(search, Alsd)
        score, node, entry, there = search.results if ended else search.hypotheses
        if final and not ended:
            leaf = search.tree.leaf.gather(1, node).clamp(min=0)
            utterance = torch.arange(len(score), device=score.device)[:, None].expand_as(leaf)
            bonus = search.predictions.final(utterance.flatten(), leaf.flatten())
            if isinstance(bonus, Tensor):
                score = score + bonus.view_as(score)
        score, entry, there = score.tolist(), entry.tolist(), there.tolist()
        found = {}
        for b in utterances:
            live = [h for h, is_there in enumerate(there[b]) if is_there and not math.isnan(score[b][h])]
            if not live:
                _log.warning("A search found nothing: the scores of utterance %d of the batch are not numbers.", b)
            found[b] = [(score[b][h], entry[b][h]) for h in live]
        return [sorted(one, key=self._order, reverse=True)[: self.nbest] for one in search.traces.read(found)]

    def _order(self, hypothesis: Hypothesis) -> float:
        return hypothesis.score / len(hypothesis.yseq) if self.score_norm else hypothesis.score


def _outside_inference_mode(method: Callable) -> Callable:
    """What a stream remembers is written again by a later call, which may be made outside of inference mode."""

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return wrapped


class Streams:
    """Any number of utterances at once, each going on as its frames come; made by `BatchedSearch.streams`.

    What a stream gives is what the same search gives for all its frames at once. Weights must not change while streams
    are open.
    """

    def __init__(self, search: BatchedSearch):
        self._options, self._search = search, None
        self._places: dict[int, int] = {}  # stream to place in the batch
        self._tidy_at, self._warned = TIDY, False
        self._next = 0

    def __len__(self) -> int:
        """Open streams."""
        return len(self._places)

    @_outside_inference_mode
    def open(self) -> int:
        """Begin a stream; returns its number."""
        if self._search is None:
            self._search = self._options._search(1, device_of(self._options.decoder))
        search = self._search
        utterances = search.tree.utterances
        free = set(range(utterances)) - set(self._places.values())
        if not free:
            search.widen(2 * utterances)
            free = {utterances}
        place = min(free)
        begin = torch.zeros(search.tree.utterances, dtype=torch.bool, device=search.tree.device)
        begin[place] = True
        search.frames.restart(begin)
        search.start(begin)
        stream, self._next = self._next, self._next + 1
        self._places[stream] = place
        return stream

    @_outside_inference_mode
    def push(self, frames: Mapping[int, Tensor]) -> None:
        """More frames of some streams, and the search as far as they reach.

        Args:
            frames: encoder output of each stream that has any. (T, D)

        Raises:
            KeyError: a stream that is not open.
            ValueError, TypeError: frames of a wrong shape or dtype.
        """
        search = self._search
        for stream, given in frames.items():
            self._place(stream)
            if not isinstance(given, Tensor) or not given.is_floating_point():
                raise TypeError(f"frames of stream {stream} must be a floating-point tensor (T, D); got {given!r:.60}.")
            if given.dim() != 2:
                raise ValueError(f"frames of stream {stream} must be (T, D); got shape {tuple(given.shape)}.")
            _check_frames(self._options.joint_network, f"frames of stream {stream}", given)
        dtypes = sorted({str(piece.dtype) for piece in frames.values()})
        if len(dtypes) > 1:  # where the joint network has no dtype of its own, as in autocast
            raise TypeError(f"frames of all streams must be of one dtype; got {' and '.join(dtypes)}.")
        given = {self._places[stream]: piece for stream, piece in frames.items() if len(piece)}
        if not given:
            return
        count = torch.zeros(search.tree.utterances, dtype=torch.long)
        pieces = list(given.values())
        batch = pieces[0].new_zeros(len(count), max(len(piece) for piece in pieces), pieces[0].shape[1])
        for place, piece in given.items():
            batch[place, : len(piece)] = piece
            count[place] = len(piece)
        search.frames.append(search.joint.frames(batch), count.to(batch.device))
        search.advance()
        if not self._warned and search.short_of_places() is not None:
            self._warned = True
            _log.warning(
                "Streams on a GPU: at some frame more labels could be taken than there are places; the least probable "
                "ones were left out. A smaller expansion_gamma or nstep, or a larger beam_size, avoids that."
            )
        if search.traces.used > self._tidy_at:
            search.forget_traces()
            self._tidy_at = max(TIDY, 2 * search.traces.used)

    def partial(self, stream: int) -> list[Hypothesis]:
        """The n-best list so far, best first; a list of its own that later frames do not change."""
        return self._options._nbest(self._search, [self._place(stream)], final=False)[0]

    @_outside_inference_mode
    def close(self, stream: int) -> list[Hypothesis]:
        """End a stream; its n-best list."""
        place, search = self._place(stream), self._search
        found = self._options._nbest(search, [place], final=True)[0]
        del self._places[stream]
        there = search.hypotheses.there.clone()
        there[place] = False
        search.hypotheses = search.hypotheses._replace(there=there)
        search.tree.less_is_needed()
        return found

    def _place(self, stream: int) -> int:
        if stream not in self._places:
            raise KeyError(f"stream {stream!r} is not open; open are {sorted(self._places)}.")
        return self._places[stream]


def _without_exponent(given: Any) -> str:
    """How to write a number that YAML, which wants a point and a sign in 1.0e+5, has read as text."""
    try:
        number = Decimal(given) if isinstance(given, str) else Decimal("NaN")
    except InvalidOperation:
        return ""
    written = f"{number:f}"
    return f", a text; in YAML write {written if '.' in written else f'{written}.0'}" if number.is_finite() else ""


def _check_frames(joint_network: nn.Module, name: str, frames: Tensor) -> None:
    size = getattr(joint_network.lin_enc, "in_features", frames.shape[-1])
    if frames.shape[-1] != size:
        raise ValueError(f"{name} must hold {size} numbers a frame, as joint_network takes; got {frames.shape[-1]}.")
    weight = getattr(joint_network.lin_enc, "weight", None)  # a quantised layer's is a method
    kind = frames.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if isinstance(weight, Tensor) and weight.dtype != frames.dtype and not cast:
        raise TypeError(f"{name} must be of joint_network's dtype, {weight.dtype}; got {frames.dtype}.")


def _checked_lengths(encoder_out: Tensor, lengths: Tensor | None) -> Tensor:
    if not isinstance(encoder_out, Tensor) or not encoder_out.is_floating_point():
        raise TypeError(f"encoder_out must be a floating-point tensor (B, T, D); got {encoder_out!r:.60}.")
    if encoder_out.dim() != 3:
        raise ValueError(f"encoder_out must be (B, T, D); got shape {tuple(encoder_out.shape)}.")
    B, T = encoder_out.shape[:2]
    if lengths is None:
        return torch.full((B,), T, dtype=torch.long, device=encoder_out.device)
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be a tensor of integers (B,); got {lengths!r:.60}.")
    if lengths.shape != (B,):
        raise ValueError(f"lengths must be ({B},), a number for each utterance; got shape {tuple(lengths.shape)}.")
    if lengths.device.type == "cpu" and B and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T:
        raise ValueError(f"lengths must lie in 0 .. {T}, the frames of encoder_out; got {lengths.tolist()}.")
    return lengths.to(encoder_out.device, torch.long)
