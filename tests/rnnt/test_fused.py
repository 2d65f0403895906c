"""Joint network and loss in one, against the loop over materialised logits and autograd."""

from typing import NamedTuple

import pytest
import torch
from bench.harness import extra_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from penalties import assert_no_penalty
from rnnt_problems import random_problem
from torch import Tensor
from two_processes import in_two_processes

from espnet_mega_plugin.rnnt import fused, fused_rnnt_loss, rnnt_loss, wavefront

EXACT = {"atol": 1e-10, "rtol": 1e-10}
NAMES = ("enc", "dec", "weight", "bias")


class Joint(NamedTuple):
    """Arguments of `fused_rnnt_loss`, in its order; NaN in whatever is padding."""

    enc: Tensor
    dec: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    frame_lengths: Tensor
    label_lengths: Tensor

    def leaves(self, *names: str) -> "Joint":
        """With fresh leaves, those named requiring a gradient."""
        fresh = {name: getattr(self, name).clone().requires_grad_(name in (names or NAMES)) for name in NAMES}
        return self._replace(**fresh)

    def logits(self, activation) -> Tensor:
        """(B, T, U+1, V)"""
        enc, dec = (x.nan_to_num(0.0) for x in (self.enc, self.dec))
        return torch.nn.functional.linear(activation(enc[:, :, None] + dec[:, None]), self.weight, self.bias)


def random_joint(B, T, U, V, J, seed, blank=0, dtype=torch.float64, spread=1.0) -> Joint:
    problem = random_problem(B, T, U, V, seed, blank)
    draw = torch.Generator().manual_seed(seed)
    shapes = ((B, T, J), (B, U + 1, J), (V, J), (V,))
    enc, dec, weight, bias = (torch.randn(*s, generator=draw, dtype=torch.float64).to(dtype) * spread for s in shapes)
    for b in range(B):
        enc[b, problem.act_lens[b] :] = torch.nan
        dec[b, problem.label_lens[b] + 1 :] = torch.nan
    return Joint(enc, dec, weight, bias, *problem[1:4])


def wanted(joint: Joint, activation=torch.tanh, weights=None, method="reference", **options):
    """Costs and gradients of their weighted sum by materialised logits."""
    leaves = joint.leaves()
    costs = rnnt_loss(leaves.logits(activation), *leaves[4:], reduction="none", method=method, **options)
    weights = torch.ones_like(costs) if weights is None else weights
    return costs.detach(), torch.autograd.grad(costs, leaves[:4], weights)


def got(joint: Joint, activation=torch.tanh, weights=None, **options):
    leaves = joint.leaves()
    costs = fused_rnnt_loss(*leaves, activation, reduction="none", **options)
    weights = torch.ones_like(costs) if weights is None else weights
    return costs.detach(), torch.autograd.grad(costs, leaves[:4], weights)


