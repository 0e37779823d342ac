"""Compares runs and their base models: quality on the same prompts and held-out sets, and the cost of each run.

Only one model is in memory at a time. Costs come from the records of the runs.
"""

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trivium.data.tokenizer import document_encoding
from trivium.engine.record import read_record
from trivium.engine.runfolder import RunFolder
from trivium.errors import ConfigError, TriviumError
from trivium.use.answers import EvalPrompt, ModelAnswer, Scores, answers, read_questions, score
from trivium.use.held_out import HeldOut, Passage, measure, passages_of_file, passages_of_run
from trivium.use.load import FoundModel, Loaded, find, load, read_chat

Note = Callable[[str], None]
Bar = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class ComparedModel:
    """One model of a comparison.

    Attributes:
        name: its name in the comparison.
        base: name of its base model in the comparison; None for base models and for scratch.
        method: from its run file; None for a model without a run.
        folder: its folder.
        size_bytes: of the model or adapter on disk.
        num_trained_params, train_seconds, tokens_per_second, peak_memory_gib: from the records of its run.
        held_out, general: losses on the held-out set, and on general text.
        scores, answers: answers to the prompts, and their scores.
    """

    name: str
    base: str | None
    method: str | None
    folder: str
    size_bytes: int
    num_trained_params: int | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gib: float | None = None
    held_out: HeldOut | None = None
    general: HeldOut | None = None
    scores: Scores | None = None
    answers: list[ModelAnswer] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        models: base models first, then the others in the order given.
        questions: the prompts; may be empty.
        held_out, general: what the two losses were measured on; may be None.
        same_tokenizer: whether all tokenizers are equal, so that losses per token can be compared.
        notes: remarks for the reader.
    """

    models: list[ComparedModel]
    questions: list[EvalPrompt]
    held_out: str | None
    general: str | None
    same_tokenizer: bool
    notes: list[str]

    def forgotten(self, model: ComparedModel) -> float | None:
        """The increase of the general loss over the base model's; None if either is missing."""
        before = next((other.general for other in self.models if other.name == model.base), None)
        return None if before is None or model.general is None else model.general.loss - before.loss


@dataclass
class Measurements:
    """How every model is evaluated; for the fields, see `compare` and `answers`."""

    questions: list[EvalPrompt]
    as_chat: bool
    """Whether any of the models is a chat model."""
    stops: list[str]
    """The stop tokens of all models."""
    max_new_tokens: int
    thinking: bool
    held_out: Path | None
    general: Path | None
    own: list[Passage] | None
    """The held-out set of a run, used without a `held_out` file."""
    note: Note
    bar: Bar
    _passages: dict[Any, list[Passage]] = field(default_factory=dict)

    def examine(self, model: ComparedModel, place: FoundModel) -> ComparedModel:
        """The model with its losses, answers and scores; its weights are freed."""
        loaded = load(place, self.note)
        held_out = self._read(self.held_out, loaded) if self.held_out else self.own
        general = self._read(self.general, loaded) if self.general else None
        result = replace(
            model,
            held_out=measure(loaded, held_out, self.bar(f"{model.name}: held-out loss")) if held_out else None,
            general=measure(loaded, general, self.bar(f"{model.name}: general loss")) if general else None,
        )
        if self.questions:
            vocabulary = loaded.tokenizer.get_vocab()
            given = answers(
                loaded,
                self.questions,
                as_chat=self.as_chat and loaded.template is not None,
                stop_ids=[vocabulary[token] for token in self.stops if token in vocabulary],
                max_new_tokens=self.max_new_tokens,
                thinking=self.thinking,
                every=self.bar(f"{model.name}: answers"),
            )
            result = replace(result, scores=score(self.questions, given), answers=given)
        del loaded
        gc.collect()
        return result

    def _read(self, path: Path, loaded: Loaded) -> list[Passage]:
        """A file in the model's tokens and template, cached for models that share them."""
        key = (path, document_encoding(loaded.tokenizer).fingerprint, loaded.template)
        if key not in self._passages:
            self._passages[key] = passages_of_file(path, loaded.tokenizer, note=self.note)
        return self._passages[key]


def compare(
    names: Sequence[str],
    *,
    prompts: Path | None,
    held_out: Path | None,
    general: Path | None,
    max_new_tokens: int = 256,
    thinking: bool = False,
    note: Note = lambda text: None,
    bar: Bar = lambda name: lambda done, total: None,
) -> Comparison:
    """Compare models, including the base models of runs and adapters.

    Args:
        names: runs, or any other name that `find` accepts.
        prompts: a file of prompts, with or without expected answers.
        held_out: a file to measure the loss on; by default, the held-out set of the first run.
        general: a file of general text, to measure forgetting.
        max_new_tokens: maximum tokens of an answer.
        thinking: the template's `enable_thinking`.
        note: called with a remark for the reader.
        bar: starts a progress bar with a name, and returns what to call with (done, total).

    Raises: ConfigError or BadData when a model or a file cannot be used.
    """
    notes: list[str] = []

    def remember(text: str) -> None:
        if text not in notes:
            notes.append(text)
            note(text)

    entries = find_models(names, remember)
    same_tokenizer, as_chat, stops = _shared_chat(place for _, place in entries)
    own, own_name = (None, None) if held_out else own_held_out(entries, same_tokenizer, remember)
    evaluation = Measurements(
        questions=read_questions(prompts) if prompts else [],
        as_chat=as_chat,
        stops=stops,
        max_new_tokens=max_new_tokens,
        thinking=thinking,
        held_out=held_out,
        general=general,
        own=own,
        note=remember,
        bar=bar,
    )
    if evaluation.questions:
        how = "with the chat template" if as_chat else "as plain text"
        notes.append(f"Prompts are given {how}. Answers end at {' or '.join(stops)}.")
    return Comparison(
        models=[evaluation.examine(model, place) for model, place in entries],
        questions=evaluation.questions,
        held_out=str(held_out) if held_out else own_name,
        general=str(general) if general else None,
        same_tokenizer=same_tokenizer,
        notes=notes,
    )


