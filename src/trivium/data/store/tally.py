"""Tally: counts of the records that were read, as stored in report.json, and as text."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from trivium.data.chat.formats import Conversation, Document
from trivium.data.rejects import Reject
from trivium.errors import count_of

COUNTS = (
    "records",
    "kept",
    "split",
    "rejected",
    "conversations",
    "dropped_turns",
    "cut_turns",
    "lost_reasoning_turns",
    "control_token_records",
)
"""The counts shown to users, under their names in report.json."""

NOTES = {
    "dropped_turns": ("answer", "dropped: too long, or not preceded by a message"),
    "cut_turns": ("answer", "cut to fit"),
    "lost_reasoning_turns": ("answer", "with reasoning that the template leaves out"),
    "control_token_records": ("record", "containing control tokens as text"),
}


@dataclass
class Tally:
    """Counts of records. A record is kept (one sample), split (several samples) or rejected (none)."""

    num_samples: int = 0
    """Documents and samples of conversations."""
    num_tokens: int = 0
    supervised_tokens: int = 0
    text_bytes: int = 0
    control_token_records: int = 0
    """Records with a control token in their text (it stays text in documents, and is a token in conversations)."""
    conversations: int = 0
    reasoning_documents: int = 0
    """Samples with reasoning in an answer."""
    split: int = 0
    num_split_samples: int = 0
    """Samples made from split records."""
    dropped_turns: int = 0
    cut_turns: int = 0
    lost_reasoning_turns: int = 0
    rejected_by_reason: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rejected_by_reason = Counter(self.rejected_by_reason)  # a plain dict when read back from JSON

    def add(self, other: "Tally") -> None:
        """Add another tally's counts."""
        for name in (one.name for one in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def add_record(self, content: Document | Conversation | Reject) -> None:
        """Count a record as one sample or one reject, without its tokens."""
        if isinstance(content, Reject):
            self.rejected_by_reason[content.reason] += 1
            return
        self.num_samples += 1
        if isinstance(content, Conversation):
            self.conversations += 1
            self.reasoning_documents += any(turn.weight and turn.thinks for turn in content.turns)

    @property
    def rejected(self) -> int:
        """Rejected records."""
        return self.rejected_by_reason.total()

    @property
    def kept(self) -> int:
        """Records that became one sample."""
        return self.num_samples - self.num_split_samples

    @property
    def records(self) -> int:
        """All records."""
        return self.kept + self.split + self.rejected

    @property
    def reject_share(self) -> float:
        """Share of the records that were rejected; 0 without records."""
        return self.rejected / self.records if self.records else 0.0

    def counts(self) -> dict[str, int]:
        """The counts shown to users."""
        return {name: getattr(self, name) for name in COUNTS}


def describe_counts(counts: Mapping[str, int]) -> list[str]:
    """Lines for users: the records, then the notes of `describe_notes`."""
    whole = (
        f"{count_of(counts['records'], 'record')} = {counts['kept']:,} kept + "
        f"{counts['split']:,} split into several samples + "
        f"{counts['rejected']:,} rejected"
    )
    return [whole, *describe_notes(counts)]


def describe_notes(counts: Mapping[str, int]) -> list[str]:
    """Lines for users about dropped, cut or suspicious content; zero counts have no line."""
    return [f"{count_of(counts[name], noun)} {what}" for name, (noun, what) in NOTES.items() if counts.get(name)]
