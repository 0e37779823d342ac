"""Prepare a run: find or build its tokenizer, token stores, data order and model shape, and choose its batching.

Everything chosen here could also be set in the run file and is recorded in the run folder.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trivium.config.inputs import Source, TrainTokenizer
from trivium.config.run import Run
from trivium.data.batch.order import Order
from trivium.data.batch.pack import Batch, StoreBatches, sequential_batches
from trivium.data.chat.samples import ConversationSettings
from trivium.data.chat.template import describe_template
from trivium.data.source.corpus import FileHashes
from trivium.data.store.build import BuildSettings, BuiltStore, Listener, build_sources
from trivium.data.store.megatron import Selection, Store
from trivium.data.store.train_tokenizer import train_tokenizer_from_sources
from trivium.data.tokenizer import load_tokenizer
from trivium.engine.control_tokens import PretrainedTokens
from trivium.engine.device import Machine
from trivium.engine.sample import end_ids
from trivium.errors import ConfigError
from trivium.files import GIB, sha256_file
from trivium.model import catalog, hf
from trivium.model.resolve import settle_shape, shape_of_sizes
from trivium.model.shape import QwenShape
from trivium.plan.amount import settle_amount
from trivium.plan.fit import settle_batch
from trivium.plan.workload import DataFacts


@dataclass(frozen=True)
class MixtureComponent:
    """A token store, or a selection of its samples, in the training mixture.

    Attributes:
        source: the source in the run file.
        built: its token store.
        kind: `all`, or `reasoning` or `plain` if `data.reasoning_share` is set.
        store: the samples.
        weight: share of training tokens relative to other components; None reads every sample once per epoch.
    """

    source: Source
    built: BuiltStore
    kind: str
    store: Store | Selection
    weight: float | None


@dataclass(frozen=True)
class Job:
    """A prepared run.

    Attributes:
        weights_folder: folder of the pretrained weights; None for random initialization.
        tokenizer: the transformers tokenizer.
        built: the token store of each source.
        mixture: the parts of the training mixture.
        batches: the micro-batches of every step.
        held_out: the evaluation batches; empty when nothing is held out.
        num_steps: optimizer steps of the whole run.
        stop_ids: tokens that end generation; the first is the model's EOS token.
        pretrained_tokens: which tokens the pretrained model knows; None for random initialization.
        inputs: hex digest of tokenizer, data, order and frozen weights.
        facts: statistics of the data for the planner.
    """

    run: Run
    shape: QwenShape
    weights_folder: Path | None
    tokenizer: Any
    tokenizer_folder: Path
    built: list[BuiltStore]
    mixture: list[MixtureComponent]
    batches: StoreBatches
    held_out: list[Batch]
    num_steps: int
    stop_ids: list[int]
    pretrained_tokens: PretrainedTokens | None
    inputs: str
    facts: DataFacts

    @property
    def has_conversations(self) -> bool:
        """Whether any source holds conversations."""
        return any(store.has_conversations for store in self.built)

    @cached_property
    def trained_tokens(self) -> list[int]:
        """Token ids whose rows are trained with an adapter; found on first use, since that may load the model."""
        adapter, pretrained = self.run.adapter, self.pretrained_tokens
        return pretrained.to_train(adapter.train_tokens) if adapter and pretrained else []


def cache_folder(run: Run) -> Path:
    """The cache of token stores and trained tokenizers."""
    return Path(run.data.cache_dir) if run.data.cache_dir else Path(run.runs_dir) / "cache"


def prepare(run: Run, note: Callable[[str], None], machine: Machine | None = None) -> Job:
    """Find the model, tokenizer and data of a run, and build what does not exist yet.

    Args:
        note: receives a line about each long task and about the planner's choices.
        machine: its memory decides the batching that the run file leaves open; None uses the defaults.

    Raises: ConfigError, BadData.
    """
    require_one_device(run)
    known_shape, model_folder = find_shape(run)
    tokenizer_folder = find_tokenizer(run, model_folder, note)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    shape = settle_shape(run, known_shape, len(tokenizer), tokenizer_folder)
    built = build_data(run, tokenizer, note)
    mixture = find_mixture(run, built)
    has_conversations = any(store.has_conversations for store in built)
    turn_end = [describe_template(tokenizer).end_of_turn_id] if has_conversations else []
    facts = count_facts(mixture)
    run = settle_amount(run, facts)
    if machine is not None:
        run = settle_batching(run, shape, facts, machine, note)
    stores = [part.store for part in mixture]
    weights = [part.weight for part in mixture if part.weight is not None]
    order = Order([store.lengths for store in stores], weights or None, run.data.seq_len, run.seed, has_conversations)
    epochs = run.budget.epochs
    num_sequences = None if epochs is None else order.num_sequences_in_epochs(epochs)
    frozen_folder = model_folder if run.trainable == "adapter" else None
    weights_folder = None if run.weights == "random" else model_folder
    pretrained = None
    if weights_folder is not None:
        pretrained = PretrainedTokens(weights_folder, shape, tokenizer, built, turn_end[0] if turn_end else None)
        if run.adapter is not None and run.adapter.train_tokens is not None:
            pretrained.ids_of(run.adapter.train_tokens)  # refuses unknown ones before anything is written
    return Job(
        run=run,
        shape=shape,
        weights_folder=weights_folder,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        built=built,
        mixture=mixture,
        batches=StoreBatches(stores, order, run.sequences_per_step, run.sequences_per_micro_batch, num_sequences),
        held_out=held_out_batches(run, built),
        num_steps=count_steps(run, num_sequences),
        stop_ids=list(dict.fromkeys([*turn_end, *end_ids(tokenizer)])),
        pretrained_tokens=pretrained,
        inputs=digest_inputs(run, tokenizer_folder, built, order, frozen_folder),
        facts=facts,
    )


def require_one_device(run: Run) -> None:
    """Raise ConfigError for settings that the planner supports and training does not."""
    asked = {"parallel.devices": run.parallel.devices, "parallel.offload": run.parallel.offload}
    known = {"parallel.devices": 1, "parallel.offload": "none"}
    if asked != known:
        found = " and ".join(f"{key} is {asked[key]}" for key in known if asked[key] != known[key])
        raise ConfigError(
            f"{found}, but this version trains on one device without offloading; only `trivium plan` supports these "
            f"settings. Set {' and '.join(f'{key}: {value}' for key, value in known.items())}."
        )


def settle_batching(run: Run, shape: QwenShape, facts: DataFacts, machine: Machine, note: Callable[[str], None]) -> Run:
    """The run with its micro-batch size and activation checkpointing: as configured, the default, or what fits."""
    settled = settle_batch(run, shape, machine.precision, machine.device_type, machine.memory_bytes, facts)
    usual = settle_batch(run, shape, machine.precision, machine.device_type, sys.maxsize, facts)
    chosen = []
    if settled.batch.micro_tokens != usual.batch.micro_tokens:
        chosen.append(f"batch.micro_tokens: {settled.batch.micro_tokens}")
    if settled.activation_checkpointing and run.activation_checkpointing is None:
        chosen.append("activation_checkpointing: true")
    if chosen:
        memory_gib = machine.memory_bytes / GIB
        note(f"the planner chose {' and '.join(chosen)}: the default does not fit in {memory_gib:,.1f} GiB of memory")
    return settled


def count_facts(mixture: Sequence[MixtureComponent]) -> DataFacts:
    """Statistics of the data from stores and build reports; all tokens of an external store count as supervised."""
    num_rows = sum(len(part.store.lengths) for part in mixture)
    tokens = [int(part.store.lengths.sum(dtype=np.int64)) for part in mixture]
    supervised = sum(supervised_share(part.built) * count for part, count in zip(mixture, tokens, strict=True))
    reports = {part.built.path: part.built.report for part in mixture if part.built.report}.values()
    samples = sum(report["kept"] + report["split"] for report in reports)
    return DataFacts(
        num_rows=num_rows,
        num_tokens=sum(tokens),
        kind="conversations" if any(part.built.has_conversations for part in mixture) else "documents",
        mean_tokens=sum(tokens) / max(1, num_rows),
        supervised_share=supervised / max(1, sum(tokens)),
        reasoning_share=sum(report["reasoning_documents"] for report in reports) / max(1, samples),
        is_measured=True,
    )


def supervised_share(built: BuiltStore) -> float:
    """Share of a source's tokens that are supervised."""
    report = built.report
    if not report.get("conversations"):
        return 1.0
    return min(1.0, report["supervised_tokens"] / max(1, report["tokens"] + report["held_out_tokens"]))


