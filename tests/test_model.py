"""The plugin's model class through ESPnet's own task: every choice of the loss, inside all that ESPnet makes of it."""

import argparse
import copy
import logging
import pickle
import sys
import types

import pytest
import torch
import yaml
from espnet2.asr_transducer.espnet_transducer_model import ESPnetASRTransducerModel
from espnet2.asr_transducer.joint_network import JointNetwork
from espnet2.tasks.asr_transducer import ASRTransducerTask
from espnet2.utils.get_default_kwargs import get_default_kwargs
from test_ddp import CONFIG, write_data
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import in_two_processes

from espnet_mega_plugin import RNNTLoss
from espnet_mega_plugin import model as model_module
from espnet_mega_plugin.model import LOSSES, DeferringJointNetwork, MegaTransducerModel
from espnet_mega_plugin.rnnt import arguments as door
from espnet_mega_plugin.rnnt import pruned, rnnt_loss

CONFIGURATION = {
    "token_list": ["<blank>", "a", "b", "c", "d", "<sos/eos>"],
    "input_size": 12,
    "frontend": None,
    "specaug": None,
    "normalize": None,
    "encoder_conf": {
        "input_conf": {"vgg_like": False, "conv_size": 4, "subsampling_factor": 2},
        "body_conf": [{"block_type": "conv1d", "output_size": 8, "kernel_size": 1}],
    },
    "decoder": "mega",
    "decoder_conf": {"block_size": 8, "linear_size": 8, "qk_size": 4, "v_size": 8, "num_heads": 2, "num_blocks": 1},
    "joint_network_conf": {"joint_space_size": 8},
    "scheduler_conf": {"warmup_steps": 4},
    "init": None,
}
AUXILIARY = {"transducer_weight": 0.7, "auxiliary_ctc_weight": 0.3, "auxiliary_lm_loss_weight": 0.2}
ACTIVATIONS = {
    "tanh": {},
    "relu": {},
    "selu": {},
    "identity": {},
    "mish": {},
    "swish": {"swish_beta": 1.5},
    "smish": {"smish_alpha": 1.2, "smish_beta": 0.7},
    "leaky_relu": {"leakyrelu_neg_slope": 0.1},
    "hardtanh": {"hardtanh_min_val": -0.5, "hardtanh_max_val": 0.7},
    "ftswish": {"ftswish_threshold": -0.3, "ftswish_mean_shift": 0.1},
}


def model(joint: dict | None = None, **conf) -> ESPnetASRTransducerModel:
    configuration = {**CONFIGURATION, "joint_network_conf": {"joint_space_size": 8, **(joint or {})}}
    return ASRTransducerTask.build_model(argparse.Namespace(**configuration, model_conf=conf)).train()


def pruned_model(**arguments) -> ESPnetASRTransducerModel:
    return model(use_k2_pruned_loss=True, k2_pruned_loss_args=arguments)


def twins(*choices, dtype=torch.float64, joint=None, **conf):
    """Models with the same weights and one choice of the loss each."""
    found = [model(joint, transducer_loss=choice, **conf).to(dtype) for choice in choices]
    for other in found[1:]:
        other.load_state_dict(found[0].state_dict())
    return found


def batch(dtype=torch.float32):
    # short ones: ESPnet 202511's encoder cuts speech's lengths to the 18 frames it leaves, and takes no half of them
    speech, lengths = torch.randn(3, 41, 12, dtype=dtype), torch.tensor([41, 9, 14])
    labels = torch.tensor([[1, 2, 2, 4], [3, -1, -1, -1], [4, 1, -1, -1]])
    return speech, lengths, labels, torch.tensor([4, 1, 2])


def gradients(network) -> dict:
    # ESPnet's conv1d block has `out_pos` for attention blocks behind it
    return {name: parameter.grad for name, parameter in network.named_parameters() if "out_pos" not in name}


def loss_and_gradients(network, data):
    network.zero_grad()
    loss, stats, weight = network(*data)
    loss.backward()
    return loss.detach(), stats, weight, gradients(network)


