"""Explains every key of a run file: meaning, accepted values and default, as text and as JSON schema.

Everything is derived from the models in `trivium.config.run`. Never imports torch.
"""

import copy
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticUndefined

from trivium.config.inputs import Part, parse_count
from trivium.config.run import METHOD_DEFAULTS, Run

SHORTHANDS: dict[str, list[dict[str, Any]]] = {
    "Model": [{"type": "string", "description": "A parameter count like 25M, a catalog name, a folder or a Hub id."}],
    "Tokenizer": [{"type": "string", "description": "A folder with tokenizer.json, or a Hub id."}],
    "Source": [{"type": "string", "description": "A file, or a folder of them."}],
    "Data": [
        {"type": "string", "description": "A file, or a folder of them."},
        {"type": "array", "items": {"$ref": "#/$defs/Source"}, "minItems": 1},
    ],
}
"""Parts that can be given as a string (or, for `data`, a list) instead of a mapping."""

COUNT_TEXT = r"^\s*\d+(\.\d+)?\s*[KMBTkmbt]?\s*$"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

EXAMPLES: dict[str, Any] = {
    "method": "scratch",
    "name": "stories-25m",
    "model": "25M",
    "model.name": "Qwen/Qwen3-0.6B",
    "model.params": "25M",
    "model.vocab_size": 8192,
    "model.shape": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4},
    "model.shape.num_key_value_heads": 2,
    "model.shape.head_dim": 64,
    "data": "stories.txt",
    "data.sources": ["stories.txt", "books.parquet"],
    "data.sources.N.path": "stories.txt",
    "data.sources.N.hub": "roneneldan/TinyStories",
    "data.sources.N.store": "corpus/tokens",
    "data.sources.N.weight": 2,
    "data.sources.N.subset": "en",
    "data.sources.N.revision": "main",
    "data.sources.N.fields": {"prompt": "question", "answer": "response"},
    "data.sources.N.roles": {"human": "user", "bot": "assistant"},
    "data.sources.N.dataset": "alpaca_en",
    "data.reasoning_share": 0.75,
    "adapter": {"rank": 16},
    "adapter.alpha": 32,
    "adapter.train_tokens": ["<|im_start|>", "<|im_end|>"],
    "log.trackers": ["tensorboard"],
    "data.workers": 2,
    "data.cache_dir": "cache",
    "tokenizer": "Qwen/Qwen3-0.6B",
    "tokenizer.path": "Qwen/Qwen3-0.6B",
    "tokenizer.train": {"kind": "bpe", "vocab_size": 4096},
    "budget.steps": 1000,
    "budget.tokens": "500M",
    "budget.epochs": 3,
    "batch.micro_tokens": 8192,
    "activation_checkpointing": True,
    "eval.every_steps": 100,
    "sample.every_steps": 100,
    "sample.prompts": ["Once upon a time"],
    "checkpoint.every_steps": 100,
    "log.every_steps": 10,
    "data.held_out": 0.05,
    "batch.tokens": 16_384,
}
"""Examples for keys without a default, or for their parents; for other keys, the default is the example."""


@dataclass(frozen=True)
class Key:
    """One key of a run file. `part` is set if the value has keys; `N` in `dotted` stands for any list index."""

    dotted: str
    doc: str
    expected: str
    part: type[Part] | None
    is_list: bool
    default: Any
    choices: tuple[str, ...]

    @property
    def defaults(self) -> dict[str, Any]:
        """Default by method name, or by "" if all methods share it; empty if the key has no default."""
        by_method = {}
        for method, preset in METHOD_DEFAULTS.items():
            value: Any = preset
            for name in self.dotted.split("."):
                value = value.get(name, PydanticUndefined) if isinstance(value, dict) else PydanticUndefined
            if value is not PydanticUndefined:
                by_method[method] = value
        default = self.default.model_dump(exclude_none=True) if isinstance(self.default, Part) else self.default
        if by_method:
            return by_method | dict.fromkeys(
                () if default in (None, PydanticUndefined) else METHOD_DEFAULTS.keys() - by_method, default
            )
        return {} if default is PydanticUndefined else {"": default}

    @property
    def example(self) -> Any:
        """A value that the key accepts."""
        parent, _, name = self.dotted.rpartition(".")
        if name == "N":
            return keys()[parent].example[0]
        if self.dotted not in EXAMPLES and not self.defaults:
            return EXAMPLES[parent][name]
        return EXAMPLES.get(self.dotted, next(iter(self.defaults.values()), None))


class _Schema(GenerateJsonSchema):
    """Adds counts like `25M` as strings, and omits generated titles."""

    def function_before_schema(self, schema: Any) -> dict[str, Any]:
        inner = super().function_before_schema(schema)
        is_count = schema["function"]["function"] is parse_count
        return {"anyOf": [inner, {"type": "string", "pattern": COUNT_TEXT}]} if is_count else inner

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def _place_limits(schema: Any) -> None:
    """Move the limits of a count to its integer alternative; pydantic puts them on the outer schema."""
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for child in children:
        _place_limits(child)
    if isinstance(schema, dict) and "anyOf" in schema:
        for name in schema.keys() & LIMITS.keys():
            schema["anyOf"][0][LIMITS[name]] = schema.pop(name)


