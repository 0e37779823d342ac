"""Trainable tokens: embedding and head rows of a few tokens, trained while the rest of the table is frozen.

A base model may never have trained some of its tokens, for example the one that ends a turn; an adapter alone cannot
fix that. The table is never copied: looked-up rows are replaced afterwards, and the loss replaces the logits of those
tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TrainableTokens(nn.Module):
    """An embedding table or a head (V, D), frozen except for the rows of a few tokens.

    ids: int64 (k,), the tokens. rows: fp32 (k, D), trained; they replace the table's rows, which keep their values.
    """

    def __init__(self, base_layer: nn.Embedding | nn.Linear, ids: Sequence[int]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor(ids, device=base_layer.weight.device), persistent=False)
        self.rows = nn.Parameter(base_layer.weight.detach()[self.ids].float())

    @property
    def weight(self) -> Tensor:
        """The frozen table, without the trained rows."""
        return self.base_layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens, in the table's dtype; only the trained rows get a gradient.

        Rows are selected by a product with ones and zeros. That is exact, and its gradient is a product too, which
        unlike a scatter always sums in the same order.
        """
        looked_up = nn.functional.embedding(tokens, self.weight)
        is_row = tokens.unsqueeze(-1) == self.ids
        rows = is_row.to(looked_up.dtype) @ self.rows.to(looked_up.dtype)
        return torch.where(is_row.any(-1, keepdim=True), rows, looked_up)

    def folded(self) -> Tensor:
        """The whole table with the trained rows written into it, fp32 (V, D)."""
        return self.weight.detach().float().index_copy(0, self.ids, self.rows.detach())
