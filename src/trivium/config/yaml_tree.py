"""Parses the strict YAML 1.2 of run files into a tree of plain values, each with its file and line.

`1e-4` is a number; `no`, `off`, `2026-01-01` and `1:30` are text. Duplicate keys, tags, anchors, a second document and
tabs are errors. Never imports torch.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_FILE_BYTES = 1 << 20

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

NULLS = ("", "~", "null", "Null", "NULL")
BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
MAX_DIGITS = 4000  # Python refuses to convert longer integers
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Place:
    """Where a value comes from: a file and line (from 1), or another source like the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass
class Node:
    """One value and its place; a mapping's place is that of its key."""

    value: "Scalar | list[Node] | dict[str, Node]"
    place: Place

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def printable(text: str) -> str:
    """Text with control characters and line breaks escaped as in double-quoted YAML."""
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)


class Problem(Exception):
    """One problem in a run file and its place."""

    def __init__(self, place: Place, text: str) -> None:
        super().__init__(printable(f"{place}: {text}"))
        self.place = place
        self.text = text


def resolve_scalar(text: str) -> Scalar:
    """The value of an unquoted word by YAML 1.2's core schema.

    Source: https://yaml.org/spec/1.2.2/#103-core-schema
    """
    if text in NULLS:
        return None
    if text in BOOLS:
        return BOOLS[text]
    if INTEGER.fullmatch(text) and len(text) <= MAX_DIGITS:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    if SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def read_file(path: Path) -> str:
    """The text of a run file. Raises: Problem when it is missing, not a plain file, too large, or not UTF-8."""
    place = Place(str(path))
    try:
        if not path.exists():
            raise Problem(place, "no such file; give the path of a run file")
        if not path.is_file():
            raise Problem(place, "not a file; give the path of a run file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise Problem(place, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise Problem(
            place, f"the file is over {MAX_FILE_BYTES:,} bytes, too large for a run file; did you give a data file?"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Problem(Place(str(path), line), "not UTF-8 text; save the file as UTF-8") from None


def parse_tree(text: str, source: str, problems: list[Problem]) -> Node:
    """Parse one YAML document; problems that do not stop the parser are added to `problems`.

    Raises: Problem when the text cannot be parsed.
    """
    try:
        return _Parser(source, problems, yaml.parse(text, Loader=LOADER)).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        lines = text.split("\n")
        if re.match(r"\s*\t", lines[line - 1] if line <= len(lines) else ""):
            raise Problem(Place(source, line), "the line is indented with a tab; YAML indents with spaces") from None
        reason = error.problem or error.context or "cannot be parsed"
        hint = "check this line and the one above for a missing colon, quote or bracket, and the indentation"
        raise Problem(Place(source, line), f"not valid YAML ({reason}); {hint}") from None
    except yaml.YAMLError as error:
        raise Problem(Place(source), f"not valid YAML ({str(error).splitlines()[0]})") from None


@dataclass
class _Parser:
    """Builds nodes from PyYAML's events."""

    source: str
    problems: list[Problem]
    events: Iterator[Any]

    def document(self) -> Node:
        """The only document of the text; null if the text is empty."""
        next(self.events)
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return Node(None, Place(self.source))
        root = self.node(next(self.events))
        next(self.events)
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            raise Problem(
                self.place(event), "a second document starts here; a run file holds one run, so remove the `---`"
            )
        return Node(root.value, Place(self.source))

    def place(self, event: Any) -> Place:
        return Place(self.source, event.start_mark.line + 1)

    def node(self, event: Any) -> Node:
        place = self.place(event)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise Problem(
                place, "found an anchor or alias (& or *); write the value out, or put quotes around it if it is text"
            )
        if event.tag is not None:
            self.problems.append(
                Problem(place, f"found the tag {event.tag}; run files hold plain values, so remove it")
            )
        if isinstance(event, yaml.ScalarEvent):
            return Node(resolve_scalar(event.value) if event.implicit[0] else event.value, place)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(item))
            return Node(items, place)
        return Node(self.mapping(), place)

    def mapping(self) -> dict[str, Node]:
        children: dict[str, Node] = {}
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent) or key.anchor is not None or key.tag is not None:
                raise Problem(self.place(key), "found a key that is not plain text; expected `name: value`")
            place = self.place(key)
            child = self.node(next(self.events))
            if key.value in children:
                earlier = children[key.value].place.line
                self.problems.append(Problem(place, f"{key.value} is set twice, here and on line {earlier}; keep one"))
            else:
                children[key.value] = Node(child.value, place)
        return children
