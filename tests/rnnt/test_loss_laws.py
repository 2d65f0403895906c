"""What the loss has to obey, whichever method computes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rnnt_problems import ON_CPU, Problem, inside, random_problem

from espnet_mega_plugin.rnnt import RNNTLoss, rnnt_loss, wavefront

FAST = [name for name in ON_CPU if name != "reference"]
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def costs_and_gradient(problem: Problem, weights=None, **options):
    """Costs (B,) and the gradient of their weighted sum to the logits; ``leaf`` chooses where the gradient is made."""
    leaf = problem.acts.detach().clone().requires_grad_()
    acts = leaf if options.pop("leaf", True) else leaf * 1
    costs = rnnt_loss(acts, *problem[1:], reduction="none", **options)
    (gradient,) = torch.autograd.grad(costs, leaf, torch.ones_like(costs) if weights is None else weights)
    return costs.detach(), gradient


@pytest.mark.parametrize("method", FAST)
@settings(max_examples=80)
@given(
    B=st.integers(1, 4),
    T=st.integers(1, 7),
    U=st.integers(0, 6),
    V=st.integers(2, 6),
    blank=st.integers(-1, 5),
    fastemit_lambda=st.sampled_from([0.0, 0.01, 1.5]),
    leaf=st.booleans(),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_every_method_is_the_reference(method, B, T, U, V, blank, fastemit_lambda, leaf, spread, seed):
    blank = min(blank, V - 1)
    problem = random_problem(B, T, U, V, seed, blank % V, spread)._replace(blank=blank)
    weights = torch.randn(B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = costs_and_gradient(problem, weights, fastemit_lambda=fastemit_lambda, method="reference")
    got = costs_and_gradient(problem, weights, fastemit_lambda=fastemit_lambda, method=method, leaf=leaf)
    torch.testing.assert_close(got, wanted, **EXACT)
    assert (got[1][~inside(problem)] == 0).all()


def test_tiles_of_every_size_give_the_same(monkeypatch):
    problem = random_problem(3, 13, 7, 11, seed=3, dtype=torch.float32)
    wanted = costs_and_gradient(problem, method="reference")
    for rows in (1, 3, 8, 50, 1000):
        monkeypatch.setattr(wavefront, "CPU_TILE_BYTES", rows * 11 * 4)
        torch.testing.assert_close(costs_and_gradient(problem), wanted)


def test_batch_is_alone():
    problem = random_problem(5, 9, 6, 8, seed=4)
    costs, gradient = costs_and_gradient(problem)
    for b in range(5):
        one = problem.only(b)
        cost, alone = costs_and_gradient(one)
        torch.testing.assert_close(cost[0], costs[b], **EXACT)
        torch.testing.assert_close(alone[0], gradient[b, : one.acts.shape[1], : one.acts.shape[2]], **EXACT)


def test_a_constant_added_to_a_cell_changes_nothing():
    problem = random_problem(3, 6, 4, 5, seed=5)
    moved = problem.with_acts(problem.acts + 40 * torch.randn(3, 6, 5, 1, dtype=torch.float64))
    torch.testing.assert_close(costs_and_gradient(moved), costs_and_gradient(problem), atol=1e-9, rtol=1e-9)


def test_classes_have_no_order():
    problem = random_problem(3, 6, 4, 5, seed=6)
    order = torch.randperm(5)
    place = order.argsort()  # class k moves to place[k]
    labels = torch.where(problem.labels < 0, -1, place[problem.labels])
    moved = Problem(problem.acts[..., order], labels, *problem[2:4], int(place[problem.blank]))
    costs, gradient = costs_and_gradient(problem)
    torch.testing.assert_close(costs_and_gradient(moved), (costs, gradient[..., order]), **EXACT)


def test_rows_of_the_gradient_sum_to_zero():
    _, gradient = costs_and_gradient(random_problem(3, 8, 5, 7, seed=7), fastemit_lambda=0.2)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3, 8, 6, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("method", ON_CPU)
def test_reductions(method):
    problem = random_problem(4, 5, 3, 6, seed=8)
    loss = {name: rnnt_loss(*problem, reduction=name, method=method) for name in ("none", "sum", "mean")}
    assert loss["none"].shape == (4,) and loss["sum"].shape == loss["mean"].shape == (1,)
    torch.testing.assert_close(loss["sum"], loss["none"].sum()[None])
    torch.testing.assert_close(loss["mean"], loss["none"].sum()[None] / 4)


@pytest.mark.parametrize("method", ON_CPU)
def test_fastemit_leaves_the_value_alone(method):
    problem = random_problem(3, 5, 4, 6, seed=9)
    plain, plain_gradient = costs_and_gradient(problem, fastemit_lambda=0.0, method=method)
    pushed, pushed_gradient = costs_and_gradient(problem, fastemit_lambda=0.5, method=method)
    torch.testing.assert_close(pushed, plain, atol=0, rtol=0)
    assert (pushed_gradient - plain_gradient).abs().max() > 0.01


def test_defaults_are_warp_transducers():
    problem = random_problem(3, 5, 4, 6, seed=10)
    acts = problem.acts.nan_to_num()
    leaves = [acts.clone().requires_grad_() for _ in range(3)]
    RNNTLoss()(leaves[0], *problem[1:4]).backward()
    rnnt_loss(leaves[1], *problem[1:4]).backward()
    rnnt_loss(leaves[2], *problem[1:4], 0, "mean", 0.001, method="reference").backward()
    for leaf in leaves[:2]:
        torch.testing.assert_close(leaf.grad, leaves[2].grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_integer_types_are_alike(dtype):
    problem = random_problem(3, 5, 4, 6, seed=11)
    wanted = rnnt_loss(*problem)
    given = [tensor.to(dtype) for tensor in problem[1:4]]
    torch.testing.assert_close(rnnt_loss(problem.acts, *given), wanted, atol=0, rtol=0)


def test_columns_of_labels_beyond_u_are_padding():
    problem = random_problem(3, 5, 4, 6, seed=12)
    wider = torch.cat([problem.labels, torch.full((3, 2), -1)], 1)
    torch.testing.assert_close(rnnt_loss(problem.acts, wider, *problem[2:]), rnnt_loss(*problem), atol=0, rtol=0)


@pytest.mark.parametrize("method", ON_CPU)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(method, reduction):
    acts = torch.zeros(0, 5, 3, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int32)
    loss = rnnt_loss(acts, torch.zeros(0, 2, dtype=torch.int32), none, none, reduction=reduction, method=method)
    assert loss.tolist() == ([] if reduction == "none" else [0.0])
    loss.sum().backward()
    assert acts.grad.shape == acts.shape


def test_smallest():
    """One frame, no labels, two classes: the blank's own probability."""
    acts = torch.tensor([[[[0.3, -1.1]]]], dtype=torch.float64)
    lens = torch.tensor([1]), torch.tensor([0])
    cost = rnnt_loss(acts, torch.zeros(1, 0, dtype=torch.int64), *lens)
    torch.testing.assert_close(cost, -acts.log_softmax(-1)[0, 0, :1, 0])