@settings(max_examples=60)
@given(
    B=st.integers(1, 4),
    T=st.integers(1, 6),
    U=st.integers(0, 5),
    V=st.integers(2, 6),
    J=st.integers(1, 4),
    blank=st.integers(-1, 5),
    fastemit_lambda=st.sampled_from([0.0, 0.01, 1.5]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_reference_over_materialised_logits(B, T, U, V, J, blank, fastemit_lambda, spread, seed):
    blank = min(blank, V - 1)
    joint = random_joint(B, T, U, V, J, seed, blank % V, spread=spread)
    weights = torch.randn(B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = dict(weights=weights, blank=blank, fastemit_lambda=fastemit_lambda)
    torch.testing.assert_close(got(joint, **options), wanted(joint, **options), **EXACT)


def test_tiles_of_every_size_give_the_same(monkeypatch):
    joint = random_joint(3, 9, 6, 7, 4, seed=1)
    monkeypatch.setattr(fused, "FEWEST_ROWS", 1)
    for rows in (1, 2, 7, 50, 1000):
        monkeypatch.setattr(fused, "CPU_TILE_BYTES", rows * 7 * 8)
        for activation in (torch.tanh, torch.nn.SiLU()):
            torch.testing.assert_close(got(joint, activation), wanted(joint, activation), **EXACT)


def test_the_way_of_other_devices_gives_the_same(monkeypatch):
    """CPU tensors treated as those of a device that reading from would synchronise."""
    joint = random_joint(3, 9, 6, 7, 4, seed=25)
    monkeypatch.setattr(wavefront, "lengths_are_free", lambda logits: False)
    joint.bias[1:] -= 800.0  # some posteriors are exactly 0
    for threshold in (None, 0):
        for count in (fused._count, lambda *_: None):
            monkeypatch.setattr(fused, "_count", count)
            torch.testing.assert_close(got(joint, threshold=threshold), wanted(joint), **EXACT)


def test_gradcheck():
    joint = random_joint(2, 3, 2, 3, 2, seed=2)
    inputs = [getattr(joint, name).nan_to_num(0.0).requires_grad_() for name in NAMES]

    def costs(*inputs):
        return fused_rnnt_loss(*inputs, *joint[4:], reduction="none", fastemit_lambda=0.0)

    assert torch.autograd.gradcheck(costs, inputs)


# ---- activations ----------------------------------------------------------------------------------------------------

TORCH_ACTIVATIONS = [
    torch.nn.Tanh(),
    torch.nn.functional.tanh,
    torch.nn.ReLU(),
    torch.nn.ReLU(inplace=True),
    torch.nn.SiLU(),
    torch.nn.GELU(),
    torch.nn.Identity(),
    torch.nn.Sequential(torch.nn.Softplus(), torch.nn.Tanh()),
]


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS, ids=str)
def test_activations_of_torch(activation):
    joint = random_joint(3, 5, 4, 6, 3, seed=3)
    torch.testing.assert_close(got(joint, activation), wanted(joint, activation), **EXACT)


@pytest.mark.parametrize("name", "ftswish hardtanh leaky_relu mish relu selu smish swish tanh identity".split())
@pytest.mark.parametrize("options", [{}, dict(ftswish_mean_shift=0.1, smish_beta=2.0, swish_beta=1.5)], ids=str)
def test_activations_of_espnets_joint_network(name, options):
    module = pytest.importorskip("espnet2.asr_transducer.activation")
    activation = module.get_activation(name, **options)
    joint = random_joint(3, 5, 4, 6, 3, seed=4, spread=0.7)
    torch.testing.assert_close(got(joint, activation), wanted(joint, activation), **EXACT)


def test_an_activations_parameters_are_trained():
    joint = random_joint(3, 5, 4, 6, 3, seed=5)
    gradients = []
    for way in (fused_rnnt_loss, None):
        slope = torch.nn.PReLU(init=0.3, dtype=torch.float64)
        way = way or (lambda *x, activation: rnnt_loss(joint.leaves().logits(activation), *joint[4:]))
        way(*joint, activation=slope).backward()
        gradients.append(slope.weight.grad)
    torch.testing.assert_close(*gradients, **EXACT)


# ---- inside autograd ------------------------------------------------------------------------------------------------


def test_an_activation_may_have_parameters_that_it_does_not_use():
    joint, activation = random_joint(2, 4, 2, 5, 3, seed=35), torch.nn.PReLU(dtype=torch.float64)
    activation.unused = torch.nn.Parameter(torch.ones(2))
    fused_rnnt_loss(*joint.leaves(), activation).sum().backward()
    used = activation.weight.grad.clone()
    assert activation.unused.grad is None or not activation.unused.grad.any()
    activation.weight.grad = None
    rnnt_loss(joint.leaves().logits(activation), *joint[4:]).sum().backward()
    torch.testing.assert_close(used, activation.weight.grad, **EXACT)


def test_a_function_of_what_is_trained_is_refused():
    joint, module, slope = (
        random_joint(2, 4, 2, 5, 3, seed=36),
        torch.nn.PReLU(dtype=torch.float64),
        torch.ones(1, requires_grad=True),
    )
    for function in (module.forward, lambda x: x * slope):
        with pytest.raises(TypeError, match="activation is a function of something that is trained"):
            fused_rnnt_loss(*joint, function)
    with torch.no_grad():
        slope.requires_grad_(False)
    fused_rnnt_loss(*joint, lambda x: x * slope)


@pytest.mark.parametrize("names", ["enc", "dec", "weight", "bias", "enc dec", "weight bias", "enc weight"])
def test_only_what_requires_a_gradient_gets_one(names):
    joint = random_joint(3, 5, 4, 6, 3, seed=6)
    whole = dict(zip(NAMES, wanted(joint)[1], strict=True))
    leaves = joint.leaves(*names.split())
    fused_rnnt_loss(*leaves, reduction="sum").backward()
    for name in NAMES:
        grad = getattr(leaves, name).grad
        if name in names.split():
            torch.testing.assert_close(grad, whole[name], **EXACT)
        else:
            assert grad is None


def test_without_bias():
    joint = random_joint(3, 5, 4, 6, 3, seed=7)
    leaves = joint.leaves()._replace(bias=None)
    fused_rnnt_loss(*leaves, reduction="sum").backward()
    costs, gradients = wanted(joint._replace(bias=torch.zeros(6, dtype=torch.float64)))
    for name, gradient in zip(NAMES[:3], gradients, strict=False):
        torch.testing.assert_close(getattr(leaves, name).grad, gradient, **EXACT)


def test_gradients_beyond_the_lengths_are_zero():
    joint = random_joint(4, 7, 5, 6, 3, seed=8)
    _, (enc, dec, _, _) = got(joint)
    assert (enc[joint.enc.isnan()] == 0).all() and (dec[joint.dec.isnan()] == 0).all()


def test_a_retained_graph_gives_the_same_again():
    joint = random_joint(3, 5, 4, 6, 3, seed=9)
    leaves = joint.leaves()
    loss = fused_rnnt_loss(*leaves, reduction="sum")
    first, second = (torch.autograd.grad(loss, leaves[:4], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    torch.testing.assert_close(first, wanted(joint)[1], **EXACT)
    torch.autograd.grad(loss, leaves[:4])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves[:4])


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_penalty_is_refused(name):
    leaves = random_joint(2, 4, 3, 5, 3, seed=10).leaves()
    others = [getattr(leaves, other) for other in NAMES if other != name]
    assert_no_penalty(fused_rnnt_loss(*leaves), getattr(leaves, name), *others)
    activation = torch.nn.PReLU(dtype=torch.float64)
    assert_no_penalty(fused_rnnt_loss(*leaves, activation), getattr(leaves, name), activation.weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_value_alone(mode):
    joint = random_joint(3, 5, 4, 6, 3, seed=11)
    leaves = joint.leaves()
    with mode():
        loss = fused_rnnt_loss(*leaves, reduction="none")
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, wanted(joint)[0], **EXACT)
    assert fused_rnnt_loss(*joint).grad_fn is None


def test_any_strides_and_expanded_inputs():
    joint = random_joint(3, 5, 4, 6, 3, seed=12)
    row = torch.randn(3, 1, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for way in (lambda enc: fused_rnnt_loss(enc, *joint[1:]), lambda enc: rnnt_loss(joint._replace(enc=enc).logits(torch.tanh), *joint[4:])):  # fmt: skip
        enc = row.transpose(0, 1).expand(5, 3, 3).transpose(0, 1)
        gradients.append(torch.autograd.grad(way(enc), row)[0])
    torch.testing.assert_close(*gradients, **EXACT)


# ---- laws -----------------------------------------------------------------------------------------------------------


def test_batch_is_alone():
    joint = random_joint(5, 8, 6, 7, 3, seed=13)
    costs, (enc, dec, weight, _) = got(joint)
    total = torch.zeros_like(weight)
    for b in range(5):
        T, U = int(joint.frame_lengths[b]), int(joint.label_lengths[b])
        lengths = joint.frame_lengths[b : b + 1], joint.label_lengths[b : b + 1]
        one = joint._replace(enc=joint.enc[b : b + 1, :T], dec=joint.dec[b : b + 1, : U + 1], labels=joint.labels[b : b + 1, :U])  # fmt: skip
        cost, gradients = got(one._replace(frame_lengths=lengths[0], label_lengths=lengths[1]))
        torch.testing.assert_close(cost[0], costs[b], **EXACT)
        torch.testing.assert_close(gradients[0][0], enc[b, :T], **EXACT)
        torch.testing.assert_close(gradients[1][0], dec[b, : U + 1], **EXACT)
        total += gradients[2]
    torch.testing.assert_close(total, weight, **EXACT)


def test_reductions_and_defaults_are_those_of_the_standard_loss():
    joint = random_joint(4, 5, 3, 6, 3, seed=14)
    logits = joint.logits(torch.tanh)
    torch.testing.assert_close(fused_rnnt_loss(*joint), rnnt_loss(logits, *joint[4:]))
    for reduction, shape in (("none", (4,)), ("sum", (1,)), ("mean", (1,))):
        loss = fused_rnnt_loss(*joint, reduction=reduction)
        assert loss.shape == shape
        torch.testing.assert_close(loss, rnnt_loss(logits, *joint[4:], reduction=reduction))
    leaves = joint.leaves(), joint.leaves()
    fused_rnnt_loss(*leaves[0]).backward()
    rnnt_loss(leaves[1].logits(torch.tanh), *joint[4:]).backward()
    torch.testing.assert_close(leaves[0].weight.grad, leaves[1].weight.grad, **EXACT)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(reduction):
    none = torch.zeros(0, dtype=torch.int64)
    joint = Joint(torch.zeros(0, 5, 3), torch.zeros(0, 3, 3), torch.randn(4, 3), torch.randn(4), none.view(0, 2), none, none)  # fmt: skip
    leaves = joint.leaves()
    loss = fused_rnnt_loss(*leaves, reduction=reduction)
    assert loss.tolist() == ([] if reduction == "none" else [0.0])
    loss.sum().backward()
    assert all((getattr(leaves, name).grad == 0).all() for name in NAMES)


def test_threshold_leaves_cells_out():
    joint = random_joint(1, 60, 20, 5, 4, seed=15, spread=0.5)
    computed, whole = [], wanted(joint, method="wavefront")[1]
    for threshold, tolerance in ((0.0, 1e-12), (1e-6, 1e-4), (1e-3, 0.1)):
        leaves = joint.leaves()
        costs = fused_rnnt_loss(*leaves, reduction="none", threshold=threshold)
        computed.append(len(costs.grad_fn.saved_tensors[4]))
        gradients = torch.autograd.grad(costs.sum(), leaves[:4])
        torch.testing.assert_close(gradients, whole, atol=tolerance, rtol=0)
    assert computed[0] == 60 * 21 and computed[1] < 0.9 * computed[0] and computed[2] < 0.8 * computed[1]


@pytest.mark.parametrize("activation", [torch.tanh, torch.nn.SiLU()], ids=["tanh", "silu"])
def test_float32_against_float64(activation):
    joint = random_joint(3, 60, 20, 50, 32, seed=16, dtype=torch.float32, spread=0.5)
    costs, gradients = got(joint, activation, fastemit_lambda=0.01)
    exact = Joint(*[x.double() for x in joint[:4]], *joint[4:])
    exact_costs, exact_gradients = wanted(exact, activation, method="wavefront", fastemit_lambda=0.01)
    assert costs.dtype == torch.float32
    torch.testing.assert_close(costs.double(), exact_costs, rtol=1e-6, atol=1e-5)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - exact_gradient).norm() < 1e-6 * exact_gradient.norm()


def error_in_float32(joint: Joint, **options) -> float:
    """The largest of the gradients' relative errors."""
    _, gradients = got(joint, **options)
    exact = Joint(*[x.double() for x in joint[:4]], *joint[4:])
    _, wanted_gradients = wanted(exact, method="wavefront")
    pairs = zip(gradients, wanted_gradients, strict=True)
    return max(float((found - exact).norm() / exact.norm()) for found, exact in pairs)


@pytest.mark.parametrize("size", [0.1, 1e-3, 1e-6])
def test_small_numbers_in_the_joint_space_keep_their_digits(size):
    joint = random_joint(2, 8, 4, 30, 16, seed=31, dtype=torch.float32)
    assert error_in_float32(joint._replace(enc=joint.enc * size, dec=joint.dec * size)) < 1e-6


def test_large_weights_keep_the_gradient_finite():
    joint = random_joint(1, 6, 3, 20, 16, seed=32, dtype=torch.float32)
    for size in (30.0, 1e9):
        _, gradients = got(joint._replace(weight=joint.weight * size))
        found = gradients[2]
        exact = Joint(*[x.double() for x in joint._replace(weight=joint.weight * size)[:4]], *joint[4:])
        exact_gradient = wanted(exact, method="wavefront")[1][2]
        torch.testing.assert_close(found.double(), exact_gradient, rtol=0, atol=2e-5)


def test_what_the_threshold_leaves_out_is_less_than_rounding():
    """The default, at a length where many cells have a small posterior."""
    joint = random_joint(1, 200, 60, 20, 8, seed=33, dtype=torch.float32)
    for found, whole in zip(got(joint)[1], got(joint, threshold=0.0)[1], strict=True):
        assert (found - whole).norm() < 4e-7 * whole.norm()


@pytest.mark.parametrize("activation", [torch.tanh, torch.nn.SiLU()], ids=["tanh", "silu"])
@pytest.mark.parametrize("narrow", ["enc", "dec"])
def test_inputs_of_two_types_are_summed_in_the_wider(activation, narrow):
    joint = random_joint(2, 8, 4, 30, 16, seed=34, dtype=torch.float32)
    joint = joint._replace(**{narrow: getattr(joint, narrow).bfloat16()})
    costs, gradients = got(joint, activation)
    wanted_costs, wanted_gradients = wanted(joint, activation, method="wavefront")
    torch.testing.assert_close(costs, wanted_costs, rtol=1e-6, atol=1e-6)
    for found, exact in zip(gradients, wanted_gradients, strict=True):
        rounding = 1e-6 if found.dtype == torch.float32 else 1e-2
        assert found.dtype == exact.dtype and (found - exact).norm() < rounding * exact.norm()


@pytest.mark.parametrize(
    "dtype, upstream",
    [
        (torch.float32, 1.0),
        (torch.float32, 1e-20),
        (torch.float32, 1e-33),
        (torch.float64, 1e-200),
        (torch.float64, 1e-250),
    ],
)
def test_no_subnormal_numbers_reach_the_products(monkeypatch, dtype, upstream):
    """But for float16, which is cut where float32 is: the numbers of a small gradient are subnormal there."""
    joint = random_joint(2, 20, 8, 40, 4, seed=17, dtype=dtype, spread=12.0)
    seen, original = [], fused._gradient_to_logits

    def recording(*arguments):
        seen.append(original(*arguments).clone())
        return seen[-1].clone()

    monkeypatch.setattr(fused, "_gradient_to_logits", recording)
    got(joint, weights=torch.full((2,), upstream, dtype=dtype), threshold=0.0)
    sizes = torch.cat([x[x != 0].abs() for x in seen])
    assert len(sizes) and sizes.min() >= torch.finfo(dtype).tiny
    assert (torch.cat(seen) == 0).any()


@pytest.mark.parametrize("offset", [2.0**14, -(2.0**27), 2.0**40, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_added_to_all_logits_costs_no_digits(dtype, offset):
    """Quarters, of which both ways make the same logits: all that is lost is lost in these."""
    joint = random_joint(2, 12, 5, 8, 3, seed=31, dtype=dtype)
    quarters = [((x * 2).round() / 2) for x in joint[:4]]
    moved = Joint(*quarters[:3], quarters[3] + offset, *joint[4:])
    exact = Joint(*[x.double() for x in moved[:4]], *joint[4:])
    activation = torch.nn.Identity()

    def logits(one):
        return moved._replace(**dict(zip(NAMES, one, strict=True))).logits(activation).to(dtype).double()

    leaves = exact.leaves()
    costs = rnnt_loss(logits(leaves[:4]), *joint[4:], reduction="none", method="reference")
    right = torch.autograd.grad(costs.sum(), leaves[:4])
    found, gradients = got(moved, activation)
    rounding = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found.double(), costs.detach(), rtol=rounding, atol=rounding)
    for one, other in zip(gradients, right, strict=True):
        assert (one.double() - other).norm() <= rounding * right[2].norm()


def test_more_than_1024_rows():
    joint = random_joint(1, 2, 1030, 3, 2, seed=32)
    torch.testing.assert_close(got(joint), wanted(joint), **EXACT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_are_visible_in_their_utterance_alone(value):
    for b in range(3):
        joint = random_joint(3, 6, 4, 5, 3, seed=18)
        joint.enc[b, 0, 1] = value
        costs, (enc, _, _, _) = got(joint, torch.nn.ReLU())
        assert costs.isnan().tolist() == [other == b for other in range(3)]
        assert [bool(x.isnan().any()) for x in enc] == [other == b for other in range(3)]


def test_fresh_memory_is_not_read():
    joint = random_joint(4, 9, 6, 8, 3, seed=19, dtype=torch.float32)
    plain = got(joint)
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        filled = got(joint)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    torch.testing.assert_close(filled, plain, atol=0, rtol=0)


def test_memory_is_a_small_part_of_the_logits():  # a size where neither tiles nor lattice count
    B, T, U, V, J = 8, 150, 40, 2000, 32
    joint = random_joint(B, T, U, V, J, seed=20, dtype=torch.float32, spread=0.3).leaves()
    found = extra_memory(lambda: None, lambda _: torch.autograd.grad(fused_rnnt_loss(*joint), joint[:4]))
    if found is None:
        pytest.skip("this platform does not tell its peak memory")
    assert found * 1e6 < 0.1 * B * T * (U + 1) * V * 4


# ---- half precision -------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """ESPnet's joint network's layers."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(21)
        self.lin_enc, self.lin_dec = (torch.nn.Linear(6, 8, dtype=dtype) for _ in range(2))
        self.lin_out = torch.nn.Linear(8, 7, dtype=dtype)

    def forward(self, enc, dec, *others, way="fused", **options):
        enc, dec = self.lin_enc(enc), self.lin_dec(dec)
        if way == "fused":
            return fused_rnnt_loss(enc, dec, self.lin_out.weight, self.lin_out.bias, *others, **options)
        return rnnt_loss(self.lin_out(torch.tanh(enc[:, :, None] + dec[:, None])), *others, **options)

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.named_parameters()}


def batch(dtype=torch.float32):
    problem = random_problem(4, 12, 5, 7, seed=22)
    return torch.randn(4, 12, 6, dtype=dtype), torch.randn(4, 6, 6, dtype=dtype), *problem[1:4]


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backward_inside):
    """As near to float32 as the materialised logits under autocast are."""
    given, errors = batch(), {}
    exact = Model()
    exact(*given).backward()
    for way in ("fused", "standard"):
        model = Model()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(*given, way=way)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        assert loss.dtype == torch.float32
        found = model.gradients()
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        errors[way] = {n: float((g - exact.gradients()[n]).norm() / g.norm()) for n, g in found.items()}
    for name, error in errors["fused"].items():
        assert error < max(2 * errors["standard"][name], 4 * torch.finfo(dtype).eps), (name, errors)


def test_autocast_leaves_float64_alone():
    given = batch(torch.float64)
    losses = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(Model(torch.float64)(*given).detach())
    torch.testing.assert_close(*losses, atol=0, rtol=0)


def test_half_parameters():
    joint = random_joint(3, 8, 4, 6, 5, seed=23, dtype=torch.bfloat16, spread=0.5)
    costs, gradients = got(joint)
    exact = wanted(Joint(*[x.double() for x in joint[:4]], *joint[4:]))
    assert costs.dtype == torch.float32 and {x.dtype for x in gradients} == {torch.bfloat16}
    torch.testing.assert_close(costs.double(), exact[0], rtol=0.02, atol=0.02)
    for gradient, exact_gradient in zip(gradients, exact[1], strict=True):
        assert (gradient.double() - exact_gradient).norm() < 0.03 * exact_gradient.norm()


def test_gradient_scaling():
    given, plain, scaled = batch(), Model(), Model()
    plain(*given).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(scaled(*given)).backward()
    scaler.unscale_(torch.optim.SGD(scaled.parameters(), lr=0.0))
    torch.testing.assert_close(scaled.gradients(), plain.gradients(), atol=1e-7, rtol=1e-5)


# ---- two processes --------------------------------------------------------------------------------------------------


def _one_of_two(rank, given, result):
    model = torch.nn.parallel.DistributedDataParallel(Model(torch.float64))
    rows = slice(0, 1) if rank == 0 else slice(1, 4)
    model(*[x[rows] for x in given], reduction="sum").backward()
    torch.save(model.module.gradients(), f"{result}.{rank}")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    given, result = batch(torch.float64), tmp_path / "gradients.pt"
    in_two_processes(tmp_path, _one_of_two, given, result)
    model = Model(torch.float64)
    model(*given, reduction="sum", way="standard").backward()
    for rank in range(2):
        averaged = torch.load(f"{result}.{rank}")  # DDP gives the mean over the processes
        torch.testing.assert_close({name: 2 * x for name, x in averaged.items()}, model.gradients(), **EXACT)


# ---- the door -------------------------------------------------------------------------------------------------------

GOOD = dict(
    enc=torch.zeros(2, 5, 3),
    dec=torch.zeros(2, 4, 3),
    weight=torch.zeros(6, 3),
    bias=torch.zeros(6),
    labels=torch.tensor([[1, 2, 3], [4, 5, -1]]),
    frame_lengths=torch.tensor([5, 3]),
    label_lengths=torch.tensor([3, 2]),
)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(enc=[[0.0]]), TypeError, r"enc must be a floating point torch.Tensor; got list"),
        (dict(dec=torch.zeros(2, 4, 3, dtype=torch.int64)), TypeError, r"dec must be a floating.*got torch.int64"),
        (dict(enc=torch.zeros(2, 5, 1, 3)), ValueError, r"enc must have 3 dimensions; got \(2, 5, 1, 3\)"),
        (dict(dec=torch.zeros(3, 4, 3)), ValueError, r"dec must be \(B, U\+1, J\) with B = 2.*got \(3, 4, 3\)"),
        (dict(dec=torch.zeros(2, 4, 2)), ValueError, r"dec must be .* J = 3.*got \(2, 4, 2\)"),
        (dict(weight=torch.zeros(6, 2)), ValueError, r"weight must be \(V, J\) with J = 3.*got \(6, 2\)"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias must be \(V,\) = \(6,\).*got \(5,\)"),
        (dict(activation="tanh"), TypeError, r"activation must be a function or module; got str"),
        (dict(activation=torch.nn.Linear(3, 2)), ValueError, r"activation must give as many channels.*from Linear"),
        (
            dict(activation=lambda x: x[:, :2]),
            ValueError,
            r"activation must give.*\(29, 3\) for 29 cells; got \(29, 2\)",
        ),
        (dict(enc=torch.zeros(2, 0, 3)), ValueError, r"the logits needs? at least one frame"),
        (dict(labels=torch.ones(2, 2, dtype=torch.int64)), ValueError, r"labels must be.*to go with the logits"),
        (dict(labels=torch.tensor([[1, 2, 3], [4, 6, -1]])), ValueError, r"labels\[1, 1\] = 6.*within label_lengths"),
        (dict(frame_lengths=torch.tensor([5, 0])), ValueError, r"frame_lengths must be from 1 to 5.*utterance 1 has 0"),
        (dict(label_lengths=torch.tensor([4, 2])), ValueError, r"label_lengths must be from 0 to 3.*utterance 0 has 4"),
        (dict(label_lengths=[3, 2]), TypeError, r"label_lengths must be a torch.Tensor; got list"),
        (dict(blank=6), ValueError, r"blank must be a class from 0 to V - 1 = 5"),
        (dict(reduction="avg"), ValueError, r"reduction must be one of"),
        (dict(fastemit_lambda=-1.0), ValueError, r"fastemit_lambda must be"),
        (dict(threshold=1.0), ValueError, r"threshold must be"),
    ],
)
def test_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        fused_rnnt_loss(**{**GOOD, **wrong})


def test_unchecked_utterances_at_fault_are_nan():
    labels = torch.tensor([[1, 2, 3], [4, 9, -1]])
    costs = fused_rnnt_loss(**{**GOOD, "labels": labels}, reduction="none", check=False)
    assert costs.isnan().tolist() == [False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_real_device(dtype):
    joint = random_joint(3, 40, 10, 30, 16, seed=24, dtype=dtype)
    exact = wanted(Joint(*[x.double() for x in joint[:4]], *joint[4:]), method="wavefront")
    found = got(Joint(*[x.cuda() for x in joint]))
    tolerance = 1e-10 if dtype == torch.float64 else wavefront.THRESHOLD[torch.float32] ** 0.5
    torch.testing.assert_close(found[0].cpu().double(), exact[0], atol=tolerance, rtol=1e-5)
    for gradient, exact_gradient in zip(found[1], exact[1], strict=True):
        assert (gradient.cpu().double() - exact_gradient).norm() < max(tolerance, 1e-10) * exact_gradient.norm()
