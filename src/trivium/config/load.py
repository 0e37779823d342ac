"""Loads a run file, with overrides or Python values, into a validated `Run`, and writes a `Run` as YAML.

Every value keeps its origin, so that errors name file and line, and the copy in the run folder tells chosen values from
defaults. All problems are reported at once, one paragraph each. Never imports torch.
"""

import difflib
import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trivium.config.explain import KeyPath, dotted_name, key_at, keys, suggest
from trivium.config.run import METHOD_DEFAULTS, Run, with_method_defaults
from trivium.config.yaml_tree import (
    Node,
    Place,
    Problem,
    parse_tree,
    printable,
    read_file,
    resolve_scalar,
)
from trivium.errors import ConfigError

COMMAND_LINE = Place("command line")
ARGUMENT = Place("argument")
FILE_NAME = Place("file name")
METHOD = Place("method")
MAX_PROBLEMS_SHOWN = 20
ENOUGH_COLUMNS = 60
BARE_TEXT = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*( [A-Za-z0-9_./-]+)*")


@dataclass(frozen=True)
class ResolvedRun:
    """A validated run, and the origin of each value by dotted key."""

    run: Run
    origins: dict[str, str]


def load_run(
    path: Path | None, overrides: Sequence[str] = (), arguments: Mapping[str, Any] | None = None
) -> ResolvedRun:
    """Read a run file (or none), set Python values and `key=value` overrides, fill in defaults, and validate.

    The last value of a key wins. A run of arguments alone is named after its method.

    Args:
        path: the run file.
        overrides: `key=value` with dotted keys, as on the command line.
        arguments: values by key; a dict sets the keys that it holds and leaves the others of its part.

    Raises: ConfigError with one paragraph per problem.
    """
    problems: list[Problem] = []
    try:
        nothing = Node({}, COMMAND_LINE if arguments is None else ARGUMENT)
        tree = parse_tree(read_file(path), str(path), problems) if path else nothing
    except Problem as problem:
        raise ConfigError(str(problem)) from None
    if tree.value is None:
        tree.value = {}
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{tree.place}: found {_show(tree.plain())}; expected keys, for example `method: scratch`")
    tree = _write_out(tree, ())
    for name, value in (arguments or {}).items():
        _set_argument(tree, (name,), value)
    tree = _write_out(tree, ())
    for override in overrides:
        try:
            tree = _write_out(_override(tree, override), ())
        except Problem as problem:
            problems.append(problem)
    if path and isinstance(tree.value, dict):
        tree.value.setdefault("name", Node(path.stem, FILE_NAME))
    elif arguments and isinstance(tree.value, dict) and "method" in tree.value:
        tree.value.setdefault("name", Node(tree.value["method"].value, METHOD))
    run = _validate(tree, problems)
    if run is None or problems:
        raise ConfigError(_paragraphs(problems))
    return ResolvedRun(run, {dotted_name(path): _origin(tree, path, run) for path, _ in _leaves(run.model_dump())})


def _write_out(node: Node, path: KeyPath) -> Node:
    """Replace shorthands like `model: 25M` (`from_shorthand` in `run.py`) by the keys they stand for."""
    key = key_at(path)
    if isinstance(node.value, list) and key and key.is_list:
        return Node([_write_out(item, (*path, index)) for index, item in enumerate(node.value)], node.place)
    part = Run if not path else key.part if key else None
    value: Any = node.value
    if part is not None and not isinstance(value, dict) and hasattr(part, "from_shorthand"):
        value = part.from_shorthand(value)
    if not isinstance(value, dict):
        return node
    children = {name: _as_node(child, node.place) for name, child in value.items()}
    return Node({name: _write_out(child, (*path, name)) for name, child in children.items()}, node.place)


def _as_node(value: Any, place: Place) -> Node:
    """A plain value as a tree in which every node has the same place; nodes in it stay as they are."""
    if isinstance(value, list):
        return Node([_as_node(item, place) for item in value], place)
    if isinstance(value, dict):
        return Node({name: _as_node(item, place) for name, item in value.items()}, place)
    return value if isinstance(value, Node) else Node(value, place)


def _set_argument(node: Node, path: KeyPath, value: Any) -> None:
    """Set one Python value in the parent of its key; validation refuses unknown keys later."""
    key = key_at(path)
    children = node.value
    assert isinstance(children, dict)
    child = children.setdefault(str(path[-1]), Node(None, ARGUMENT))
    if isinstance(value, Mapping) and isinstance(child.value, dict) and key and key.part:
        for name, inner in value.items():
            _set_argument(child, (*path, str(name)), inner)
    else:
        child.value, child.place = _as_node(_plain_value(value), ARGUMENT).value, ARGUMENT


