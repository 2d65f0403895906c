"""ESPnet's language models as scorers of a batched search: log-probability of each next label.

The first label a model sees is <sos/eos>, the last of the vocabulary, as in ESPnet's transducer search. Prefixes of
different lengths are never padded to one another. R new prefixes, V tokens, L labels.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from espnet_mega_plugin.search.leaves import LeafObjects, labels_of, own
from espnet_mega_plugin.search.recurrent import RecurrentLayers
from espnet_mega_plugin.search.scorer import LabelScorer, Rows
from espnet_mega_plugin.search.transformer_lm import TreeTransformerLM
from espnet_mega_plugin.search.tree import LabelTree


def scorer_of_lm(lm: nn.Module, vocab_size: int) -> LabelScorer:
    """What scores next labels with this language model, on its device and in its dtype (log-probabilities of a half
    precision are float32).

    Args:
        lm: ESPnet's SequentialRNNLM, TransformerLM, or any other language model with `batch_score`.
        vocab_size: of the decoder.

    Raises:
        TypeError: it has no `batch_score`.
        ValueError: its vocabulary is of another size.
    """
    if not callable(getattr(lm, "batch_score", None)):
        raise TypeError(
            f"lm ({type(lm).__name__}) has no batch_score. Pass the language model itself: the attribute `lm` of the "
            f"model that ESPnet's LMTask builds, or what load_language_model returns."
        )
    output = getattr(lm, "lm_head", None) or getattr(lm, "decoder", None)
    _check_vocabulary(lm, getattr(output, "out_features", vocab_size), vocab_size)
    ours = {
        "espnet2.lm.seq_rnn_lm.SequentialRNNLM": RecurrentLM,
        "espnet2.lm.transformer_lm.TransformerLM": TreeTransformerLM,
    }
    return ours.get(f"{type(lm).__module__}.{type(lm).__qualname__}", AnyLM)(lm, vocab_size)


def load_language_model(
    config_file: str | Path | None,
    model_file: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    token_list: Sequence[str] | None = None,
) -> nn.Module:
    """A language model trained with ESPnet, ready for `scorer_of_lm`.

    Args:
        config_file: the config.yaml of its training; None: beside model_file.
        model_file: its checkpoint, as `valid.loss.ave.pth`.
        device: as `cpu` or `cuda:0`.
        dtype: torch.float32 or "float32", for instance.
        token_list: tokens of the model whose labels it is to score; None: they are not compared.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: there is no such dtype, the configuration is no language model's or has other tokens, or the
            checkpoint's weights are not those of the configuration's model.
    """
    model_file = Path(model_file)
    config_file = model_file.parent / "config.yaml" if config_file is None else Path(config_file)
    for key, file in (("model_file", model_file), ("config_file", config_file)):
        if not file.is_file():
            raise FileNotFoundError(f"{key} of the language model: there is no file {file}.")
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ValueError(f"dtype must be a torch dtype such as float32, bfloat16 or float16; got {dtype!r}.")
    _check_is_of_a_language_model(config_file)
    task = importlib.import_module("espnet2.tasks.lm").LMTask  # the search itself does without ESPnet
    model, args = task.build_model_from_file(config_file, model_file, device)
    # ESPnet loads with strict=False: weights of another model would leave random ones
    given = torch.load(model_file, map_location="cpu", weights_only=False).keys()
    differing = sorted(given ^ model.state_dict().keys())
    if differing:
        raise ValueError(
            f"{model_file} does not hold the weights of the language model of {config_file}; in one of them alone: "
            f"{', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}. Give the config.yaml of its training."
        )
    if token_list is not None:
        _check_tokens(config_file, args.token_list, token_list)
    return model.lm.to(wanted).eval()


class RecurrentLM(LabelScorer):
    """ESPnet's SequentialRNNLM (lstm, gru, rnn_tanh, rnn_relu), all rows at once; dropout is off."""

    reach = 0  # labels back that nodes are looked at

    def __init__(self, lm: nn.Module, vocab_size: int):
        self._lm, self._sos = lm, vocab_size - 1
        self._layers = RecurrentLayers([lm.rnn])

    @property
    def recordable(self) -> bool:
        return self._layers.recordable

    def fresh(self) -> RecurrentLM:
        return RecurrentLM(self._lm, self._sos + 1)

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        self._layers.reserve(utterances, leaves)

    @torch.no_grad()
    def extend(self, rows: Rows, tree: LabelTree) -> Tensor:
        label = torch.where(rows.parent < 0, self._sos, labels_of(rows))
        out = self._layers.step(self._lm.encoder(label), rows)
        logits = self._lm.decoder(out)
        return logits.log_softmax(-1, dtype=_at_least_float32(logits.dtype))

    def move_leaves(self, kept: Tensor) -> None:
        self._layers.move_leaves(kept)


