"""Layouts: which field of a file's records holds what, detected from the first records or given by the user.

A LLaMA-Factory `dataset_info.json` is one way to give it. Runs in worker processes, so it imports nothing heavy.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from trivium.data.chat.messages import FUNCTION_CALL
from trivium.errors import BadData, ConfigError

if TYPE_CHECKING:
    from trivium.config.inputs import Source

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"]

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
# LLaMA-Factory's names -> ours. Source: its data/README.md; without `columns` or `tags` the second of each pair holds.
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
INFO_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
INFO_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": FUNCTION_CALL,
    "system_tag": "system",
}


@dataclass(frozen=True)
class RecordLayout:
    """How a file's records are read; small, so that it travels to worker processes and into manifests."""

    format: Format
    fields: Mapping[str, str | None] = field(default_factory=dict)
    """Our names (messages, role, content, prompt, input, answer, system, tools, history) -> the file's own; None for
    what the file does not have. A name that is not here is looked for under its usual names."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The file's names of roles -> ours."""
    text_field: str = "text"

    def names(self, name: str) -> tuple[str, ...]:
        """The fields that may hold what we call `name`."""
        if name in self.fields:
            given = self.fields[name]
            return () if given is None else (given,)
        return USUAL_FIELDS.get(self.format, {}).get(name, ())

    def find(self, name: str, record: dict[str, Any]) -> str | None:
        """Which field of the record holds what we call `name`; None when none does."""
        return next((found for found in self.names(name) if found in record), None)


def detect(records: Sequence[object], layout: RecordLayout, where: str) -> RecordLayout:
    """Give the layout the format that most of a file's first records have.

    Args:
        records: decoded records; those that are not objects do not count.
        layout: what the user said of fields and roles.
        where: name of the file for messages.

    Raises: BadData when no format fits, or two fit alike.
    """
    objects = [record for record in records if isinstance(record, dict)]
    counts = Counter(found for record in objects if (found := _fitting(record, layout)))
    if not counts:
        names = list(dict.fromkeys(name for record in objects for name in record))
        raise BadData(
            f"{where}: the records have the fields {', '.join(map(repr, names[:12])) or '(none)'}, which fit no known "
            "format. Expected messages; conversations (ShareGPT); instruction and output (Alpaca); prompt and "
            f"completion, response or answer; or {layout.text_field!r} for plain text. Say which is which with fields, "
            "for example {prompt: question, answer: reply}, or name the field of the text with field."
        )
    ((best, _),) = counts.most_common(1)
    if best == "both":
        raise BadData(
            f"{where}: the records hold a text ({layout.text_field!r}) and a question with its answer. Expected one "
            "or the other; say which is meant with format: text, alpaca or prompt."
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
    """What one entry of a LLaMA-Factory `dataset_info.json` says: where the records are, and how they are laid out.

    `source.path` is that file or its folder, `source.dataset` the entry. The layout is None for plain text.
    Raises: ConfigError when there is no such entry, or it says what is not understood: nothing is ignored.
    """
    assert source.path is not None and source.dataset is not None
    path = Path(source.path).expanduser()
    path = path / INFO_NAME if path.is_dir() else path
    where = f"{path}, data set {source.dataset!r}"
    entry = _info_entry(path, source.dataset)
    _refuse_unknown(entry, INFO_KEYS, where, "is not understood")
    place: dict[str, Any] = {"dataset": None, "subset": entry.get("subset"), "split": entry.get("split", "train")}
    if "hf_hub_url" in entry:
        place |= {"path": None, "hub": entry["hf_hub_url"]}
    elif "file_name" in entry:
        place["path"] = str(path.parent / entry["file_name"])
    else:
        raise ConfigError(f"{where}: names neither file_name nor hf_hub_url. Expected records in a file or on the Hub.")
    layout = _info_layout(entry, where)
    if layout.format == "text":
        return source.model_copy(update=place | {"format": "text", "field": layout.text_field}), None
    return source.model_copy(update=place), layout


def _info_entry(path: Path, name: str) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}). Expected a LLaMA-Factory {INFO_NAME}, or its folder."
        ) from None
    entry = info.get(name) if isinstance(info, dict) else None
    if not isinstance(entry, dict):
        known = ", ".join(list(info)[:12]) if isinstance(info, dict) else "no entries"
        raise ConfigError(f"{path}: has no data set {name!r}. Expected one of its entries: {known}.")
    return entry


def _info_layout(entry: dict[str, Any], where: str) -> RecordLayout:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(f"{where}: formatting is {formatting!r}. Expected alpaca, sharegpt or openai.")
    known = INFO_COLUMNS["alpaca" if formatting == "alpaca" else "sharegpt"]
    columns = entry.get("columns")
    _refuse_unknown(columns or {}, set(known), where, "as a column is not understood")
    # As there: once columns are given, one that is not among them is not read.
    fields: dict[str, str | None] = {
        ours: usual if columns is None else columns.get(theirs) for theirs, (ours, usual) in known.items()
    }
    if formatting == "alpaca":
        if fields["answer"] is None and fields["prompt"] is not None:
            return RecordLayout("text", text_field=fields["prompt"])
        return RecordLayout("alpaca", fields)
    tags = entry.get("tags") or ({"role_tag": "role", "content_tag": "content"} if formatting == "openai" else {})
    _refuse_unknown(tags, set(INFO_TAGS), where, "as a tag is not understood")
    named = INFO_TAGS | tags
    fields |= {"role": named["role_tag"], "content": named["content_tag"]}
    roles = {named[tag]: role for tag, role in INFO_ROLES.items()}
    return RecordLayout("messages" if formatting == "openai" else "sharegpt", fields, roles)


def _refuse_unknown(found: Mapping[str, Any], known: set[str], where: str, what: str) -> None:
    """Preferences, images and filters are refused too: ignoring them would train on something else."""
    for key, value in found.items():
        if key not in known and value not in (None, False):
            raise ConfigError(
                f"{where}: {key} {what}. Expected only {', '.join(sorted(known))}: questions with answers, "
                "conversations or plain text, all records of them. Make an entry without it, or describe the file with "
                "format and fields."
            )
