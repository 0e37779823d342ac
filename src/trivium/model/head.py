"""The output head: losses and log-probabilities of supervised tokens, computed in chunks of logits.

The softmax is never normalized in the buffer of logits: with e = exp(logits - max) and s = sum(e), both gradients need
e / s, and 1 / s is applied to the smaller factor of the products. A CPU processes a chunk in slices that fit the cache.

Shapes: M supervised tokens, C tokens of a chunk, D hidden, V vocabulary, K trainable tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trivium.model.shape import CPU_SLICE_VALUES, loss_chunk_rows


def cross_entropy_sum(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    weights_M: Tensor | None = None,
    head_rows: tuple[Tensor, Tensor] | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over tokens of -weight * ln softmax(hidden @ head.T)[label].

    Weights may have any sign, see `engine/objective.py`.

    Args:
        hidden_MD: [tokens, hidden], fp32 or bf16; the products are computed in its dtype.
        weight_VD: [vocabulary, hidden], the output head; cast to the dtype of `hidden_MD` once.
        labels_M: int64 [tokens]; negative labels mark padding, which does not affect loss or gradients.
        weights_M: fp32 [tokens], loss weights; None is a weight of 1 for every token.
        head_rows: token ids, int64 [k], and rows, fp32 [k, hidden], that replace those of `weight_VD`.
        chunk_rows: tokens per chunk; None is `loss_chunk_rows`.

    Returns: fp32 scalar in nats. Softmax and sums are fp32; the gradient of the head is accumulated in fp32.
    """
    ids_K, rows_KD = head_rows or (labels_M.new_empty(0), weight_VD.new_empty(0, weight_VD.shape[1]))
    chunk_rows = chunk_rows or loss_chunk_rows(weight_VD.shape[0], hidden_MD.dtype.itemsize, weight_VD.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden_MD, weight_VD, rows_KD, ids_K, labels_M, weights_M, chunk_rows)


@torch.no_grad()
def token_logprobs(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    head_rows: tuple[Tensor, Tensor] | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """ln softmax(hidden @ head.T)[label] of every token, fp32 [tokens], without gradients; 0 for padding.

    For arguments see `cross_entropy_sum`.
    """
    ids_K, rows_KD = head_rows or (labels_M.new_empty(0), weight_VD.new_empty(0, weight_VD.shape[1]))
    chunk_rows = chunk_rows or loss_chunk_rows(weight_VD.shape[0], hidden_MD.dtype.itemsize, is_trained=False)
    head = _CastHead(weight_VD.to(hidden_MD.dtype), rows_KD.to(hidden_MD.dtype), ids_K)
    logprobs_M = torch.zeros(len(labels_M), dtype=torch.float32, device=hidden_MD.device)
    for chunk, softmax in head.chunks(hidden_MD, labels_M.clamp(min=0), chunk_rows):
        logprobs_M[chunk] = (softmax.label_logits - (softmax.sums.log() + softmax.maxima))[:, 0]
    return logprobs_M.masked_fill_(labels_M < 0, 0.0)


@dataclass(frozen=True)
class _Softmax:
    """One chunk: e = exp(logits - maxima) [C, V] in the compute dtype; sums, maxima, label logits fp32 [C, 1]."""

    exponentials: Tensor
    maxima: Tensor
    sums: Tensor
    label_logits: Tensor


@dataclass(frozen=True)
class _CastHead:
    """The head in the compute dtype: weight [V, D], and rows [K, D] that replace those of the tokens `ids` [K]."""

    weight: Tensor
    rows: Tensor
    ids: Tensor

    def chunks(self, hidden_MD: Tensor, labels_M: Tensor, chunk_rows: int) -> Iterator[tuple[slice, _Softmax]]:
        """Each chunk with its softmax, which is valid until the next chunk, since all chunks share one buffer."""
        buffer_CV = hidden_MD.new_empty(min(chunk_rows, len(labels_M)), len(self.weight))
        for start in range(0, len(labels_M), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            hidden, labels = hidden_MD[chunk], labels_M[chunk, None]
            logits = torch.mm(hidden, self.weight.T, out=buffer_CV[: len(labels)])
            logits.index_copy_(1, self.ids, hidden @ self.rows.T)
            label_logits = logits.gather(1, labels).float()
            yield chunk, _Softmax(logits, *_exponentiate(logits), label_logits)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes all gradients while the logits of a chunk exist; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        rows_KD: Tensor,
        ids_K: Tensor,
        labels_M: Tensor,
        weights_M: Tensor | None,
        chunk_rows: int,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_rows = ctx.needs_input_grad[:3]
        head = _CastHead(weight_VD.to(hidden_MD.dtype), rows_KD.to(hidden_MD.dtype), ids_K)
        grad_hidden = torch.empty_like(hidden_MD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_rows = torch.zeros_like(rows_KD, dtype=torch.float32) if needs_rows else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        for chunk, softmax in head.chunks(hidden_MD, labels_M.clamp(min=0), chunk_rows):
            hidden, labels = hidden_MD[chunk], labels_M[chunk, None].clamp(min=0)
            counts = (labels_M[chunk, None] >= 0).float()
            if weights_M is not None:
                counts *= weights_M[chunk, None]
            loss += ((softmax.sums.log() + softmax.maxima - softmax.label_logits) * counts).sum()
            scales, exponentials = counts / softmax.sums, softmax.exponentials
            slopes_CK = exponentials[:, ids_K].float() * scales - (labels == ids_K) * counts
            # The gradients of replaced rows are done; the rest of the buffer belongs to the head's own rows.
            exponentials.index_fill_(1, ids_K, 0.0)
            counts = counts * (labels != ids_K).all(1, keepdim=True)
            if grad_hidden is not None:
                product = torch.mm(exponentials, head.weight).float().mul_(scales)
                product.sub_(head.weight[labels[:, 0]] * counts)
                grad_hidden[chunk] = product.addmm_(slopes_CK, head.rows.float())
            if grad_rows is not None:
                grad_rows.addmm_(slopes_CK.T, hidden.float())
            if grad_weight is not None:
                _add_product(grad_weight, exponentials, (hidden.float() * scales).to(hidden.dtype))
                grad_weight.index_add_(0, labels[:, 0], hidden.float() * counts, alpha=-1.0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_rows)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_rows = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        for grad in (grad_weight, grad_rows):
            if grad is not None:
                grad.mul_(grad_loss)
        return grad_hidden, grad_weight, grad_rows, None, None, None, None


def _exponentiate(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
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


def _add_product(total_VD: Tensor, left_CV: Tensor, right_CD: Tensor) -> None:
    """total += left.T @ right, the sum in the dtype of `total`."""
    if total_VD.dtype == left_CV.dtype:
        total_VD.addmm_(left_CV.T, right_CD)
    else:
        total_VD += torch.mm(left_CV.T, right_CD)
