"""ESPnet's face of the MEGA network: the class that `decoder: mega` builds.

B batch, L labels, D block size, N EMA heads, W remembered labels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from espnet2.asr_transducer.decoder.abs_decoder import AbsDecoder
from torch import Tensor

from espnet_mega_plugin.mega.network import MegaNetwork
from espnet_mega_plugin.mega.pool import MegaPool
from espnet_mega_plugin.mega.prefix_state import PrefixState
from espnet_mega_plugin.mega.prefixes import Prefix, PrefixMemory, Tables
from espnet_mega_plugin.mega.state import RANKS, BlockMemory, Documented, MegaMemory, check_shapes, stack_right
from espnet_mega_plugin.recording import CudaGraphs, switched_on


class MEGADecoder(MegaNetwork, AbsDecoder):
    """MEGA prediction network for ESPnet's transducer (arXiv:2209.10655).

    Arguments, defaults, attributes, methods and `state_dict` are those of ESPnet's class of the same name. `forward`
    gives ESPnet's numbers; every way of scoring gives what `forward` gives over the whole prefix, for any mix of
    histories in a batch (tests/test_decoder.py). ESPnet's class lacks the last two arguments, which add no parameter.

    Args:
        vocab_size: number of tokens, blank included.
        block_size: width D of the embedding, of the layers and of the output.
        linear_size: hidden width of the feed-forward half of a layer.
        qk_size: width of queries and keys; even with rel_pos_bias_type `rotary`.
        v_size: width of values.
        num_heads: number of averages the EMA keeps for each channel; the authors' language models have 16.
        rel_pos_bias_type: `simple` (a table of max_positions numbers) or `rotary` (no limit of length).
        max_positions: longest sequence `forward` takes with `simple`; chunk_size takes its place where that is set,
            and an attention_window of at most max_positions lifts the limit.
        truncation_length: how many labels back the EMA looks; null for all.
        normalization_type: layer_norm, basic_norm, rms_norm or scale_norm.
        normalization_args: `eps`; `partial` for rms_norm (share of the channels the rms is taken of).
        activation_type: swish, ftswish, hardtanh, leaky_relu, mish, relu, selu, smish, tanh or identity.
        activation_args: ESPnet's names: ftswish_threshold, ftswish_mean_shift, hardtanh_min_val, hardtanh_max_val,
            leakyrelu_neg_slope, smish_alpha, smish_beta, softplus_beta, softplus_threshold, swish_beta.
        chunk_size: attention stays inside chunks of that many labels; -1 for the full context.
        num_blocks: number of layers.
        dropout_rate: of values and of the attention's result.
        embed_dropout_rate: of the embedding.
        att_dropout_rate: of attention weights.
        ema_dropout_rate: of the EMA's output.
        ffn_dropout_rate: of the feed-forward's hidden values and result.
        embed_pad: label whose embedding is zero and that counts as padding after the first place.
        attention_window: a label attends to itself and to the attention_window - 1 before it; null for all before it.
            A state then holds that many keys, however long the stream. Not together with chunk_size.
        pre_norm: each half of a layer normalises its input instead of its result: x + u * (candidate - x) with values
            and EMA, so u and candidate too, made of Norm(x), and x + W2 phi(W1 Norm(x)); the final normalisation is
            there with and without. x itself, that the gate u keeps a part of, is not normalised. As
            `normalize_before` of facebookresearch/mega.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it and what is accepted.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int = 512,
        linear_size: int = 1024,
        qk_size: int = 128,
        v_size: int = 1024,
        num_heads: int = 4,
        rel_pos_bias_type: str = "simple",
        max_positions: int = 2048,
        truncation_length: int | None = None,
        normalization_type: str = "layer_norm",
        normalization_args: dict = {},  # noqa: B006 - ESPnet's default, shown by --print_config; never changed
        activation_type: str = "swish",
        activation_args: dict = {},  # noqa: B006
        chunk_size: int = -1,
        num_blocks: int = 4,
        dropout_rate: float = 0.0,
        embed_dropout_rate: float = 0.0,
        att_dropout_rate: float = 0.0,
        ema_dropout_rate: float = 0.0,
        ffn_dropout_rate: float = 0.0,
        embed_pad: int = 0,
        attention_window: int | None = None,
        pre_norm: bool = False,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(**arguments)
        self.prefixes = PrefixMemory()
        self.cuda_graphs = switched_on()
        self.score_cache = {}

    @property
    def score_cache(self) -> dict:
        """Empty. A search that replaces it says that an utterance is over: the prefixes remembered are dropped."""
        return self._score_cache

    @score_cache.setter
    def score_cache(self, replacement: dict) -> None:
        self._score_cache = replacement
        self.prefixes.forget()

    @property
    def cuda_graphs(self) -> bool:
        """Whether steps of up to 32 hypotheses on a GPU are recorded once as CUDA graphs and replayed.

        Recorded are those that attend to one table of labels together: not float16's, nor those whose hypotheses have
        many labels of their own (`mega/prefixes.py`, FOR_NOTHING). May be set at any time; at first true where the
        environment says ESPNET_MEGA_PLUGIN_CUDA_GRAPHS=1.
        """
        return self.prefixes.recorder_for is CudaGraphs

    @cuda_graphs.setter
    def cuda_graphs(self, on: bool) -> None:
        self.prefixes.recorder_for = CudaGraphs if on else None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed.weight.device

    def set_device(self, device: torch.device) -> None:
        """Asked for by ESPnet's interface; the device is always that of the parameters, so there is nothing to set."""

    def train(self, mode: bool = True) -> MEGADecoder:
        """As any module's. Between training and scoring weights may have changed in ways that cannot be seen."""
        self.prefixes.begin_anew()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> MEGADecoder:
        self.prefixes.begin_anew()  # else a move to another device or dtype leaves a copy of the old weights behind
        return super()._apply(*args, **kwargs)

    def inference(self, labels: Tensor, states: Documented) -> tuple[Tensor, Documented]:
        """Go on from a state by one label or several.

        Args:
            labels: new labels of each hypothesis. (B, L) int
            states: of the labels before: `init_state(B)`, or what this or another method returned for B hypotheses.

        Returns:
            out: decoder output for each new label, equal to `forward` over the whole sequence. (B, L, D)
            new_states: batched state after the new labels. One dict a block

        Raises:
            TypeError, ValueError: labels are no (B, L) integers of the vocabulary, labels and states are of different
                batch sizes, or a state lacks a key or holds one of a wrong shape.
        """
        labels, memory = self._checked(labels), self._memory(states)
        if len(memory.positions) != labels.shape[0]:
            raise ValueError(
                f"labels hold {labels.shape[0]} hypotheses, states {len(memory.positions)}. "
                f"Build states with init_state({labels.shape[0]}) or create_batch_states."
            )
        out, memory = self.extend(labels, memory)
        return out, self._documented(memory)

    def score(self, label_sequence: Sequence[int], states: Documented) -> tuple[Tensor, Documented]:
        """Score one hypothesis by one label.

        Args:
            label_sequence: its labels, the start label first; the last one is new.
            states: state after all labels but the last.

        Returns:
            out: decoder output for the last label. (1, D)
            states: state after the last label, for this one hypothesis.

        Raises:
            ValueError: states are of several hypotheses, or the labels are none of the vocabulary.

        Each prefix is evaluated once, until a search replaces `score_cache` or `prefixes.remembered` others were used
        since; it is evaluated anew for other weights, another device, dtype or autocast. (A write behind autograd's
        back, through `.data`, is seen at the next `train()` or `eval()`.) Safe to call from several threads.
        """
        out, extended = self._extended([states], [self._last(label_sequence)])
        return out, PrefixState(tuple(extended), self._built)

    def batch_score(self, hyps: Sequence[Any]) -> tuple[Tensor, Documented]:
        """Score hypotheses of any lengths by one label each; what was evaluated before is not evaluated again.

        Args:
            hyps: each with `yseq` (labels, the last one new) and `dec_state` (state after all but the last).

        Returns:
            out: decoder output for the last label of each. (B, D)
            states: batched state; `select_state` takes one hypothesis out of it.
        """
        hyps = list(hyps)
        if not hyps:
            return self.embed.weight.new_zeros(0, self.output_size), self.create_batch_states([])
        out, extended = self._extended([hyp.dec_state for hyp in hyps], [self._last(hyp.yseq) for hyp in hyps])
        return out, PrefixState(tuple(extended), self._built_batch)

    def init_state(self, batch_size: int = 0) -> Documented:
        """State before the first label: on the parameters' device, in their dtype.

        Args:
            batch_size: 0 or 1 for one hypothesis, in the shapes ESPnet documents: ema_state (D, N), prev_key
                (1, 1, qk_size), prev_value (1, 1, v_size), whose zeros are never attended to; more for a batch.
        """
        batch_size = _integer("batch_size", batch_size)
        if batch_size < 0:
            raise ValueError(f"batch_size must be 0 or more; got {batch_size}.")
        if batch_size > 1:
            return self._documented(self.empty_memory(batch_size))
        return PrefixState((self.prefixes.root(self),), self._built_first)

    def select_state(self, states: Documented, idx: int) -> Documented:
        """State of one hypothesis of a batched state, which does not keep the others' memory alive.

        Raises:
            ValueError: there is no hypothesis `idx`.
        """
        idx = _integer("idx", idx)
        prefixes = getattr(states, "prefixes", None)
        memory = self._memory(states) if prefixes is None else None
        count = len(memory.positions) if prefixes is None else len(prefixes)
        if not 0 <= idx < count:
            raise ValueError(f"idx must be a hypothesis of the states, which hold {count}, from 0; got {idx}.")
        if prefixes is not None:
            return PrefixState((prefixes[idx],), self._built)
        position = torch.tensor(memory.positions[idx])
        W = memory.padding.shape[1]
        first = W - min(W, self.attended_labels(memory.positions[idx]))
        selected = []
        for block in memory.blocks:
            state = {
                "ema_state": block.ema[idx].clone(),
                "prev_key": block.keys[idx, first:].clone(),
                "prev_value": block.values[idx, first:].clone(),
                "prev_pad": memory.padding[idx, first:].clone(),
                "position": position,
            }
            if block.inputs is not None:
                state["prev_input"] = block.inputs[idx].clone()
            selected.append(state)
        return selected

    def stack_qk_states(self, state_list: Sequence[Tensor], dim: int) -> Tensor:
        """Keys or values of hypotheses of different lengths as one batch, zeros in front of the shorter ones.

        Args:
            state_list: keys or values of each hypothesis. [(W, dim) or (1, W, dim)]
            dim: their width; decides the shape of an empty batch.

        Returns:
            stacked: on the device and in the dtype of the states. (B, longest W, dim)

        Raises:
            ValueError: an entry has another shape.
        """
        if not state_list:
            return self.embed.weight.new_zeros(0, 0, dim)
        rows = [_single(state, 2) for state in state_list]
        for i, (state, row) in enumerate(zip(state_list, rows, strict=True)):
            if row.dim() != 2 or row.shape[1] != dim:
                raise ValueError(
                    f"state_list must hold (W, {dim}) or (1, W, {dim}); the one at {i} is {tuple(state.shape)}."
                )
        return stack_right(rows)

    def create_batch_states(self, new_states: Sequence[Documented]) -> Documented:
        """One batched state of single ones, whatever the lengths of their histories."""
        if not new_states:
            return self._documented(self.empty_memory(0))
        prefixes = [getattr(states, "prefixes", None) for states in new_states]
        if all(one is not None and len(one) == 1 for one in prefixes):
            return PrefixState(tuple(one for (one,) in prefixes), self._built_batch)
        singles = [self._completed(states) for states in new_states]
        for i, states in enumerate(singles):
            if states[0]["position"].numel() != 1:
                raise ValueError(
                    f"new_states must be of one hypothesis each; the one at {i} is of {states[0]['position'].numel()}. "
                    f"Take them out of a batched state with select_state."
                )
        ranks = {name: RANKS[name] for name in ("ema_state", "prev_pad", "prev_input")}
        batched = []
        for b in range(self.num_blocks):
            block = [states[b] for states in singles]
            state = {
                "prev_key": self.stack_qk_states([one["prev_key"] for one in block], self.mega_att_k_size),
                "prev_value": self.stack_qk_states([one["prev_value"] for one in block], self.mega_att_v_size),
                "position": torch.stack([one["position"].reshape(()) for one in block]),
            }
            for name in ranks.keys() & block[0].keys():
                state[name] = stack_right([_single(one[name], ranks[name]) for one in block])
            batched.append(state)
        return batched

    def label_scorer(self) -> MegaPool:
        """What the batched search (`espnet_mega_plugin.search`) scores label prefixes with, with the weights as they
        are now."""
        return MegaPool(self, self.prefixes.constants(self))

    # -- between the documented states and the network's memory

    def _complete(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state with all keys; what a hand-made one lacks follows from its keys' shape."""
        if self.truncation_length is not None and "prev_input" not in state:
            raise ValueError(
                f"state lacks 'prev_input' (the last truncation_length - 1 = {self.truncation_length - 1} inputs), "
                f"which a decoder with truncation_length needs; it holds {sorted(state)}."
            )
        missing = [name for name in ("ema_state", "prev_key", "prev_value") if name not in state]
        if missing:
            raise ValueError(f"state lacks {', '.join(missing)}; it holds {sorted(state)}. Start from init_state().")
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} of a state must be a tensor; got {type(tensor).__name__}.")
        if not state["prev_key"].dim():
            raise ValueError("prev_key must be (W, qk_size), or a batch of them; got shape ().")
        if "prev_pad" in state and "position" in state:
            return state
        rows = state["prev_key"].shape[:-1]
        return {
            "prev_pad": state["prev_key"].new_zeros(rows, dtype=torch.bool),
            "position": torch.full(rows[:-1], rows[-1], dtype=torch.long),
            **state,
        }

    def _completed(self, states: Documented) -> Documented:
        """All blocks' states with all keys."""
        if not isinstance(states, (list, tuple)) or not all(isinstance(state, dict) for state in states):
            raise TypeError(
                f"states must be a list with one dict a block; got {states!r:.80}. Start from init_state()."
            )
        if len(states) != self.num_blocks:
            raise ValueError(f"states must hold one dict for each of the {self.num_blocks} blocks; got {len(states)}.")
        complete = [self._complete(state) for state in states]
        widths = {
            "ema_state": (self.output_size, self.mega_ema_num_heads),
            "prev_key": (self.mega_att_k_size,),
            "prev_value": (self.mega_att_v_size,),
            "prev_pad": (),
            "position": (),
            **({} if self.truncation_length is None else {"prev_input": (self.output_size,)}),
        }
        check_shapes(complete, widths)
        W = complete[0]["prev_key"].shape[-2]
        if "position" not in states[0] and W <= 1:
            # ESPnet documents zeros of one row as the state before the first label. Without rows, too, labels may have
            # been averaged: after a whole chunk, or with a window of one label, the next one attends to none of them
            zero = [state[k].eq(0).all(-1).all(-1) for state in states for k in ("ema_state", "prev_key", "prev_value")]
            begun = 1 - torch.stack([z.reshape(-1).cpu() for z in zero]).all(0).long()
            position = begun * (W or max(1, self.chunk_size))
            complete = [{**state, "position": position.reshape(state["position"].shape)} for state in complete]
        position = complete[0]["position"]
        for p in position.reshape(-1).tolist():
            if p < 0 or self.attended_labels(p) > W:
                raise ValueError(
                    f"position counts the labels of a state, of which the next label can attend to "
                    f"{self.attended_labels(max(p, 0))}; got position {p} with {W} rows of prev_key."
                )
        return complete

    def _memory(self, states: Documented) -> MegaMemory:
        states = self._completed(states)
        blocks = [
            BlockMemory(
                _batched(state["ema_state"], 3),
                _batched(state["prev_key"], 3),
                _batched(state["prev_value"], 3),
                _batched(state["prev_input"], 3) if self.truncation_length is not None else None,
            )
            for state in states
        ]
        positions = states[0]["position"].reshape(-1).tolist()
        W = states[0]["prev_key"].shape[-2]
        begin = [W - self.attended_labels(position) for position in positions]
        if any(begin):  # in front of a history may stand any number, and a weight of 0 times NaN is NaN
            first = torch.tensor(begin).to(blocks[0].keys.device, non_blocking=True)
            before = (torch.arange(W, device=first.device) < first[:, None])[..., None]
            blocks = [
                BlockMemory(one.ema, one.keys.masked_fill(before, 0.0), one.values.masked_fill(before, 0.0), one.inputs)
                for one in blocks
            ]
        return MegaMemory(blocks, _batched(states[0]["prev_pad"], 2), positions)

    @staticmethod
    def _documented(memory: MegaMemory) -> Documented:
        position = torch.tensor(memory.positions, dtype=torch.long)
        states = []
        for block in memory.blocks:
            state = {"ema_state": block.ema, "prev_key": block.keys, "prev_value": block.values}
            if block.inputs is not None:
                state["prev_input"] = block.inputs
            # a state never holds a graph: a hypothesis would keep those of all its labels alive
            state = {name: tensor.detach() for name, tensor in state.items()}
            states.append({**state, "prev_pad": memory.padding, "position": position})
        return states

    # -- prefixes and the states that stand for them

    def _extended(self, states: list[Documented], labels: list[int]) -> tuple[Tensor, list[Prefix]]:
        return self.prefixes.extend(self, lambda tables: [self._prefix(one, tables) for one in states], labels)

    def _prefix(self, states: Documented, tables: Tables) -> Prefix:
        """What scoring goes on from; a state built by hand, or one from before a move to another device, is copied."""
        prefixes = getattr(states, "prefixes", None)
        if prefixes is not None and len(prefixes) == 1 and prefixes[0].tables is tables:
            return prefixes[0]
        memory = self._memory(states)
        if len(memory.positions) != 1:
            raise ValueError(
                f"states hold {len(memory.positions)} hypotheses; scoring takes one state a hypothesis. Take it out of "
                f"a batched state with select_state."
            )
        return self.prefixes.adopt(self, memory)

    def _built(self, prefixes: tuple[Prefix, ...]) -> Documented:
        """The documented dicts of one hypothesis' state."""
        (prefix,) = prefixes
        states = self._documented(self.prefixes.memory(prefix, self))
        return [{name: tensor[0] for name, tensor in state.items()} for state in states]

    def _built_batch(self, prefixes: tuple[Prefix, ...]) -> Documented:
        """The documented dicts of a batched state."""
        return self.create_batch_states([self._built((prefix,)) for prefix in prefixes])

    def _built_first(self, _: tuple[Prefix, ...]) -> Documented:
        """The state before the first label in the shapes ESPnet documents."""
        states = self._documented(self.empty_memory(1))
        for state in states:
            state["ema_state"] = state["ema_state"][0]
            for name in ("prev_key", "prev_value"):
                state[name] = state[name].new_zeros(1, 1, state[name].shape[-1])
            state["prev_pad"] = state["prev_pad"].new_zeros(1, 1)
            state["position"] = state["position"][0]
        return states

    def _last(self, label_sequence: Sequence[int]) -> int:
        if not len(label_sequence):
            raise ValueError("label_sequence is empty; it must begin with the start label (blank).")
        label = _integer("label_sequence", label_sequence[-1])
        if not 0 <= label < self.vocab_size:
            raise ValueError(f"labels must lie in 0 .. vocab_size - 1 = {self.vocab_size - 1}; got {label}.")
        return label

    def __getstate__(self) -> dict:
        """A copy or a pickle starts with nothing remembered."""
        return {**self.__dict__, "prefixes": self.prefixes.fresh(), "_score_cache": {}}

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.prefixes = self.prefixes.fresh()
        return replica


def _integer(name: str, value: Any) -> int:
    """A Python, NumPy or torch integer; 0.7 is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must hold integers; got {value!r} ({type(value).__name__}).") from None


def _single(tensor: Tensor, rank: int) -> Tensor:
    """One hypothesis' tensor: without the batch dimension of 1 that init_state and ESPnet's states carry."""
    return tensor.squeeze(0) if tensor.dim() == rank + 1 and tensor.shape[0] == 1 else tensor


def _batched(tensor: Tensor, rank: int) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == rank - 1 else tensor
