"""Finds and loads a model by name: a run folder, a model or adapter folder, or a Hub id.

Uses transformers and PEFT, reads only safetensors and no code from the folder, and refuses missing weights.
"""

import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trivium.data.chat.template import ChatTemplate, describe_template
from trivium.data.tokenizer import load_tokenizer
from trivium.engine.record import read_record
from trivium.engine.runfolder import RunFolder
from trivium.errors import ConfigError, TriviumError, count_of, first_lines
from trivium.files import require_regular
from trivium.model import hf
from trivium.model.quantize import quantize_projections

SAFELY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class FoundModel:
    """The folders of a model.

    Attributes:
        kind: `base` is a published model, `model` the result of a run, `adapter` an adapter.
        folder: the Hugging Face or PEFT folder.
        base_folder: the folder of an adapter's base model.
        run_folder: the run that trained it, if known.
        was_quantized: whether an adapter was trained on its base model in NF4.
    """

    kind: Literal["base", "model", "adapter"]
    folder: Path
    base_folder: Path | None
    run_folder: Path | None
    was_quantized: bool

    @property
    def model_folder(self) -> Path:
        """The folder with config.json: for an adapter, its base model's."""
        return self.base_folder or self.folder


@dataclass(frozen=True)
class Loaded:
    """A loaded model.

    Attributes:
        model: a transformers model, or a PeftModel around one, on its device and in evaluation mode.
        tokenizer: a transformers tokenizer.
        place: its folders.
        template: its chat template; None without a usable one.
        stop_ids: the token ids at which generation stops.
    """

    model: Any
    tokenizer: Any
    place: FoundModel
    template: ChatTemplate | None
    stop_ids: list[int]

    @property
    def network(self) -> Any:
        """The transformers model, with the adapter's layers inside."""
        return self.model.get_base_model() if self.place.kind == "adapter" else self.model

    @property
    def converses(self) -> bool:
        """Whether it is a chat model: it has a chat template and stops at the end of a turn."""
        return self.template is not None and self.template.end_of_turn_id in self.stop_ids


def find(name: str) -> FoundModel:
    """Find a model by name; loads no weights.

    Args:
        name: a run folder, the folder of a model or an adapter, or a Hub id, which is downloaded once.

    Raises: ConfigError when there is no model, the run is not finished, or an adapter's base model is missing.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(
            f"{name} is not a model: there is no such folder, and a Hub id has the form owner/name. Give a run folder, "
            "or the folder of a Hugging Face model or PEFT adapter."
        )
    folder = path if path.is_dir() else hf.find_folder(name)
    require_regular(*folder.iterdir())
    run_folder = next((place for place in (folder, folder.resolve().parent) if (place / "run.yaml").is_file()), None)
    if run_folder == folder:
        folder = _result_of(folder)
        require_regular(*folder.iterdir())
    if (folder / hf.ADAPTER_CONFIG).is_file():
        if not (folder / hf.ADAPTER_WEIGHTS).is_file():
            raise ConfigError(
                f"{folder} has no {hf.ADAPTER_WEIGHTS}. Other formats are refused because they can run code. Save the "
                "adapter again with PEFT's save_pretrained, which writes safetensors."
            )
        return FoundModel(
            "adapter",
            folder,
            _base_of(folder),
            run_folder,
            run_folder is not None and read_record(run_folder).config.get("weights") == "nf4",
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name} is not a model: {folder} has neither config.json nor {hf.ADAPTER_CONFIG}. Give a run folder, or "
            "the folder of a Hugging Face model or PEFT adapter."
        )
    return FoundModel("model" if run_folder else "base", folder, None, run_folder, False)


def _result_of(run_folder: Path) -> Path:
    """The model or adapter of a finished run."""
    for name in ("adapter", "model"):
        if (run_folder / name).is_dir() and RunFolder(run_folder).is_finished:
            return run_folder / name
    raise ConfigError(
        f"The run {run_folder} is not finished, so it has no model yet. Resume it with: "
        f"trivium train {run_folder / 'run.yaml'}"
    )


def _base_of(adapter_folder: Path) -> Path:
    """The folder of an adapter's base model."""
    name = hf.read_json(adapter_folder / hf.ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{adapter_folder / hf.ADAPTER_CONFIG} does not name the adapter's base model. Set its "
            "base_model_name_or_path to that model's folder or Hub id."
        )
    try:
        return hf.find_folder(name)
    except ConfigError as error:
        raise ConfigError(
            f"The base model of the adapter {adapter_folder} cannot be loaded: {error} If it was moved, correct "
            f"base_model_name_or_path in {adapter_folder / hf.ADAPTER_CONFIG}."
        ) from error


