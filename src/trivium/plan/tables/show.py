"""The tables as text for a terminal, as Markdown for the docs, and as plain values for programs. Computes nothing."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from trivium.plan.tables import Table
from trivium.plan.tables.claim import GUIDES, Claim, shown

HEAD = ("", "claim", "said", "found", "verdict")
COLUMNS = 100


def as_text(tables: Sequence[Table]) -> str:
    """All of it to read, each claim with its arithmetic below."""
    lines = [f"{letter}  {title}" for letter, title in GUIDES.items()]
    for table in tables:
        lines += ["", table.title, *textwrap.wrap(table.note, COLUMNS), "", *_claims(table.claims)]
        if table.rows:
            lines += ["", *_aligned([table.head, *table.rows])]
    return "\n".join([*lines, "", summary(tables)])


def _claims(claims: Sequence[Claim]) -> Iterator[str]:
    first, *others = _aligned([HEAD, *map(_cells, claims)])
    yield first
    for line, claim in zip(others, claims, strict=True):
        yield line
        yield from textwrap.wrap(claim.arithmetic, COLUMNS, initial_indent="     ", subsequent_indent="     ")


def _cells(claim: Claim) -> tuple[str, ...]:
    said, found = shown(claim.said, claim.unit), shown(claim.found, claim.unit)
    return claim.guide, claim.what, said, found, claim.distance


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def as_markdown(tables: Sequence[Table]) -> str:
    """All of it as sections of a page."""
    parts = []
    for table in tables:
        rows = [(*_cells(claim), claim.arithmetic) for claim in table.claims]
        parts += [f"### {table.title}", table.note, _markdown((*HEAD, "how"), rows)]
        if table.rows:
            parts.append(_markdown(table.head, table.rows))
    return "\n\n".join(parts)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(tables: Sequence[Table]) -> str:
    """How many claims hold."""
    counts = Counter(claim.verdict for table in tables for claim in table.claims)
    return (
        f"Of {counts.total()} figures {counts['right']} are right (within 5 %), {counts['rough']} rough (within 25 %) "
        f"and {counts['wrong']} wrong."
    )


def as_json(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """All of it for programs: bytes, parameters, shares, hours, US dollars; an open end is null."""
    return [
        {
            "title": table.title,
            "note": table.note,
            "claims": [_record(claim) for claim in table.claims],
            "rows": [dict(zip(table.head, row, strict=True)) for row in table.rows],
        }
        for table in tables
    ]


def _record(claim: Claim) -> dict[str, Any]:
    return {
        "guide": GUIDES[claim.guide],
        "place": claim.place,
        "what": claim.what,
        "unit": claim.unit or "fits",
        "said": _plain(claim.said),
        "found": _plain(claim.found),
        "verdict": claim.verdict,
        "arithmetic": claim.arithmetic,
    }


def _plain(figure: tuple[float, float] | bool) -> Any:
    return figure if isinstance(figure, bool) else [None if end == float("inf") else end for end in figure]
