"""What is wrong is refused at the door, in words that name the argument, what came and what was expected."""

import pytest
import torch

from espnet_mega_plugin.rnnt import METHODS, RNNTLoss, rnnt_loss

GOOD = dict(
    acts=torch.zeros(2, 5, 4, 6),
    labels=torch.tensor([[1, 2, 3], [4, 5, -1]]),
    act_lens=torch.tensor([5, 3]),
    label_lens=torch.tensor([3, 2]),
)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(acts=[[0.0]]), TypeError, r"acts must be a torch.Tensor; got list"),
        (dict(acts=torch.zeros(2, 5, 4, 6, dtype=torch.int64)), TypeError, r"acts must be floating.*torch.int64"),
        (dict(acts=torch.zeros(2, 5, 4, 6, dtype=torch.complex64)), TypeError, r"acts must be floating.*complex64"),
        (
            dict(acts=torch.zeros(2, 5, 6)),
            ValueError,
            r"acts must be logits of shape \(B, T, U\+1, V\); got \(2, 5, 6\)",
        ),
        (dict(acts=torch.zeros(2, 0, 4, 6)), ValueError, r"acts needs at least one frame.*\(2, 0, 4, 6\)"),
        (dict(acts=torch.zeros(2, 5, 0, 6)), ValueError, r"acts needs at least.*one row.*\(2, 5, 0, 6\)"),
        (dict(acts=torch.zeros(2, 5, 4, 0)), ValueError, r"acts needs at least.*one class.*\(2, 5, 4, 0\)"),
        (dict(labels=None), TypeError, r"labels must be a torch.Tensor; got NoneType"),
        (dict(labels=torch.zeros(2, 3)), TypeError, r"labels must be int32 or int64; got torch.float32"),
        (dict(labels=torch.zeros(2, 3, dtype=torch.bool)), TypeError, r"labels must be int32 or int64; got torch.bool"),
        (dict(labels=torch.ones(3, dtype=torch.int64)), ValueError, r"labels must be \(B, U\).*got \(3,\)"),
        (dict(labels=torch.ones(3, 3, dtype=torch.int64)), ValueError, r"labels must be.*B = 2.*got \(3, 3\)"),
        (
            dict(labels=torch.ones(2, 2, dtype=torch.int64)),
            ValueError,
            r"labels must be \(B, U\) = \(2, 3\).*got \(2, 2\)",
        ),
        (
            dict(labels=torch.tensor([[1, 2, 3], [4, 6, -1]])),
            ValueError,
            r"labels\[1, 1\] = 6 is outside 0 to V - 1 = 5",
        ),
        (dict(labels=torch.tensor([[1, -1, 3], [4, 5, -1]])), ValueError, r"labels\[0, 1\] = -1 is outside 0 to V"),
        (dict(labels=torch.tensor([[1, 2, 3], [0, 5, -1]])), ValueError, r"labels\[1, 0\] = 0 is the blank"),
        (dict(blank=5), ValueError, r"labels\[1, 1\] = 5 is the blank"),
        (dict(blank=-1), ValueError, r"labels\[1, 1\] = 5 is the blank"),
        (dict(act_lens=torch.tensor([5.0, 3.0])), TypeError, r"act_lens must be int32 or int64; got torch.float32"),
        (dict(act_lens=torch.tensor([5])), ValueError, r"act_lens must be \(B,\) = \(2,\) as in acts; got \(1,\)"),
        (dict(act_lens=torch.tensor([[5, 3]])), ValueError, r"act_lens must be \(B,\).*got \(1, 2\)"),
        (dict(act_lens=torch.tensor([5, 0])), ValueError, r"act_lens must be from 1 to 5.*utterance 1 has 0"),
        (dict(act_lens=torch.tensor([6, 3])), ValueError, r"act_lens must be from 1 to 5.*utterance 0 has 6"),
        (dict(label_lens=[3, 2]), TypeError, r"label_lens must be a torch.Tensor; got list"),
        (dict(label_lens=torch.tensor([3, 2, 1])), ValueError, r"label_lens must be \(B,\).*got \(3,\)"),
        (dict(label_lens=torch.tensor([3, -1])), ValueError, r"label_lens must be from 0 to 3.*utterance 1 has -1"),
        (dict(label_lens=torch.tensor([4, 2])), ValueError, r"label_lens must be from 0 to 3.*utterance 0 has 4"),
        (dict(blank=6), ValueError, r"blank must be a class from 0 to V - 1 = 5, or -1.*got 6"),
        (dict(blank=-2), ValueError, r"blank must be a class.*got -2"),
        (dict(blank=1.0), TypeError, r"blank must be an int; got float"),
        (dict(blank=True), TypeError, r"blank must be an int; got bool"),
        (dict(reduction="avg"), ValueError, r"reduction must be one of 'none', 'mean', 'sum'; got 'avg'"),
        (dict(reduction=None), ValueError, r"reduction must be one of .*got None"),
        (dict(fastemit_lambda=-0.1), ValueError, r"fastemit_lambda must be a finite number from 0 up; got -0.1"),
        (dict(fastemit_lambda=float("nan")), ValueError, r"fastemit_lambda must be.*got nan"),
        (dict(fastemit_lambda=float("inf")), ValueError, r"fastemit_lambda must be.*got inf"),
        (dict(fastemit_lambda="0"), TypeError, r"fastemit_lambda must be.*got str"),
        (dict(threshold=-1e-9), ValueError, r"threshold must be None or a number from 0 to below 1; got -1e-09"),
        (dict(threshold=1.0), ValueError, r"threshold must be.*got 1.0"),
        (
            dict(method="numba"),
            ValueError,
            r"method must be 'auto' or one of 'reference', 'triton', 'wavefront'; got 'numba'",
        ),
    ],
)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_refused(wrong, error, message, method):
    with pytest.raises(error, match=message):
        rnnt_loss(**{**GOOD, "method": method, **wrong})


