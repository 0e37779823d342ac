"""Exports the result of a run to a folder, and verifies it by loading it with stock transformers (and PEFT).

An adapter is merged into its base in fp32 or copied, a model is copied. The folder is written under another name and
renamed only after its logits were compared.
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
from trivium.errors import ConfigError, TriviumError
from trivium.files import fsync_directory, require_free_space
from trivium.model import hf
from trivium.use.answers import EvalPrompt, prompt_text
from trivium.use.held_out import Passage, passages_of_run
from trivium.use.load import FoundModel, Loaded, find, load, load_network

MAX_DIFFERENCE = 1e-4
# All logits of a prompt are kept to be compared: 8 prompts of 128 tokens are 0.6 GB with Qwen's vocabulary.
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
    """What was written, and the differences of its logits.

    Attributes:
        folder: the written folder.
        num_prompts: number of prompts compared.
        prompts_from: `held-out documents`, `sample prompts` or `built-in prompts`.
        dtype: of the written weights.
        max_difference: largest difference of a logit between the reloaded model and the expected one.
        rounding: largest difference of a logit from rounding to `dtype`; None without rounding.
        quantized_difference: largest difference of a logit to the adapter on the NF4 base; None if it was not trained
            on one.
        quantized_loss, loss: mean loss on the prompts on the NF4 base, and of the written model; None likewise.
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
    """Write a model or adapter and verify it.

    Args:
        name: a run folder, or the folder of a model or an adapter.
        out: the folder to create; it must not contain files.
        merge: merge an adapter into its base.
        dtype: of the merged weights; None for the base's.
        note: called with a line about the progress.

    Raises: ConfigError when there is nothing to export or `out` is in use; TriviumError when the written model does
        not compute the same. Nothing is left behind then.
    """
    place = find(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists, and an export never overwrites. Choose another folder.")
    if merge and place.kind != "adapter":
        raise ConfigError(
            f"{place.folder} is not an adapter, so there is nothing to merge. Leave out --merge to copy it."
        )
    if dtype is not None and not merge:
        raise ConfigError(
            "--dtype applies to merged weights; a copy keeps its dtype. Add --merge, or leave --dtype out."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        done = _merged(place, beside, dtype, note) if merge else _copied(place, beside, note)
        _sync(beside)
        if out.exists():
            out.rmdir()
        os.rename(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    fsync_directory(out.parent)
    return Export(folder=str(out), **done)


def _merged(place: FoundModel, beside: Path, dtype: torch.dtype | None, note: Note) -> dict[str, Any]:
    """Base plus adapter in fp32, rounded to `dtype`, written and compared."""
    config = hf.read_json(place.model_folder / "config.json")
    dtype = dtype or getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    loaded = load(place, dtype=torch.float32)
    require_free_space(beside.parent, loaded.network.num_parameters() * dtype.itemsize + (64 << 20), "the merged model")
    prompts, prompts_from = check_prompts(loaded, note)
    adapted = logits_of(loaded.network, prompts)
    network = _cast(loaded.model.merge_and_unload(safe_merge=True), dtype)
    network.save_pretrained(beside)
    _copy_tokenizer(place, beside)
    # The written model must compute what the one in memory does: the same rounded weights in the same fp32 arithmetic.
    rounded = adapted if dtype == torch.float32 else logits_of(_cast(network, torch.float32), prompts)
    del loaded, network
    gc.collect()
    reloaded = logits_of(load_network(beside, torch.float32), prompts)
    done = {
        "num_prompts": len(prompts),
        "prompts_from": prompts_from,
        "dtype": str(dtype).removeprefix("torch."),
        "max_difference": _require_equal(rounded, reloaded, f"{place.folder} and its merged model"),
        "rounding": None if dtype == torch.float32 else difference(adapted, reloaded),
    }
    return done | (_against_quantized(place, prompts, reloaded, note) if place.was_quantized else {})


def _cast(network: Any, dtype: torch.dtype) -> Any:
    """Parameters only: `network.to` would round the rotary frequencies too, which no folder holds."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def _against_quantized(place: FoundModel, prompts: list[Passage], merged: Logits, note: Note) -> dict[str, Any]:
    """The difference of the merged model from what was trained: the adapter on its NF4 base."""
    note(f"{place.folder} was trained on its base in NF4, unlike the merged model; measuring the difference")
    try:
        trained = logits_of(load(place, dtype=torch.float32, nf4=True).network, prompts)
    except ConfigError as error:
        note(f"the difference to the NF4 base was not measured: {error}")
        return {}
    return {
        "quantized_difference": difference(trained, merged),
        "quantized_loss": mean_loss(trained, prompts),
        "loss": mean_loss(merged, prompts),
    }


def _copied(place: FoundModel, beside: Path, note: Note) -> dict[str, Any]:
    """The folder's known files, reloaded and compared."""
    loaded = load(place)
    prompts, prompts_from = check_prompts(loaded, note)
    original = logits_of(loaded.network, prompts)
    dtype = str(loaded.network.dtype).removeprefix("torch.")
    del loaded
    gc.collect()
    names = [*hf.MODEL_FILES, *hf.TOKENIZER_FILES, *hf.WEIGHT_FILES, *hf.ADAPTER_FILES]
    files = sorted({file for name in names for file in place.folder.glob(name)})
    require_free_space(beside.parent, sum(file.stat().st_size for file in files) + (64 << 20), "the copy")
    beside.mkdir()
    for file in files:
        shutil.copyfile(file, beside / file.name)
    again = FoundModel(place.kind, beside, place.base_folder, None, False)
    reloaded = logits_of(load(again).network, prompts)
    return {
        "num_prompts": len(prompts),
        "prompts_from": prompts_from,
        "dtype": dtype,
        "max_difference": _require_equal(original, reloaded, f"{place.folder} and its copy"),
    }


def _copy_tokenizer(place: FoundModel, beside: Path) -> None:
    """Tokenizer, chat template and generation defaults, byte for byte: the adapter's own before its base's."""
    owner = place.folder if (place.folder / "tokenizer.json").is_file() else place.model_folder
    for name in hf.TOKENIZER_FILES:
        if (owner / name).is_file():
            shutil.copyfile(owner / name, beside / name)
    for folder in (place.folder, place.model_folder):
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", beside / "generation_config.json")
            return


def check_prompts(loaded: Loaded, note: Note) -> tuple[list[Passage], str]:
    """Prompts to compare logits on: held-out documents if available, else sample prompts, else built-in ones."""
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
    """Logits [tokens, vocabulary] of each prompt, fp32, on the host."""
    found = []
    for prompt in prompts:
        inputs = torch.from_numpy(prompt.ids)[None].to(network.device)
        found.append(network(input_ids=inputs, use_cache=False).logits[0].float().cpu())
    return found


def difference(left: Logits, right: Logits) -> float:
    """The largest difference of a logit; NaN where one of them is."""
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def mean_loss(logits: Logits, prompts: Sequence[Passage]) -> float:
    """Mean loss of the prompts' supervised tokens, nats a token."""
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
            f"{what} do not compute the same: their logits differ by up to {found:.3g} on {len(expected)} prompts, and "
            f"{MAX_DIFFERENCE:g} is allowed. Nothing was kept. An adapter of tied embeddings cannot be merged; serve "
            "it unmerged instead."
        )
    return found


def _sync(folder: Path) -> None:
    """Fsync every file before the folder is renamed."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    fsync_directory(folder)
