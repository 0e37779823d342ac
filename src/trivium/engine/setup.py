"""From a `Run` to everything its loop needs: tokenizer, token stores, order of rows, shape, engine.

Decides nothing a run file could not say; where the file is silent, what was chosen is in the run folder's
provenance. Used by `start`, `verify` and the quickstart.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.config.run import Run, Source, TrainTokenizer
from trivium.data.batch.order import Order
from trivium.data.batch.pack import Batch, Rows, sequential_batches
from trivium.data.chat.samples import describe_template
from trivium.data.source.corpus import FileHashes
from trivium.data.store.build import BuiltStore, ConversationSettings, build_sources, train_tokenizer_from_sources
from trivium.data.store.megatron import Selection, Store
from trivium.data.tokenizer import load_tokenizer
from trivium.engine.device import GIB, Machine
from trivium.engine.engine import Engine
from trivium.engine.sample import end_ids
from trivium.errors import ConfigError
from trivium.files import sha256_file
from trivium.model import adapter, catalog, hf, quantize
from trivium.model.qwen import Qwen, init_weights
from trivium.model.shape import QwenShape
from trivium.plan.facts import DataFacts
from trivium.plan.fit import settle_batch

VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Part:
    """A store, or some of its samples, with a share of the training tokens.

    Attributes:
        source: what the run file calls it.
        built: what it was made into.
        kind: `all`, or `reasoning` and `plain` where the two have shares of their own.
        store: its samples.
        weight: its share, relative to the other parts; None reads every sample once an epoch.
    """

    source: Source
    built: BuiltStore
    kind: str
    store: Store | Selection
    weight: float | None


@dataclass(frozen=True)
class Job:
    """A run with its data found and its sizes settled.

    Attributes:
        shape: the network.
        weights_folder: where pretrained weights lie; None when they start at random.
        tokenizer: the transformers tokenizer.
        tokenizer_folder: where it lies.
        built: the data of each source.
        parts: what the order mixes: the sources, or their reasoned and plain samples.
        rows: the micro-batches of every step.
        held_out: the evaluation's batches, always the same; empty when nothing is held out.
        num_steps: optimizer steps of the whole run.
        stop_ids: the tokens at which the result stops writing, the first being its own end token.
        inputs: hex digest of all that is read: tokenizer, data, order, and weights that stay as they are.
        facts: the data in numbers, as the planner takes them.
    """

    run: Run
    shape: QwenShape
    weights_folder: Path | None
    tokenizer: Any
    tokenizer_folder: Path
    built: list[BuiltStore]
    parts: list[Part]
    rows: Rows
    held_out: list[Batch]
    num_steps: int
    stop_ids: list[int]
    inputs: str
    facts: DataFacts

    @property
    def has_conversations(self) -> bool:
        """Whether it learns to answer, beside or instead of going on with a text."""
        return any(store.has_conversations for store in self.built)


def cache_folder(run: Run) -> Path:
    """Where token stores and trained tokenizers are kept."""
    return Path(run.data.cache_dir) if run.data.cache_dir else Path(run.runs_dir) / "cache"


def prepare(run: Run, note: Callable[[str], None], machine: Machine | None = None) -> Job:
    """Find the model, tokenizer and data of a run, and build what is not there yet.

    Args:
        run: the run.
        note: is told in one line what takes long, and what the planner chose.
        machine: for whose memory the planner settles the micro-batch where the run file does not; None where nothing
            is to be trained, and the default is taken.

    Raises: ConfigError, BadData.
    """
    require_one_device(run)
    known_shape, model_folder = find_shape(run)
    tokenizer_folder = find_tokenizer(run, model_folder, note)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    shape = settle_shape(run, known_shape, len(tokenizer), tokenizer_folder)
    built = build_data(run, tokenizer)
    parts = find_parts(run, built)
    has_conversations = any(store.has_conversations for store in built)
    facts = count_facts(parts)
    if machine is not None:
        run = settle_portions(run, shape, facts, machine, note)
    stores = [part.store for part in parts]
    weights = [part.weight for part in parts if part.weight is not None]
    order = Order([store.lengths for store in stores], weights or None, run.data.seq_len, run.seed, has_conversations)
    num_rows = None if run.budget.epochs is None else order.num_rows_in_epochs(run.budget.epochs)
    frozen_folder = model_folder if run.trainable == "adapter" else None
    return Job(
        run=run,
        shape=shape,
        weights_folder=None if run.weights == "random" else model_folder,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        built=built,
        parts=parts,
        rows=Rows(stores, order, run.rows_per_step, run.rows_per_micro_batch, num_rows),
        held_out=held_out_batches(run, built),
        num_steps=count_steps(run, num_rows),
        stop_ids=stop_ids(tokenizer, has_conversations),
        inputs=digest_inputs(run, tokenizer_folder, built, order, frozen_folder),
        facts=facts,
    )


def require_one_device(run: Run) -> None:
    """Refuse what the planner foresees and training does not do yet.

    Raises: ConfigError.
    """
    asked = {"parallel.devices": run.parallel.devices, "parallel.offload": run.parallel.offload}
    known = {"parallel.devices": 1, "parallel.offload": "none"}
    if asked != known:
        found = " and ".join(f"{key} is {asked[key]}" for key in known if asked[key] != known[key])
        raise ConfigError(
            f"{found}, and this version trains on one device that holds everything; `trivium plan` shows what others "
            f"would need. Set {' and '.join(f'{key}: {value}' for key, value in known.items())}."
        )


def settle_portions(run: Run, shape: QwenShape, facts: DataFacts, machine: Machine, note: Callable[[str], None]) -> Run:
    """The run with its micro-batch and its recomputation settled: as set, else the default, else what fits."""
    settled = settle_batch(run, shape, machine.precision, machine.place, machine.memory_bytes, facts)
    chosen = []
    if settled.rows_per_micro_batch != run.rows_per_micro_batch:
        chosen.append(f"batch.micro_tokens: {settled.batch.micro_tokens}")
    if settled.activation_checkpointing and run.activation_checkpointing is None:
        chosen.append("activation_checkpointing: true")
    if chosen:
        there = f"{machine.memory_bytes / GIB:,.1f} GiB"
        note(f"the planner chose {' and '.join(chosen)}, since the default does not fit the {there} of memory")
    return settled


def count_facts(parts: Sequence[Part]) -> DataFacts:
    """The data in numbers, from the stores and their reports; all of a ready store is taken to carry loss."""
    num_rows = sum(len(part.store.lengths) for part in parts)
    tokens = [int(part.store.lengths.sum(dtype=np.int64)) for part in parts]
    supervised = sum(supervised_share(part.built) * count for part, count in zip(parts, tokens, strict=True))
    reports = {part.built.path: part.built.report for part in parts if part.built.report}.values()
    samples = sum(report["kept"] + report["split"] for report in reports)
    return DataFacts(
        num_rows=num_rows,
        num_tokens=sum(tokens),
        kind="conversations" if any(part.built.has_conversations for part in parts) else "documents",
        mean_tokens=sum(tokens) / max(1, num_rows),
        supervised_share=supervised / max(1, sum(tokens)),
        reasoning_share=sum(report["reasoning_documents"] for report in reports) / max(1, samples),
        is_measured=True,
    )


def supervised_share(built: BuiltStore) -> float:
    """Share of a source's tokens that carry loss."""
    report = built.report
    if not report.get("conversations"):
        return 1.0
    return min(1.0, report["supervised_tokens"] / max(1, report["tokens"] + report["held_out_tokens"]))