# ---- fused is standard ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_is_standard(activation, seed):
    torch.manual_seed(seed)
    joint = {"joint_activation_type": activation, **ACTIVATIONS[activation]}
    networks = twins("fused", "standard", joint=joint, fastemit_lambda=0.02, **AUXILIARY)
    found, wanted = (loss_and_gradients(network, batch) for batch in [batch(torch.float64)] for network in networks)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for name in ("joint_network.lin_out.weight", "joint_network.lin_out.bias", "joint_network.lin_enc.weight", "joint_network.lin_dec.weight"):  # fmt: skip
        assert found[3][name].abs().max() > 1e-4, name


@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_topology_of_fused_and_standard(topology, seed):
    """One number and one gradient, another one than the regular topology's, and that of the pruned loss's lattice."""
    torch.manual_seed(seed)
    data = batch(torch.float64)
    networks = twins("fused", "standard", "auto", transducer_topology=topology)
    arguments = dict(prune_range=9, simple_loss_scaling=0.0, loss_type=topology)
    regular, whole = twins("fused")[0], pruned_model(**arguments).double()  # whole: pruned, yet with all rows
    for other in (regular, whole):
        other.load_state_dict(networks[0].state_dict())
    whole.steps_num = 100  # warm-up is over: the simple loss has weight 0
    found, *others = (loss_and_gradients(network, data) for network in networks)
    for other in others:
        torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole(*data)[0].double(), found[0], rtol=1e-5, atol=1e-5)  # its logits are float32
    assert found[0].isfinite() and abs(found[0] - loss_and_gradients(regular, data)[0]) > 1e-9  # rounding: 1e-13


def test_a_loss_that_is_not_ours_knows_no_topology(monkeypatch, seed):
    """The plugin's takes its place."""
    torch.manual_seed(seed)
    monkeypatch.setattr(model_module, "_standard_loss_is_ours", lambda: False)
    networks = twins("fused", "standard", transducer_topology="constrained")
    data = batch(torch.float64)
    found, wanted = (loss_and_gradients(network, data) for network in networks)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_topologies_that_are_refused():
    with pytest.raises(ValueError, match="transducer_topology must be one of 'regular', .*; got 'free'"):
        model(transducer_topology="free")
    for conf in ({"transducer_loss": "pruned"}, {"use_k2_pruned_loss": True}):
        with pytest.raises(ValueError, match=r"k2_pruned_loss_args: \{loss_type: modified\}"):
            model(transducer_topology="modified", **conf)


def test_the_batch_is_ragged_in_frames():
    data = batch()
    frames = model().encode(*data[:2])[1].tolist()
    assert frames[0] == 18 and len(set(frames)) == 3 and all(T >= U for T, U in zip(frames, data[3], strict=True))