class AnyLM(LabelScorer):
    """Any language model by its `batch_score`, a call for all prefixes of the same length.

    A leaf holds the labels and what the model calls its state.
    """

    reach = 0

    def __init__(self, lm: nn.Module, vocab_size: int):
        self._lm, self._vocab_size, self._leaves = lm, vocab_size, LeafObjects()

    def fresh(self) -> AnyLM:
        return AnyLM(self._lm, self._vocab_size)

    def reserve(self, utterances: int, nodes: int, leaves: int) -> None:
        self._leaves.reserve(utterances, leaves)

    @torch.no_grad()
    def extend(self, rows: Rows, tree: LabelTree) -> Tensor:
        weight = next(self._lm.parameters(), rows.label)
        by_length: dict[int, list] = {}
        for prefix in self._leaves.of_parents(rows):
            labels, state = self._extended(prefix)
            by_length.setdefault(len(labels), []).append((prefix, labels, state))
        dtype = _at_least_float32(weight.dtype) if weight.is_floating_point() else torch.float32
        out = torch.zeros(len(rows.label), self._vocab_size, dtype=dtype, device=weight.device)
        for group in by_length.values():
            prefixes, labels, states = zip(*group, strict=True)
            sequences = torch.tensor(labels, device=weight.device)
            logp, states = self._lm.batch_score(sequences, list(states), None)
            _check_vocabulary(self._lm, logp.shape[-1], self._vocab_size)
            out[[prefix.row for prefix in prefixes]] = logp.to(dtype)
            for prefix, sequence, state in zip(prefixes, labels, states, strict=True):
                self._leaves.put(prefix, (sequence, own(state)))
        return out

    def _extended(self, prefix) -> tuple[list[int], object]:
        if prefix.before is not None:
            labels, state = prefix.before
            return [*labels, prefix.label], state
        init_state = getattr(self._lm, "init_state", None)
        return [self._vocab_size - 1], None if init_state is None else init_state(None)

    def move_leaves(self, kept: Tensor) -> None:
        self._leaves.move(kept)


def _check_vocabulary(lm: nn.Module, has: int, vocab_size: int) -> None:
    if has != vocab_size:
        raise ValueError(
            f"the language model ({type(lm).__name__}) has {has} tokens, the decoder {vocab_size}. Both must be "
            f"trained on the same token list."
        )


def _check_is_of_a_language_model(config_file: Path) -> None:
    config = importlib.import_module("yaml").safe_load(config_file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "lm" not in config:
        raise ValueError(
            f"config_file of the language model: {config_file} has no key lm, so it is not the config.yaml of a "
            f"language model's training. Name that one; without a name it is looked for beside the checkpoint."
        )


def _check_tokens(config_file: Path, has: Sequence[str], wanted: Sequence[str]) -> None:
    has, wanted = list(has), list(wanted)
    if has == wanted:
        return
    if len(has) != len(wanted):
        differ = f"{len(has)} tokens, the decoder {len(wanted)}"
    else:
        place = next(i for i, (one, other) in enumerate(zip(has, wanted, strict=True)) if one != other)
        differ = f"{has[place]!r} as token {place}, the decoder {wanted[place]!r}"
    raise ValueError(
        f"the language model of {config_file} has {differ}. Both must be trained on the same token list, in one order."
    )


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
