"""Trainable tokens: embedding and head rows of a few tokens, trained while the rest of the table is frozen.

Pretraining may have left some tokens untrained, for example the end of a turn, which an adapter alone cannot fix. The
table is not copied: rows are replaced after the lookup, and the loss replaces the logits of those tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TrainableTokens(nn.Module):
    """An embedding table or a head (V, D), frozen except for the rows of a few tokens.

    ids: int64 (k,), the tokens. rows: fp32 (k, D), trained; used in place of the table's rows.
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
        """Look up tokens, in the table's dtype; only the trained rows get gradients.

        Rows are selected by a product with zeros and ones, which is exact. Its gradient is a product too, which always
        sums in the same order, unlike a scatter.
        """
        looked_up = nn.functional.embedding(tokens, self.weight)
        is_row = tokens.unsqueeze(-1) == self.ids
        rows = is_row.to(looked_up.dtype) @ self.rows.to(looked_up.dtype)
        return torch.where(is_row.any(-1, keepdim=True), rows, looked_up)

    def folded(self) -> Tensor:
        """The table with the trained rows merged, fp32 (V, D)."""
        return self.weight.detach().float().index_copy(0, self.ids, self.rows.detach())