def test_auto_is_fused_in_float32_too(seed):
    torch.manual_seed(seed)
    networks, data = twins("auto", "standard", dtype=torch.float32, **AUXILIARY), batch()
    found, wanted = (loss_and_gradients(network, data) for network in networks)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Shapes(TorchDispatchMode):
    """Shapes of all that is computed, but for expanded tensors."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.seen |= {tuple(x.shape) for x in tensors if x.untyped_storage().nbytes() >= x.nbytes}
        return found


def test_the_logits_are_not_built(seed):
    torch.manual_seed(seed)
    data = batch()
    for choice, built in (("standard", True), ("fused", False), ("auto", False)):
        network = model(transducer_loss=choice)
        with Shapes() as shapes:
            network(*data)[0].backward()
        assert any(len(shape) == 4 and shape[2:] == (5, 6) for shape in shapes.seen) is built


def test_validation_with_error_rates(seed):
    torch.manual_seed(seed)
    networks = twins("fused", "standard", dtype=torch.float32, report_cer=True, report_wer=True)
    for _ in range(2):  # the search is built the first time
        data, found = batch(), []
        for network in networks:
            with torch.no_grad():
                loss, stats, _ = network.eval()(*data)
            found.append((loss, stats))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        assert found[0][1]["cer_transducer"] is not None and found[0][1]["wer_transducer"] is not None
    assert torch.is_tensor(networks[0].joint_network(torch.randn(2, 8), torch.randn(2, 8)))


def test_gradients_accumulate(seed):
    torch.manual_seed(seed)
    networks, found = twins("fused", "standard"), []
    parts = batch(torch.float64), batch(torch.float64)
    for network in networks:
        for data in parts:
            (network(*data)[0] / 2).backward()
        found.append(gradients(network))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_autocast(scale, seed):
    """As near to float32 as the materialised logits are, the loss scaled as AMP does it or not."""
    torch.manual_seed(seed)
    networks, data = twins("fused", "standard", dtype=torch.float32), batch()
    wanted, errors = loss_and_gradients(networks[1], data)[3], []
    for network in networks:
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _, _ = network(*data)
        (loss * scale).backward()
        assert loss.dtype == torch.float32
        found = {name: x / scale for name, x in gradients(network).items()}
        errors.append({name: float((x - wanted[name]).norm()) for name, x in found.items()})
    largest = max(float(x.norm()) for x in wanted.values())
    for name, error in errors[0].items():
        assert error < 2 * errors[1][name] + 0.01 * largest, (name, errors)


# ---- when something needs the logits --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["joint_network", "joint_network.lin_out", "joint_network.joint_activation"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_get_the_logits(place, kind, seed, caplog):
    torch.manual_seed(seed)
    caplog.set_level(logging.INFO)
    network, data = model(), batch()
    seen = []
    with torch.no_grad():
        wanted, _, _ = network(*data)
        handle = getattr(network.get_submodule(place), kind)(lambda module, *given: seen.append(given))
    loss, _, _ = network(*data)
    loss.backward()
    assert len(seen) == 1 and all(torch.is_tensor(x) for given in seen[0] for x in given if type(given) is tuple)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=1e-5)
    handle.remove()
    network(*data)
    said = [record.getMessage() for record in caplog.records if "transducer loss is" in record.getMessage()]
    assert ["'fused'" in line for line in said] == [True, False, True]
    assert f"hooks listen to {place}; method wavefront" in said[1]


def test_hooks_on_all_modules_get_the_logits():
    network, seen = model(), []
    remember = lambda module, given, out: seen.append(out) if module is network.joint_network else None  # noqa: E731
    handle = torch.nn.modules.module.register_module_forward_hook(remember)
    try:
        network(*batch())
    finally:
        handle.remove()
    assert seen[0].dim() == 4 and not network.joint_network.deferring


class LowRank(torch.nn.Linear):
    """As LoRA has it: the weight alone is not all of the layer."""

    def __init__(self, of: torch.nn.Linear):
        super().__init__(of.in_features, of.out_features)
        self.down, self.up = torch.nn.Linear(of.in_features, 2, bias=False), torch.nn.Linear(2, of.out_features)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    ("changed", "kind"),
    [(LowRank, "LowRank"), (torch.nn.utils.parametrizations.weight_norm, "ParametrizedLinear")],
    ids=["low rank", "weight_norm"],
)
def test_a_lin_out_of_another_kind_gets_the_logits(changed, kind, seed, caplog):
    torch.manual_seed(seed)
    caplog.set_level(logging.INFO)
    networks, data, found = twins("auto", "fused", "standard"), batch(torch.float64), []
    for network in networks:
        torch.manual_seed(seed)
        network.joint_network.lin_out = changed(network.joint_network.lin_out).double()
        found.append(loss_and_gradients(network, data))
        assert all(x is not None and x.abs().max() > 0 for name, x in found[-1][3].items() if "lin_out" in name)
    *others, wanted = found
    for other in others:
        torch.testing.assert_close(other, wanted, rtol=1e-9, atol=1e-9)
    assert (
        f"'standard' on cpu (transducer_loss: fused, but joint_network.lin_out is no Linear but {kind};" in caplog.text
    )


@pytest.mark.parametrize("place", ["joint_network", "joint_network.lin_out", "joint_network.joint_activation"])
def test_a_replaced_forward_gets_the_logits(place, seed, caplog):
    torch.manual_seed(seed)
    caplog.set_level(logging.INFO)
    networks, data, found = twins("auto", "standard"), batch(torch.float64), []
    for network in networks:
        plain = network(*data)[0].detach()
        module = network.get_submodule(place)
        module.forward = lambda *given, forward=module.forward, **options: forward(*given, **options) * 0.5
        found.append(loss_and_gradients(network, data))
        assert (found[-1][0] - plain).abs() > 1e-6
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert f"but {place}.forward was replaced; method" in caplog.text


def test_a_projection_that_the_fused_loss_calls_may_be_anything(seed, caplog):
    torch.manual_seed(seed)
    caplog.set_level(logging.INFO)
    networks, data, found = twins("fused", "standard"), batch(torch.float64), []
    for network in networks:
        torch.manual_seed(seed)
        joint = network.joint_network
        joint.lin_enc = LowRank(joint.lin_enc).double()
        joint.lin_enc.down.register_forward_hook(lambda module, given, out: out * 2)
        joint.lin_dec.forward = lambda x, forward=joint.lin_dec.forward: forward(x) * 0.5
        found.append(loss_and_gradients(network, data))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert ["'fused'" in line for line in choices_of(caplog)] == [True, False]


class OwnDropout(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.3, self.training)


@pytest.mark.parametrize("random", [torch.nn.Dropout(0.3), torch.nn.AlphaDropout(), torch.nn.RReLU(), OwnDropout()])
def test_an_activation_that_draws_gets_the_logits(random, seed, caplog):
    """The fused loss would compute the hidden rows again in backward, with other random numbers."""
    torch.manual_seed(seed)
    caplog.set_level(logging.INFO)
    networks, data, found = twins("auto", "standard"), batch(torch.float64), []
    for network in networks:
        network.joint_network.joint_activation = torch.nn.Sequential(torch.nn.Tanh(), random)
        torch.manual_seed(seed)
        found.append(loss_and_gradients(network, data))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    name = type(random).__qualname__
    assert f"but joint_network.joint_activation.1 is a {name}, which would draw anew in backward" in caplog.text
    arguments = {name: getattr(model(), name) for name in ("encoder", "decoder", "frontend", "specaug", "normalize")}
    arguments |= {"vocab_size": 6, "token_list": CONFIGURATION["token_list"], "joint_network": JointNetwork(6, 8, 8)}
    arguments["joint_network"].joint_activation = torch.nn.Sequential(torch.nn.Tanh(), random)
    with pytest.raises(ValueError, match="fused cannot be had: joint_network.joint_activation.1 is a .*Write 'stand"):
        MegaTransducerModel(**arguments, transducer_loss="fused")


def test_a_joint_network_of_ones_own(seed, caplog):
    class Own(JointNetwork):
        pass

    caplog.set_level(logging.INFO)
    arguments = {name: getattr(model(), name) for name in ("encoder", "decoder", "frontend", "specaug", "normalize")}
    arguments |= {"vocab_size": 6, "token_list": CONFIGURATION["token_list"], "joint_network": Own(6, 8, 8)}
    loss, _, _ = MegaTransducerModel(**arguments)(*batch())
    assert loss.isfinite() and "'standard' on cpu (transducer_loss: auto, but the joint network is no" in caplog.text
    with pytest.raises(ValueError, match=r"transducer_loss: fused cannot be had: the joint network is no .*Own"):
        MegaTransducerModel(**arguments, transducer_loss="fused")


def test_a_failing_forward_leaves_the_joint_network_as_it_was():
    network = model(transducer_loss="fused")
    with pytest.raises(AssertionError):
        network(*batch()[:3], torch.tensor([4, 1]))
    assert torch.is_tensor(network.joint_network(torch.randn(2, 8), torch.randn(2, 8)))


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_the_task_builds_the_plugins_model():
    built = model()
    assert type(built) is MegaTransducerModel and isinstance(built, ESPnetASRTransducerModel)
    assert type(built.joint_network) is DeferringJointNetwork and isinstance(built.joint_network, JointNetwork)


def test_the_parser_knows_the_key_beside_espnets():
    shown = ASRTransducerTask.get_parser().get_default("model_conf")
    ours = {"transducer_loss": "auto", "validation_search": "maes", "transducer_topology": "regular"}
    assert shown == {**get_default_kwargs(ESPnetASRTransducerModel), **ours, "check_targets": False}


def test_espnets_class_refuses_the_key():
    """As documented: with ESPNET_MEGA_PLUGIN=0 the line has to go."""
    with pytest.raises(TypeError, match="transducer_loss"):
        ESPnetASRTransducerModel(**dict.fromkeys(get_default_kwargs(ESPnetASRTransducerModel)), transducer_loss="auto")


@pytest.mark.parametrize("choice", ["Fused", "k2_pruned", "", None, 1, ["fused"]])
def test_unknown_choices_are_refused(choice):
    with pytest.raises(
        ValueError, match=r"model_conf: transducer_loss must be one of 'auto', 'fused', 'standard', .*got"
    ):
        model(transducer_loss=choice)


@pytest.mark.parametrize("choice", ["fused", "standard"])
def test_contradictions_are_refused(choice):
    with pytest.raises(ValueError, match=f"transducer_loss: {choice} and use_k2_pruned_loss: true contradict"):
        model(transducer_loss=choice, use_k2_pruned_loss=True)


def choices_of(caplog) -> list[str]:
    return [text for text in (record.getMessage() for record in caplog.records) if text.startswith("The transducer")]


def test_the_choice_is_logged_once(caplog):
    caplog.set_level(logging.INFO)
    expected = {
        "auto": "'fused' on cpu (transducer_loss: auto; the logits are not built; method wavefront)",
        "fused": "'fused' on cpu (transducer_loss: fused; the logits are not built; method wavefront)",
        "standard": "'standard' on cpu (transducer_loss: standard; method wavefront)",
        "pruned": "'pruned' on cpu (transducer_loss: pruned)",
    }
    for choice, line in expected.items():
        caplog.clear()
        network = model(transducer_loss=choice)
        for _ in range(2):
            network(*batch())
        assert choices_of(caplog) == [f"The transducer loss is {line}."]
    caplog.clear()
    model(transducer_topology="modified")(*batch()[:2], torch.tensor([[1], [3], [4]]), torch.tensor([1, 1, 1]))
    (said,) = choices_of(caplog)
    assert said.endswith("method wavefront; topology modified).")


def test_the_choice_is_logged_once_where_replicas_live_for_a_step(caplog):
    """As DataParallel makes them, of a model that was copied and pickled."""
    caplog.set_level(logging.INFO)
    for choice in ("fused", "pruned"):
        network = model(transducer_loss=choice, fastemit_lambda=0.01)
        copies = [network, copy.deepcopy(network)]
        if choice == "pruned":  # get_activation's lambdas are no matter of ours
            copies.append(pickle.loads(pickle.dumps(network)))
        for each in copies:
            caplog.clear()
            for _ in range(2):
                for _ in range(2):
                    each._replicate_for_data_parallel()(*batch())
            assert len(choices_of(caplog)) == 1
            assert caplog.text.count("has no FastEmit") == (choice == "pruned")


@pytest.mark.parametrize("wrong", [1, 0, "yes", None])
def test_check_targets_is_a_bool(wrong):
    with pytest.raises(ValueError, match=f"model_conf: check_targets must be true or false; got {wrong!r}"):
        model(check_targets=wrong)


def test_k2_checks_no_targets():
    with pytest.raises(ValueError, match="check_targets: true is for .* not for transducer_loss: k2.*write .*pruned"):
        model(transducer_loss="k2", check_targets=True)


@pytest.mark.parametrize("choice", ["auto", "fused", "standard", "pruned"])
def test_check_targets_names_what_a_gpu_leaves_unseen(choice, monkeypatch, seed):
    """CPU tensors treated as those of a device that reading from would synchronise."""
    torch.manual_seed(seed)
    monkeypatch.setattr(door, "_values_are_free", lambda *tensors: False)
    data = batch()
    data[2][0, 1] = 0  # the blank, as a label
    assert model(transducer_loss=choice)(*data)[0].isnan()
    network = model(transducer_loss=choice, check_targets=True)
    assert network(*batch())[0].isfinite()
    with pytest.raises(ValueError, match=r"(labels|symbols)\[0, 1\] = 0 is the (blank|termination_symbol); "):
        network(*data)


def test_standard_is_what_warprnnt_pytorch_gives(monkeypatch, seed, caplog):
    """A real installation is used as ESPnet uses it, in float32."""
    torch.manual_seed(seed)

    class Real(RNNTLoss):
        """Not the plugin's class itself."""

        def forward(self, acts, *others):
            seen.append(acts.dtype)
            return super().forward(acts, *others)

    seen, network, data = [], model(transducer_loss="standard"), batch()
    wanted, _, _ = network(*data)
    module = types.ModuleType("warprnnt_pytorch")
    module.RNNTLoss = type("RNNTLoss", (torch.nn.Module,), {
        "__init__": lambda self, **options: (torch.nn.Module.__init__(self), setattr(self, "loss", Real(**options)))[0],
        "forward": lambda self, *given: self.loss(*given),
    })  # fmt: skip
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", module)
    network.criterion_transducer = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(*data)
    loss, _, _ = network(*data)
    assert seen == [torch.float32] * 2
    torch.testing.assert_close(loss, wanted)
    caplog.set_level(logging.INFO)
    model(transducer_loss="standard", check_targets=True)(*data)
    assert "the installed warprnnt_pytorch, which check_targets does not reach)" in caplog.text


