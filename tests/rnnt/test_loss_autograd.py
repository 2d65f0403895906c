"""The loss inside autograd: where it overwrites the logits, wrong use raises; everywhere else nothing shows."""

import pytest
import torch
from penalties import assert_no_penalty
from rnnt_problems import ON_CPU, random_problem
from torch.utils.checkpoint import checkpoint
from two_processes import in_two_processes

from espnet_mega_plugin.rnnt import RNNTLoss, rnnt_loss, warprnnt
from espnet_mega_plugin.rnnt.wavefront import may_overwrite

EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture
def problem():
    return random_problem(3, 5, 4, 6, seed=31)


@pytest.fixture
def gradient(problem):
    """The right one, to the logits, of the sum."""
    leaf = problem.acts.clone().requires_grad_()
    rnnt_loss(leaf, *problem[1:], reduction="sum", method="reference").backward()
    return leaf.grad


def loss_of(acts, problem, **options):
    return rnnt_loss(acts, *problem[1:], reduction="sum", **options)


@pytest.mark.parametrize("method", ON_CPU)
@pytest.mark.parametrize("inplace", [True, False])
def test_gradcheck(method, inplace):
    problem = random_problem(2, 3, 2, 3, seed=30)

    def costs(leaf):
        # gradcheck runs backward several times, which is for leaves or inplace=False
        acts = leaf if inplace else leaf * 1
        options = dict(reduction="none", fastemit_lambda=0.0, method=method, inplace=inplace)
        return rnnt_loss(acts, *problem[1:], **options)

    assert torch.autograd.gradcheck(costs, problem.acts.nan_to_num(0.0).requires_grad_())


# ---- leaf logits are left alone -------------------------------------------------------------------------------------


def test_leaf_logits_keep_their_values_and_a_second_backward_works(problem, gradient):
    acts = problem.acts.clone().requires_grad_()
    loss = loss_of(acts, problem)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(acts.detach(), problem.acts, equal_nan=True, atol=0, rtol=0)
    loss.backward()
    torch.testing.assert_close(acts.grad, 2 * gradient, **EXACT)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(3, 5, 5, 6),
        lambda x: x[:, :5],
        lambda x: x.transpose(0, 1).transpose(0, 1),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float64),
    ],
)
def test_views_of_a_leaf_are_left_alone(problem, gradient, view):
    leaf = problem.acts.clone().requires_grad_()
    loss = loss_of(view(leaf), problem)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * gradient, **EXACT)
    torch.testing.assert_close(leaf.detach(), problem.acts, equal_nan=True, atol=0, rtol=0)


# ---- other logits give their place to the gradient ------------------------------------------------------------------


def test_the_gradient_takes_the_place_of_the_logits(problem, gradient):
    leaf = problem.acts.clone().requires_grad_()
    acts = leaf * 1
    assert may_overwrite(acts)
    loss_of(acts, problem).backward()
    torch.testing.assert_close(leaf.grad, gradient, **EXACT)
    torch.testing.assert_close(acts.detach(), gradient, **EXACT)


def test_not_where_it_is_told_not_to(problem, gradient):
    leaf = problem.acts.clone().requires_grad_()
    acts = leaf * 1
    loss = loss_of(acts, problem, inplace=False)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * gradient, **EXACT)
    torch.testing.assert_close(acts.detach(), problem.acts, equal_nan=True, atol=0, rtol=0)


