"""The five questions whose answers decide which way to train, and how an answer is read.

Asking is a function that the caller brings, so that nothing here needs a terminal. Opens no data: a path is handed on
as it was typed. Imported by the verb `plan`; never imports torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.config.run import parse_count
from trivium.errors import ConfigError
from trivium.plan import devices
from trivium.plan.devices import Device
from trivium.plan.situation import Situation
from trivium.plan.workload import DataFacts, given_facts

MAX_TRIES = 3
AMOUNT = re.compile(r"(\d[\d,]*(?:\.\d+)?\s*(?:[KMBT]\b)?)\s*([a-z]*)", re.IGNORECASE)
ROW_WORDS = ("conversation", "conversations", "pair", "pairs", "example", "examples", "row", "rows")
TOKEN_WORDS = ("token", "tokens")
NUMBERED = re.compile(r"(\d{1,6})\s*x\s*(\S.*)", re.IGNORECASE)
LIMIT = re.compile(r"(\$?)\s*(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
DOLLAR_WORDS = ("usd", "dollar", "dollars")
HOURS = {"hour": 1, "hours": 1, "h": 1, "day": 24, "days": 24, "d": 24, "week": 168, "weeks": 168}


@dataclass(frozen=True)
class PlanAnswers:
    """What was answered.

    Attributes:
        is_general: whether a general model already does it; None when nobody knows.
        data: how much there will be, or a path as it was typed; None for none yet.
        device, num_devices: what to train on, and how many of them.
        is_laptop: whether that is the laptop at hand.
        adapter_only: whether only the adapter may be shared.
        max_cost: US dollars; None for no limit.
        max_hours: how long it may take; None for no limit.
    """

    is_general: bool | None
    data: DataFacts | str | None
    device: Device
    num_devices: int
    is_laptop: bool
    adapter_only: bool
    max_cost: float | None
    max_hours: float | None

    def situation(self, facts: DataFacts | None) -> Situation:
        """What to decide on, once the data has been measured where it was a path."""
        return Situation(
            facts=facts,
            is_general=self.is_general,
            device=self.device,
            num_devices=self.num_devices,
            is_laptop=self.is_laptop,
            adapter_only=self.adapter_only,
            max_cost=self.max_cost,
            max_hours=self.max_hours,
        )


@dataclass(frozen=True)
class PlanQuestion:
    """One question: its text, the answer that an empty line gives, and the fields of `PlanAnswers` that a text becomes."""

    text: str
    default: str
    read: Callable[[str], dict[str, Any]]


def ask(prompt: Callable[[str, str], str]) -> PlanAnswers:
    """Ask every question by `prompt(text, default)`, again where an answer cannot be read.

    Raises: ConfigError when a question was answered three times with what cannot be read.
    """
    answers: dict[str, Any] = {}
    for question in questions():
        text = question.text
        for number in range(1, MAX_TRIES + 1):
            try:
                answers |= question.read(prompt(text, question.default).strip() or question.default)
                break
            except ConfigError as error:
                if number == MAX_TRIES:
                    raise
                text = f"{error}\n{question.text}"
    return PlanAnswers(**answers)


def questions() -> tuple[PlanQuestion, ...]:
    """In the order of the tree: is training needed, what is there to learn, and what forbids a way."""
    return (
        PlanQuestion(
            "Does a general model, well prompted, already do it well enough (yes, no, unknown)?", "unknown", _general
        ),
        PlanQuestion("What is there to learn from: a path, or such as 5K conversations, or 2B tokens?", "none", _data),
        PlanQuestion(
            "What will it train on: laptop (this one), or such as rtx-4090, or 8x h100-80?", "laptop", _hardware
        ),
        PlanQuestion("Must the adapter be shared apart from the model and its licence (yes, no)?", "no", _adapter_only),
        PlanQuestion("What may it cost, and how long may it take, such as 50 USD, 2 days?", "no limit", _limits),
    )


def _general(text: str) -> dict[str, Any]:
    return {"is_general": _one_of(text, {"yes": True, "no": False, "unknown": None})}


def _adapter_only(text: str) -> dict[str, Any]:
    return {"adapter_only": _one_of(text, {"yes": True, "no": False})}


def _one_of(text: str, meanings: dict[str, bool | None]) -> bool | None:
    """The meaning of a word, or of its beginning."""
    found = [word for word in meanings if word.startswith(text.lower())]
    if len(found) != 1:
        raise ConfigError(f"{text!r} is none of {', '.join(meanings)}.")
    return meanings[found[0]]


def _data(text: str) -> dict[str, Any]:
    if text.lower() == "none":
        return {"data": None}
    match = AMOUNT.fullmatch(text)
    if match is None or Path(text).expanduser().exists():
        return {"data": text}
    count, unit = parse_count(match[1].replace(",", "")), match[2].lower()
    if isinstance(count, int) and unit in ROW_WORDS:
        return {"data": given_facts("conversations", num_rows=count)}
    if isinstance(count, int) and unit in TOKEN_WORDS:
        return {"data": given_facts("documents", num_tokens=count)}
    raise ConfigError(
        f"{text!r} is no path that exists, and says no unit. Expected such as 5K conversations, 2B tokens."
    )


def _hardware(text: str) -> dict[str, Any]:
    if text.lower() in ("laptop", "here"):
        return {"device": devices.this_machine(), "num_devices": 1, "is_laptop": text.lower() == "laptop"}
    match = NUMBERED.fullmatch(text)
    count, name = (int(match[1]), match[2]) if match else (1, text)
    if count < 1:
        raise ConfigError(f"{text!r}: nothing trains on no device. Expected one or more.")
    return {"device": devices.get(name), "num_devices": count, "is_laptop": False}


def _limits(text: str) -> dict[str, Any]:
    limits: dict[str, Any] = {"max_cost": None, "max_hours": None}
    if text.lower() in ("no limit", "none"):
        return limits
    for part in re.split(r"\s*[,;]\s*|\s+and\s+", text):
        match = LIMIT.fullmatch(part)
        unit = match[3].lower() if match else ""
        if match and (match[1] or unit in DOLLAR_WORDS):
            limits["max_cost"] = float(match[2])
        elif match and unit in HOURS:
            limits["max_hours"] = float(match[2]) * HOURS[unit]
        else:
            raise ConfigError(f"{part!r} is no limit of cost or time. Expected such as 50 USD, 36 hours, 2 days.")
    return limits
