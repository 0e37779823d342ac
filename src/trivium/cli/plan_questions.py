"""The five questions that `trivium plan` asks on a terminal, and the parsers of their answers. Never imports torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.config.inputs import parse_count
from trivium.errors import ConfigError
from trivium.plan import devices
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
class PlanQuestion:
    """A question with its default answer, and a parser that returns fields of `Situation`, or `data`."""

    text: str
    default: str
    read: Callable[[str], dict[str, Any]]


def ask(prompt: Callable[[str, str], str]) -> tuple[Situation, DataFacts | str | None]:
    """Ask every question with `prompt(text, default)`, and again if the answer is invalid.

    Returns the situation without facts, and the data: facts, or a path as typed, or None.

    Raises: ConfigError after three invalid answers to a question.
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
    data = answers.pop("data")
    return Situation(**answers), data


def questions() -> tuple[PlanQuestion, ...]:
    """The questions in order."""
    return (
        PlanQuestion(
            "Does an existing model with a good prompt already do it well enough (yes, no, unknown)?",
            "unknown",
            lambda text: {"is_general": _one_of(text, {"yes": True, "no": False, "unknown": None})},
        ),
        PlanQuestion("What is the training data (a path, or an amount: 5K conversations, 2B tokens)?", "none", _data),
        PlanQuestion("Which device (laptop for this one, or a name: rtx-4090, 8x h100-80)?", "laptop", _hardware),
        PlanQuestion(
            "May only an adapter be published, because of the license of the model (yes, no)?",
            "no",
            lambda text: {"adapter_only": _one_of(text, {"yes": True, "no": False})},
        ),
        PlanQuestion("What is the limit on cost and time (for example: 50 USD, 2 days)?", "no limit", _limits),
    )


def _one_of(text: str, meanings: dict[str, bool | None]) -> bool | None:
    """The meaning of a word or its beginning."""
    found = [word for word in meanings if word.startswith(text.lower())]
    if len(found) != 1:
        raise ConfigError(f"{text!r} is not a valid answer. Expected one of {', '.join(meanings)}.")
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
        f"{text!r} is not an existing path or an amount with a unit. Expected for example 5K conversations, 2B tokens."
    )


def _hardware(text: str) -> dict[str, Any]:
    if text.lower() in ("laptop", "here"):
        return {"device": devices.this_machine(), "num_devices": 1, "is_laptop": text.lower() == "laptop"}
    match = NUMBERED.fullmatch(text)
    count, name = (int(match[1]), match[2]) if match else (1, text)
    if count < 1:
        raise ConfigError(f"{text!r} has no devices. Expected one or more, for example 1x t4.")
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
            raise ConfigError(f"{part!r} is not a limit. Expected for example 50 USD, 36 hours or 2 days.")
    return limits