class Detached(torch.autograd.Function):
    """Its result looks into its input, which nothing about it tells."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_not_where_a_function_of_pythons_made_them(problem, gradient):
    leaf = problem.acts.clone().requires_grad_()
    loss_of(Detached.apply(leaf), problem).backward()
    torch.testing.assert_close(leaf.detach(), problem.acts, equal_nan=True, atol=0, rtol=0)
    torch.testing.assert_close(leaf.grad, gradient, **EXACT)


def test_not_where_a_compiled_joint_network_made_them(problem):
    def joint(x):
        return x.tanh()

    leaves = [problem.acts.nan_to_num(0.0).requires_grad_() for _ in range(2)]
    loss_of(torch.compile(joint, backend="aot_eager")(leaves[0]), problem).backward()
    loss_of(joint(leaves[1]), problem).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **EXACT)


def test_a_joint_networks_output_is_overwritten(problem):
    lin_out = torch.nn.Linear(7, 6, dtype=torch.float64)
    acts = lin_out(torch.randn(3, 5, 5, 7, dtype=torch.float64))
    assert may_overwrite(acts)


def test_second_backward_over_overwritten_logits_raises(problem):
    acts = problem.acts.clone().requires_grad_() * 1
    loss = loss_of(acts, problem)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"overwritten before its backward.*inplace=False"):
        loss.backward()


def test_second_loss_over_overwritten_logits_raises(problem):
    acts = problem.acts.clone().requires_grad_() * 1
    with pytest.raises(RuntimeError, match=r"overwritten before its backward.*inplace=False"):
        (loss_of(acts, problem) + loss_of(acts, problem)).backward()


def test_second_backward_without_retained_graph_says_what_torch_says(problem):
    loss = loss_of(problem.acts.clone().requires_grad_() * 1, problem)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_another_operation_that_needs_the_logits_makes_autograd_raise(problem):
    leaf = problem.acts.nan_to_num(0.0).requires_grad_()
    acts = leaf * 1
    norm = acts.square().sum()  # made before the loss: its backward runs after the loss's
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (norm + loss_of(acts, problem)).backward()


def test_another_operation_that_is_done_with_the_logits_is_right(problem, gradient):
    leaf = problem.acts.nan_to_num(0.0).requires_grad_()
    acts = leaf * 1
    (loss_of(acts, problem) + acts.square().sum()).backward()
    torch.testing.assert_close(leaf.grad, gradient + 2 * leaf.detach(), **EXACT)


@pytest.mark.parametrize("shape", [(3, 5, 5, 6), (15, 5, 6)])
@pytest.mark.parametrize("function", [lambda x: x.log_softmax(-1), torch.tanh, torch.exp])
def test_an_operation_that_keeps_its_result_keeps_it(problem, function, shape):
    """Logits out of log_softmax, which warp-transducer's users often pass, train as any others."""
    leaf = problem.acts.nan_to_num(0.0).requires_grad_()
    gradients = []
    for method in ("wavefront", "reference"):
        acts = function(leaf.view(shape)).view(3, 5, 5, 6)
        gradients.append(torch.autograd.grad(loss_of(acts, problem, method=method), leaf)[0])
    torch.testing.assert_close(*gradients, **EXACT)


def test_parts_of_one_tensor_each_have_their_loss(problem, gradient):
    """A batch split to save memory: the parts share a version counter and are not overwritten."""
    leaf = problem.acts.clone().requires_grad_()
    acts = leaf * 1
    sum(rnnt_loss(*[x[b : b + 1] for x in (acts, *problem[1:4])], reduction="sum") for b in range(3)).backward()
    torch.testing.assert_close(leaf.grad, gradient, **EXACT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(problem, reentrant):
    """Recomputed tensors are not version-checked by autograd, so nothing may be overwritten there."""
    leaf = problem.acts.nan_to_num(0.0).requires_grad_()

    def region(x):
        acts = x * 2
        return loss_of(acts, problem) + (acts * acts).sum()

    wanted = torch.autograd.grad(region(leaf), leaf)[0]
    checkpoint(region, leaf, use_reentrant=reentrant).backward()
    torch.testing.assert_close(leaf.grad, wanted, **EXACT)


def test_saved_tensors_offloaded(problem, gradient):
    leaf = problem.acts.clone().requires_grad_()
    acts = leaf * 1
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(acts, problem)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * gradient, **EXACT)


def test_hooks_and_retained_gradients_see_the_gradient(problem, gradient):
    leaf = problem.acts.clone().requires_grad_()
    acts = leaf * 1
    seen = []
    acts.register_hook(lambda grad: seen.append(grad.clone()))
    acts.retain_grad()
    loss_of(acts, problem).backward()
    for found in (seen[0], acts.grad, leaf.grad):
        torch.testing.assert_close(found, gradient, **EXACT)


@pytest.mark.parametrize("topology", ["regular", "modified"])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_gradient_penalty_is_refused(problem, inplace, topology):
    leaf = problem.acts.nan_to_num(0.0).requires_grad_()
    assert_no_penalty(loss_of(leaf, problem, topology=topology), leaf)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    acts = leaf * scale
    assert_no_penalty(loss_of(acts, problem, inplace=inplace, topology=topology), acts, leaf, scale)


def test_the_definitions_penalty_is_right(problem):
    leaf = problem.acts[:1].nan_to_num(0.0).requires_grad_()

    def penalty(acts):
        loss = rnnt_loss(acts, *[x[:1] for x in problem[1:4]], method="reference", fastemit_lambda=0.0)
        return torch.autograd.grad(loss, acts, create_graph=True)[0].square().sum()

    assert torch.autograd.gradcheck(penalty, leaf, fast_mode=True)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_gradient_with_a_graph_is_the_same_number(problem, gradient, inplace):
    leaf = problem.acts.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(leaf * 1, problem, inplace=inplace), leaf, create_graph=True)
    torch.testing.assert_close(grad.detach(), gradient, **EXACT)


