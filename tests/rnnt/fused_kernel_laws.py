"""What the fused loss's Triton kernels have to obey, on CPU tensors: test_kernels.py runs this in the interpreter.

The oracles are the loop over materialised logits in float64, with autograd, and the PyTorch way of the same loss.
"""

from types import SimpleNamespace

import pytest
import torch
from penalties import assert_no_penalty
from test_fused import EXACT, NAMES, Joint, got, random_joint, wanted

from espnet_mega_plugin.rnnt import fused, fused_kernels, fused_rnnt_loss, kernels
from espnet_mega_plugin.rnnt.fused_kernels import FORMULAS, formula

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # log(0) is meant
TRITON = {"method": "triton"}


def exact(joint: Joint) -> Joint:
    return Joint(*[x.double() for x in joint[:4]], *joint[4:])


def test_small_numbers_in_the_joint_space_keep_their_digits():
    joint = random_joint(1, 4, 2, 8, 8, seed=31, dtype=torch.float32)
    joint = joint._replace(enc=joint.enc * 1e-4, dec=joint.dec * 1e-4)
    found, right = got(joint, **TRITON)[1], wanted(exact(joint), method="wavefront")[1]
    assert all((one - other).norm() < 2e-6 * other.norm() for one, other in zip(found, right, strict=True))


@pytest.mark.parametrize(
    "shape, blank, fastemit_lambda",
    [
        ((3, 5, 3, 5, 3), 0, 0.0),
        ((2, 4, 3, 7, 5), 6, 0.3),
        ((1, 1, 0, 2, 1), 1, 0.1),
        ((2, 4, 0, 3, 2), 0, 0.1),
        ((2, 1, 3, 3, 4), 2, 0.1),
        ((1, 6, 5, 9, 33), 4, 0.0),
    ],
)
def test_it_is_the_reference(shape, blank, fastemit_lambda):
    joint = random_joint(*shape, seed=1, blank=blank)
    options = {
        "weights": torch.linspace(-1, 2, shape[0], dtype=torch.float64),
        "blank": blank,
        "fastemit_lambda": fastemit_lambda,
    }
    torch.testing.assert_close(got(joint, **options, **TRITON), wanted(joint, **options), **EXACT)


@pytest.mark.parametrize("rows", [1, 7])
def test_tiles_of_every_size_give_the_same(monkeypatch, rows):
    """Rows of enc and dec whose cells are in several tiles, parts of a row of logits, several blocks of channels."""
    joint = random_joint(2, 5, 2, 7, 130, seed=2, spread=0.3)
    monkeypatch.setattr(kernels, "MOST_CLASSES_AT_ONCE", 4)
    monkeypatch.setattr(fused.Joint, "_rows_that_fit", lambda *_: rows)
    monkeypatch.setattr(fused, "FEWEST_ROWS", 1)
    torch.testing.assert_close(got(joint, **TRITON), wanted(joint), **EXACT)


def test_more_frames_than_a_sum_takes_at_once():
    joint = random_joint(1, 37, 1, 3, 2, seed=3, spread=0.2)
    torch.testing.assert_close(got(joint, **TRITON), wanted(joint), **EXACT)


@pytest.mark.parametrize("threshold", [None, 0, 1e-3])
def test_the_cells_that_backward_computes(threshold):
    """With a threshold, those of the PyTorch way; on some paths posteriors are exactly 0."""
    joint = random_joint(2, 9, 5, 4, 3, seed=4, spread=4.0)
    found = []
    for method in ("triton", "wavefront"):
        leaves = joint.leaves()
        costs = fused_rnnt_loss(*leaves, reduction="none", threshold=threshold, method=method, fastemit_lambda=0.2)
        cells = costs.grad_fn.saved_tensors[4]
        found.append((costs.detach(), cells, torch.autograd.grad(costs.sum(), leaves[:4])))
    torch.testing.assert_close(found[0][0], found[1][0], **EXACT)
    torch.testing.assert_close(found[0][2], found[1][2], **EXACT)
    if threshold == 0:
        assert len(found[0][1]) == int((joint.frame_lengths * (joint.label_lengths + 1)).sum())
    else:
        assert found[0][1].tolist() == found[1][1].tolist()
        assert len(found[0][1]) < int((joint.frame_lengths * (joint.label_lengths + 1)).sum())


def test_nothing_but_cells_below_the_threshold():
    joint = random_joint(1, 3, 2, 3, 2, seed=5)
    joint.bias[joint.labels[0]] = -torch.inf
    costs, gradients = got(joint, **TRITON)
    assert costs.tolist() == [torch.inf] and all((x == 0).all() for x in gradients)


# ---- activations ----------------------------------------------------------------------------------------------------

