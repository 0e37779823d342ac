"""The model shape of a run file, given by a name, a folder, sizes, or a parameter budget. Never imports torch.

The engine uses the real tokenizer and the config.json of a Hub model; the planner reads local files only
(`planned_shape`) and assumes the configured size for a tokenizer that is not trained yet.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from trivium.config.inputs import TrainTokenizer
from trivium.config.run import Run
from trivium.errors import ConfigError
from trivium.files import require_regular
from trivium.model import catalog
from trivium.model.shape import QwenShape

VOCAB_MULTIPLE = 64


def shape_of_sizes(run: Run) -> QwenShape | None:
    """The shape given by `model.shape`; None if it is not set."""
    given = run.model.shape
    if given is None:
        return None
    heads = given.num_attention_heads
    return QwenShape(
        **given.model_dump(exclude={"num_key_value_heads", "head_dim"}),
        num_key_value_heads=given.num_key_value_heads or heads,
        head_dim=given.head_dim or given.hidden_size // heads,
        vocab_size=run.model.vocab_size or VOCAB_MULTIPLE,
        max_position_embeddings=run.data.seq_len,
    )


def settle_shape(run: Run, shape: QwenShape | None, num_tokens: int, tokenizer: Path | str) -> QwenShape:
    """The shape with its final vocabulary size: as pretrained, as set, or as the tokenizer needs.

    Args:
        shape: the shape so far; None for a parameter budget.
        num_tokens: tokens of the tokenizer.
        tokenizer: its name in messages.

    Raises: ConfigError when the embedding table would be smaller than the tokenizer.
    """
    vocab_size = run.model.vocab_size or VOCAB_MULTIPLE * math.ceil(num_tokens / VOCAB_MULTIPLE)
    if shape is not None and run.weights != "random":
        if run.model.vocab_size not in (None, shape.vocab_size):
            raise ConfigError(
                f"model.vocab_size is {run.model.vocab_size:,}, but the pretrained embedding table has "
                f"{shape.vocab_size:,} rows. Remove model.vocab_size, or train with weights: random."
            )
        vocab_size = shape.vocab_size
    elif shape is not None and run.model.name is not None and run.tokenizer is not None and run.tokenizer.path:
        vocab_size = run.model.vocab_size or max(shape.vocab_size, vocab_size)
    if vocab_size < num_tokens:
        raise ConfigError(
            f"The tokenizer in {tokenizer} has {num_tokens:,} tokens, but the model's embedding table has only "
            f"{vocab_size:,} rows. Set model.vocab_size to at least {num_tokens}, or use the model's own tokenizer."
        )
    if shape is None:
        assert run.model.params is not None
        shape = catalog.size_for_budget(run.model.params, vocab_size)
        return replace(shape, max_position_embeddings=run.data.seq_len)
    return replace(shape, vocab_size=vocab_size)


def planned_shape(run: Run) -> QwenShape | None:
    """The shape from local files; None for a Hub model that is not in the catalog.

    Raises: ConfigError when the name is unknown, its folder has no config.json, or the sizes are invalid.
    """
    shape = shape_of_sizes(run)
    if run.model.name is not None:
        shape = shape_of_name(run.model.name)
        if shape is None:
            return None
    path = run.tokenizer.path if run.tokenizer else None
    return settle_shape(run, shape, _num_tokens(run, shape), path or run.model.name or "the run file")


def shape_of_name(name: str) -> QwenShape | None:
    """The shape of a published model or of a model folder; None for other Hub ids.

    Raises: ConfigError when there is no such folder or size, or the folder has no readable config.json.
    """
    if Path(name).is_dir():
        require_model_folder(Path(name))
        file = Path(name) / "config.json"
        if not file.is_file():
            raise ConfigError(
                f"{name} has no config.json, so it is not a Hugging Face model folder. Download the whole model, or "
                "give its name, for example Qwen/Qwen3-0.6B."
            )
        return QwenShape.from_hf_config(read_json(file))
    published = published_shape(name)
    if published is not None:
        return published
    if "/" not in name:
        return catalog.get(name)  # raises with the nearest name
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"There is no folder {name!r}. Give the path of a model folder, or the name of a model, for example "
            "Qwen/Qwen3-0.6B."
        )
    return None


def require_model_folder(folder: Path) -> None:
    """Raise ConfigError for a folder with a special file in it, and for the folder of a run, naming its model."""
    require_regular(*folder.iterdir())
    if not (folder / "run.yaml").is_file() or (folder / "config.json").is_file():
        return
    if (folder / "model" / "config.json").is_file():
        hint = f"Set model: {folder / 'model'}."
    elif (folder / "adapter").is_dir():
        merged = f"{folder}-merged"
        hint = f"Merge its adapter: trivium export {folder} --merge --out {merged}. Then set model: {merged}."
    else:
        hint = f"It has no result yet; finish it with: trivium train {folder / 'run.yaml'}"
    raise ConfigError(f"{folder} is the folder of a run; expected the folder of a model. {hint}")


def published_shape(name: str) -> QwenShape | None:
    """The shape of a model in the catalog, by its name or its Hub id; None for other names."""
    by_id = {hub_id.lower(): known for known, hub_id in catalog.hub_ids().items()}
    known = by_id.get(name.lower(), name)
    return catalog.get(known) if catalog.is_listed(known) else None


def hub_id(name: str) -> str:
    """The Hub id of a published model, by its name or its id; other names are returned unchanged."""
    if not Path(name).is_dir():
        for known, published_id in catalog.hub_ids().items():
            if name.lower() in (known.lower(), published_id.lower()):
                return published_id
    return name


def _num_tokens(run: Run, shape: QwenShape | None) -> int:
    """Tokens of the configured tokenizer, of the model's tokenizer, or of the one that will be trained."""
    if run.tokenizer is not None and run.tokenizer.path is not None:
        return _tokenizer_size(run.tokenizer.path)
    if run.tokenizer is None and shape is not None and run.model.name is not None and _has_tokenizer(run):
        return shape.vocab_size
    return ((run.tokenizer.train if run.tokenizer else None) or TrainTokenizer()).vocab_size