def find_mixture(run: Run, built: Sequence[BuiltStore]) -> list[MixtureComponent]:
    """The training mixture: one component per source, or two if `data.reasoning_share` is set.

    Raises: ConfigError when a component has a share but no samples.
    """
    share = run.data.reasoning_share
    sources = zip(run.data.sources, built, strict=True)
    if share is None:
        return [MixtureComponent(source, one, "all", one.open(), source.weight) for source, one in sources]
    mixture = []
    for source, one in sources:
        store, reasoning = one.open(), one.reasoning()
        weight = source.weight or float(store.num_tokens)
        is_reasoned = np.zeros(len(store), dtype=bool) if reasoning is None else reasoning
        for kind, part_share, chosen in (("reasoning", share, is_reasoned), ("plain", 1 - share, ~is_reasoned)):
            if part_share and chosen.any():
                samples = Selection(store, np.flatnonzero(chosen))
                mixture.append(MixtureComponent(source, one, kind, samples, part_share * weight))
    wanted = {kind for kind, part_share in (("reasoning", share), ("plain", 1 - share)) if part_share}
    if missing := wanted - {part.kind for part in mixture}:
        found = " or ".join({"plain": "without reasoning", "reasoning": "with reasoning"}[kind] for kind in missing)
        raise ConfigError(
            f"data.reasoning_share is {share}, but the data has no samples {found}. Add some, or remove "
            "data.reasoning_share."
        )
    return mixture