def test_checkpoints_go_from_every_choice_to_every_other(caplog):
    networks = {choice: model(transducer_loss=choice) for choice in LOSSES}
    for source, given in networks.items():
        for target in LOSSES:
            fresh = model(transducer_loss=target)
            caplog.clear()
            kept = {name: x.clone() for name, x in fresh.state_dict().items()}
            torch.nn.ModuleDict({"module": fresh}).load_state_dict(
                {f"module.{name}": x for name, x in given.state_dict().items()}
            )
            anew = {name for name in kept if name not in given.state_dict()}
            wanted = {name: kept[name] if name in anew else given.state_dict()[name] for name in kept}
            torch.testing.assert_close(dict(fresh.state_dict()), wanted, rtol=0, atol=0)
            assert bool(anew) is ("begin anew" in caplog.text)
            assert bool(anew) is (target in ("pruned", "k2") and source not in ("pruned", "k2"))
    part = {name: x for name, x in networks["k2"].state_dict().items() if not name.startswith(("lm_", "joint_"))}
    with pytest.raises(RuntimeError, match="lm_proj"):  # no model's checkpoint: nothing is taken to be meant
        networks["pruned"].load_state_dict(part)


# ---- pruned ---------------------------------------------------------------------------------------------------------


def test_pruned_loss_that_keeps_all_rows_is_the_standard_loss(seed):
    torch.manual_seed(seed)
    network = pruned_model(prune_range=9, simple_loss_scaling=0.0, loss_type="regular")
    network.steps_num = 100  # warm-up is over: the simple loss has weight 0
    data = batch()
    loss, _, _ = network(*data)
    encoded, frames = network.encode(data[0], data[1])
    labels = data[2].clamp(min=0)
    decoded = network.decoder(torch.nn.functional.pad(labels, (1, 0)))
    logits = network.joint_network(encoded.unsqueeze(2), decoded.unsqueeze(1))
    want = rnnt_loss(logits, labels, frames, data[3], fastemit_lambda=0.0)
    torch.testing.assert_close(loss.reshape(1), want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def k2(monkeypatch):
    """A module k2 whose functions are ours."""

    class RaggedTensor:
        def __init__(self, rows):
            self.rows = [torch.tensor(row) for row in rows]

        def to(self, device):
            return self

        def pad(self, mode, padding_value):
            return torch.nn.utils.rnn.pad_sequence(self.rows, batch_first=True, padding_value=padding_value)

    module = types.ModuleType("k2")
    module.RaggedTensor, module.called = RaggedTensor, []

    def recording(name):
        return lambda *args, **kwargs: (module.called.append(name), getattr(pruned, name)(*args, **kwargs))[1]

    for name in ("rnnt_loss_smoothed", "get_rnnt_prune_ranges", "do_rnnt_pruning", "rnnt_loss_pruned"):
        setattr(module, name, recording(name))
    monkeypatch.setitem(sys.modules, "k2", module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune_rang": 5}, "has no 'prune_rang'; its keys are prune_range, simple_loss_scaling"),
        ({"loss_type": "smoothed"}, "loss_type must be one of 'regular', .*; got 'smoothed'"),
        ({"prune_range": 0}, "prune_range must be an integer of 1 or more; got 0"),
        ({"prune_range": 2.5}, "prune_range must be an integer of 1 or more; got 2.5"),
        ({"lm_scale": -0.1}, "lm_scale must be a finite number from 0 up; got -0.1"),
        ({"lm_scale": 0.8, "am_scale": 0.8}, "lm_scale and am_scale must be 1 at most together; got .*0.8.*0.8"),
        ({"am_scale": 1.5}, "lm_scale and am_scale must be 1 at most together; got .*0.0.*1.5"),
        ({"padding_idx": 1}, "padding_idx must be 0, the class of ESPnet's blank; got 1"),
        ({"padding_idx": -1}, "padding_idx must be 0, the class of ESPnet's blank; got -1"),
        ({"padding_idx": False}, "padding_idx must be 0, the class of ESPnet's blank; got False"),
        ({"simple_loss_scaling": "0.5"}, "simple_loss_scaling must be a finite number from 0 up; got '0.5'"),
        ({"reduction": "max"}, "reduction must be one of 'mean', 'sum'; got 'max'"),
        ({"reduction": "none"}, "reduction must be one of 'mean', 'sum'; got 'none'"),
    ],
)
def test_arguments_of_the_pruned_loss_are_refused_when_the_model_is_made(arguments, message):
    for conf in ({"transducer_loss": "pruned"}, {"use_k2_pruned_loss": True}, {"transducer_loss": "k2"}):
        with pytest.raises(ValueError, match=f"model_conf: k2_pruned_loss_args.* ?{message}"):
            model(**conf, k2_pruned_loss_args=arguments)


