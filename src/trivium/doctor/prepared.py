"""What the rules check: a prepared run, and a run with its engine.

The facts come from where training reads them: the token stores, the tokenizer, the model's folder, the engine.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from trivium.config.inputs import Source
from trivium.config.run import Run
from trivium.data.chat.formats import Conversation
from trivium.data.chat.template import ChatTemplate, describe_template
from trivium.data.columns import FULL_WEIGHT, loss_weights
from trivium.data.source.corpus import open_corpus
from trivium.data.source.records import read_records
from trivium.engine.build import build_engine
from trivium.engine.device import Machine
from trivium.engine.engine import Engine
from trivium.engine.prepare import Job, cache_folder
from trivium.errors import BadData, ConfigError
from trivium.model import hf
from trivium.plan.workload import Workload, of_run

MAX_SAMPLES = 4096
MAX_SAMPLE_TOKENS = 1 << 22
MAX_CONVERSATIONS = 64
READ_BLOCK_BYTES = 1 << 16


class StoredSample(NamedTuple):
    """One document of a token store, or its last `seq_len` tokens, with the loss weight of each token."""

    ids: np.ndarray
    weights: np.ndarray
    """uint8 [tokens], in hundredths; the first token is never a label."""
    is_ready_made: bool
    """Whether the store was not built by Trivium."""

    @property
    def supervised(self) -> np.ndarray:
        """Positions of the supervised tokens, int [supervised]."""
        return 1 + np.flatnonzero(self.weights[1:])


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to start.

    Attributes:
        job: the run with its tokenizer, token stores and model shape.
        machine: the device it would run on.
        conversations: the first ones of each source.
    """

    job: Job
    machine: Machine
    conversations: list[Conversation]

    @property
    def run(self) -> Run:
        """The run file's values."""
        return self.job.run

    @cached_property
    def workload(self) -> Workload:
        """One optimizer step in the planner's numbers."""
        job, machine = self.job, self.machine
        return of_run(job.run, job.shape, job.facts, machine.precision, machine.device_type)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The tokenizer's chat template; None without a usable one."""
        with suppress(ConfigError, BadData):
            return describe_template(self.job.tokenizer)
        return None

    @cached_property
    def samples(self) -> list[StoredSample]:
        """At most MAX_SAMPLES samples, spread evenly over the token stores."""
        samples = []
        for built, source in zip(self.job.built, self.run.data.sources, strict=True):
            store, most = built.open(), self.run.data.seq_len
            mean_length = max(1.0, float(np.minimum(store.lengths, most).mean())) if len(store) else 1.0
            share = int(min(MAX_SAMPLES, MAX_SAMPLE_TOKENS / mean_length)) // len(self.job.built)
            for document in np.linspace(0, len(store) - 1, min(len(store), max(1, share))).astype(int).tolist():
                length = int(store.lengths[document])
                ids = store.tokens(document, max(0, length - most), length)
                weights = loss_weights(store, document, max(0, length - most), length)
                weights = np.full(len(ids), FULL_WEIGHT, dtype=np.uint8) if weights is None else weights
                samples.append(StoredSample(ids, weights, source.store is not None))
        return samples

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """The model's config.json; empty for random weights."""
        folder = self.job.weights_folder
        return hf.read_json(folder / "config.json") if folder is not None else {}

    @cached_property
    def model_stop_ids(self) -> list[int]:
        """Tokens at which generation stops in the model that training starts from; empty for random weights."""
        folder = self.job.weights_folder
        return hf.read_stop_ids(folder) if folder is not None else []

    def show(self, token: int) -> str:
        """A token as text."""
        return str(self.job.tokenizer.convert_ids_to_tokens(int(token)))


def prepare_checks(job: Job, machine: Machine, with_hub: bool) -> PreparedRun:
    """The prepared run with the first conversations of its sources; from Hub datasets only `with_hub` (needs network).

    Raises: BadData or ConfigError when a source cannot be read.
    """
    sources = [source for source in job.run.data.sources if source.path or (source.hub and with_hub)]
    found: list[Conversation] = []
    for source in sources:
        found += islice(_conversations(job.run, source), MAX_CONVERSATIONS)
    return PreparedRun(job, machine, found)


def _conversations(run: Run, source: Source) -> Iterator[Conversation]:
    corpus = open_corpus(source, run.data.max_document_mib, cache_folder(run))
    if not corpus.has_conversations:
        return
    pieces = (piece for block in corpus.blocks(block_bytes=READ_BLOCK_BYTES) for piece in block.pieces)
    for record in read_records(pieces, corpus.reading):
        if isinstance(record.content, Conversation):
            yield record.content


@dataclass(frozen=True)
class LoadedRun:
    """A prepared run with an engine for the checks; training builds another one."""

    prepared: PreparedRun
    engine: Engine


def load(prepared: PreparedRun) -> LoadedRun:
    """Load the model and build its engine.

    Raises: ConfigError when the weights or the adapter cannot be loaded.
    """
    torch.manual_seed(prepared.run.seed)
    return LoadedRun(prepared, build_engine(prepared.job, prepared.machine))
