"""Finds and loads a model by name: a run folder, a model or adapter folder, or a Hub id.

Loads with stock transformers and PEFT: safetensors only, no code from the folder, and missing weights are an error.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from trivium.data.chat.template import ChatTemplate, describe_template
from trivium.data.tokenizer import load_tokenizer
from trivium.engine.runfolder import RunFolder
from trivium.errors import ConfigError, TriviumError
from trivium.model import hf
from trivium.model.quantize import quantize_projections

SAFELY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class FoundModel:
    """The folders of a model.

    Attributes:
        kind: `base` is a published model, `model` the full result of a run, `adapter` an adapter of a base.
        folder: the Hugging Face or PEFT folder.
        base_folder: the folder of an adapter's base.
        run_folder: the run that made it, if known.
        was_quantized: whether it was trained against its base in NF4.
    """

    kind: Literal["base", "model", "adapter"]
    folder: Path
    base_folder: Path | None
    run_folder: Path | None
    was_quantized: bool

    @property
    def model_folder(self) -> Path:
        """The folder with config.json: the base's for an adapter."""
        return self.base_folder or self.folder


@dataclass(frozen=True)
class Loaded:
    """A loaded model.

    Attributes:
        model: a transformers model, or a PeftModel around one, on its device and in evaluation mode.
        tokenizer: a transformers tokenizer; an adapter's own, else its base's.
        place: where it came from.
        template: its chat template; None without a usable one.
        stop_ids: the token ids at which generation stops.
    """

    model: Any
    tokenizer: Any
    place: FoundModel
    template: ChatTemplate | None
    stop_ids: list[int]

    @property
    def kind(self) -> str:
        """`base`, `model` or `adapter`."""
        return self.place.kind

    @property
    def network(self) -> Any:
        """The transformers model, with the adapter's layers inside."""
        return self.model.get_base_model() if self.kind == "adapter" else self.model

    @property
    def converses(self) -> bool:
        """Whether it is a chat model: it has a chat template, and generation stops at the end of a turn."""
        return self.template is not None and self.template.end_of_turn_id in self.stop_ids


def find(name: str) -> FoundModel:
    """Find a model by name; loads no weights.

    Args:
        name: a run folder, the folder of a model or an adapter, or a Hub id, which is downloaded once.

    Raises: ConfigError when there is no model, the run is not finished, or an adapter's base is missing.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(
            f"{name} is not a model: there is no such folder, and it is not a Hub id of the form owner/name. Give the "
            "folder of a finished run, of a Hugging Face model or of an adapter."
        )
    folder = path if path.is_dir() else hf.find_folder(name)
    run_folder = next((place for place in (folder, folder.resolve().parent) if (place / "run.yaml").is_file()), None)
    if run_folder == folder:
        folder = _result_of(folder)
    if (folder / hf.ADAPTER_CONFIG).is_file():
        if not (folder / hf.ADAPTER_WEIGHTS).is_file():
            raise ConfigError(
                f"{folder} has no {hf.ADAPTER_WEIGHTS}. Expected an adapter in safetensors; other formats are not "
                "read because they can run code. Save the adapter again with safetensors."
            )
        return FoundModel("adapter", folder, _base_of(folder), run_folder, _weights_of(run_folder) == "nf4")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name} is not a model: {folder} has neither a config.json nor an {hf.ADAPTER_CONFIG}. Give the folder of "
            "a finished run, of a Hugging Face model or of an adapter."
        )
    return FoundModel("model" if run_folder else "base", folder, None, run_folder, False)


def _result_of(run_folder: Path) -> Path:
    """The model or adapter of a finished run."""
    for name in ("adapter", "model"):
        if (run_folder / name).is_dir() and RunFolder(run_folder).is_finished:
            return run_folder / name
    raise ConfigError(
        f"The run {run_folder} is not finished, so it has no model yet. Resume it with: "
        f"trivium train {run_folder / 'run.yaml'}."
    )


def _base_of(adapter_folder: Path) -> Path:
    """The folder of an adapter's base model."""
    name = hf.read_json(adapter_folder / hf.ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{adapter_folder / hf.ADAPTER_CONFIG} does not say which model the adapter belongs to. Set its "
            "base_model_name_or_path to that model's folder or Hub id."
        )
    try:
        return hf.find_folder(name)
    except ConfigError as error:
        raise ConfigError(
            f"The adapter {adapter_folder} belongs to the model {name}, which cannot be loaded: {error} If the model "
            f"was moved, set base_model_name_or_path in {adapter_folder / hf.ADAPTER_CONFIG} to where it is now."
        ) from error


