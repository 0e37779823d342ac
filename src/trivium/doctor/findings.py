"""What the doctor reports: rules, findings, and when findings stop a run.

The rules themselves are in the other files of this folder, by theme; `examine.py` runs them.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from trivium.errors import ConfigError, TriviumError

Severity = Literal["error", "warning", "info"]
DOCUMENT = "docs/doctor.md"
Subject = TypeVar("Subject")


class Violation(NamedTuple):
    """What a rule says about a run that breaks it; each text is a sentence or two."""

    severity: Severity
    found: str
    expected: str
    fix: str


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One thing that must hold, and the function that checks it."""

    id: str
    title: str
    check: Callable[[Subject], Violation | None]
    stops_with: type[TriviumError] = ConfigError
    """The exception, and so the exit code, of an error of this rule."""


@dataclass(frozen=True)
class Finding:
    """A rule and what it found. An `error` stops the run, a `warning` is likely a mistake, an `info` only informs."""

    id: str
    title: str
    violation: Violation
    stops_with: type[TriviumError]

    @property
    def severity(self) -> Severity:
        """The violation's severity."""
        return self.violation.severity

    @property
    def anchor(self) -> str:
        """Where the documentation gives the reasons."""
        return f"{DOCUMENT}#{self.id.lower()}"

    def record(self) -> dict[str, Any]:
        """The finding as `--json` prints it."""
        texts = self.violation._asdict()
        return {"id": self.id, "severity": texts.pop("severity"), "title": self.title, **texts, "anchor": self.anchor}

    def paragraph(self) -> str:
        """The finding as one line of text."""
        _, found, expected, fix = self.violation
        return f"{self.id} {self.title}: {found} Expected: {expected} Fix: {fix} See {self.anchor}."


def check(rules: Sequence[Rule[Subject]], subject: Subject) -> list[Finding]:
    """Check every rule; the findings are in the order of the rules."""
    violations = ((rule, rule.check(subject)) for rule in rules)
    return [Finding(rule.id, rule.title, violation, rule.stops_with) for rule, violation in violations if violation]


def stopping(findings: Iterable[Finding], allowed: frozenset[str]) -> list[Finding]:
    """The errors whose rule is not in `allowed`."""
    return [finding for finding in findings if finding.severity == "error" and finding.id not in allowed]


def refusal(errors: Sequence[Finding], with_paragraphs: bool) -> TriviumError:
    """The exception that ends the command, of the first finding's type; with full paragraphs, or the ids alone."""
    ids = list(dict.fromkeys(finding.id for finding in errors))
    lines = [finding.paragraph() for finding in errors] if with_paragraphs else []
    flags = " ".join(f"--allow {name}" for name in ids)
    last = f"The doctor stops this run: {', '.join(ids)}. Fix the findings, or train anyway with {flags}."
    return errors[0].stops_with("\n".join([*lines, last]))


def known_ids(given: Sequence[str], known: Iterable[str]) -> frozenset[str]:
    """The rule ids given with `--allow`, in capitals.

    Raises: ConfigError that suggests the nearest known id for an unknown one.
    """
    ids = sorted(set(known))
    for name in given:
        if name.upper() not in ids:
            near = difflib.get_close_matches(name.upper(), ids, n=1, cutoff=0.3)
            hint = f"Did you mean {near[0]}?" if near else f"The rules are {', '.join(ids)}."
            raise ConfigError(f"--allow {name}: the doctor has no rule with that id. {hint}")
    return frozenset(name.upper() for name in given)
