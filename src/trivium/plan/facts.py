"""What the planner knows about the data: rows, tokens, kind, how much of it carries loss, how much reasons.

Measured from files (`data/survey.py`; its `Survey` has all of these fields), or given as numbers by somebody who has
no files yet: `given_facts`. Never imports torch.
"""

from dataclasses import dataclass
from typing import Literal

from trivium.errors import ConfigError

Kind = Literal["documents", "conversations"]
USUAL_TOKENS: dict[Kind, int] = {"conversations": 400, "documents": 1000}
"""Mean length of a row where nobody says. Assumed: a question with an answer of a page, a page or two of text."""


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
    kind: Kind
    mean_tokens: float
    supervised_share: float = 1.0
    reasoning_share: float = 0.0
    is_measured: bool = False


def given_facts(
    kind: Kind, num_rows: int | None = None, num_tokens: int | None = None, mean_tokens: float | None = None
) -> DataFacts:
    """Facts from what is known without files; of rows, tokens and mean length the missing ones follow from the others.

    Raises: ConfigError when neither rows nor tokens are given, or one is not above zero.
    """
    given = {"rows": num_rows, "tokens": num_tokens, "mean tokens of a row": mean_tokens}
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"The data's {name} are {value}. Expected a number above zero.")
    if num_rows is None and num_tokens is None:
        raise ConfigError("Nothing says how much data there is. Expected a number of rows, or of tokens.")
    mean = mean_tokens or (num_tokens / num_rows if num_rows and num_tokens else USUAL_TOKENS[kind])
    return DataFacts(
        num_rows=num_rows or max(1, round((num_tokens or 0) / mean)),
        num_tokens=num_tokens or max(1, round((num_rows or 0) * mean)),
        kind=kind,
        mean_tokens=mean,
    )