def digest_inputs(
    run: Run, tokenizer_folder: Path, built: Sequence[BuiltStore], order: Order, frozen_folder: Path | None
) -> str:
    """Hex digest of the tokenizer, the stores (for external stores their fingerprints), the order of the data, and an
    adapter's frozen base weights, which checkpoints do not contain."""
    stores = [store.manifest.get("sha256") or store.open().fingerprint for store in built]
    parts: list[Any] = [sha256_file(tokenizer_folder / "tokenizer.json"), stores, order.fingerprint()]
    if frozen_folder is not None:
        hashes = FileHashes(cache_folder(run))
        parts.append({path.name: hashes.sha256(path) for path in sorted(frozen_folder.glob("*.safetensors"))})
        hashes.save()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_shape(run: Run) -> tuple[QwenShape | None, Path | None]:
    """The model shape of a run and its Hugging Face folder, downloaded without weights for random initialization.

    Returns: (None, None) for a parameter budget: that shape depends on the vocabulary.
    """
    model = run.model
    if model.name is None:
        return shape_of_sizes(run), None
    if run.weights == "random" and catalog.is_listed(model.name):
        return catalog.get(model.name), None
    folder = hf.find_folder(model.name, with_weights=run.weights != "random")
    return hf.read_shape(folder), folder


def find_tokenizer(run: Run, model_folder: Path | None, note: Callable[[str], None]) -> Path:
    """The folder of the configured tokenizer, of the model's tokenizer, or of one trained on the data."""
    if run.tokenizer is not None and run.tokenizer.path is not None:
        return hf.find_folder(run.tokenizer.path, with_weights=False)
    if run.tokenizer is None and model_folder is not None and (model_folder / "tokenizer.json").is_file():
        return model_folder
    training = (run.tokenizer.train if run.tokenizer else None) or TrainTokenizer()
    return train_tokenizer_from_sources(
        run.data.sources,
        kind=training.kind,
        vocab_size=training.vocab_size,
        cache_dir=cache_folder(run),
        max_document_mib=run.data.max_document_mib,
        listener=Listener(note),
    )


def build_data(run: Run, tokenizer: Any, note: Callable[[str], None]) -> list[BuiltStore]:
    """The token store of every source, built or cached."""
    data = run.data
    settings = BuildSettings(
        cache_dir=cache_folder(run),
        conversations=ConversationSettings(data.seq_len, data.overlong, run.loss_tokens == "all"),
        held_out=data.held_out,
        max_reject_share=data.max_reject_share,
        max_document_mib=data.max_document_mib,
        workers=data.workers,
    )
    return build_sources(data.sources, tokenizer, settings, Listener(note))


def held_out_batches(run: Run, built: Sequence[BuiltStore]) -> list[Batch]:
    """Batches of held-out documents; eval.max_tokens is divided equally between the sources."""
    stores = [store for store in (one.open_held_out() for one in built) if store is not None]
    batch_tokens = run.sequences_per_micro_batch * run.data.seq_len
    batches = []
    for store in stores:
        batches += sequential_batches(store, batch_tokens, run.data.seq_len, run.eval.max_tokens // len(stores))
    return batches


def count_steps(run: Run, num_sequences: int | None) -> int:
    """Optimizer steps of the whole run."""
    if run.budget.steps is not None:
        return run.budget.steps
    if run.budget.tokens is not None:
        return math.ceil(run.budget.tokens / run.step_tokens)
    assert num_sequences is not None
    return max(1, math.ceil(num_sequences / run.sequences_per_step))