# ---- types and strides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_low_precision_against_float64(dtype, leaf, spread):
    """float32: 1e-6 of the gradient's norm; half types: the rounding of the gradient itself."""
    problem = random_problem(3, 40, 12, 50, seed=13, spread=spread, dtype=dtype)
    wanted = costs_and_gradient(problem.with_acts(problem.acts.double()), fastemit_lambda=0.01)
    costs, gradient = costs_and_gradient(problem, fastemit_lambda=0.01, leaf=leaf)
    assert costs.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(costs.double(), wanted[0], rtol=1e-6, atol=1e-5)
    error = (gradient.double() - wanted[1]).norm() / wanted[1].norm()
    rounding = (wanted[1].to(dtype).double() - wanted[1]).norm() / wanted[1].norm()
    assert error <= max(1e-6, 1.01 * rounding), (float(error), float(rounding))


def test_peaky_logits_keep_their_precision():
    """A trained model's rows: one class has almost everything, at logits of 25; what is left to learn is small."""
    problem = random_problem(2, 60, 15, 100, seed=14, dtype=torch.float32)
    acts = problem.acts.clone()
    acts[..., 0] += 25
    for u in range(15):
        acts[:, 4 * u + 2, u, problem.labels[0, u]] += 40
    wanted = costs_and_gradient(problem.with_acts(acts.double()))
    costs, gradient = costs_and_gradient(problem.with_acts(acts))
    torch.testing.assert_close(costs.double(), wanted[0], rtol=1e-6, atol=2e-6)
    assert (gradient.double() - wanted[1]).norm() / wanted[1].norm() < 1e-6


