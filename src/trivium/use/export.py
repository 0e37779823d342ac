"""Exports a model or adapter, optionally merged, and verifies the export with transformers (and PEFT).

Merging is done in fp32. The folder is written under a temporary name and renamed after its logits were compared.
"""

import gc
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from trivium.data.batch.pack import NO_LABEL
from trivium.engine.record import read_record
from trivium.errors import ConfigError, TriviumError, count_of
from trivium.files import fsync_directory, require_free_space
from trivium.model import hf
from trivium.use.answers import EvalPrompt, prompt_text
from trivium.use.held_out import Passage, passages_of_run
from trivium.use.load import FoundModel, Loaded, find, load, load_network

MAX_DIFFERENCE = 1e-4
# The logits of all prompts are kept: 8 prompts of 128 tokens are 0.6 GB with Qwen's vocabulary.
NUM_PROMPTS, MAX_PROMPT_TOKENS = 8, 128
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
        done = _merged(place, staging, dtype, note) if merge else _copied(place, staging, note)
        _sync(staging)
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
    require_free_space(
        staging.parent, loaded.network.num_parameters() * dtype.itemsize + (64 << 20), "the merged model"
    )
    prompts, prompts_from = check_prompts(loaded, note)
    adapted = logits_of(loaded.network, prompts)
    network = _cast(loaded.model.merge_and_unload(safe_merge=True), dtype)
    network.save_pretrained(staging)
    _copy_tokenizer(place, staging)
    # Compare like with like: the same rounded weights in fp32 arithmetic.
    rounded = adapted if dtype == torch.float32 else logits_of(_cast(network, torch.float32), prompts)
    del loaded, network
    gc.collect()
    reloaded = logits_of(load_network(staging, torch.float32), prompts)
    done = {
        "num_prompts": len(prompts),
        "prompts_from": prompts_from,
        "dtype": str(dtype).removeprefix("torch."),
        "max_difference": _require_equal(rounded, reloaded, f"{place.folder} and its merged model"),
        "rounding": None if dtype == torch.float32 else difference(adapted, reloaded),
    }
    return done | (_against_quantized(place, prompts, reloaded, note) if place.was_quantized else {})


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
    """Copy the known files of the folder, reload and compare."""
    loaded = load(place)
    prompts, prompts_from = check_prompts(loaded, note)
    original = logits_of(loaded.network, prompts)
    dtype = str(loaded.network.dtype).removeprefix("torch.")
    del loaded
    gc.collect()
    names = [*hf.MODEL_FILES, *hf.TOKENIZER_FILES, *hf.WEIGHT_FILES, *hf.ADAPTER_FILES]
    files = sorted({file for name in names for file in place.folder.glob(name)})
    require_free_space(staging.parent, sum(file.stat().st_size for file in files) + (64 << 20), "the copy")
    staging.mkdir()
    for file in files:
        shutil.copyfile(file, staging / file.name)
    again = FoundModel(place.kind, staging, place.base_folder, None, False)
    reloaded = logits_of(load(again).network, prompts)
    return {
        "num_prompts": len(prompts),
        "prompts_from": prompts_from,
        "dtype": dtype,
        "max_difference": _require_equal(original, reloaded, f"{place.folder} and its copy"),
    }


def _copy_tokenizer(place: FoundModel, staging: Path) -> None:
    """Copy the tokenizer, chat template and generation defaults; the adapter's are preferred over its base model's."""
    owner = place.folder if (place.folder / "tokenizer.json").is_file() else place.model_folder
    for name in hf.TOKENIZER_FILES:
        if (owner / name).is_file():
            shutil.copyfile(owner / name, staging / name)
    for folder in (place.folder, place.model_folder):
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", staging / "generation_config.json")
            return


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
