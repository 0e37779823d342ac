"""Columns: values stored next to the tokens of a token store, one per token or one per document.

Worker processes import this module, so it stays free of heavy imports.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

FULL_WEIGHT = 100
"""The loss weight of a plain supervised token, in hundredths."""


class Column(NamedTuple):
    """Declares a column. Packing aligns a per-token value with the position that predicts the token."""

    name: str
    dtype: str
    """Name of a numpy dtype."""
    per: Literal["token", "document"] = "token"
    default: float = 0
    """Value for tokens of stores that lack this column."""


LOSS_WEIGHTS = Column("loss_weights", "uint8", default=FULL_WEIGHT)
"""Loss weight of each token as a label, in hundredths; 0 for no loss."""
REASONING = Column("reasoning", "uint8", per="document")
"""1 if an answer in the document contains reasoning."""


class TokenStore(Protocol):
    """The methods of a token store that packing uses."""

    @property
    def lengths(self) -> "np.ndarray":
        """Tokens of each document, int [num_documents]."""
        ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """Columns stored next to the tokens."""
        ...

    def tokens(self, document: int, start: int, stop: int) -> "np.ndarray":
        """Token ids [start, stop) of a document."""
        ...

    def column(self, name: str, document: int, start: int, stop: int) -> "np.ndarray":
        """Values for tokens [start, stop) of a document; for a per-document column its one value, [1]."""
        ...

    def sequence_starts(self, document: int, start: int, stop: int) -> list[int]:
        """Positions inside (start, stop) at which another sequence of the document begins."""
        ...


def loss_weights(store: TokenStore, document: int, start: int, stop: int) -> "np.ndarray | None":
    """Loss weights, uint8 in hundredths, of tokens [start, stop) as labels; None if all tokens have full weight."""
    if LOSS_WEIGHTS not in store.columns:
        return None
    return store.column(LOSS_WEIGHTS.name, document, start, stop)
