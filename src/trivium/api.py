"""Trivium for notebooks and scripts: the functions behind the commands, with Python values instead of options.

A run is given as a run file, as its keys (`method="lora", model=..., data=...`), or as a file and the keys to change;
nested keys are dicts: `budget={"epochs": 2}`. Errors are the same `TriviumError` paragraphs that the commands print; an
option `--held-out FILE` in one is the argument `held_out=FILE` here. Progress is shown as by the commands, which call
these functions. torch is imported inside them, when it is needed.
"""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trivium.results import TrainedRun

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trivium.config.load import ResolvedRun

__all__ = ["LoadedModel", "TrainedRun", "load", "open_run", "train"]

File = str | PathLike[str]


class LoadedModel(NamedTuple):
    """A model that is ready to use, and its tokenizer: `model, tokenizer = trivium.load(...)`."""

    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerBase"


def train(run_file: File | None = None, /, *overrides: str, allow: Iterable[str] = (), **keys: Any) -> TrainedRun:
    """Train a run, or resume it; the same call again does nothing if it is finished.

    Args:
        run_file: a run file; None if the keys describe the whole run.
        overrides: `key=value` with dotted keys, as on the command line.
        allow: ids of the doctor's rules whose errors do not stop the run.
        keys: keys of a run file as Python values; they win over the run file's.

    Raises:
        ConfigError: the configuration is wrong, or the folder belongs to another run; nothing was changed.
        BadData: the data cannot be used; nothing was changed.
        DoesNotFit: memory or disk ran out; saved files are unchanged.
        Stopped: the run was interrupted and everything was saved; the same call continues.
        TriviumError: the run could not continue.
    """
    resolved = _resolve(run_file, overrides, keys)

    from trivium.doctor.examine import allowed_ids
    from trivium.train import train as train_run

    return TrainedRun(train_run(resolved, allowed_ids(tuple(allow))).path)


def open_run(folder: File) -> TrainedRun:
    """A run that was trained before, finished or not. Raises: TriviumError when `folder` is not a run folder."""
    from trivium.engine.runfolder import RunFolder

    return TrainedRun(RunFolder.existing(Path(folder)).path)


def load(model: File, *, nf4: bool = False) -> LoadedModel:
    """Load a model and its tokenizer with transformers, on the accelerator if there is one.

    Args:
        model: a run folder, the folder of a model or an adapter, or a Hub id. An adapter is applied to its base model.
        nf4: quantize an adapter's base model to NF4, as QLoRA training does.

    Raises: ConfigError when there is no such model, or it is damaged, incomplete or not a Qwen model.
    """
    from trivium.use.load import load as load_model

    loaded = load_model(str(model), nf4=nf4)
    return LoadedModel(loaded.model, loaded.tokenizer)


def _resolve(run_file: File | None, overrides: Iterable[str], keys: dict[str, Any]) -> "ResolvedRun":
    from trivium.config.load import load_run

    return load_run(None if run_file is None else Path(run_file), tuple(overrides), keys)