def find_parts(run: Run, built: Sequence[BuiltStore]) -> list[Part]:
    """What the order mixes: one part a source, or two where reasoned samples have a share of their own.

    Raises: ConfigError when that share cannot be had.
    """
    share = run.data.reasoning_share
    sources = zip(run.data.sources, built, strict=True)
    if share is None:
        return [Part(source, one, "all", one.open(), source.weight) for source, one in sources]
    parts = []
    for source, one in sources:
        store, reasoning = one.open(), one.reasoning()
        weight = source.weight or float(store.num_tokens)
        is_reasoned = np.zeros(len(store), dtype=bool) if reasoning is None else reasoning
        for kind, part_share, chosen in (("reasoning", share, is_reasoned), ("plain", 1 - share, ~is_reasoned)):
            if part_share and chosen.any():
                samples = Selection(store, np.flatnonzero(chosen))
                parts.append(Part(source, one, kind, samples, part_share * weight))
    wanted = {kind for kind, part_share in (("reasoning", share), ("plain", 1 - share)) if part_share}
    if missing := wanted - {part.kind for part in parts}:
        raise ConfigError(
            f"data.reasoning_share is {share}, and the data holds no {' and no '.join(sorted(missing))} samples to "
            "make it up from. Add some, or leave data.reasoning_share out."
        )
    return parts


