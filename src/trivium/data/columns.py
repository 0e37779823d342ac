"""Columns: values stored next to the tokens of a token store, declared by name, type and what each value belongs to.

Imports nothing heavy, since worker processes use it.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

FULL_WEIGHT = 100
"""The loss weight of a plain supervised token, in hundredths."""


class Column(NamedTuple):
    """The declaration of a column.

    A value per token belongs to the token as a label: packing puts it where that token is predicted.
    """

    name: str
    dtype: str
    """As numpy names it."""
    per: Literal["token", "document"] = "token"
    default: float = 0
    """The value of tokens from a store without this column."""


LOSS_WEIGHTS = Column("loss_weights", "uint8", default=FULL_WEIGHT)
"""By how much the loss of a token as a label counts, in hundredths; 0 for none."""
REASONING = Column("reasoning", "uint8", per="document")
"""1 where an answer of the document reasons."""


class HasColumns(Protocol):
    """What has documents with columns."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns next to the tokens."""
        ...

    def column(self, name: str, document: int, start: int, stop: int) -> "np.ndarray":
        """Values of the tokens [start, stop) of a document; of a column per document, its value, [1]."""
        ...


def loss_weights(store: HasColumns, document: int, start: int, stop: int) -> "np.ndarray | None":
    """Loss weights, uint8 in hundredths, of tokens [start, stop) as labels; None where every token counts alike."""
    if LOSS_WEIGHTS not in store.columns:
        return None
    return store.column(LOSS_WEIGHTS.name, document, start, stop)
