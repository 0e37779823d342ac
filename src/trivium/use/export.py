"""Exports a model or adapter, optionally merged, and verifies the export with transformers (and PEFT).

Merging is done in fp32. The folder is written under a temporary name and renamed after its logits were compared.
"""

import gc
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from trivium.data.batch.pack import NO_LABEL
from trivium.engine.record import read_record
from trivium.errors import ConfigError, TriviumError, count_of
from trivium.files import (
    TensorSource,
    atomic_write,
    fsync_directory,
    full_disk_explained,
    require_free_space,
    write_safetensors,
)
from trivium.model import hf
from trivium.model.card import CARD, adapter_card
from trivium.use.answers import EvalPrompt, prompt_text
from trivium.use.held_out import Passage, passages_of_run
from trivium.use.load import FoundModel, Loaded, find, load, load_network

MAX_DIFFERENCE = 1e-4
# The logits of all prompts are kept: 8 prompts of 128 tokens are 0.6 GB with Qwen's vocabulary.
NUM_PROMPTS, MAX_PROMPT_TOKENS = 8, 128
MAX_SHOWN_FILES = 5
BUILT_IN_PROMPTS = (
    "What is the capital of France, and which river flows through it?",
    "Once upon a time, there was a little fox who could not sleep.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    'Write {"name": ..., "age": ...} for: Ada, who is 36 years old. \u4f60\u597d, \U0001f600!',
)

Note = Callable[[str], None]
Logits = list[torch.Tensor]


@dataclass(frozen=True)
class Export:
    """An export, and how much its logits differ from the original's.

    Attributes:
        folder: the written folder.
        num_prompts: number of prompts that logits were compared on.
        prompts_from: `held-out documents`, `sample prompts` or `built-in prompts`.
        dtype: of the written weights.
        max_difference: largest difference of a logit after reloading.
        rounding: largest difference of a logit from rounding to `dtype`; None without rounding.
        quantized_difference: largest difference of a logit from the adapter on its NF4 base model; None if it was not
            trained on one.
        quantized_loss, loss: mean loss on the prompts with the NF4 base model, and of the export; None likewise.
    """

    folder: str
    num_prompts: int
    prompts_from: str
    dtype: str
    max_difference: float
    rounding: float | None = None
    quantized_difference: float | None = None
    quantized_loss: float | None = None
    loss: float | None = None