def test_what_the_pruned_loss_takes_trains(seed):
    torch.manual_seed(seed)
    for reduction in ("mean", "sum"):
        network = pruned_model(reduction=reduction, padding_idx=0)
        assert all(x is not None for x in loss_and_gradients(network, batch())[3].values())


@pytest.mark.parametrize("choice", ["auto", "fused", "standard"])
@pytest.mark.parametrize("arguments", [{"prune_range": 5}, {"bogus": 1}])
def test_arguments_of_the_pruned_loss_are_refused_without_it(choice, arguments):
    with pytest.raises(
        ValueError, match=f"k2_pruned_loss_args is for a pruned loss and transducer_loss is {choice}; got "
    ):
        model(transducer_loss=choice, k2_pruned_loss_args=arguments)
    model(transducer_loss=choice, k2_pruned_loss_args={})  # ESPnet's default


@pytest.mark.parametrize("wrong", ["false", "true", 1, 0, None])
def test_use_k2_pruned_loss_is_a_bool(wrong):
    with pytest.raises(ValueError, match=f"model_conf: use_k2_pruned_loss must be true or false; got {wrong!r}"):
        model(use_k2_pruned_loss=wrong)


@pytest.mark.parametrize("wrong", ["4", 4.0, None, True, -1])
def test_warmup_steps_is_an_integer_where_it_is_used(wrong, monkeypatch):
    monkeypatch.setitem(CONFIGURATION, "scheduler_conf", {"warmup_steps": wrong})
    for choice in ("pruned", "k2"):
        with pytest.raises(ValueError, match=f"model_conf: a pruned loss needs warmup_steps.*; got {wrong!r}"):
            model(transducer_loss=choice)