def load(
    name: str | FoundModel,
    note: Callable[[str], None] = lambda text: None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    nf4: bool = False,
) -> Loaded:
    """Load a model with its tokenizer, on the accelerator if there is one.

    Args:
        name: a name for `find`, or its result.
        note: called with a remark about the model.
        dtype: of the (base) model's weights; `auto` keeps the stored one. An adapter's weights are fp32.
        nf4: quantize the linear layers of an adapter's base model to NF4, as in training.

    Raises: ConfigError when the folder is damaged, incomplete or not a supported model.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = find(name) if isinstance(name, str) else name
    hf.read_shape(place.model_folder)  # refuses other models, and those that need their own code
    tokenizer, template, stop_ids = read_chat(place)
    model = load_network(place.model_folder, dtype, nf4)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ConfigError(
            f"The tokenizer of {place.folder} has {len(tokenizer):,} tokens, more than the model's "
            f"{model.get_input_embeddings().weight.shape[0]:,} embedding rows. Use the tokenizer that the model was "
            "trained with."
        )
    if place.kind == "adapter":
        model = load_adapter(model, place)
        if place.was_quantized and not nf4:
            note(
                f"{place.folder} was trained on an NF4 base model; here it runs on the full-precision base model, so "
                "its outputs differ slightly. Add --nf4 to quantize the base model."
            )
    network = model.get_base_model() if place.kind == "adapter" else model
    if (place.folder / "generation_config.json").is_file():  # an adapter's settings win over its base model's
        network.generation_config = GenerationConfig.from_pretrained(place.folder)
    network.generation_config.eos_token_id = stop_ids
    if network.generation_config.pad_token_id is None:
        network.generation_config.pad_token_id = tokenizer.pad_token_id
    return Loaded(model.eval(), tokenizer, place, template, stop_ids)


def read_chat(place: FoundModel) -> tuple[Any, ChatTemplate | None, list[int]]:
    """A model's tokenizer, chat template (None without a usable one) and stop token ids, without its weights.

    Raises: ConfigError when neither the folder nor the base model's has a tokenizer.
    """
    folders = (place.folder, place.model_folder)
    folder = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
    if folder is None:
        raise ConfigError(
            f"No tokenizer.json in {' or '.join(dict.fromkeys(map(str, folders)))}. Copy the tokenizer that the model "
            "was trained with into it."
        )
    tokenizer, template = load_tokenizer(folder), None
    with suppress(TriviumError):
        template = describe_template(tokenizer)
    return tokenizer, template, hf.read_stop_ids(*folders) or [tokenizer.eos_token_id]


def load_network(folder: Path, dtype: torch.dtype | Literal["auto"] = "auto", nf4: bool = False) -> Any:
    """The transformers model of a folder, on its device.

    Raises: ConfigError when it cannot be loaded or weights are missing (transformers would initialize them randomly).
    """
    from transformers import AutoModelForCausalLM

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, dtype=dtype, output_loading_info=True, **SAFELY
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{folder} cannot be loaded: {first_lines(error)} Expected a Hugging Face folder with weights in "
            "safetensors. Download it again, or give the folder of a finished run."
        ) from error
    if missing := sorted(map(str, report["missing_keys"])):
        raise ConfigError(
            f"{folder} cannot be loaded: it lacks {count_of(len(missing), 'weight')}, for example {missing[0]}. "
            "Download the folder again."
        )
    if nf4:
        quantize_projections(model, model.dtype)
    return model.to(device)


def load_adapter(model: Any, place: FoundModel) -> Any:
    """The PeftModel of an adapter and its base model.

    Raises: ConfigError when the adapter does not fit or weights are missing (PEFT would initialize them randomly).
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(place.folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"The adapter {place.folder} does not fit its base model {place.base_folder}: {first_lines(error)} Set "
            f"base_model_name_or_path in its {hf.ADAPTER_CONFIG} to the model it was trained on."
        ) from error
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise ConfigError(
            f"The adapter {place.folder} lacks weights that its {hf.ADAPTER_CONFIG} lists. Save or download it again."
        )
    return adapted