def test_the_good_one_is_not_refused():
    assert rnnt_loss(**GOOD).isfinite()


def test_the_module_refuses_when_it_is_made():
    with pytest.raises(ValueError, match="reduction must be one of"):
        RNNTLoss(reduction="batch")
    with pytest.raises(ValueError, match="fastemit_lambda must be"):
        RNNTLoss(fastemit_lambda=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'clamp'"):
        RNNTLoss(clamp=1.0)
    with pytest.raises(TypeError, match="blank must be an int; got str"):
        RNNTLoss(blank="a")
    with pytest.raises(ValueError, match="blank must be a class from 0 up, or -1 for the last one; got -2"):
        RNNTLoss(blank=-2)
    with pytest.raises(ValueError, match="method must be 'auto' or one of .*; got 'numba'"):
        RNNTLoss(method="numba")
    with pytest.raises(ValueError, match="threshold must be"):
        RNNTLoss(threshold=1.0)


def test_blank_minus_one_is_the_last_class():
    labels = torch.tensor([[1, 2, 3], [4, 0, -1]])
    acts = torch.randn(2, 5, 4, 6)
    lens = GOOD["act_lens"], GOOD["label_lens"]
    torch.testing.assert_close(rnnt_loss(acts, labels, *lens, blank=-1), rnnt_loss(acts, labels, *lens, blank=5))


def test_padding_may_hold_anything():
    """Frames and rows beyond the longest utterance, and labels beyond each length, are padding."""
    lens = torch.tensor([3, 2]), torch.tensor([1, 0])
    labels = torch.tensor([[1, -7, 10**9], [0, 99, -1]], dtype=torch.int32)
    loss = rnnt_loss(GOOD["acts"], labels, *lens, reduction="none")
    torch.testing.assert_close(loss, rnnt_loss(GOOD["acts"][:, :3, :2], labels[:, :1], *lens, reduction="none"))
