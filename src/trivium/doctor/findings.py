"""What the doctor says: rules, what is wrong by one, and when that stops a run.

The rules themselves are in the files beside this one, by theme; `examine.py` puts them to a run. Imported inside
`doctor`, and by the command line for its types.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from trivium.errors import ConfigError, TriviumError

Severity = Literal["error", "warning", "info"]
DOCUMENT = "docs/doctor.md"
Subject = TypeVar("Subject")


class Trouble(NamedTuple):
    """What a rule has to say of a run that breaks it; each text is a sentence or two."""

    severity: Severity
    found: str
    expected: str
    todo: str


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One thing that must hold, and the function that looks."""

    id: str
    title: str
    check: Callable[[Subject], Trouble | None]
    stops_with: type[TriviumError] = ConfigError
    """What an error of this rule ends the command with."""


@dataclass(frozen=True)
class Finding:
    """A rule and what it found."""

    id: str
    title: str
    trouble: Trouble
    stops_with: type[TriviumError]

    @property
    def severity(self) -> Severity:
        """`error` stops the run, `warning` is likely a mistake, `info` is worth knowing."""
        return self.trouble.severity

    @property
    def anchor(self) -> str:
        """Where the reasons are written down."""
        return f"{DOCUMENT}#{self.id.lower()}"

    def record(self) -> dict[str, Any]:
        """The finding as `--json` prints it."""
        trouble = self.trouble._asdict()
        return {"id": self.id, "severity": trouble.pop("severity"), "title": self.title, **trouble} | {
            "anchor": self.anchor
        }

    def paragraph(self) -> str:
        """The finding as one line of text."""
        _, found, expected, todo = self.trouble
        return f"{self.id} {self.title}: {found} Expected: {expected} To do: {todo} See {self.anchor}."


def look(rules: Sequence[Rule[Subject]], subject: Subject) -> list[Finding]:
    """Put every rule to a subject; the findings in the order of the rules."""
    troubles = ((rule, rule.check(subject)) for rule in rules)
    return [Finding(rule.id, rule.title, trouble, rule.stops_with) for rule, trouble in troubles if trouble]


def stopping(findings: Iterable[Finding], allowed: frozenset[str]) -> list[Finding]:
    """The errors that nobody allowed."""
    return [finding for finding in findings if finding.severity == "error" and finding.id not in allowed]


def refusal(errors: Sequence[Finding], with_paragraphs: bool) -> TriviumError:
    """The error that ends the command, of the first finding's kind; with the findings in full, or only their names."""
    names = ", ".join(finding.id for finding in errors)
    flags = " ".join(f"--allow {name}" for name in dict.fromkeys(finding.id for finding in errors))
    lines = [finding.paragraph() for finding in errors] if with_paragraphs else []
    last = (
        f"The doctor stops this run: {names}. Mend what it found, or go on in spite of it, knowing why, with {flags}."
    )
    return errors[0].stops_with("\n".join([*lines, last]))


def known_ids(given: Sequence[str], known: Iterable[str]) -> frozenset[str]:
    """The ids that `--allow` names.

    Raises: ConfigError with the nearest known id for one that no rule has.
    """
    ids = sorted(set(known))
    for name in given:
        if name.upper() not in ids:
            near = difflib.get_close_matches(name.upper(), ids, n=1, cutoff=0.3)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(ids)}."
            raise ConfigError(f"--allow {name}: the doctor has no rule of that id, so nothing would be allowed. {hint}")
    return frozenset(name.upper() for name in given)