def _plain_value(value: Any) -> Any:
    """A Python value as a run file would have it: paths become text, tuples lists, numbers of libraries plain ones."""
    if isinstance(value, Mapping):
        return {str(name): _plain_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return value


def _override(tree: Node, override: str) -> Node:
    """Set one `key=value`; validation refuses unknown keys later."""
    dotted, equals, text = override.partition("=")
    if not equals:
        raise Problem(COMMAND_LINE, f"found {_show(override)}; expected key=value, for example optimizer.lr=1e-3")
    if re.search("[\ud800-\udfff]", override):
        raise Problem(COMMAND_LINE, f"{dotted} is not valid UTF-8 text")
    steps = dotted.strip().split(".")
    path: KeyPath = tuple(int(step) if re.fullmatch("[0-9]{1,6}", step) else step for step in steps)
    node = tree
    if path[0] == "budget" and len(path) > 1 and isinstance(tree.value, dict):
        tree.value.pop("budget", None)  # only one of its keys may be set, so the override replaces the file's
    for depth in range(len(path)):
        node = _child(node, path[: depth + 1])
    new = _override_value(dotted, text)
    node.value, node.place = new.value, new.place
    return tree


def _child(node: Node, path: KeyPath) -> Node:
    """The node at the end of `path`, given its parent; it is created if missing."""
    *above, step = path
    parent = dotted_name(tuple(above))
    if node.value is None:
        key = key_at(tuple(above))
        node.value, node.place = ([] if key and key.is_list else {}), COMMAND_LINE
    if isinstance(node.value, dict):
        return node.value.setdefault(str(step), Node(None, COMMAND_LINE))
    if not isinstance(node.value, list):
        reason = f"{parent} is {_show(node.value)} ({node.place}) and has no keys"
        raise Problem(COMMAND_LINE, f"{dotted_name(path)} cannot be set: {reason}")
    if not isinstance(step, int) or step > len(node.value):
        expected = f"an index from 0 to {len(node.value)}"
        raise Problem(COMMAND_LINE, f"{dotted_name(path)}: {parent} is a list; expected {expected}")
    if step == len(node.value):
        node.value.append(Node(None, COMMAND_LINE))
    return node.value[step]


def _override_value(dotted: str, text: str) -> Node:
    """Parse a list, mapping or quoted text as YAML, and anything else as an unquoted scalar."""
    if text.lstrip()[:1] in ("[", "{", '"', "'"):
        found: list[Problem] = []
        try:
            node = parse_tree(text, dotted, found)
        except Problem as problem:
            found, node = [problem], Node(None, COMMAND_LINE)
        if found:
            raise Problem(COMMAND_LINE, f"{dotted}: {found[0].text}")
        return _as_node(node.plain(), COMMAND_LINE)
    return Node(resolve_scalar(text.strip()), COMMAND_LINE)


def _find(tree: Node, path: KeyPath) -> tuple[Node, int]:
    """The deepest existing node on the way to `path`, and its depth."""
    node = tree
    for depth, step in enumerate(path):
        value: Any = node.value
        in_list = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if not in_list and not (isinstance(value, dict) and step in value):
            return node, depth
        node = value[step]
    return node, len(path)


def _validate(tree: Node, problems: list[Problem]) -> Run | None:
    """The validated run, or None after adding the reasons to `problems`."""
    values = with_method_defaults(tree.plain())
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        bad_method = values.get("method") not in list(METHOD_DEFAULTS)
        for detail in error.errors(include_url=False)[: 2 * MAX_PROBLEMS_SHOWN]:
            unfilled = detail["type"] == "missing" and detail["loc"][0] in METHOD_DEFAULTS["scratch"]
            if not (bad_method and unfilled):
                problems.append(_explain(tree, detail))
        return None


def _explain(tree: Node, detail: ErrorDetails) -> Problem:
    """A pydantic error as a problem: where, what was found, what was expected, what to do."""
    path, kind, found = detail["loc"], detail["type"], detail["input"]
    place = _find(tree, path)[0].place
    dotted = dotted_name(path)
    if kind == "extra_forbidden":
        return Problem(place, f"{dotted[: 2 * ENOUGH_COLUMNS]} is not a known key; {suggest(path)}")
    if kind == "value_error":
        reason = str(detail.get("ctx", {}).get("error", detail["msg"]))
        return Problem(_place_of_reason(tree, reason), reason) if not path else Problem(place, f"{dotted}: {reason}")
    key = key_at(path)
    expected = key.expected if key else "something else"
    if kind == "missing":
        meaning = f" ({key.doc.partition('. ')[0].rstrip('.')})" if key and key.doc else ""
        return Problem(place, f"{dotted} is missing; expected {expected}{meaning}")
    if kind == "string_unicode":
        return Problem(place, f"{dotted} is not valid Unicode text; expected {expected}")
    return Problem(
        place, f"{dotted} is {_show(found)}; expected {expected}{_hint(found, key.choices if key else (), expected)}"
    )


def _hint(found: object, choices: tuple[str, ...], expected: str) -> str:
    """What to do about a wrong value, if that is clear from the value."""
    if choices and isinstance(found, str) and (near := difflib.get_close_matches(found[:64], choices, n=1)):
        return f"; did you mean {near[0]}?"
    if isinstance(found, str) and not isinstance(resolve_scalar(found), str | None) and "text" not in expected:
        return "; remove the quotes" if "number" in expected or "true" in expected else ""
    if expected.startswith("text") and isinstance(found, int | float):
        return "; put quotes around it"
    return ""


def _place_of_reason(tree: Node, reason: str) -> Place:
    """The line of the first key that the message names and the user has set."""
    for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", reason):
        path = tuple(word.split("."))
        node, depth = _find(tree, path)
        if word in keys() and depth == len(path):
            return node.place
    return tree.place


def _show(value: object) -> str:
    """A value as the user wrote it, short and printable."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        short = value if len(value) <= ENOUGH_COLUMNS else value[:ENOUGH_COLUMNS] + "..."
        return quote(short)
    if isinstance(value, dict):
        return f"a mapping ({', '.join(quote(str(name)[:20], always=False) for name in list(value)[:3]) or 'empty'})"
    return f"a list of {len(value)}" if isinstance(value, list) else f"{value!r}"[:ENOUGH_COLUMNS]


def _paragraphs(problems: list[Problem]) -> str:
    """All problems in the order of the file, without duplicates."""
    ordered = sorted(problems, key=lambda problem: (problem.place.line is None, problem.place.line or 0))
    lines = list(dict.fromkeys(str(problem) for problem in ordered))
    if len(lines) > MAX_PROBLEMS_SHOWN:
        lines[MAX_PROBLEMS_SHOWN:] = ["and more problems like these"]
    return "\n".join(lines)


def _has_keys(value: Any, path: KeyPath) -> bool:
    """Whether a value is a part with keys, as opposed to a mapping with names chosen by the user."""
    key = key_at(path)
    return isinstance(value, dict) and (key is None or key.part is not None)


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Path and value of every leaf of a run; a list of plain values is one leaf."""
    if _has_keys(value, path):
        for name, child in value.items():
            yield from _leaves(child, (*path, name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, child in enumerate(value):
            yield from _leaves(child, (*path, index))
    else:
        yield path, value


def flatten(run: Run) -> dict[str, Any]:
    """Every value of a run by its dotted key, for example `data.sources.0.path`."""
    return {dotted_name(path): value for path, value in _leaves(run.model_dump())}


def _origin(tree: Node, path: KeyPath, run: Run) -> str:
    """Where the value at a path came from: `run.yaml:3`, `command line`, `default of method scratch` or `default`."""
    node, depth = _find(tree, path)
    if depth == len(path):
        return str(node.place)
    key = key_at(path)
    return f"default of method {run.method}" if key and run.method in key.defaults else "default"


def quote(text: str, always: bool = True) -> str:
    """Text as a YAML scalar on one line: double-quoted, or bare if allowed and safe."""
    is_safe = BARE_TEXT.fullmatch(text) is not None and resolve_scalar(text) == text
    if is_safe and not always:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(escaped)}"'


def to_yaml(value: object) -> str:
    """A plain value as one line of YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{{{', '.join(f'{quote(name, always=False)}: {to_yaml(item)}' for name, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(to_yaml(item) for item in value)}]"
    return quote(value, always=False) if isinstance(value, str) else repr(value)


def dump_run(run: Run, origins: dict[str, str]) -> str:
    """The whole run as YAML with each value's origin in a comment; it loads back to an equal Run."""
    lines: list[tuple[str, str]] = []

    def write(name: str, value: Any, path: KeyPath, indent: str) -> None:
        if _has_keys(value, path):
            lines.append((f"{indent}{name}:", ""))
            for key, child in value.items():
                write(key, child, (*path, key), f"{indent}  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append((f"{indent}{name}:", ""))
            for index, item in enumerate(value):
                start = len(lines)
                for key, child in item.items():
                    write(key, child, (*path, index, key), f"{indent}    ")
                lines[start] = (f"{indent}  - {lines[start][0].lstrip()}", lines[start][1])
        else:
            origin = quote(origins.get(dotted_name(path), ""))[1:-1]
            lines.append((f"{indent}{name}: {to_yaml(value)}", origin))

    for name, value in run.model_dump().items():
        write(name, value, (name,), "")
    width = max(len(text) for text, _ in lines if len(text) <= ENOUGH_COLUMNS)
    return "".join(f"{text:<{width}}  # {origin}".rstrip() + "\n" if origin else f"{text}\n" for text, origin in lines)


def differences(old: Run, new: Run) -> list[str]:
    """The dotted keys in which two runs differ, with both values; `absent` if a list is shorter."""
    before, after = flatten(old), flatten(new)
    shown = [{dotted: to_yaml(value) for dotted, value in values.items()} for values in (before, after)]
    return [
        f"{dotted}: {shown[0].get(dotted, 'absent')} -> {shown[1].get(dotted, 'absent')}"
        for dotted in dict.fromkeys([*before, *after])
        if dotted not in before or dotted not in after or before[dotted] != after[dotted]
    ]