def export(name: str, out: Path, merge: bool, dtype: torch.dtype | None, note: Note) -> Export:
    """Export a model or adapter and verify the export.

    Args:
        name: a run folder, or the folder of a model or an adapter.
        out: the folder to create; it must not contain files.
        merge: merge an adapter into its base model.
        dtype: of the merged weights; None for the base model's.
        note: called with lines about the progress.

    Raises: ConfigError when there is nothing to export or `out` is in use; TriviumError when the logits differ.
        Nothing is left behind then.
    """
    place = find(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already exists. Choose a new folder for --out; nothing is overwritten.")
    if merge and place.kind != "adapter":
        raise ConfigError(f"{place.folder} is not an adapter, so there is nothing to merge. Remove --merge to copy it.")
    if dtype is not None and not merge:
        raise ConfigError("--dtype only works with --merge; a copy keeps its dtype. Add --merge, or remove --dtype.")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with full_disk_explained(staging, "The part of an export was deleted."):
            done = _merged(place, staging, dtype, note) if merge else _copied(place, staging, note)
            _sync(staging)
        _note_left_out([place.folder, *([place.model_folder] if merge else [])], note)
        if out.exists():
            out.rmdir()
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    fsync_directory(out.parent)
    return Export(folder=str(out), **done)


def _merged(place: FoundModel, staging: Path, dtype: torch.dtype | None, note: Note) -> dict[str, Any]:
    """Merge in fp32, round to `dtype`, write and compare."""
    config = hf.read_json(place.model_folder / "config.json")
    dtype = dtype or getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    loaded = load(place, dtype=torch.float32)
    prompts, prompts_from = check_prompts(loaded, note)
    adapted = logits_of(loaded.network, prompts)
    network = _cast(loaded.model.merge_and_unload(safe_merge=True), dtype)
    written = _write_model(loaded, staging, dtype, [hf.tensor_source(*one) for one in network.named_parameters()])
    # Compare like with like: the same rounded weights in fp32 arithmetic.
    rounded = adapted if dtype == torch.float32 else logits_of(_cast(network, torch.float32), prompts)
    del loaded, network
    gc.collect()
    require_config(staging, written)
    reloaded = logits_of(load_network(staging, torch.float32), prompts)
    done = {
        "num_prompts": len(prompts),
        "prompts_from": prompts_from,
        "dtype": str(dtype).removeprefix("torch."),
        "max_difference": _require_equal(rounded, reloaded, f"{place.folder} and its merged model"),
        "rounding": None if dtype == torch.float32 else difference(adapted, reloaded),
    }
    return done | (_against_quantized(place, prompts, reloaded, note) if place.was_quantized else {})


def _note_left_out(folders: list[Path], note: Note) -> None:
    """Say which files of the exported folders are not in the export; hidden files are not worth a word."""
    known = (*hf.MODEL_FILES, *hf.TOKENIZER_FILES, *hf.WEIGHT_FILES, *hf.ADAPTER_FILES)
    for folder in folders:
        ours = (*known, ".*", *([CARD] if (folder / hf.ADAPTER_CONFIG).is_file() else []))
        others = sorted(file.name for file in folder.iterdir() if not any(map(file.match, ours)))
        if others:
            more = f" and {len(others) - MAX_SHOWN_FILES} more" if len(others) > MAX_SHOWN_FILES else ""
            note(
                f"not exported from {folder}: {', '.join(others[:MAX_SHOWN_FILES])}{more}; an export has weights, "
                "configuration and tokenizer, so copy what else belongs to them, for example a license"
            )


def _cast(network: Any, dtype: torch.dtype) -> Any:
    """Cast only the parameters: `network.to` would also round the rotary frequencies, which are not saved."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def _against_quantized(place: FoundModel, prompts: list[Passage], merged: Logits, note: Note) -> dict[str, Any]:
    """How much the merged model differs from the adapter on its NF4 base model, which is what was trained."""
    note(f"{place.folder} was trained on an NF4 base model; measuring how much the merged model differs")
    try:
        trained = logits_of(load(place, dtype=torch.float32, nf4=True).network, prompts)
    except ConfigError as error:
        note(f"the difference could not be measured: {error}")
        return {}
    return {
        "quantized_difference": difference(trained, merged),
        "quantized_loss": mean_loss(trained, prompts),
        "loss": mean_loss(merged, prompts),
    }


def _copied(place: FoundModel, staging: Path, note: Note) -> dict[str, Any]:
    """Write the folder's weights, configuration and tokenizer again, reload and compare."""
    loaded = load(place)
    prompts, prompts_from = check_prompts(loaded, note)
    original = logits_of(loaded.network, prompts)
    dtype = loaded.network.dtype
    if place.kind == "adapter":
        _copy_adapter(place.folder, staging)
    else:
        files = hf.find_tensors(hf.read_shape(place.folder), place.folder)
        names = [name for name, _ in loaded.network.named_parameters()]
        written = _write_model(loaded, staging, dtype, [hf.stored_source(files[name], name) for name in names])
        require_config(staging, written)
    del loaded
    gc.collect()
    again = FoundModel(place.kind, staging, place.base_folder, None, False)
    reloaded = logits_of(load(again).network, prompts)
    return {
        "num_prompts": len(prompts),
        "prompts_from": prompts_from,
        "dtype": str(dtype).removeprefix("torch."),
        "max_difference": _require_equal(original, reloaded, f"{place.folder} and its copy"),
    }


def _copy_adapter(folder: Path, staging: Path) -> None:
    """Write an adapter's weights, its configuration, tokenizer and model card as they are, or a new card."""
    tensors = hf.stored_sources(folder / hf.ADAPTER_WEIGHTS)
    require_free_space(
        staging.parent, sum(tensor.num_bytes for tensor in tensors) + hf.companion_bytes(folder), "the copy"
    )
    staging.mkdir()
    for name in (hf.ADAPTER_CONFIG, hf.GENERATION_CONFIG, *hf.TOKENIZER_FILES):
        if (folder / name).is_file():
            atomic_write(staging / name, (folder / name).read_bytes())
    card = folder / CARD
    text = card.read_bytes() if card.is_file() else adapter_card(hf.read_json(folder / hf.ADAPTER_CONFIG)).encode()
    atomic_write(staging / CARD, text)
    write_safetensors(staging / hf.ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def _write_model(loaded: Loaded, staging: Path, dtype: torch.dtype, tensors: list[TensorSource]) -> dict[str, object]:
    """Write a model folder, and return what every reader must find in its config.json.

    The tokenizer and the generation defaults are the adapter's, else its base model's.
    """
    place, generation = loaded.place, loaded.network.generation_config
    folders = (place.folder, place.model_folder)
    ids = {key: getattr(generation, key) for key in hf.TOKEN_IDS if getattr(generation, key) is not None}
    stored = [folder / hf.GENERATION_CONFIG for folder in folders if (folder / hf.GENERATION_CONFIG).is_file()]
    settings = (hf.read_json(stored[0]) if stored else {}) | ids
    owner = next(folder for folder in folders if (folder / "tokenizer.json").is_file())
    size_bytes = sum(tensor.num_bytes for tensor in tensors) + hf.companion_bytes(owner)
    require_free_space(staging.parent, size_bytes, "the model")
    staging.mkdir()
    hf.write_model(staging, hf.read_shape(place.model_folder), dtype, tensors, settings)
    hf.write_companions(staging, owner, settings)
    config, name = loaded.network.config, str(dtype).removeprefix("torch.")
    return {
        "rope_theta": config.rope_parameters["rope_theta"],
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": loaded.network.get_input_embeddings().weight.shape[0],
        "dtype": name,
        "torch_dtype": name,
        **ids,
        "eos_token_id": loaded.stop_ids[0],
    }


def require_config(folder: Path, expected: Mapping[str, object]) -> None:
    """Check the keys of config.json that readers use and that transformers 5 would find elsewhere or not miss.

    Raises: TriviumError naming those that are missing or differ.
    """
    written = hf.read_json(folder / "config.json")
    if wrong := [
        f"{key} {written.get(key)!r} instead of {value!r}"
        for key, value in expected.items()
        if written.get(key) != value
    ]:
        raise TriviumError(
            f"The config.json of the export has {', '.join(wrong)}, so other programs would run another model than the "
            "one that was trained. The export was deleted. Expected the values of the loaded model; check the "
            "config.json and generation_config.json of the model that is exported."
        )


def check_prompts(loaded: Loaded, note: Note) -> tuple[list[Passage], str]:
    """Prompts to compare logits on: held-out documents, else the run's sample prompts, else built-in prompts."""
    run_folder = loaded.place.run_folder
    if run_folder is not None:
        with suppress(TriviumError, OSError):  # a run without its data can still be exported
            passages = passages_of_run(run_folder, note)
            chosen = passages[:: max(1, len(passages) // NUM_PROMPTS)][:NUM_PROMPTS]
            return [passage.end(MAX_PROMPT_TOKENS) for passage in chosen], "held-out documents"
    given = read_record(run_folder).config.get("sample") if run_folder is not None else None
    prompts = (given.get("prompts") if isinstance(given, dict) else None) or []
    source = "sample prompts" if prompts else "built-in prompts"
    questions = [EvalPrompt([{"role": "user", "content": prompt}]) for prompt in prompts or BUILT_IN_PROMPTS]
    texts = [prompt_text(loaded.tokenizer, question, loaded.converses, thinking=False) for question in questions]
    return [Passage.of(ids).end(MAX_PROMPT_TOKENS) for ids in loaded.tokenizer(texts).input_ids], source


@torch.inference_mode()
def logits_of(network: Any, prompts: Sequence[Passage]) -> Logits:
    """Logits [tokens, vocabulary] of each prompt, fp32, on the CPU."""
    found = []
    for prompt in prompts:
        inputs = torch.from_numpy(prompt.ids)[None].to(network.device)
        found.append(network(input_ids=inputs, use_cache=False).logits[0].float().cpu())
    return found


def difference(left: Logits, right: Logits) -> float:
    """The largest difference of a logit; NaN if any logit is."""
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def mean_loss(logits: Logits, prompts: Sequence[Passage]) -> float:
    """Mean loss of the prompts' supervised tokens, in nats per token."""
    labels = [torch.from_numpy(prompt.labels) for prompt in prompts]
    losses = [cross_entropy(each, label, reduction="sum") for each, label in zip(logits, labels, strict=True)]
    return float(sum(losses)) / max(1, sum(int((label != NO_LABEL).sum()) for label in labels))


def _require_equal(expected: Logits, reloaded: Logits, what: str) -> float:
    """The largest difference of a logit.

    Raises: TriviumError when it is too large.
    """
    found = difference(expected, reloaded)
    if math.isnan(found) or found > MAX_DIFFERENCE:
        raise TriviumError(
            f"The logits of {what} differ by up to {found:.3g} on {count_of(len(expected), 'prompt')}; at most "
            f"{MAX_DIFFERENCE:g} is allowed. The export was deleted. An adapter on tied embeddings cannot be merged; "
            "serve it unmerged."
        )
    return found


def _sync(folder: Path) -> None:
    """Fsync every file before the folder is renamed."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    fsync_directory(folder)