WITH_FORMULA = {
    "tanh": torch.tanh,
    "Tanh": torch.nn.Tanh(),
    "ReLU": torch.nn.ReLU(),
    "Hardtanh": torch.nn.Hardtanh(-0.5, 0.7),
    "LeakyReLU": torch.nn.LeakyReLU(0.1),
    "SELU": torch.nn.SELU(),
    "SiLU": torch.nn.SiLU(),
    "Mish": torch.nn.Mish(),
    "Identity": torch.nn.Identity(),
}
IN_PYTORCH = {
    "GELU": torch.nn.GELU(),
    "lambda": lambda x: x.sin(),
    "in place": torch.nn.Sequential(torch.nn.ReLU(True)),
}
ESPNETS = {
    "ftswish": {"ftswish_threshold": -0.3, "ftswish_mean_shift": 0.1},
    "hardtanh": {"hardtanh_max_val": 2},
    "leaky_relu": {},
    "mish": {},
    "relu": {},
    "selu": {},
    "smish": {"smish_alpha": 1.2, "smish_beta": 0.7},
    "swish": {"swish_beta": 1.5},
    "tanh": {},
    "identity": {},
}


def espnets(name: str, options: dict) -> torch.nn.Module:
    return pytest.importorskip("espnet2.asr_transducer.activation").get_activation(name, **options)


def assert_the_same(activation):
    joint = random_joint(2, 4, 3, 5, 6, seed=6, spread=1.5)
    torch.testing.assert_close(got(joint, activation, **TRITON), wanted(joint, activation), **EXACT)


@pytest.mark.parametrize("name", [*WITH_FORMULA, *IN_PYTORCH])
def test_activations_of_torch(name):
    activation = (WITH_FORMULA | IN_PYTORCH)[name]
    assert (formula(activation) is None) == (name in IN_PYTORCH)
    assert_the_same(activation)


@pytest.mark.parametrize("name", ESPNETS)
def test_activations_of_espnets_joint_network(name):
    for options in ({}, ESPNETS[name]) if name in ("ftswish", "smish", "swish") else (ESPNETS[name],):
        activation = espnets(name, options)
        assert formula(activation) is not None
        if type(activation).__module__ + "." == fused_kernels.ESPNET:  # torch's own are above
            assert_the_same(activation)


def test_activations_far_from_zero():
    """Values and derivatives of every formula, where exponentials overflow, too."""
    x = torch.cat([torch.linspace(-3, 3, 25), torch.tensor([-200.0, -60.0, -21.0, 21.0, 60.0, 200.0])]).double()
    modules = [module for name, module in WITH_FORMULA.items() if name != "tanh"]
    modules += [espnets(name, ESPNETS[name]) for name in ("ftswish", "mish", "smish", "swish")]
    assert {f"{type(each).__module__}.{type(each).__qualname__}" for each in modules} == set(FORMULAS)
    none = torch.zeros(1, 1, len(x), dtype=torch.float64)
    for activation in modules:
        leaf = x.clone().requires_grad_()
        exact = activation(leaf)
        (slope,) = torch.autograd.grad(exact.sum(), leaf)
        options = SimpleNamespace(activation=activation, blank=0, dtype=torch.float64)  # of `fused.Options`
        joint = fused_kernels._Joint(x.view(1, 1, -1), none, torch.zeros(2, len(x)).double(), None, options)
        cell = torch.zeros(1, dtype=torch.int64)
        torch.testing.assert_close(joint.hidden(cell)[0], exact.detach(), **EXACT)
        totals = fused_kernels._Gradients(joint, cell, (True, True, False, False), [], ())
        totals.add_to_rows(cell, torch.ones(1, len(x), dtype=torch.float64))
        for total in (totals.enc, totals.dec):
            torch.testing.assert_close(total[0], slope, **EXACT)


def test_an_activations_parameters_are_trained():
    joint, gradients = random_joint(2, 4, 3, 5, 3, seed=7), []
    for method in ("triton", "wavefront"):
        slope = torch.nn.PReLU(init=0.3, dtype=torch.float64)
        fused_rnnt_loss(*joint, slope, method=method).backward()
        gradients.append(slope.weight.grad)
    torch.testing.assert_close(*gradients, **EXACT)


# ---- types, and what stands in memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_other_types(dtype, limit):
    joint = random_joint(2, 12, 4, 21, 8, seed=8, dtype=dtype, spread=0.5)
    costs, gradients = got(joint, fastemit_lambda=0.1, **TRITON)
    exact_costs, exact_gradients = wanted(exact(joint), fastemit_lambda=0.1)
    assert costs.dtype == torch.float32 and {x.dtype for x in gradients} == {dtype}
    torch.testing.assert_close(costs.double(), exact_costs, rtol=limit, atol=limit)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert (gradient.double() - exact_gradient).norm() < limit * exact_gradient.norm()


