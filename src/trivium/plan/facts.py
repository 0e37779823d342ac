"""What the planner knows about the data: rows, tokens, kind, how much of it carries loss, how much reasons.

Measured from files, or given as numbers by somebody who has no files yet. Never imports torch.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataFacts:
    """The data in numbers.

    Attributes:
        num_rows: documents, or conversations.
        num_tokens: tokens of one pass over them.
        kind: what a row is.
        mean_tokens: mean length of a row in tokens.
        supervised_share: share of the tokens that carry loss when answers alone are learnt.
        reasoning_share: share of the conversations that show reasoning.
        is_measured: whether the tokens were counted with the model's tokenizer, rather than estimated or given.
    """

    num_rows: int
    num_tokens: int
    kind: Literal["documents", "conversations"]
    mean_tokens: float
    supervised_share: float = 1.0
    reasoning_share: float = 0.0
    is_measured: bool = False