@pytest.mark.parametrize("wrong", [-0.1, float("inf"), float("nan"), "1e-3", True])
@pytest.mark.parametrize("choice", ["fused", "standard", "pruned"])
def test_fastemit_lambda_is_refused_when_the_model_is_made(choice, wrong):
    with pytest.raises(ValueError, match=f"model_conf: fastemit_lambda must be a finite .* from 0 up; got {wrong!r}"):
        model(transducer_loss=choice, fastemit_lambda=wrong)


@pytest.mark.parametrize("loss_type", ["regular", "modified", "constrained"])
def test_pruned_is_espnets_own_method_with_k2(loss_type, seed, k2):
    """Weights, warm-up and masks are the same at every step; k2 is touched only where it was asked for."""
    torch.manual_seed(seed)
    arguments = dict(prune_range=2, simple_loss_scaling=0.4, lm_scale=0.2, am_scale=0.1, loss_type=loss_type)
    ours, same = pruned_model(**arguments), model(transducer_loss="pruned", k2_pruned_loss_args=arguments)
    theirs = model(transducer_loss="k2", k2_pruned_loss_args=arguments)
    for other in (same, theirs):
        other.load_state_dict(ours.state_dict())
    data = batch()
    for _ in range(7):  # through the warm-up of 4 steps and beyond
        loss, _, _ = ours(*data)
        torch.testing.assert_close(same(*data)[0], loss, rtol=0, atol=0)
        assert not k2.called
        torch.testing.assert_close(theirs(*data)[0], loss)
        assert len(k2.called) == 4
        k2.called.clear()
    loss.backward()
    for name, gradient in gradients(ours).items():
        assert gradient is not None and gradient.isfinite().all(), name