def test_a_gradient_of_a_gradient_through_the_upstream_one_is_refused(problem):
    leaf, scale = problem.acts.nan_to_num(0.0).requires_grad_(), torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(loss_of(leaf, problem) * scale, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"wavefront\._Costs\.backward cannot be differentiated"):
        torch.autograd.grad(grad.sum(), scale)


def test_a_gradient_with_a_graph_under_checkpointing(problem):
    """There, what is saved may be unpacked but once."""
    leaf = problem.acts.nan_to_num(0.0).requires_grad_()
    assert_no_penalty(checkpoint(lambda x: loss_of(x * 2, problem), leaf, use_reentrant=False), leaf)


# ---- without a gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_value_alone(problem, mode):
    acts = problem.acts.clone().requires_grad_()
    wanted = loss_of(acts, problem).detach()
    with mode():
        loss = loss_of(acts, problem)
        made_here = loss_of(problem.acts.clone(), problem)
    assert not loss.requires_grad and loss.grad_fn is None
    torch.testing.assert_close(loss, wanted, **EXACT)
    torch.testing.assert_close(made_here, wanted, **EXACT)
    assert acts.grad is None


def test_unused_gradient_saves_nothing(problem):
    assert loss_of(problem.acts, problem).grad_fn is None


# ---- training -------------------------------------------------------------------------------------------------------


def tiny_model(dtype=torch.float32):
    torch.manual_seed(32)
    return torch.nn.Linear(8, 6, dtype=dtype), torch.randn(3, 5, 5, 8, dtype=dtype)


def test_autocast(problem):
    """bfloat16 logits out of autocast, the loss inside or outside of it."""
    model, hidden = tiny_model()
    gradients, losses = [], []
    for inside in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            acts = model(hidden)
            assert acts.dtype == torch.bfloat16
            loss = loss_of(acts, problem) if inside else None
        loss = loss if inside else loss_of(acts, problem)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.weight.grad)
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)
    model.zero_grad()
    loss_of(model(hidden), problem).backward()
    torch.testing.assert_close(gradients[0], model.weight.grad, atol=0.05, rtol=0.05)


def test_gradient_scaling(problem):
    model, hidden = tiny_model()
    loss_of(model(hidden), problem).backward()
    wanted = model.weight.grad.clone()
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.scale(loss_of(model(hidden), problem)).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(model.weight.grad, wanted, atol=1e-6, rtol=1e-5)


def test_shape_and_names_of_warprnnt_pytorch(problem):
    """What ESPnet does with it: (1,) that backward takes, the arguments by name."""
    acts = problem.acts.clone().requires_grad_()
    lens = [tensor.int() for tensor in problem[1:4]]
    loss = warprnnt.RNNTLoss(blank=0, fastemit_lambda=0.0)(acts, *lens)
    assert loss.shape == (1,)
    loss.backward()
    assert acts.grad.isfinite().all()
    named = dict(acts=acts, labels=lens[0], act_lens=lens[1], label_lens=lens[2])
    torch.testing.assert_close(warprnnt.rnnt_loss(**named, blank=0, reduction="mean", fastemit_lambda=0.0), loss)


def test_the_module_shows_and_passes_on_its_options(problem):
    loss = RNNTLoss(blank=0, fastemit_lambda=0.01, reduction="none", method="reference")
    assert "fastemit_lambda=0.01" in repr(loss) and "method='reference'" in repr(loss)
    assert loss(*problem[:4]).shape == (3,)


def _one_of_two(rank, results):
    model, hidden = tiny_model(torch.float64)
    model = torch.nn.parallel.DistributedDataParallel(model)
    problem = random_problem(3, 5, 4, 6, seed=31)
    rows = slice(0, 1) if rank == 0 else slice(1, 3)
    acts = model(hidden[rows])
    rnnt_loss(acts, *[x[rows] for x in problem[1:4]], reduction="sum").backward()
    if rank == 0:
        torch.save(model.module.weight.grad, results)


@pytest.mark.slow
def test_two_processes_are_one(problem, tmp_path):
    in_two_processes(tmp_path, _one_of_two, tmp_path / "grad.pt")
    model, hidden = tiny_model(torch.float64)
    loss_of(model(hidden), problem).backward()
    averaged = torch.load(tmp_path / "grad.pt")  # DDP gives the mean over the processes
    torch.testing.assert_close(2 * averaged, model.weight.grad, **EXACT)
