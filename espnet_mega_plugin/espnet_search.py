"""The batched search where ESPnet searches: behind its BeamSearchTransducer, and behind its ErrorCalculator.

`beam_search_config: {search_type: maes_batched}` (or greedy_batched, tsd_batched, alsd_batched) gives ESPnet's
unmodified commands the plugin's search, for one utterance or chunk at a time; `attach.py` puts it there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
from espnet2.asr_transducer.beam_search_transducer import Hypothesis as ESPnetHypothesis
from espnet2.asr_transducer.error_calculator import ErrorCalculator
from torch import Tensor, nn

from espnet_mega_plugin.replica import device_of
from espnet_mega_plugin.search.hypotheses import Hypothesis
from espnet_mega_plugin.search.language_model import scorer_of_lm
from espnet_mega_plugin.search.scorer import Fusion
from espnet_mega_plugin.search.search import BatchedSearch

SUFFIX = "_batched"


@dataclass
class TimedHypothesis(ESPnetHypothesis):
    """ESPnet's hypothesis, with what the batched search knows besides; its states are None."""

    frames: list[int] = field(default_factory=list)  # encoder frame at which each label was taken, from 0
    logps: list[float] = field(default_factory=list)  # log-probability of each label where it was taken


class BatchedBeamSearch(BeamSearchTransducer):
    """ESPnet's BeamSearchTransducer, its arguments and answers, by the batched search.

    Partial results of a stream are best first and lists of their own. `lm` may be any language model of ESPnet's; it
    changes no label of greedy_batched, which warns.

    Raises:
        TypeError, ValueError: an argument the search cannot take; the message names it.
    """

    def __init__(
        self,
        decoder: nn.Module,
        joint_network: nn.Module,
        beam_size: int,
        lm: nn.Module | None = None,
        lm_weight: float = 0.1,
        search_type: str = "maes_batched",
        max_sym_exp: int = 3,
        u_max: int = 50,
        nstep: int = 2,
        expansion_gamma: float = 2.3,
        expansion_beta: int = 2,
        score_norm: bool = False,
        nbest: int = 1,
        streaming: bool = False,
    ) -> None:
        # not ESPnet's constructor: it knows none of these search types
        self.decoder, self.joint_network, self.vocab_size = decoder, joint_network, decoder.vocab_size
        self.beam_size, self.nbest, self.score_norm, self.use_lm = beam_size, nbest, score_norm, lm is not None
        self.search = BatchedSearch(
            decoder,
            joint_network,
            beam_size,
            search_type.removesuffix(SUFFIX),
            max_sym_exp=max_sym_exp,
            u_max=u_max,
            nstep=nstep,
            expansion_gamma=expansion_gamma,
            expansion_beta=expansion_beta,
            score_norm=score_norm,
            nbest=nbest,
            fusion=None if lm is None else Fusion(scorer_of_lm(lm, decoder.vocab_size), lm_weight),
        )
        if streaming:
            self.search.streams()  # refuses what cannot stream
        self.reset_cache()

    @torch.no_grad()
    def __call__(self, enc_out: Tensor, is_final: bool = True) -> list[TimedHypothesis]:
        """The n-best list, best first: of an utterance, or of all chunks of a stream so far.

        Args:
            enc_out: encoder output, of an utterance or of its next chunk. (T, D_enc)
            is_final: whether nothing follows.
        """
        self.decoder.set_device(enc_out.device)
        if is_final and self._stream is None:
            return [_for_espnet(hypothesis) for hypothesis in self.search(enc_out[None])[0]]
        if self._stream is None:
            self._streams = self.search.streams()
            self._stream = self._streams.open()
        self._streams.push({self._stream: enc_out})
        if not is_final:
            return [_for_espnet(hypothesis) for hypothesis in self._streams.partial(self._stream)]
        found = self._streams.close(self._stream)
        self.reset_cache()
        return [_for_espnet(hypothesis) for hypothesis in found]

    def reset_cache(self) -> None:
        """Forget a stream that has not ended."""
        self.decoder.score_cache = {}
        self._streams = self._stream = None


def _for_espnet(hypothesis: Hypothesis) -> TimedHypothesis:
    return TimedHypothesis(hypothesis.score, hypothesis.yseq, frames=hypothesis.frames, logps=hypothesis.logps)


class BatchedErrorCalculator(ErrorCalculator):
    """ESPnet's ErrorCalculator with one search for the whole batch; the figures are the same.

    Args, besides ESPnet's:
        search_type: `maes`, as ESPnet's (beam 2), or `greedy`, at most `nstep` labels a frame.
    """

    def __init__(
        self,
        decoder: nn.Module,
        joint_network: nn.Module,
        token_list: list[str],
        sym_space: str,
        sym_blank: str,
        search_type: str = "maes",
        nstep: int = 2,
        report_cer: bool = False,
        report_wer: bool = False,
    ) -> None:
        # not ESPnet's constructor: it builds a search that refuses vocabularies of less than four tokens
        beam_size = min(2, decoder.vocab_size)
        self.beam_search = BatchedSearch(
            decoder,
            joint_network,
            beam_size,
            search_type,
            nstep=nstep,
            expansion_beta=min(2, decoder.vocab_size - beam_size),
        )
        self.decoder, self.token_list, self.space, self.blank = decoder, token_list, sym_space, sym_blank
        self.report_cer, self.report_wer = report_cer, report_wer

    @torch.no_grad()
    def __call__(self, encoder_out: Tensor, target: Tensor, encoder_out_lens: Tensor) -> tuple:
        """Character and word error rate of the batch, None where not reported.

        Args:
            encoder_out: (B, T, D_enc)
            target: labels, padded with blank. (B, L)
            encoder_out_lens: (B,)
        """
        encoder_out = encoder_out.to(device_of(self.decoder))
        lists = self.beam_search(encoder_out, encoder_out_lens.to(encoder_out.device).clamp(max=encoder_out.shape[1]))
        best = [nbest[0].yseq[1:] if nbest else [] for nbest in lists]  # none: the scores are not numbers
        found, wanted = self.convert_to_char(best, target)
        cer = self.calculate_cer(found, wanted) if self.report_cer else None
        wer = self.calculate_wer(found, wanted) if self.report_wer else None
        return cer, wer

    def calculate_cer(self, char_pred: list[str], char_target: list[str]) -> float:
        """ESPnet's rate; where no reference has a character, the number of those found."""
        if any(text.replace(" ", "") for text in char_target):
            return super().calculate_cer(char_pred, char_target)
        return float(sum(len(text.replace(" ", "")) for text in char_pred))

    def calculate_wer(self, char_pred: list[str], char_target: list[str]) -> float:
        """ESPnet's rate; where no reference has a word, the number of those found."""
        if any(text.replace("▁", " ").split() for text in char_target):
            return super().calculate_wer(char_pred, char_target)
        return float(sum(len(text.replace("▁", " ").split()) for text in char_pred))