def test_autocast():
    """Products in bfloat16, float32 inputs, of which one is bfloat16 before; every gradient in its input's type."""
    joint = random_joint(2, 8, 3, 11, 6, seed=9, dtype=torch.float32, spread=0.5)
    joint = joint._replace(dec=joint.dec.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        costs, gradients = got(joint, **TRITON)
    exact_costs, exact_gradients = wanted(exact(joint))
    assert costs.dtype == torch.float32 and [x.dtype for x in gradients] == [x.dtype for x in joint[:4]]
    torch.testing.assert_close(costs.double(), exact_costs, rtol=2e-2, atol=2e-2)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert (gradient.double() - exact_gradient).norm() < 3e-2 * exact_gradient.norm()


@pytest.mark.parametrize("upstream", [1.0, 1e-33])
def test_no_subnormal_numbers_reach_the_products(monkeypatch, upstream):
    joint = random_joint(1, 9, 4, 20, 4, seed=10, dtype=torch.float32, spread=12.0)
    seen, original = [], fused.Gradients.add

    def recording(self, cells, to_logits):
        original(self, cells, lambda *given: seen.append(to_logits(*given)) or seen[-1])

    monkeypatch.setattr(fused.Gradients, "add", recording)
    got(joint, weights=torch.tensor([upstream]), threshold=0, **TRITON)
    (grad,) = seen
    sizes = grad[grad != 0].abs()
    assert len(sizes) and sizes.min() >= torch.finfo(torch.float32).tiny and (grad == 0).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_are_visible_in_their_utterance_alone(value):
    joint = random_joint(3, 4, 2, 5, 3, seed=11)
    joint.enc[1, 0, 1] = value
    costs, (enc, _, _, _) = got(joint, torch.nn.ReLU(), **TRITON)
    assert costs.isnan().tolist() == [False, True, False]
    assert [bool(x.isnan().any()) for x in enc] == [False, True, False]


def test_fresh_memory_is_not_read():
    joint = random_joint(3, 5, 3, 5, 3, seed=12, dtype=torch.float32)
    plain = got(joint, **TRITON)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        filled = got(joint, **TRITON)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(filled, plain, atol=0, rtol=0)


def test_any_strides():
    joint = random_joint(2, 4, 3, 5, 6, seed=13)
    swapped = joint._replace(**{name: getattr(joint, name).mT.contiguous().mT for name in NAMES[:3]})
    whole = wanted(joint)
    torch.testing.assert_close(got(swapped, **TRITON), whole, **EXACT)
    doubled = joint.enc.repeat_interleave(2, 2)[..., ::2]
    assert not doubled.is_contiguous()
    costs = fused_rnnt_loss(doubled, *joint[1:], reduction="none", **TRITON)
    torch.testing.assert_close(costs, whole[0], **EXACT)


# ---- inside autograd ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["enc", "dec", "weight", "bias", "enc dec"])
def test_only_what_requires_a_gradient_gets_one(names):
    joint = random_joint(2, 4, 2, 4, 3, seed=14)
    whole = dict(zip(NAMES, wanted(joint)[1], strict=True))
    leaves = joint.leaves(*names.split())
    fused_rnnt_loss(*leaves, reduction="sum", **TRITON).backward()
    for name in NAMES:
        grad = getattr(leaves, name).grad
        if name in names.split():
            torch.testing.assert_close(grad, whole[name], **EXACT)
        else:
            assert grad is None


def test_without_bias_and_again_on_a_retained_graph():
    joint = random_joint(2, 4, 2, 4, 3, seed=15)
    leaves = joint.leaves()._replace(bias=None)
    loss = fused_rnnt_loss(*leaves, reduction="sum", **TRITON)
    first, second = (torch.autograd.grad(loss, leaves[:3], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    torch.testing.assert_close(first, wanted(joint._replace(bias=torch.zeros(4).double()))[1][:3], **EXACT)


def test_a_gradient_penalty_is_refused():
    leaves = random_joint(2, 4, 2, 4, 3, seed=17).leaves()
    assert_no_penalty(fused_rnnt_loss(*leaves, **TRITON), leaves.weight, leaves.enc)


def test_a_constant_added_to_all_logits_costs_no_digits():
    joint = random_joint(2, 6, 4, 7, 3, seed=18, dtype=torch.float32)
    quarters = [(x * 2).round() / 2 for x in joint[:4]]
    for offset in (1e4, -1e6):
        moved = Joint(*quarters[:3], quarters[3] + offset, *joint[4:])
        found, right = (
            f(one, torch.nn.Identity(), **o) for f, one, o in ((got, moved, TRITON), (wanted, exact(moved), {}))
        )
        torch.testing.assert_close(found[0].double(), right[0], rtol=1e-6, atol=0)
        size = right[1][2].norm()
        assert all((one - other).norm() < 2e-6 * size for one, other in zip(found[1], right[1], strict=True))


def test_value_alone():
    joint = random_joint(2, 4, 2, 4, 3, seed=16)
    with torch.no_grad():
        costs = fused_rnnt_loss(*joint.leaves(), reduction="none", **TRITON)
    assert costs.grad_fn is None
    torch.testing.assert_close(costs, wanted(joint)[0], **EXACT)