def _has_tokenizer(run: Run) -> bool:
    """Whether the named model comes with a tokenizer; a size like `ladder-1m` does not."""
    name = run.model.name or ""
    if run.weights != "random":
        return True
    return (Path(name) / "tokenizer.json").is_file() if Path(name).is_dir() else not catalog.is_listed(name)


def tokenizer_at_hand(run: Run) -> Path | None:
    """The folder of the run's tokenizer, if it is on this machine and not trained by the run."""
    name = (run.tokenizer.path if run.tokenizer else run.model.name) or ""
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        return folder if (folder / "tokenizer.json").is_file() else None
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(name, file) for file in ("tokenizer.json", "tokenizer_config.json")]
    return Path(found[0]).parent if isinstance(found[0], str) and isinstance(found[1], str) else None


def _tokenizer_size(path: str) -> int:
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        shape = shape_of_name(path)
        if shape is None:
            raise ConfigError(f"The vocabulary size of the tokenizer {path!r} is unknown. Set model.vocab_size.")
        return shape.vocab_size
    content: Any = read_json(file)
    try:
        return max([*content["model"]["vocab"].values(), *(entry["id"] for entry in content["added_tokens"])]) + 1
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ConfigError(f"{file} does not list its tokens. Set model.vocab_size.") from None


def read_json(path: Path) -> dict[str, object]:
    """A JSON object in a model folder.

    Raises: ConfigError when the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; expected the folder of a Hugging Face model. Check the path."
        ) from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}). Download the file again.") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} contains a {type(content).__name__}; expected a JSON object. Download the file again."
        )
    return content
