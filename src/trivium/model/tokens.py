"""Rows of a few tokens that are trained while the table they belong to is frozen.

A base model has never learnt some of its tokens, such as the one that ends a turn; an adapter alone cannot mend that.
The table is never copied: what is looked up is replaced afterwards, and the loss replaces the logits of those tokens.
Knows neither the network nor files. `qwen` and `adapter` import this file.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TokenRows(nn.Module):
    """An embedding table or a head (V, D), frozen but for the rows of a few tokens.

    ids: int64 (k,), the tokens. rows: fp32 (k, D), trained; they stand in for the table's own, which stay as they are.
    """

    def __init__(self, base_layer: nn.Embedding | nn.Linear, ids: Sequence[int]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor(ids, device=base_layer.weight.device), persistent=False)
        self.rows = nn.Parameter(base_layer.weight.detach()[self.ids].float())

    @property
    def weight(self) -> Tensor:
        """The table without the trained rows."""
        return self.base_layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens up, in the table's dtype; only the trained rows get a gradient.

        The rows are picked by a product with ones and zeros: exact, and its gradient is a product too, which unlike a
        scatter always adds in the same order.
        """
        looked_up = nn.functional.embedding(tokens, self.weight)
        is_row = tokens.unsqueeze(-1) == self.ids
        rows = is_row.to(looked_up.dtype) @ self.rows.to(looked_up.dtype)
        return torch.where(is_row.any(-1, keepdim=True), rows, looked_up)

    def folded(self) -> Tensor:
        """The whole table with the trained rows in their places, fp32 (V, D)."""
        return self.weight.detach().float().index_copy(0, self.ids, self.rows.detach())