def stop_ids(tokenizer: Any, has_conversations: bool) -> list[int]:
    """Where the result stops: at the end of a turn if it learns to answer, and at the end of a document in any case."""
    turn_end = [describe_template(tokenizer).end_of_turn_id] if has_conversations else []
    return list(dict.fromkeys([*turn_end, *end_ids(tokenizer)]))


def digest_inputs(
    run: Run, tokenizer_folder: Path, built: Sequence[BuiltStore], order: Order, frozen_folder: Path | None
) -> str:
    """Hex digest of the tokenizer, every store's bytes (of a ready store, its fingerprint), the order of rows, and the
    weights an adapter stands on, which no checkpoint holds."""
    stores = [store.manifest.get("sha256") or store.open().fingerprint for store in built]
    parts: list[Any] = [sha256_file(tokenizer_folder / "tokenizer.json"), stores, order.fingerprint()]
    if frozen_folder is not None:
        hashes = FileHashes(cache_folder(run))
        parts.append({path.name: hashes.sha256(path) for path in sorted(frozen_folder.glob("*.safetensors"))})
        hashes.save()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_shape(run: Run) -> tuple[QwenShape | None, Path | None]:
    """The network a run names, and its Hugging Face folder where it has one; without weights when they start at random.

    Returns: (None, None) for a parameter budget, whose shape waits for the vocabulary.
    """
    model = run.model
    if model.shape is not None:
        given = model.shape
        heads = given.num_attention_heads
        values = given.model_dump(exclude={"num_key_value_heads", "head_dim"})
        return QwenShape(
            **values,
            num_key_value_heads=given.num_key_value_heads or heads,
            head_dim=given.head_dim or given.hidden_size // heads,
            vocab_size=model.vocab_size or VOCAB_MULTIPLE,
            max_position_embeddings=run.data.seq_len,
        ), None
    if model.name is None:
        return None, None
    if run.weights == "random" and model.name.lower() in {name.lower() for name in catalog.names()}:
        return catalog.get(model.name), None
    folder = hf.find_folder(model.name, with_weights=run.weights != "random")
    return hf.read_shape(folder), folder


def find_tokenizer(run: Run, model_folder: Path | None, note: Callable[[str], None]) -> Path:
    """The tokenizer's folder: the one named, the model's own, or one trained on the data."""
    if run.tokenizer is not None and run.tokenizer.path is not None:
        return hf.find_folder(run.tokenizer.path, with_weights=False)
    if run.tokenizer is None and model_folder is not None and (model_folder / "tokenizer.json").is_file():
        return model_folder
    training = (run.tokenizer.train if run.tokenizer else None) or TrainTokenizer()
    note(f"training a {training.kind} tokenizer of {training.vocab_size:,} entries on the data")
    return train_tokenizer_from_sources(
        run.data.sources,
        kind=training.kind,
        vocab_size=training.vocab_size,
        cache_dir=cache_folder(run),
        max_document_mib=run.data.max_document_mib,
    )


def settle_shape(run: Run, shape: QwenShape | None, num_tokens: int, tokenizer_folder: Path) -> QwenShape:
    """The shape with its vocabulary fixed: as pretrained, as asked for, or as the tokenizer needs.

    Raises: ConfigError when the embedding table would have fewer rows than the tokenizer has tokens.
    """
    vocab_size = run.model.vocab_size or VOCAB_MULTIPLE * math.ceil(num_tokens / VOCAB_MULTIPLE)
    if shape is not None and run.weights != "random":
        if run.model.vocab_size not in (None, shape.vocab_size):
            raise ConfigError(
                f"model.vocab_size is {run.model.vocab_size:,} and the pretrained table has {shape.vocab_size:,} rows; "
                "leave model.vocab_size out when weights are not random."
            )
        vocab_size = shape.vocab_size
    elif shape is not None and run.model.name is not None and run.tokenizer is not None and run.tokenizer.path:
        vocab_size = run.model.vocab_size or max(shape.vocab_size, vocab_size)
    if vocab_size < num_tokens:
        raise ConfigError(
            f"The tokenizer in {tokenizer_folder} has {num_tokens:,} tokens and the model's table {vocab_size:,} rows; "
            "a token without a row cannot be read. Set model.vocab_size to at least the former, or take the model's "
            "own tokenizer."
        )
    if shape is None:
        assert run.model.params is not None
        shape = catalog.size_for_budget(run.model.params, vocab_size)
        return replace(shape, max_position_embeddings=run.data.seq_len)
    return replace(shape, vocab_size=vocab_size)


