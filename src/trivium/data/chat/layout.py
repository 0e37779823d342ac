"""Layouts: the format and field names of a file's records, detected from the first records or given by the user.

The user can also give a LLaMA-Factory `dataset_info.json`. Worker processes import this module, so it stays free of
heavy imports.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from trivium.errors import BadData, ConfigError
from trivium.files import require_regular

if TYPE_CHECKING:
    from trivium.config.inputs import Source

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"]

FUNCTION_CALL = "function_call"
"""Role of an answer whose content is a tool call."""

USUAL_FIELDS: dict[Format, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",), "system": ("system",), "tools": ("tools",)},
    "sharegpt": {"messages": ("conversations",), "system": ("system",), "tools": ("tools",)},
    "alpaca": {
        "prompt": ("instruction",),
        "input": ("input",),
        "answer": ("output",),
        "system": ("system",),
        "history": ("history",),
    },
    "prompt": {
        "prompt": ("prompt",),
        "answer": ("completion", "response", "answer"),
        "system": ("system",),
        "tools": ("tools",),
    },
}

INFO_NAME = "dataset_info.json"
INFO_KEYS = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "formatting", "subset", "split", "columns", "tags"}
# LLaMA-Factory's names -> (ours, default field without `columns`). Source: its data/README.md.
INFO_COLUMNS = {
    "alpaca": {
        "prompt": ("prompt", "instruction"),
        "query": ("input", "input"),
        "response": ("answer", "output"),
        "history": ("history", None),
        "system": ("system", None),
        "tools": ("tools", None),
    },
    "sharegpt": {"messages": ("messages", "conversations"), "system": ("system", None), "tools": ("tools", None)},
}
INFO_FIELD_TAGS = {"role_tag": "from", "content_tag": "value"}
# Tag -> (our role, default name of the role without `tags`).
INFO_ROLE_TAGS = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "function_tag": (FUNCTION_CALL, "function_call"),
    "system_tag": ("system", "system"),
}


@dataclass(frozen=True)
class RecordLayout:
    """Format and field names of a file's records; part of a store's manifest."""

    format: Format
    fields: Mapping[str, str | None] = field(default_factory=dict)
    """Our names (messages, role, content, prompt, input, answer, system, tools, history) -> the file's; None if the
    file has no such field. Other names have their usual fields."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The file's names of roles -> ours, in addition to the usual ones."""
    text_field: str = "text"

    def names(self, name: str) -> tuple[str, ...]:
        """The file's fields that may hold `name`."""
        if name in self.fields:
            given = self.fields[name]
            return () if given is None else (given,)
        return USUAL_FIELDS.get(self.format, {}).get(name, ())

    def find(self, name: str, record: dict[str, Any]) -> str | None:
        """The record's field that holds `name`; None if there is none."""
        return next((found for found in self.names(name) if found in record), None)


def detect(records: Sequence[object], layout: RecordLayout, where: str) -> RecordLayout:
    """Set the layout's format to that of most of a file's first records.

    Args:
        records: decoded records; those that are not objects are ignored.
        layout: fields and roles given by the user.
        where: name of the file for messages.

    Raises: BadData when no format fits, or two do.
    """
    objects = [record for record in records if isinstance(record, dict)]
    counts = Counter(found for record in objects if (found := _fitting(record, layout)))
    if not counts:
        names = list(dict.fromkeys(name for record in objects for name in record))
        raise BadData(
            f"{where}: the records have the fields {', '.join(map(repr, names[:12])) or '(none)'}, which match no "
            "known format. Expected messages; conversations (ShareGPT); instruction and output (Alpaca); prompt and "
            f"completion, response or answer; or {layout.text_field!r} for plain text. Set `fields`, for example "
            "{prompt: question, answer: reply}, or set `field` to the field with the text."
        )
    ((best, _),) = counts.most_common(1)
    if best == "both":
        raise BadData(
            f"{where}: the records have both a text ({layout.text_field!r}) and a question with an answer, so the "
            "format is ambiguous. Set `format` to text, alpaca or prompt."
        )
    return replace(layout, format=cast(Format, best))