def _shared_chat(places: Iterable[FoundModel]) -> tuple[bool, bool, list[str]]:
    """Whether all tokenizers are equal, whether any model is a chat model, and the stop tokens of all models."""
    encodings: set[str] = set()
    stops: dict[str, None] = {}
    as_chat = False
    for place in places:
        tokenizer, template, stop_ids = read_chat(place)
        encodings.add(document_encoding(tokenizer).fingerprint)
        stops |= dict.fromkeys(tokenizer.convert_ids_to_tokens(stop_ids))
        as_chat |= template is not None and template.end_of_turn_id in stop_ids
    return len(encodings) == 1, as_chat, list(stops)


def find_models(names: Sequence[str], note: Note) -> list[tuple[ComparedModel, FoundModel]]:
    """The base models of the named models, then the other named models, each once.

    Raises: ConfigError when one cannot be found.
    """
    places: dict[str, FoundModel] = {}
    for name in names:
        place = find(name)
        short = place.run_folder.resolve().name if place.run_folder else Path(name).name
        places[short if short not in places else name] = place
    bases = {name: base for name, place in places.items() if (base := _base_of(place, note)) is not None}
    folder_names = {place.folder.resolve(): name for name, place in places.items()}
    for base in bases.values():
        if base.folder.resolve() not in folder_names:
            folder_names[base.folder.resolve()] = name = _base_name(base, places)
            places[name] = base
    base_names = {name: folder_names[base.folder.resolve()] for name, base in bases.items()}
    first = list(dict.fromkeys(base_names.values()))
    ordered = first + [name for name in places if name not in first]
    return [(_known_of(name, base_names.get(name), places[name]), places[name]) for name in ordered]


def _base_of(place: FoundModel, note: Note) -> FoundModel | None:
    """The base model of a run or adapter; None for scratch, for published models, and if it cannot be found."""
    if place.base_folder is not None:
        return find(str(place.base_folder))
    config = read_record(place.run_folder).config if place.run_folder is not None else {}
    model = config.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    if config.get("weights", "random") == "random" or not isinstance(name, str):
        return None
    try:
        return find(name)
    except ConfigError as error:
        note(f"{place.run_folder} is compared without its base model: {error}")
        return None


def _base_name(base: FoundModel, taken: dict[str, FoundModel]) -> str:
    """The run name, folder name or Hub id of a base model."""
    folder = (base.run_folder or base.folder).resolve()
    snapshot = next((part for part in folder.parts if part.startswith("models--")), None)
    name = snapshot.removeprefix("models--").replace("--", "/") if snapshot else folder.name
    return name if name not in taken else str(base.folder)


def _known_of(name: str, base: str | None, place: FoundModel) -> ComparedModel:
    """What is known about a model without loading it."""
    size_bytes = sum(file.stat().st_size for file in place.folder.iterdir() if file.is_file())
    model = ComparedModel(name, base, None, str(place.folder), size_bytes)
    if place.run_folder is None:
        return model
    record = read_record(place.run_folder)
    finished = RunFolder(place.run_folder).read("finished.json") or {}
    made = record.provenance.get("model")
    return replace(
        model,
        method=record.config.get("method"),
        num_trained_params=made.get("num_trained_params") if isinstance(made, dict) else None,
        train_seconds=finished.get("train_seconds", record.curve("train/seconds").last),
        tokens_per_second=record.curve("train/tokens_per_second").typical,
        peak_memory_gib=record.curve("train/peak_memory_gib").highest,
    )


def own_held_out(
    entries: Sequence[tuple[ComparedModel, FoundModel]], same_tokenizer: bool, note: Note
) -> tuple[list[Passage] | None, str | None]:
    """The held-out set of the first run that is not a base model, and its name; (None, None) without one."""
    bases = {model.base for model, _ in entries}
    runs = [(one.name, place.run_folder) for one, place in entries if place.run_folder and one.name not in bases]
    if not runs:
        return None, None
    if not same_tokenizer:
        note("No held-out loss, because the models' tokenizers differ. Add --held-out FILE to measure one.")
        return None, None
    name, run_folder = runs[0]
    try:
        return passages_of_run(run_folder, note), f"held-out set of {name}"
    except (TriviumError, OSError) as error:
        note(f"No held-out loss, because the held-out set of {name} cannot be read: {error}")
        return None, None
