"""What the doctor reports: rules, findings, and when findings stop a run.

The rules are in the other files of this folder, by topic; `examine.py` runs them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from trivium.errors import ConfigError, TriviumError

Severity = Literal["error", "warning", "info"]
Subject = TypeVar("Subject")


class Violation(NamedTuple):
    """How a run violates a rule; each text is a sentence or two."""

    severity: Severity
    found: str
    expected: str
    fix: str


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """A condition that a run must meet, and the function that checks it."""

    id: str
    title: str
    check: Callable[[Subject], Violation | None]
    stops_with: type[TriviumError] = ConfigError
    """The exception raised for an error of this rule, which sets the exit code."""


class Finding(NamedTuple):
    """A violated rule. An `error` stops the run, a `warning` is likely a mistake, an `info` is worth knowing."""

    id: str
    title: str
    severity: Severity
    found: str
    expected: str
    fix: str
    stops_with: type[TriviumError]

    @property
    def anchor(self) -> str:
        """The rule's section in the documentation."""
        return f"docs/doctor.md#{self.id.lower()}"

    def record(self) -> dict[str, Any]:
        """The finding as `--json` prints it."""
        names = ("id", "severity", "title", "found", "expected", "fix", "anchor")
        return {name: getattr(self, name) for name in names}

    def paragraph(self) -> str:
        """The finding as one line of text."""
        return f"{self.id} {self.title}: {self.found} Expected: {self.expected} Fix: {self.fix} See {self.anchor}."


def check(rules: Sequence[Rule[Subject]], subject: Subject) -> list[Finding]:
    """Check every rule; the findings are in the order of the rules."""
    violations = ((rule, rule.check(subject)) for rule in rules)
    return [Finding(rule.id, rule.title, *violation, rule.stops_with) for rule, violation in violations if violation]


def stopping(findings: Iterable[Finding], allowed: frozenset[str]) -> list[Finding]:
    """The errors whose rule is not in `allowed`."""
    return [finding for finding in findings if finding.severity == "error" and finding.id not in allowed]


def refusal(errors: Sequence[Finding], with_paragraphs: bool) -> TriviumError:
    """The exception that ends the command, of the first finding's type; with full paragraphs, or the ids alone."""
    ids = list(dict.fromkeys(finding.id for finding in errors))
    lines = [finding.paragraph() for finding in errors] if with_paragraphs else []
    flags = " ".join(f"--allow {name}" for name in ids)
    last = f"The doctor stopped this run: {', '.join(ids)}. Fix the errors, or ignore them with {flags}."
    return errors[0].stops_with("\n".join([*lines, last]))