def test_any_strides():
    problem = random_problem(4, 6, 5, 7, seed=15)
    wanted = costs_and_gradient(problem)
    swapped = problem.acts.transpose(1, 3).contiguous().transpose(1, 3)
    sliced = torch.full((4, 8, 9, 15), torch.nan, dtype=torch.float64)
    sliced[:, 1:7, 2:8, ::2][..., :7] = problem.acts
    for acts in (swapped, sliced[:, 1:7, 2:8, ::2][..., :7]):
        assert not acts.is_contiguous()
        base = acts.requires_grad_()
        torch.testing.assert_close(rnnt_loss(base * 1, *problem[1:], reduction="none"), wanted[0], **EXACT)
        costs = rnnt_loss(base, *problem[1:], reduction="none")
        torch.testing.assert_close(torch.autograd.grad(costs.sum(), base)[0], wanted[1], **EXACT)


def test_expanded_logits():
    row = torch.randn(1, 6, 1, 7, dtype=torch.float64, requires_grad=True)
    problem = random_problem(4, 6, 5, 7, seed=16)
    gradients = []
    for acts in (row.expand(4, 6, 6, 7), row.expand(4, 6, 6, 7).contiguous()):
        gradients.append(torch.autograd.grad(rnnt_loss(acts, *problem[1:]), row)[0])
    torch.testing.assert_close(*gradients)


# ---- awkward numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_are_visible_in_their_utterance_alone(value, dtype, leaf):
    problem = random_problem(3, 6, 4, 5, seed=17, dtype=dtype)
    for b in range(3):
        acts = problem.acts.clone()
        acts[b, int(problem.act_lens[b]) - 1, 0, 2] = value
        costs, gradient = costs_and_gradient(problem.with_acts(acts), leaf=leaf)
        valid = inside(problem)
        for other in range(3):
            assert costs[other].isnan() == (other == b)
            assert gradient[other][valid[other]].isnan().all() == (other == b)
            assert not gradient[other][~valid[other]].isnan().any()


