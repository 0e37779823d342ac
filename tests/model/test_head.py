"""The chunked loss compared with torch's cross entropy."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.model.head import cross_entropy_sum
from trivium.model.shape import CPU_SLICE_VALUES, LOGITS_CHUNK_BYTES, loss_chunk_rows


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def inputs(rows: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 0.3):
    torch.manual_seed(rows + hidden + vocab)
    hidden_MD = torch.randn(rows, hidden).to(dtype).requires_grad_()
    weight_VD = (scale * torch.randn(vocab, hidden)).requires_grad_()
    return hidden_MD, weight_VD, torch.randint(vocab, (rows,))


def reference(hidden_MD, weight_VD, labels):
    """torch's cross entropy in fp64, with its gradients."""
    hidden = hidden_MD.detach().double().requires_grad_()
    weight = weight_VD.detach().to(hidden_MD.dtype).double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (loss / len(labels)).backward()
    return loss, hidden.grad, weight.grad


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(2, 300), st.integers(1, 80))
def test_cross_entropy_sum_equals_plain(rows, hidden, vocab, chunk_rows):
    hidden_MD, weight_VD, labels = inputs(rows, hidden, vocab)
    loss = cross_entropy_sum(hidden_MD, weight_VD, labels, chunk_rows=chunk_rows)
    (loss / rows).backward()
    expected, grad_hidden, grad_weight = reference(hidden_MD, weight_VD, labels)
    # Each is a difference of two parts; where little is left of them, their own size says how exact it can be.
    largest_logit = float((hidden_MD @ weight_VD.T).detach().abs().max())
    assert abs(loss.item() - expected.item()) < 1e-6 * (expected.item() + rows * largest_logit)
    for found, plain, part in (
        (hidden_MD.grad, grad_hidden, weight_VD[labels]),
        (weight_VD.grad, grad_weight, hidden_MD),
    ):
        assert (found.double() - plain).norm() < 1e-6 * (plain.norm() + part.detach().norm() / rows)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 24), st.integers(2, 120), st.integers(1, 50), st.data())
def test_cross_entropy_sum_with_weights_and_head_rows_equals_plain(rows, hidden, vocab, chunk_rows, data):
    hidden_MD, weight_VD, labels = inputs(rows, hidden, vocab)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, vocab - 1), max_size=9, unique=True)), dtype=torch.int64)
    rows_KD = torch.randn(len(ids), hidden).requires_grad_()
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.5]), min_size=rows, max_size=rows)))
    labels[::3] = ids[0] if len(ids) else labels[::3]
    labels[1::4] = -100
    loss = cross_entropy_sum(hidden_MD, weight_VD, labels, weights, (ids, rows_KD), chunk_rows)
    loss.backward()

    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_MD, weight_VD, rows_KD)]
    logits = wide[0] @ wide[1].index_copy(0, ids, wide[2]).T
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    expected = (losses * weights).sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for found, plain in zip((hidden_MD, weight_VD, rows_KD), wide, strict=True):
        torch.testing.assert_close(found.grad.double(), plain.grad, rtol=1e-4, atol=1e-5)
    assert (weight_VD.grad[ids] == 0).all()


def test_head_rows_of_a_frozen_head_in_bf16():
    hidden_MD, weight_VD, labels = inputs(300, 64, 1000, torch.bfloat16)
    weight_VD = weight_VD.detach().bfloat16()
    ids, rows_KD = torch.tensor([7, 3]), torch.randn(2, 64).requires_grad_()
    labels[:100] = 3
    loss = cross_entropy_sum(hidden_MD, weight_VD, labels, head_rows=(ids, rows_KD), chunk_rows=128)
    (loss / 300).backward()
    whole = weight_VD.float().index_copy(0, ids, rows_KD.detach())
    expected, grad_hidden, grad_weight = reference(hidden_MD, whole, labels)
    assert rows_KD.grad.dtype == torch.float32
    assert relative(loss, expected) < 1e-3
    assert relative(hidden_MD.grad, grad_hidden) < 1e-2
    assert relative(rows_KD.grad, grad_weight[ids]) < 1e-2


def test_cross_entropy_sum_equals_plain_with_the_real_vocabulary():
    hidden_MD, weight_VD, labels = inputs(40, 32, 151_936)
    assert CPU_SLICE_VALUES // 151_936 < 16 < 40  # several slices in a chunk, several chunks
    loss = cross_entropy_sum(hidden_MD, weight_VD, labels, chunk_rows=16)
    (loss / 40).backward()
    expected, grad_hidden, grad_weight = reference(hidden_MD, weight_VD, labels)
    assert relative(loss, expected) < 1e-6
    assert relative(hidden_MD.grad, grad_hidden) < 1e-6
    assert relative(weight_VD.grad, grad_weight) < 1e-6


def test_cross_entropy_sum_of_huge_logits_does_not_overflow():
    hidden_MD, weight_VD, labels = inputs(20, 16, 50, scale=100.0)
    loss = cross_entropy_sum(hidden_MD, weight_VD, labels, chunk_rows=7)
    loss.backward()
    assert relative(loss, reference(hidden_MD, weight_VD, labels)[0]) < 1e-6
    assert torch.isfinite(hidden_MD.grad).all() and torch.isfinite(weight_VD.grad).all()


def test_cross_entropy_sum_in_bf16_keeps_loss_and_head_gradient_in_fp32():
    hidden_MD, weight_VD, labels = inputs(600, 64, 2000, torch.bfloat16)
    loss = cross_entropy_sum(hidden_MD, weight_VD, labels, chunk_rows=128)
    (loss / 600).backward()
    expected, grad_hidden, grad_weight = reference(hidden_MD, weight_VD, labels)
    assert loss.dtype == torch.float32 and weight_VD.grad.dtype == torch.float32
    assert relative(loss, expected) < 1e-4
    assert relative(hidden_MD.grad, grad_hidden) < 1e-2
    assert relative(weight_VD.grad, grad_weight) < 1e-2


def test_cross_entropy_sum_ignores_padding():
    hidden_MD, weight_VD, labels = inputs(40, 8, 30)
    padded = torch.cat([labels, torch.full((9,), -100)])
    more = torch.cat([hidden_MD.detach(), 50 * torch.randn(9, 8)]).requires_grad_()
    loss = cross_entropy_sum(more, weight_VD, padded, chunk_rows=16)
    loss.backward()
    found = weight_VD.grad.clone()
    weight_VD.grad = None
    expected = cross_entropy_sum(hidden_MD, weight_VD, labels, chunk_rows=16)
    expected.backward()
    assert relative(loss, expected) < 1e-6 and relative(found, weight_VD.grad) < 1e-6
    assert relative(more.grad[:40], hidden_MD.grad) < 1e-6
    assert (more.grad[40:] == 0).all()


def test_frozen_head_gets_no_gradient():
    hidden_MD, weight_VD, labels = inputs(10, 8, 30)
    weight_VD.requires_grad_(False)
    cross_entropy_sum(hidden_MD, weight_VD, labels).backward()
    assert weight_VD.grad is None and hidden_MD.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_chunk_rows_fit_their_bytes(dtype):
    rows = loss_chunk_rows(151_936, dtype.itemsize, is_trained=True)
    assert rows * 151_936 * dtype.itemsize <= LOGITS_CHUNK_BYTES
    assert loss_chunk_rows(10**9, dtype.itemsize, is_trained=True) == 64
