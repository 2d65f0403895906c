"""ESPnet's transducer model with a choice of losses: `model_conf: {transducer_loss: auto}`.

    fused     joint network and loss in one: the logits (B, T, U+1, V) are never built (`rnnt/fused.py`)
    standard  as ESPnet does it: the joint network's logits, and the loss that `import warprnnt_pytorch` gives
    pruned    a simple loss and R rows of logits a frame (`rnnt/pruned.py`), k2 is not needed; ESPnet's other keys for
              it are `use_k2_pruned_loss: true` and `k2_pruned_loss_args: {...}`
    k2        the same by ESPnet's own code and an installed k2
    auto      the default: pruned where `use_k2_pruned_loss: true`, else fused, else (where the joint network is not
              ESPnet's, or something listens to it) standard

fused and standard are the same number with the same gradients, of the alignments that `transducer_topology` says:

    regular      the default: any number of labels a frame
    constrained  one label a frame at most. An encoder that sees the whole utterance does not learn to let its labels
                 come in bursts, which every search's cap on labels a frame would cut; searches are as ever
    modified     a label takes its frame with it, without the blank after it: for searches that go on like this

`check_targets: true` has the values of labels and lengths checked on a GPU, too, where the host waits for that; without
it a label or length that cannot be is a NaN loss there, and an error on the CPU.

For the alignments the pruned losses have ESPnet's key, `k2_pruned_loss_args: {loss_type: …}`. Weights go from any
choice to any other: `am_proj` and `lm_proj`, which only pruned and k2 have, are left out or begin anew. The decoding
searches never meet any of this.

ESPnet's forward is not copied: for the fused loss the joint network answers the one call that forward makes with what
its logits are made of, and the method that computes the loss recognises that.

Where `report_cer` or `report_wer` is true, validation decodes: `validation_search: maes` (the default) with the batched
search, to the figures of ESPnet's mAES with beam 2; `greedy` with the best label alone; `espnet` by ESPnet's own code.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from espnet2.asr_transducer.espnet_transducer_model import ESPnetASRTransducerModel
from espnet2.asr_transducer.joint_network import JointNetwork
from torch import Tensor

from espnet_mega_plugin.rnnt.fused import fused_rnnt_loss
from espnet_mega_plugin.rnnt.loss import RNNTLoss, fastest
from espnet_mega_plugin.rnnt.pruned import (
    do_rnnt_pruning,
    get_rnnt_prune_ranges,
    rnnt_loss_pruned,
    rnnt_loss_smoothed,
)
from espnet_mega_plugin.rnnt.topologies import TOPOLOGIES

LOSSES = ("auto", "fused", "standard", "pruned", "k2")
SEARCHES = ("maes", "greedy", "espnet")
SIMPLE = ("am_proj", "lm_proj")  # the layers of the pruned loss's simple loss
# Modules of the joint network that the fused loss calls; it stands for the others.
CALLED = ("joint_network.lin_enc", "joint_network.lin_dec")
RANDOM = (torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_log = logging.getLogger("espnet_mega_plugin")


class Projected(NamedTuple):
    """What the joint network's logits are made of; goes to the loss in their place."""

    enc: Tensor  # (B, T, J)
    dec: Tensor  # (B, U+1, J)


class DeferringJointNetwork(JointNetwork):
    """ESPnet's joint network; while ``deferring``, its next call gives `Projected` instead of logits."""

    deferring = False

    def forward(self, enc_out: Tensor, dec_out: Tensor, no_projection: bool = False) -> Tensor | Projected:
        if not self.deferring:
            return super().forward(enc_out, dec_out, no_projection)
        self.deferring = False  # the search for CER and WER, later in the same forward, gets logits
        return Projected(self.lin_enc(enc_out).squeeze(2), self.lin_dec(dec_out).squeeze(1))