@pytest.mark.parametrize("mask", [-torch.inf, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_masked_class_is_as_if_it_were_not_there(dtype, mask):
    problem = random_problem(3, 6, 4, 5, seed=18, dtype=dtype)
    wanted = costs_and_gradient(problem)
    column = torch.full_like(problem.acts[..., :1], mask)
    costs, gradient = costs_and_gradient(problem.with_acts(torch.cat([problem.acts, column], -1)))
    torch.testing.assert_close((costs, gradient[..., :-1]), wanted)
    assert (gradient[..., -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_arcs_leave_the_other_paths(dtype):
    """-inf for the blank of one cell and a label of another: as where they are just improbable."""
    problem = random_problem(2, 6, 4, 5, seed=19, dtype=dtype)
    improbable, masked = problem.acts.clone(), problem.acts.clone()
    for acts, value in ((improbable, -200.0), (masked, -torch.inf)):
        acts[0, 2, 1, 0] = value
        acts[0, 3, 2, problem.labels[0, 2]] = value
        acts[0, 0, 0, 0] = acts[0, 1, 0, 0] = value  # no arc leads to a cell
        acts[0, 0, 0, problem.labels[0, 0]] = -1.0
        acts[0, 4, :, 0] = value
        acts[0, 4, 4, 0] = 0.5
    wanted = costs_and_gradient(problem.with_acts(improbable), method="reference")
    for method in ON_CPU:
        torch.testing.assert_close(costs_and_gradient(problem.with_acts(masked), method=method), wanted)


@pytest.mark.parametrize("cells", ["all", "a row"])
@pytest.mark.parametrize("value", [1e4, -1e6, 1e8, 1e12, 1e17, 3e38, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_that_are_large_together_cost_no_digits(dtype, value, cells, power):
    """A constant below them all, or a row that is masked as a whole: what is lost is lost in the logits alone."""
    problem = random_problem(2, 6, 4, 5, seed=37, dtype=dtype)
    acts = problem.acts.clone()
    if cells == "all":
        acts = ((acts * 8).round() / 8).add_(value).clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    else:
        acts[0, 1, 1] = value
        acts[0, 5, 4] = value  # on every path
    wanted = costs_and_gradient(problem.with_acts(acts.double()), method="reference", fastemit_lambda=0.3)
    rounding = 1e-6 if dtype == torch.float32 else 2e-10  # `wavefront.LARGE`
    for leaf in (True, False):
        costs, gradient = costs_and_gradient(problem.with_acts(acts), leaf=leaf, fastemit_lambda=0.3)
        torch.testing.assert_close(costs.double(), wanted[0], rtol=rounding, atol=0)
        assert (gradient - wanted[1]).norm() < rounding * wanted[1].norm()


def test_nor_do_they_on_other_devices(monkeypatch):
    """CPU tensors treated as those of a device that reading from would synchronise."""
    monkeypatch.setattr(wavefront, "lengths_are_free", lambda logits: False)
    problem = random_problem(2, 6, 4, 5, seed=38)
    for value in (1e12, -1e30):
        moved = problem.with_acts(problem.acts + value)
        wanted = costs_and_gradient(moved, method="reference")
        torch.testing.assert_close(costs_and_gradient(moved), wanted, **EXACT)


@pytest.mark.parametrize("T, U", [(2, 1030), (3, 1024)])
def test_more_than_1024_rows(T, U):
    problem = random_problem(1, T, U, 3, seed=39)
    torch.testing.assert_close(costs_and_gradient(problem), costs_and_gradient(problem, method="reference"), **EXACT)


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("method", ON_CPU)
@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
def test_labels_without_a_path_cost_inf_and_give_no_gradient(leaf, method, topology):
    problem = random_problem(3, 6, 4, 5, seed=20)
    alone = costs_and_gradient(problem, topology=topology)
    acts = problem.acts.clone()
    acts[0, :, 2, problem.labels[0, 2]] = -torch.inf
    costs, gradient = costs_and_gradient(problem.with_acts(acts), leaf=leaf, method=method, topology=topology)
    assert costs[0] == torch.inf
    assert (gradient[0] == 0).all()
    torch.testing.assert_close((costs[1:], gradient[1:]), (alone[0][1:], alone[1][1:]))


@pytest.fixture(params=[wavefront.E, wavefront.TWO], ids=["exp", "exp2"])
def power(request, monkeypatch):
    """Both bases, whichever this machine's processor would take."""
    monkeypatch.setattr(wavefront, "base", lambda device: request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [-1e4, -300.0, 300.0, 1e4])
def test_large_logits_do_not_overflow(dtype, offset, power):
    """Rows that leave the range of a plain sum of exponentials are computed again."""
    problem = random_problem(3, 6, 4, 5, seed=21, dtype=dtype, spread=50.0)
    acts = problem.acts + offset * torch.randint(0, 2, (3, 6, 5, 5))
    costs, gradient = costs_and_gradient(problem.with_acts(acts), method="reference")
    # the costs are differences of float32 numbers as large as the offset
    rounding = 4 * abs(offset) * torch.finfo(dtype).eps
    found = costs_and_gradient(problem.with_acts(acts))
    torch.testing.assert_close(found[0], costs, rtol=1e-5, atol=1e-7 + rounding)
    assert (found[1] - gradient).norm() < 1e-6 * gradient.norm()
    # In float32 a single number may have its row's sum and its own exponential rounded by what `wavefront.LARGE` allows
    torch.testing.assert_close(found[1], gradient, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("spread", [1.0, 16.0, 32.0, 100.0, 1e4, 1e8, 1e12])
def test_the_gradients_error_does_not_grow_with_the_logits(spread, monkeypatch):
    problem = random_problem(2, 40, 12, 50, seed=31, dtype=torch.float32, spread=spread)
    _, wanted = costs_and_gradient(problem.with_acts(problem.acts.double()), method="reference")
    for base in (wavefront.E, wavefront.TWO):
        monkeypatch.setattr(wavefront, "base", lambda device, base=base: base)
        for leaf in (True, False):
            _, gradient = costs_and_gradient(problem, leaf=leaf)
            assert (gradient - wanted).norm() < 1e-6 * wanted.norm(), (base, leaf)


@pytest.mark.parametrize("above", [16.0, 30.0, 45.0, 68.0, 90.0])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_the_gradients_error_does_not_grow_where_another_class_is_likelier(above, offset, power):
    """Neither blank nor label: what a row's sum is made relative to is far below it."""
    problem = random_problem(2, 60, 11, 50, seed=35, dtype=torch.float32, spread=1.0)
    acts = problem.acts + offset
    acts[..., next(k for k in range(1, 50) if k not in problem.labels)] += above
    exact = costs_and_gradient(problem.with_acts(acts.double()))[1]
    gradient = costs_and_gradient(problem.with_acts(acts))[1]
    assert (gradient - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_with_either_base(dtype, power):
    problem = random_problem(3, 9, 5, 20, seed=36, dtype=dtype)
    costs, gradient = costs_and_gradient(problem)
    wanted = costs_and_gradient(problem.with_acts(problem.acts.double()), method="reference")
    torch.testing.assert_close(costs.double(), wanted[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted[1], rtol=0, atol=torch.finfo(dtype).eps)


def test_what_the_threshold_leaves_out_is_less_than_rounding():
    """The default, at a length where many cells have a small posterior."""
    problem = random_problem(1, 300, 80, 50, seed=32, dtype=torch.float32)
    _, wanted = costs_and_gradient(problem.with_acts(problem.acts.double()), threshold=0.0)
    _, gradient = costs_and_gradient(problem)
    assert (gradient[0] == 0).all(-1).double().mean() > 0.1
    assert (gradient - wanted).norm() < 2e-7 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_subnormal_numbers_in_the_gradient(dtype):
    problem = random_problem(2, 30, 10, 40, seed=22, dtype=dtype, spread=40.0)
    for scale in (1.0, 1e-20, 1e-33):
        weights = torch.full((2,), scale, dtype=wavefront.accumulator(dtype))
        _, gradient = costs_and_gradient(problem, weights, threshold=0.0)
        size = gradient[gradient != 0].abs()
        assert len(size) and size.min() >= torch.finfo(dtype).tiny


def test_threshold_gives_exact_zeros_and_keeps_the_rest():
    problem = random_problem(1, 60, 20, 5, seed=23)
    _, whole = costs_and_gradient(problem, threshold=0.0)
    _, banded = costs_and_gradient(problem, threshold=1e-6)
    dropped = (banded == 0).all(-1)
    assert 0.1 < dropped.double().mean() < 0.9
    torch.testing.assert_close(banded[~dropped], whole[~dropped], **EXACT)
    assert whole[dropped].abs().max() <= 1e-6


def test_zero_and_infinite_upstream_gradients():
    problem = random_problem(3, 5, 3, 4, seed=24)
    _, gradient = costs_and_gradient(problem, torch.tensor([0.0, torch.inf, 1.0], dtype=torch.float64))
    assert (gradient[0] == 0).all() and not gradient[1].isfinite().all() and gradient[2].isfinite().all()


# ---- what memory holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_memory_is_not_read(dtype, leaf, power):
    """torch.empty filled with NaN, and garbage outside the lengths, change no bit."""
    problem = random_problem(4, 9, 6, 8, seed=25, dtype=dtype)
    zeros = problem.with_acts(problem.acts.nan_to_num(0.0))
    wanted = costs_and_gradient(zeros, leaf=leaf)
    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        got = costs_and_gradient(problem, leaf=leaf)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.testing.assert_close(got, wanted, atol=0, rtol=0)


# ---- others' losses -------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(B=st.integers(1, 3), T=st.integers(2, 9), U=st.integers(1, 6), V=st.integers(2, 20), seed=st.integers(0, 999))
def test_torchaudio_agrees(B, T, U, V, seed):
    functional = pytest.importorskip("torchaudio.functional")
    problem = random_problem(B, T, U, V, seed, blank=seed % V, dtype=torch.float32)
    # torchaudio reads its padding, and wants int32 and labels that are classes
    theirs = problem.acts.nan_to_num(0.0).requires_grad_()
    others = [tensor.clamp(min=0).int() for tensor in problem[1:4]]
    wanted = functional.rnnt_loss(theirs, *others, blank=problem.blank, reduction="none")
    wanted.sum().backward()
    got = costs_and_gradient(problem, fastemit_lambda=0.0)
    torch.testing.assert_close(got, (wanted.detach(), theirs.grad), atol=2e-5, rtol=2e-5)


def test_espnets_numba_loss_agrees():
    module = pytest.importorskip("espnet2.asr.transducer.rnnt_multi_blank.rnnt_multi_blank")
    problem = random_problem(2, 4, 3, 5, seed=26, dtype=torch.float32)
    fastemit_lambda = 0.25
    theirs = problem.acts.nan_to_num(0.0).requires_grad_()
    loss = module.RNNTLossNumba(blank=0, reduction="sum", fastemit_lambda=fastemit_lambda)
    wanted = loss(theirs, *[tensor.clamp(min=0).int() for tensor in problem[1:4]])
    wanted.sum().backward()
    costs, gradient = costs_and_gradient(problem, fastemit_lambda=fastemit_lambda)
    # theirs reports (1 + lambda) times the value, with warp-transducer's gradient
    torch.testing.assert_close(costs.sum() * (1 + fastemit_lambda), wanted.detach().squeeze(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gradient, theirs.grad, atol=1e-5, rtol=1e-4)