@functools.cache
def _model_schema() -> dict[str, Any]:
    schema = Run.model_json_schema(schema_generator=_Schema)
    _place_limits(schema)
    return schema


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file, with shorthands; keys that have a default by method are not required."""
    schema = copy.deepcopy(_model_schema())
    schema["required"] = ["method", "model", "data"]
    definitions = schema["$defs"]
    definitions["Optimizer"].pop("required")
    for name, alternatives in SHORTHANDS.items():
        definitions[name] = {"anyOf": [*alternatives, definitions[name]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Trivium run file"}


def _bounds(schema: dict[str, Any]) -> str:
    """For example ` above 0 and below 1`; empty without bounds."""
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    if schema.get("minimum", 0) > schema.get("exclusiveMinimum", math.inf):
        del words["exclusiveMinimum"]
    bounds = [f"{word} {schema[name]:,}".removesuffix(".0") for name, word in words.items() if name in schema]
    return f" {' and '.join(bounds)}" if bounds else ""


def describe(schema: dict[str, Any]) -> str:
    """What a JSON schema accepts, as text that follows `expected`."""
    if "$ref" in schema:
        part = schema["$ref"].rsplit("/", 1)[1]
        keys = f"any of the keys {', '.join(_model_schema()['$defs'][part]['properties'])}"
        shorthand = {"Data": "a file, a list of sources, or ", "Source": "a file or "}.get(part, "text or ")
        return shorthand + keys if part in SHORTHANDS else keys
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
        optional = " (null leaves it unset)" if len(choices) < len(schema["anyOf"]) else ""
        count = [choice for choice in choices if choice.get("pattern") == COUNT_TEXT]
        return describe(choices[0]) + (", or a count like 25M" if count else "") + optional
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema.get("pattern") == NAME_PATTERN:
        return "at most 100 letters, digits, dots, dashes and underscores, the first a letter or digit"
    if schema["type"] == "array":
        least = "a list of at least one entry" if schema.get("minItems") else "a list"
        return f"{least}, each {describe(schema['items'])}"
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    words["object"] = "a mapping of names to names"
    return words.get(schema["type"], schema["type"]) + _bounds(schema)


def _part_of(annotation: Any) -> tuple[type[Part] | None, bool]:
    """The part inside `Part`, `Part | None` or `list[Part]`, and whether the annotation is a list."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return _part_of(arguments[0])[0], True
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _part_of(next(argument for argument in arguments if argument is not type(None)))
    is_part = isinstance(annotation, type) and issubclass(annotation, Part)
    return (annotation if is_part else None), False


def _walk(part: type[Part], prefix: str) -> Iterator[Key]:
    schema = _model_schema()
    properties = (schema if part is Run else schema["$defs"][part.__name__])["properties"]
    for name, field in part.model_fields.items():
        inner, is_list = _part_of(field.annotation)
        dotted = f"{prefix}{name}"
        choices = tuple(properties[name].get("enum", ()))
        expected = describe(properties[name])
        doc = " ".join((field.description or "").split())
        yield Key(dotted, doc, expected, None if is_list else inner, is_list, field.default, choices)
        if is_list:
            dotted += ".N"
            doc = (inner.__doc__ if inner else None) or "One entry of the list."
            accepted = [properties[name], *properties[name].get("anyOf", [])]
            items = next(one["items"] for one in accepted if "items" in one)
            yield Key(dotted, doc, describe(items), inner, False, PydanticUndefined, ())
        if inner:
            yield from _walk(inner, f"{dotted}.")


@functools.cache
def keys() -> dict[str, Key]:
    """Every key in the order of `run.py`; list entries are under `N`, for example `data.sources.N.path`."""
    return {key.dotted: key for key in _walk(Run, "")}


KeyPath = tuple[str | int, ...]


def dotted_name(path: KeyPath) -> str:
    """`("data", "sources", 0, "path")` -> `"data.sources.0.path"`."""
    return ".".join(str(step) for step in path)


def key_at(path: KeyPath) -> Key | None:
    """The key at a path with any list indices; None if there is no such key."""
    steps = [str(step) for step in path]
    return keys().get(".".join("N" if step.isdigit() else step for step in steps))


RENAMED_KEYS = {
    "learning_rate": "optimizer.lr",
    "clip_norm": "optimizer.max_grad_norm",
    "states": "optimizer.state_dtype",
    "warmup_share": "schedule.warmup_ratio",
    "decay_share": "schedule.decay_ratio",
    "floor_share": "schedule.min_lr_ratio",
    "b_rate_ratio": "adapter.loraplus_lr_ratio",
    "long_rows": "data.overlong",
}
"""Keys of earlier versions and of other frameworks, and their current names."""


def suggest(path: KeyPath) -> str:
    """The end of a message about an unknown key: the nearest known key, or the list of keys."""
    parent = key_at(path[:-1])
    part = Run if len(path) == 1 else parent.part if parent else None
    name, siblings = str(path[-1]), list(part.model_fields) if part else []
    if len(name) <= 64:
        if near := difflib.get_close_matches(name, [*siblings, *RENAMED_KEYS], n=1):
            return f"did you mean {RENAMED_KEYS.get(near[0], near[0])}?"
        elsewhere = {dotted.rsplit(".", 1)[-1]: dotted for dotted in reversed(keys()) if dotted[-2:] != ".N"}
        if near := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75):
            return f"did you mean {elsewhere[near[0]]}?"
    if siblings:
        return f"{dotted_name(path[:-1]) or 'a run'} has {', '.join(siblings)}"
    return "run `trivium config explain` for all keys"