class MegaTransducerModel(ESPnetASRTransducerModel):
    """ESPnet's model with its arguments and four more.

    Args:
        transducer_loss: one of `LOSSES`, see above.
        validation_search: one of `SEARCHES`, see above.
        transducer_topology: one of `TOPOLOGIES`, see above.
        check_targets: whether the plugin's losses check labels and lengths wherever these are, see above.

    Raises:
        ValueError: ``transducer_loss`` is none of these, contradicts ``use_k2_pruned_loss``, or is "fused" with a joint
            network that it cannot stand for; ``validation_search`` or ``transducer_topology`` is none of those, or the
            latter is given to a pruned loss; ``use_k2_pruned_loss`` or ``check_targets`` is no bool, or the latter true
            for k2; ``fastemit_lambda`` is no number from 0 up; ``k2_pruned_loss_args`` holds something unknown or of a
            wrong value, or is given without a pruned loss; with one, ``warmup_steps`` is no integer from 0 up.
    """

    def __init__(
        self,
        *args,
        transducer_loss: str = "auto",
        validation_search: str = "maes",
        transducer_topology: str = "regular",
        check_targets: bool = False,
        **kwargs,
    ) -> None:
        if validation_search not in SEARCHES:
            raise ValueError(
                f"model_conf: validation_search must be one of {', '.join(map(repr, SEARCHES))}; "
                f"got {validation_search!r}."
            )
        given = inspect.signature(ESPnetASRTransducerModel).bind(*args, **kwargs).arguments
        choice = _resolved(transducer_loss, given.get("use_k2_pruned_loss", False))
        _check_topology(transducer_topology, choice)
        _check_targets(check_targets, choice)
        fastemit_lambda = given.get("fastemit_lambda", 0.0)
        if not _from_0_up(fastemit_lambda):
            raise ValueError(f"model_conf: fastemit_lambda must be a finite number from 0 up; got {fastemit_lambda!r}.")
        _check_pruned(given.get("k2_pruned_loss_args", {}), given.get("warmup_steps", 0), choice)
        super().__init__(**{**given, "use_k2_pruned_loss": choice in ("pruned", "k2")})
        self.transducer_loss, self.validation_search = transducer_loss, validation_search
        self.transducer_topology, self._choice = transducer_topology, choice
        self.check_targets = check_targets
        self._said = {}  # on each device which loss; DataParallel's replicas, made anew in each step, share it
        if choice in ("auto", "fused") and type(self.joint_network) is JointNetwork:
            self.joint_network.__class__ = DeferringJointNetwork  # the same parameters, hooks and names
        reason = self._needs_logits()
        if choice == "fused" and reason:
            raise ValueError(f"model_conf: transducer_loss: fused cannot be had: {reason}. Write 'standard' or 'auto'.")

    def forward(self, *args, **kwargs):
        """As ESPnet's: the loss, statistics, and the batch size."""
        if not self.training and self.error_calculator is None and (self.report_cer or self.report_wer):
            self.error_calculator = self._error_calculator()
        if self._choice not in ("auto", "fused") or self._needs_logits():
            return super().forward(*args, **kwargs)
        self.joint_network.deferring = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.joint_network.deferring = False

    def _error_calculator(self) -> object | None:
        """What decodes in validation; None: ESPnet's forward makes its own."""
        if self.validation_search == "espnet":
            return None
        if self.validation_search == "maes" and not isinstance(self.joint_network, JointNetwork):
            return None  # the same figures; the batched search takes ESPnet's joint network apart
        from espnet_mega_plugin.espnet_search import BatchedErrorCalculator

        if "modified" in (self.transducer_topology, self.use_k2_pruned_loss and self.k2_loss_type):
            self.validation_nstep = 1  # as in ESPnet: the loss knows one label a frame
        return BatchedErrorCalculator(
            self.decoder,
            self.joint_network,
            self.token_list,
            self.sym_space,
            self.sym_blank,
            search_type=self.validation_search,
            nstep=self.validation_nstep,
            report_cer=self.report_cer,
            report_wer=self.report_wer,
        )

    def _calc_transducer_loss(
        self, encoder_out: Tensor, joint_out: Tensor | Projected, target: Tensor, t_len: Tensor, u_len: Tensor
    ) -> Tensor:
        """ESPnet's method: -log P of the batch's mean utterance. (1,)

        Args:
            encoder_out: (B, T, D_enc)
            joint_out: logits (B, T, U+1, V), or what the joint network gave in their place.
            target: (B, U) int32
            t_len, u_len: frames and labels of each utterance. (B,)
        """
        if isinstance(joint_out, Projected):
            why = f"transducer_loss: {self.transducer_loss}; the logits are not built"
            self._say("fused", encoder_out.device, self._by_method(why, encoder_out.device))
            joint = self.joint_network
            output = joint.lin_out.weight, joint.lin_out.bias
            options = {"fastemit_lambda": self.fastemit_lambda, "topology": self.transducer_topology}
            options["check"] = self._check()
            return fused_rnnt_loss(*joint_out, *output, target, t_len, u_len, joint.joint_activation, **options)
        why = f"transducer_loss: {self.transducer_loss}"
        if self._choice != "standard":
            why = f"{why}, but {self._needs_logits()}"
        topology = self.transducer_topology
        if self.criterion_transducer is None and (_standard_loss_is_ours() or topology != "regular"):
            self.criterion_transducer = RNNTLoss(
                reduction="mean", fastemit_lambda=self.fastemit_lambda, check=self._check(), topology=topology
            )
        if isinstance(self.criterion_transducer, RNNTLoss):
            self._say("standard", encoder_out.device, self._by_method(why, encoder_out.device))
            with torch.autocast(encoder_out.device.type, enabled=False):  # any float type is read: no float32 copy
                return self.criterion_transducer(joint_out, target, t_len, u_len)
        unchecked = ", which check_targets does not reach" if self.check_targets else ""
        self._say("standard", encoder_out.device, f"{why}; the installed warprnnt_pytorch{unchecked}")
        return super()._calc_transducer_loss(encoder_out, joint_out, target, t_len, u_len)

    def _needs_logits(self) -> str | None:
        """Why the fused loss cannot take the joint network's place; None: it can."""
        joint = self.joint_network
        if type(joint) is not DeferringJointNetwork:
            return f"the joint network is no JointNetwork of ESPnet's but {type(joint).__qualname__}"
        if type(joint.lin_out) is not torch.nn.Linear:  # a LoRA layer, a quantised or parametrised one
            return f"joint_network.lin_out is no Linear but {type(joint.lin_out).__qualname__}"
        for name, module in joint.named_modules(prefix="joint_network"):
            if name.startswith(CALLED):
                continue
            if any(getattr(module, hooks) for hooks in HOOKS):
                return f"hooks listen to {name}"
            if "forward" in vars(module):
                return f"{name}.forward was replaced"
            if isinstance(module, RANDOM) or "dropout" in type(module).__name__.lower():
                return f"{name} is a {type(module).__qualname__}, which would draw anew in backward"
        if torch.nn.modules.module._has_any_global_hook():
            return "hooks listen to all modules"
        return None

    def _check(self) -> bool | None:
        return True if self.check_targets else None

    def _by_method(self, why: str, device: torch.device) -> str:
        topology = self.transducer_topology
        over = "" if topology == "regular" else f"; topology {topology}"
        return f"{why}; method {fastest(device, topology)}{over}"

    def _say(self, loss: str, device: torch.device, why: str) -> None:
        """An INFO line, once for each choice that is made."""
        if self._said.get(device) != loss:
            self._said[device] = loss
            _log.info("The transducer loss is '%s' on %s (%s).", loss, device, why)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        simple = tuple(f"{prefix}{name}." for name in SIMPLE)
        here = {f"{prefix}{name}": x.detach() for name, x in self.named_parameters() if name.startswith(SIMPLE)}
        for name in [name for name in state_dict if name.startswith(simple) and name not in here]:
            del state_dict[name]  # of torch's copy of the caller's
        missing = {name: x for name, x in here.items() if name not in state_dict}
        if missing and any(name.startswith(f"{prefix}joint_network.") for name in state_dict):
            _log.warning("The checkpoint was made with another transducer_loss: %s begin anew.", ", ".join(missing))
            state_dict.update(missing)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _calc_k2_transducer_pruned_loss(self, encoder_out: Tensor, *args, **kwargs) -> Tensor:
        """ESPnet's method, by the plugin's functions unless k2 was asked for."""
        way = "use_k2_pruned_loss: true" if self.transducer_loss == "auto" else f"transducer_loss: {self._choice}"
        self._say(self._choice, encoder_out.device, way)
        if self._choice == "pruned":
            return self._pruned_loss(encoder_out, *args, **kwargs)
        try:
            importlib.import_module("k2")
        except Exception as error:  # a k2 built for another torch raises OSError
            raise ImportError(
                f"model_conf: transducer_loss: k2 needs k2, which cannot be imported ({error!r}). Install one for "
                f"torch {torch.__version__}, or write transducer_loss: pruned, the same loss without k2."
            ) from error
        return super()._calc_k2_transducer_pruned_loss(encoder_out, *args, **kwargs)

    def _pruned_loss(
        self,
        encoder_out: Tensor,
        decoder_out: Tensor,
        labels: Tensor,
        encoder_out_len: Tensor,
        decoder_out_len: Tensor,
        prune_range: int = 5,
        simple_loss_scaling: float = 0.5,
        lm_scale: float = 0.0,
        am_scale: float = 0.0,
        loss_type: str = "regular",
        reduction: str = "mean",
        padding_idx: int = 0,
    ) -> Tensor:
        """Simple loss over all rows, then the joint network's loss over the `prune_range` rows it points to.

        B utterances, T frames, U labels. Over the first `warmup_steps` (the scheduler's) steps the weight of the
        joint network's loss rises from 0.1 to 1 and that of the simple loss falls from 1 to `simple_loss_scaling`,
        as in ESPnet.

        Args:
            encoder_out: (B, T, D_enc)
            decoder_out: (B, U+1, D_dec)
            labels: padded with the model's ignore_id. (B, U)
            encoder_out_len, decoder_out_len: frames and labels of each utterance. (B,)
            prune_range: rows kept in each frame.
            simple_loss_scaling: final weight of the simple loss.
            lm_scale, am_scale: shares of the simpler models that smooth the simple loss.
            loss_type: regular, modified (at most one label a frame) or constrained.
            reduction: mean or sum.
            padding_idx: class of the blank, 0 in ESPnet.
        """
        if self.fastemit_lambda > 0.0 and "FastEmit" not in self._said:
            self._said["FastEmit"] = "not used"
            logging.info("The pruned loss has no FastEmit: fastemit_lambda is not used.")
        self.steps_num += 1
        warm = min(1.0, self.steps_num / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        zeros = torch.zeros_like(decoder_out_len)
        # On the CPU the number of rows, a size, is told without waiting for the simple loss.
        boundary = torch.stack([zeros, zeros, decoder_out_len, encoder_out_len], 1).long().cpu()
        symbols = labels.masked_fill(labels == self.ignore_id, padding_idx)

        simple, posteriors = rnnt_loss_smoothed(
            self.lm_proj(decoder_out).float(),
            self.am_proj(encoder_out).float(),
            symbols,
            padding_idx,
            lm_only_scale=lm_scale,
            am_only_scale=am_scale,
            boundary=boundary,
            rnnt_type=loss_type,
            reduction=reduction,
            return_grad=True,
            check=self._check(),  # of what both losses are given
        )
        ranges = get_rnnt_prune_ranges(*posteriors, boundary, prune_range)
        joint = self.joint_network(
            *do_rnnt_pruning(self.joint_network.lin_enc(encoder_out), self.joint_network.lin_dec(decoder_out), ranges),
            no_projection=True,
        )
        pruned = rnnt_loss_pruned(
            joint.float(), symbols, ranges, padding_idx, boundary, rnnt_type=loss_type, reduction=reduction
        )
        return (1 - warm * (1 - simple_loss_scaling)) * simple + (0.1 + 0.9 * warm) * pruned


def _resolved(transducer_loss: str, use_k2_pruned_loss: bool) -> str:
    """The choice that both keys make together; "auto" where they leave it to the model."""
    if transducer_loss not in LOSSES:
        raise ValueError(
            f"model_conf: transducer_loss must be one of {', '.join(map(repr, LOSSES))}; got {transducer_loss!r}."
        )
    if not isinstance(use_k2_pruned_loss, bool):  # "false" would be true
        raise ValueError(f"model_conf: use_k2_pruned_loss must be true or false; got {use_k2_pruned_loss!r}.")
    if not use_k2_pruned_loss:
        return transducer_loss
    if transducer_loss in ("fused", "standard"):
        raise ValueError(
            f"model_conf: transducer_loss: {transducer_loss} and use_k2_pruned_loss: true contradict one another: the "
            "latter is transducer_loss: pruned. Leave one of them out."
        )
    return "pruned" if transducer_loss == "auto" else transducer_loss


def _from_0_up(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _check_targets(value: object, choice: str) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"model_conf: check_targets must be true or false; got {value!r}.")
    if value and choice == "k2":
        raise ValueError(
            "model_conf: check_targets: true is for the plugin's own losses, not for transducer_loss: k2. Leave it "
            "out, or write transducer_loss: pruned, the same loss without k2."
        )


def _check_pruned(given: object, warmup_steps: object, choice: str) -> None:
    """`k2_pruned_loss_args`, whose keys and values ESPnet would look at in the first step of training only.

    ESPnet's task takes `warmup_steps` from the scheduler's configuration, whatever the loss.
    """
    if choice not in ("pruned", "k2"):
        if given:
            raise ValueError(
                f"model_conf: k2_pruned_loss_args is for a pruned loss and transducer_loss is {choice}; got {given!r}. "
                "Leave it out, or write transducer_loss: pruned."
            )
        return
    if type(warmup_steps) is not int or warmup_steps < 0:
        raise ValueError(
            "model_conf: a pruned loss needs warmup_steps, the scheduler's, to be an integer from 0 up; "
            f"got {warmup_steps!r}."
        )
    where, own = "model_conf: k2_pruned_loss_args", inspect.signature(MegaTransducerModel._pruned_loss).parameters
    defaults = {name: p.default for name, p in own.items() if p.default is not p.empty}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping of {', '.join(defaults)}; got {given!r}.")
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ValueError(f"{where} has no {unknown[0]!r}; its keys are {', '.join(defaults)}.")
    choices = {"loss_type": TOPOLOGIES, "reduction": ("mean", "sum")}  # costs of single utterances train nothing
    for name, value in given.items():
        if name in choices:
            fits, wanted = value in choices[name], f"one of {', '.join(map(repr, choices[name]))}"
        elif name == "padding_idx":
            fits, wanted = type(value) is int and value == 0, "0, the class of ESPnet's blank"
        elif name == "prune_range":
            fits, wanted = type(value) is int and value >= 1, "an integer of 1 or more"
        else:
            fits, wanted = _from_0_up(value), "a finite number from 0 up"
        if not fits:
            raise ValueError(f"{where}: {name} must be {wanted}; got {value!r}.")
    scales = {name: given.get(name, defaults[name]) for name in ("lm_scale", "am_scale")}
    if sum(scales.values()) > 1:
        raise ValueError(f"{where}: lm_scale and am_scale must be 1 at most together; got {scales}.")


def _check_topology(topology: str, choice: str) -> None:
    if topology not in TOPOLOGIES:
        raise ValueError(
            f"model_conf: transducer_topology must be one of {', '.join(map(repr, TOPOLOGIES))}; got {topology!r}."
        )
    if topology != "regular" and choice in ("pruned", "k2"):
        raise ValueError(
            f"model_conf: transducer_topology: {topology} is for the losses over all alignments, fused and standard; "
            f"for a pruned one write k2_pruned_loss_args: {{loss_type: {topology}}}."
        )


def _standard_loss_is_ours() -> bool:
    """Whether `import warprnnt_pytorch` gives the plugin's loss; where it gives none, ESPnet says so."""
    try:
        return importlib.import_module("warprnnt_pytorch").RNNTLoss is RNNTLoss
    except ImportError:
        return False


def _signature() -> inspect.Signature:
    """ESPnet's arguments and ours: ESPnet's parser reads names and defaults of `model_conf` from it."""
    theirs = inspect.signature(ESPnetASRTransducerModel.__init__)
    ours = inspect.signature(MegaTransducerModel.__init__).parameters
    own = ("transducer_loss", "validation_search", "transducer_topology", "check_targets")
    return theirs.replace(parameters=[*theirs.parameters.values(), *(ours[name] for name in own)])


MegaTransducerModel.__init__.__signature__ = _signature()
