"""Which network a run names, found without torch and without the Hub: the catalogue, a folder, a budget, or numbers.

The engine settles the shape again from the real tokenizer; here an untrained tokenizer counts with the size it is to
have. Imported by whoever plans a run; reads config.json and tokenizer.json only.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from trivium.config.run import Run, TrainTokenizer
from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.model.shape import QwenShape

VOCAB_MULTIPLE = 64


def shape_of_run(run: Run) -> QwenShape | None:
    """The network with its vocabulary; None for an id of the Hub that is not in the catalogue.

    Raises: ConfigError when the name is no model, its folder has no config.json, or the sizes cannot be.
    """
    model = run.model
    if model.name is not None:
        shape = shape_of_name(model.name)
        return replace(shape, vocab_size=model.vocab_size) if shape and model.vocab_size else shape
    vocab_size = model.vocab_size or VOCAB_MULTIPLE * math.ceil(_tokenizer_size(run) / VOCAB_MULTIPLE)
    if model.shape is None:
        return catalog.size_for_budget(model.params or 0, vocab_size)
    given = model.shape
    heads = given.num_attention_heads
    return QwenShape(
        **given.model_dump(exclude={"num_key_value_heads", "head_dim"}),
        num_key_value_heads=given.num_key_value_heads or heads,
        head_dim=given.head_dim or given.hidden_size // heads,
        vocab_size=vocab_size,
    )


def shape_of_name(name: str) -> QwenShape | None:
    """A published model with its owner before it or not, a folder's model, or None for another id of the Hub."""
    if Path(name).is_dir():
        return _shape_of_folder(Path(name))
    owner, slash, last = name.rpartition("/")
    known = {entry.lower() for entry in catalog.names()}
    if last.lower() in known and (not slash or owner.lower() == "qwen"):
        return catalog.get(last)
    if slash and not name.startswith((".", "/", "~")) and name.count("/") == 1:
        return None
    if slash:
        raise ConfigError(f"There is no folder {name!r}. Give the path of a model's folder, or the name of a model.")
    return catalog.get(name)


def hub_id(name: str) -> str:
    """Where a published model's weights are found; any other name stays as it is."""
    published = {known.lower(): known for known in catalog.names() if known.startswith("Qwen")}
    known = published.get(name.rpartition("/")[2].lower())
    return f"Qwen/{known}" if known and not Path(name).is_dir() and shape_of_name(name) is not None else name


def _shape_of_folder(folder: Path) -> QwenShape:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no config.json, so it is not the folder of a Hugging Face model. Download the model whole, "
            "or give its name, such as Qwen/Qwen3-0.6B."
        )
    return QwenShape.from_hf_config(_read_json(file))


def _tokenizer_size(run: Run) -> int:
    """Tokens of the run's tokenizer: of the one named, or of the one to be trained."""
    if run.tokenizer is None or run.tokenizer.path is None:
        return ((run.tokenizer.train if run.tokenizer else None) or TrainTokenizer()).vocab_size
    file = Path(run.tokenizer.path) / "tokenizer.json"
    if not file.is_file():
        shape = shape_of_name(run.tokenizer.path)
        if shape is None:
            raise ConfigError(f"How many tokens {run.tokenizer.path!r} has is not known here; set model.vocab_size.")
        return shape.vocab_size
    content = _read_json(file)
    try:
        return max([*content["model"]["vocab"].values(), *(entry["id"] for entry in content["added_tokens"])]) + 1
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ConfigError(f"{file} does not say which tokens there are; set model.vocab_size.") from None


def _read_json(file: Path) -> dict[str, Any]:
    """One JSON object. Raises: ConfigError when the file is something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}). Fetch the file again.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no JSON object. Fetch the file again.")
    return content