def build_data(run: Run, tokenizer: Any) -> list[BuiltStore]:
    """A token store for every source, built now or found."""
    data = run.data
    return build_sources(
        data.sources,
        tokenizer,
        conversations=ConversationSettings(data.seq_len, data.overlong, run.loss_tokens == "all"),
        held_out=data.held_out,
        max_reject_share=data.max_reject_share,
        max_document_mib=data.max_document_mib,
        cache_dir=cache_folder(run),
        workers=data.workers,
    )


def held_out_batches(run: Run, built: Sequence[BuiltStore]) -> list[Batch]:
    """The evaluation's batches: every source's held-out documents, up to an equal part of eval.max_tokens each."""
    stores = [store for store in (one.open_held_out() for one in built) if store is not None]
    batch_tokens = run.rows_per_micro_batch * run.data.seq_len
    batches = []
    for store in stores:
        batches += sequential_batches(store, batch_tokens, run.data.seq_len, run.eval.max_tokens // len(stores))
    return batches


def count_steps(run: Run, num_rows: int | None) -> int:
    """Optimizer steps of the whole run."""
    if run.budget.steps is not None:
        return run.budget.steps
    if run.budget.tokens is not None:
        return math.ceil(run.budget.tokens / run.batch.tokens)
    assert num_rows is not None
    return max(1, math.ceil(num_rows / run.rows_per_step))


def build_engine(job: Job, machine: Machine) -> Engine:
    """The model with its first weights on its device, adapted where that is asked for, and its optimizer."""
    run = job.run
    if run.adapter is None:
        model = Qwen(job.shape)
        if job.weights_folder is None:
            init_weights(model, run.seed)
        else:
            hf.load_weights(model, job.weights_folder)
        model.compute_dtype = machine.compute_dtype
        model.recompute = bool(run.activation_checkpointing)
        return Engine(model.to(machine.device), run.optimizer)
    model = load_frozen(job, machine)
    model.recompute = bool(run.activation_checkpointing)
    adapter.inject(model, run.adapter, run.seed, trained_tokens(job), job.weights_folder)
    return Engine(model, run.optimizer, run.adapter.loraplus_lr_ratio)


def load_frozen(job: Job, machine: Machine) -> Qwen:
    """The base of an adapter: its weights as they are computed with, never in memory in full precision beside that."""
    assert job.weights_folder is not None
    with torch.device("meta"):
        model = Qwen(job.shape)
    if job.run.weights == "nf4":
        return quantize.load_quantized(model, job.weights_folder, machine.compute_dtype, machine.device)
    model = model.to(machine.compute_dtype).to_empty(device=machine.device)
    hf.load_weights(model, job.weights_folder)
    model.compute_dtype = machine.compute_dtype
    return model


def trained_tokens(job: Job) -> list[int]:
    """Ids whose rows are trained beside the adapter: those the run names, else those the data needs and the model never
    learnt. Whether too few are named is the doctor's question.

    Raises: ConfigError when a named token is none.
    """
    assert job.run.adapter is not None
    named = job.run.adapter.train_tokens
    if named is None:
        control = control_tokens(job)
        return untrained_tokens(job, {token for store in job.built for token in store.open().found_among(control)})
    known = job.tokenizer.get_vocab()
    if unknown := [token for token in named if token not in known]:
        raise ConfigError(
            f"adapter.train_tokens names {unknown[0]!r}, and {job.tokenizer_folder} has no such token. Name tokens as "
            "the tokenizer writes them, such as <|im_end|>."
        )
    return [known[token] for token in named]


def control_tokens(job: Job) -> list[int]:
    """Ids of the tokens that steer a model, such as the one that ends a turn."""
    return sorted(job.tokenizer.get_added_vocab().values())


def untrained_tokens(job: Job, used: Collection[int]) -> list[int]:
    """Which control tokens, of those that the data uses, the pretrained model never learnt.

    Only the rows of reserved tokens are read, from the model's embedding and, where it is another tensor, its head.
    """
    assert job.weights_folder is not None
    control = control_tokens(job)
    reserved = [*control, *range(len(job.tokenizer), job.shape.vocab_size)]
    places = [place for place, token in enumerate(control) if token in used]
    if not places:
        return []
    with torch.device("meta"):
        files = hf.find_tensors(Qwen(job.shape), job.weights_folder)
    names = [hf.EMBEDDINGS] if job.shape.tie_word_embeddings else [hf.EMBEDDINGS, hf.HEAD]
    embedding, *head = [hf.read_rows(files[name], name, reserved) for name in names]
    untrained = adapter.untrained_rows(embedding, head[0] if head else None, places, range(len(reserved)))
    return [reserved[place] for place in untrained]