def test_without_k2_only_the_choice_k2_fails_and_only_in_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "k2", None)  # its import raises ImportError
    assert model(transducer_loss="pruned")(*batch())[0].isfinite()
    network = model(transducer_loss="k2")
    with pytest.raises(ImportError, match=r"model_conf: transducer_loss: k2 needs k2.*write transducer_loss: pruned"):
        network(*batch())


# ---- ESPnet's own training ------------------------------------------------------------------------------------------


def train(folder, data, **conf):
    """Two epochs of one step of two batches each by ESPnet's worker; its configuration, its state, its losses."""
    training = {"accum_grad": 2, "batch_size": 2, "max_epoch": 2, "optim_conf": {"lr": 0.05}, "seed": 0}
    config = folder / "train.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, **data, **training, **({"model_conf": conf} if conf else {})}))
    command = ["--config", str(config), "--ngpu", "0", "--output_dir", str(folder / "exp")]
    args = ASRTransducerTask.get_parser().parse_args(command)
    args.version, args.distributed = "", False
    args.dist_rank = None
    ASRTransducerTask.main_worker(args)
    state = torch.load(folder / "exp" / "checkpoint.pth", weights_only=False)
    stats = state["reporter"]["stats"]
    losses = [stats[epoch][part]["loss"] for epoch in (1, 2) for part in ("train", "valid")]
    return yaml.safe_load((folder / "exp" / "config.yaml").read_text()), state["model"], losses