def _fitting(record: dict[str, Any], layout: RecordLayout) -> str | None:
    def has(form: Format, *names: str) -> bool:
        return all(replace(layout, format=form).find(name, record) is not None for name in names)

    for form in ("messages", "sharegpt"):
        if has(form, "messages"):
            return form
    pair = next((form for form in ("alpaca", "prompt") if has(form, "prompt", "answer")), None)
    if not isinstance(record.get(layout.text_field), str) or "prompt" in layout.fields or "answer" in layout.fields:
        return pair
    return "both" if pair else "text"


def from_dataset_info(source: "Source") -> "tuple[Source, RecordLayout | None]":
    """Resolve an entry of a LLaMA-Factory `dataset_info.json` to the source of its records and their layout.

    `source.path` is that file or its folder, `source.dataset` the entry. The layout is None for plain text.
    Raises: ConfigError when the entry is missing or has an unsupported setting.
    """
    assert source.path is not None and source.dataset is not None
    path = Path(source.path).expanduser()
    path = path / INFO_NAME if path.is_dir() else path
    where = f"{path}, dataset {source.dataset!r}"
    entry = _info_entry(path, source.dataset)
    _refuse_unknown(entry, INFO_KEYS, where, "key")
    place: dict[str, Any] = {"dataset": None, "subset": entry.get("subset"), "split": entry.get("split", "train")}
    if "hf_hub_url" in entry:
        place |= {"path": None, "hub": entry["hf_hub_url"]}
    elif "file_name" in entry:
        place["path"] = str(path.parent / entry["file_name"])
    else:
        raise ConfigError(f"{where} has neither file_name nor hf_hub_url. Set one to the file or Hub dataset.")
    layout = _info_layout(entry, where)
    if layout.format == "text":
        return source.model_copy(update=place | {"format": "text", "field": layout.text_field}), None
    return source.model_copy(update=place), layout


def _info_entry(path: Path, name: str) -> dict[str, Any]:
    require_regular(path)
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). Expected a LLaMA-Factory {INFO_NAME}, or its folder."
        ) from None
    entry = info.get(name) if isinstance(info, dict) else None
    if not isinstance(entry, dict):
        known = ", ".join(list(info)[:12]) if isinstance(info, dict) else "no entries"
        raise ConfigError(f"{path} has no dataset {name!r}. Expected one of its entries: {known}.")
    return entry


def _info_layout(entry: dict[str, Any], where: str) -> RecordLayout:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(f"{where}: formatting is {formatting!r}. Expected alpaca, sharegpt or openai.")
    known = INFO_COLUMNS["alpaca" if formatting == "alpaca" else "sharegpt"]
    columns = entry.get("columns")
    _refuse_unknown(columns or {}, set(known), where, "column")
    # As in LLaMA-Factory, giving any columns disables the defaults of the others.
    fields: dict[str, str | None] = {
        ours: usual if columns is None else columns.get(theirs) for theirs, (ours, usual) in known.items()
    }
    if formatting == "alpaca":
        if fields["answer"] is None and fields["prompt"] is not None:
            return RecordLayout("text", text_field=fields["prompt"])
        return RecordLayout("alpaca", fields)
    tags = entry.get("tags") or ({"role_tag": "role", "content_tag": "content"} if formatting == "openai" else {})
    _refuse_unknown(tags, set(INFO_FIELD_TAGS | INFO_ROLE_TAGS), where, "tag")
    named = INFO_FIELD_TAGS | tags
    fields |= {"role": named["role_tag"], "content": named["content_tag"]}
    roles = {tags.get(tag, name): role for tag, (role, name) in INFO_ROLE_TAGS.items()}
    return RecordLayout("messages" if formatting == "openai" else "sharegpt", fields, roles)


def _refuse_unknown(found: Mapping[str, Any], known: set[str], where: str, what: str) -> None:
    """Refuse unsupported settings (preferences, images, filters); ignoring them would train on different data."""
    for key, value in found.items():
        if key not in known and value not in (None, False):
            raise ConfigError(
                f"{where}: {what} {key} is not supported. Expected only {', '.join(sorted(known))}. Remove it from the "
                "entry, or describe the file with `format` and `fields`."
            )
