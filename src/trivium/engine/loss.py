"""Cross entropy over the supervised rows only, in chunks, so that the logits of a large vocabulary never exist at once.

Softmax and its gradient are never normalised in the big buffer: with e = exp(logits - max) and s = sum(e),
both gradients need only e / s, and 1 / s is applied to the small side of the products. A chunk is passed over
in slices that fit the cache. Used by the engine alone.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trivium.plan.workload import CPU_SLICE_VALUES, loss_chunk_rows


def cross_entropy_sum(
    hidden_MD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_M: torch.Tensor,
    weights_M: torch.Tensor | None = None,
    head_rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Sum over rows of -weight * ln softmax(hidden @ head.T)[label].

    Args:
        hidden_MD: [rows, hidden], fp32 or bf16; the products are computed in its dtype.
        weight_VD: [vocabulary, hidden], the output head; cast to the dtype of `hidden_MD` once.
        labels_M: int64 [rows]; a negative one marks padding, which adds nothing to the loss or to any gradient.
        weights_M: fp32 [rows], how much each row counts; None counts all the same, as 1.
        head_rows: token ids, int64 [k], and rows, fp32 [k, hidden], that the head has in place of its own.
        chunk_rows: rows whose logits exist at a time; None takes `loss_chunk_rows`.

    Returns: fp32 scalar in nats. Softmax and sums are fp32; the gradient of the head is accumulated in fp32.
    """
    ids_K, rows_KD = head_rows or (labels_M.new_empty(0), weight_VD.new_empty(0, weight_VD.shape[1]))
    chunk_rows = chunk_rows or loss_chunk_rows(weight_VD.shape[0], hidden_MD.dtype.itemsize, weight_VD.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden_MD, weight_VD, rows_KD, ids_K, labels_M, weights_M, chunk_rows)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """All gradients are computed while a chunk's logits are there; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight_VD: torch.Tensor,
        rows_KD: torch.Tensor,
        ids_K: torch.Tensor,
        labels_M: torch.Tensor,
        weights_M: torch.Tensor | None,
        chunk_rows: int,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_rows = ctx.needs_input_grad[:3]
        weight, rows = weight_VD.to(hidden_MD.dtype), rows_KD.to(hidden_MD.dtype)
        grad_hidden = torch.empty_like(hidden_MD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD) if needs_weight else None
        grad_rows = torch.zeros_like(rows_KD) if needs_rows else None
        buffer_CV = hidden_MD.new_empty(min(chunk_rows, len(labels_M)), len(weight))
        loss = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        for chunk in (slice(start, start + chunk_rows) for start in range(0, len(labels_M), chunk_rows)):
            hidden, labels = hidden_MD[chunk], labels_M[chunk, None]
            counts, labels = (labels >= 0).float(), labels.clamp(min=0)
            if weights_M is not None:
                counts *= weights_M[chunk, None]
            logits = torch.mm(hidden, weight.T, out=buffer_CV[: len(labels)])
            logits.index_copy_(1, ids_K, hidden @ rows.T)
            label_logits = logits.gather(1, labels).float()
            maxima, sums = _exponentiate(logits)
            loss += ((sums.log() + maxima - label_logits) * counts).sum()
            scales = counts / sums
            slopes_CK = logits[:, ids_K].float() * scales - (labels == ids_K) * counts
            # The rows that were replaced are done with; what is left belongs to the head's own.
            logits.index_fill_(1, ids_K, 0.0)
            counts = counts * (labels != ids_K).all(1, keepdim=True)
            if grad_hidden is not None:
                into_hidden = torch.mm(logits, weight).float().mul_(scales).sub_(weight[labels[:, 0]] * counts)
                grad_hidden[chunk] = into_hidden.addmm_(slopes_CK, rows.float())
            if grad_rows is not None:
                grad_rows.addmm_(slopes_CK.T, hidden.float())
            if grad_weight is not None:
                _add_product(grad_weight, logits, (hidden.float() * scales).to(hidden.dtype))
                grad_weight.index_add_(0, labels[:, 0], hidden.float() * counts, alpha=-1.0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_rows)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_rows = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        for grad in (grad_weight, grad_rows):
            if grad is not None:
                grad.mul_(grad_loss)
        return grad_hidden, grad_weight, grad_rows, None, None, None, None


def _exponentiate(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace logits by exp(logits - row maximum) in place; return the maxima and the sums, fp32 [C, 1]."""
    num_rows, vocab_size = logits_CV.shape
    slice_rows = max(1, CPU_SLICE_VALUES // vocab_size) if logits_CV.device.type == "cpu" else num_rows
    maxima = torch.empty(num_rows, 1, dtype=torch.float32, device=logits_CV.device)
    sums = torch.empty_like(maxima)
    for rows in (slice(i, i + slice_rows) for i in range(0, num_rows, slice_rows)):
        wide = logits_CV[rows].float()
        torch.amax(wide, dim=1, keepdim=True, out=maxima[rows])
        wide.sub_(maxima[rows]).exp_()
        torch.sum(wide, dim=1, keepdim=True, out=sums[rows])
        if wide.dtype != logits_CV.dtype:
            logits_CV[rows] = wide
    return maxima, sums


def _add_product(total_VD: torch.Tensor, left_CV: torch.Tensor, right_CD: torch.Tensor) -> None:
    """total += left.T @ right, the sum in the dtype of `total`."""
    if total_VD.dtype == left_CV.dtype:
        total_VD.addmm_(left_CV.T, right_CD)
    else:
        total_VD += torch.mm(left_CV.T, right_CD)