def test_espnets_training_with_every_choice(tmp_path, seed):
    data, found = write_data(tmp_path, seed), {}
    for name, conf in {
        "auto": {},
        "fused": {"transducer_loss": "fused"},
        "standard": {"transducer_loss": "standard"},
        "pruned": {"transducer_loss": "pruned"},
        "k2's key": {"use_k2_pruned_loss": True},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        config, state, losses = train(folder, data, **conf)
        # ESPnet writes the defaults down where its user's YAML has no model_conf at all
        assert config["model_conf"].get("transducer_loss") == (conf.get("transducer_loss") if conf else "auto")
        found[name] = {**state, "losses": torch.tensor(losses)}
        assert found[name]["losses"].isfinite().all()
    torch.testing.assert_close(found["auto"], found["fused"], rtol=0, atol=0)
    torch.testing.assert_close(found["fused"], found["standard"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pruned"], found["k2's key"], rtol=0, atol=0)


def _one_of_two(rank, weights, data, result):
    network = model(transducer_loss="fused", **AUXILIARY).double()
    network.load_state_dict(weights)
    parallel = torch.nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
    rows = slice(2 * rank, 2 * rank + 2)
    loss, _, _ = parallel(*[x[rows] for x in data])
    loss.backward()
    torch.save(gradients(network), f"{result}.{rank}")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, seed):
    torch.manual_seed(seed)
    network = model(transducer_loss="standard", **AUXILIARY).double()
    labels = torch.tensor([[1, 2, 2, 4], [3, -1, -1, -1], [4, 1, -1, -1], [2, 2, 1, -1]])
    data = torch.randn(4, 41, 12, dtype=torch.float64), torch.full((4,), 41), labels, (labels >= 0).sum(1)
    in_two_processes(tmp_path, _one_of_two, network.state_dict(), data, tmp_path / "gradients")
    wanted = loss_and_gradients(network, data)[3]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"gradients.{rank}"), wanted, rtol=1e-9, atol=1e-9)