def _weights_of(run_folder: Path | None) -> str | None:
    """The `weights` setting of a run."""
    if run_folder is None:
        return None
    try:
        content = yaml.safe_load((run_folder / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content.get("weights") if isinstance(content, dict) else None


def load(
    name: str | FoundModel,
    note: Callable[[str], None] = lambda text: None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    nf4: bool = False,
) -> Loaded:
    """Load a model with its tokenizer, on the accelerator if there is one.

    Args:
        name: a name for `find`, or its result.
        note: called with one line that the user should know about the model.
        dtype: of the base's weights; `auto` as stored. An adapter's are fp32.
        nf4: quantize the linear layers of an adapter's base to NF4, as in training.

    Raises: ConfigError when the folder is damaged, incomplete or not a Qwen model.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = find(name) if isinstance(name, str) else name
    hf.read_shape(place.model_folder)  # refuses other models, and those that need their own code
    tokenizer = read_tokenizer(place)
    model = load_network(place.model_folder, dtype, nf4)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ConfigError(
            f"The tokenizer of {place.folder} has {len(tokenizer):,} tokens and the model's embedding "
            f"{model.get_input_embeddings().weight.shape[0]:,} rows. They do not belong together; use the "
            "tokenizer that the model was trained with."
        )
    if place.kind == "adapter":
        model = load_adapter(model, place)
        if place.was_quantized and not nf4:
            note(
                f"{place.folder} was trained on its base in NF4; here it runs on the full-precision base, whose "
                "weights differ slightly."
            )
    stop_ids = hf.read_stop_ids(place.folder, place.model_folder) or [tokenizer.eos_token_id]
    _settle_generation(model, place, tokenizer, stop_ids)
    return Loaded(model.eval(), tokenizer, place, read_template(tokenizer), stop_ids)


def read_tokenizer(place: FoundModel) -> Any:
    """The adapter's or model's own tokenizer; for an adapter without one, its base's.

    Raises: ConfigError when neither has one.
    """
    for folder in (place.folder, place.base_folder):
        if folder is not None and (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder)
    where = f"in {place.folder}" + (f" or in its base {place.base_folder}" if place.base_folder else "")
    raise ConfigError(
        f"There is no tokenizer.json {where}, so the model cannot be used. Copy the tokenizer's files "
        "there from the model it was trained with."
    )


def load_network(folder: Path, dtype: torch.dtype | Literal["auto"] = "auto", nf4: bool = False) -> Any:
    """The transformers model of a folder, on its device.

    Raises: ConfigError when it cannot be loaded or a weight is missing, which transformers would initialize at random.
    """
    from transformers import AutoModelForCausalLM

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, dtype=dtype, output_loading_info=True, **SAFELY
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{folder} cannot be loaded: {_first_line(error)} Expected a Hugging Face folder with its weights in "
            "safetensors. Download what is missing, or give a finished run."
        ) from error
    if missing := sorted(map(str, report["missing_keys"])):
        raise ConfigError(
            f"{folder} cannot be loaded: {', '.join(missing[:3])} and perhaps more weights are missing from its "
            "safetensors files. Fetch the folder again."
        )
    if nf4:
        quantize_projections(model, model.dtype)
    return model.to(device)


def load_adapter(model: Any, place: FoundModel) -> Any:
    """The PeftModel of an adapter around its base.

    Raises: ConfigError when the adapter does not fit, or lacks weights, which PEFT would initialize at random.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(place.folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"The adapter {place.folder} does not fit its base {place.base_folder}: {_first_line(error)} Set the "
            f"base it was trained on in {hf.ADAPTER_CONFIG}."
        ) from error
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise ConfigError(
            f"The adapter {place.folder} lacks weights that its {hf.ADAPTER_CONFIG} names. "
            "Save or download the adapter again."
        )
    return adapted


def read_template(tokenizer: Any) -> ChatTemplate | None:
    """A description of a tokenizer's chat template; None without a usable one."""
    try:
        return describe_template(tokenizer)
    except TriviumError:
        return None


def _settle_generation(model: Any, place: FoundModel, tokenizer: Any, stop_ids: list[int]) -> None:
    """Use the adapter's generation settings before its base's."""
    from transformers import GenerationConfig

    network = model.get_base_model() if place.kind == "adapter" else model
    if (place.folder / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(place.folder)
    network.generation_config.eos_token_id = stop_ids
    if network.generation_config.pad_token_id is None:
        network.generation_config.pad_token_id = tokenizer.pad_token_id


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[:2]) if lines else type(error).__name__
