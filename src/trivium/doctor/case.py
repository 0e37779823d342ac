"""What the doctor looks at: a prepared run with the facts around it, and a trial of its engine.

Gathers, and judges nothing. Everything is read from where training reads it: the stores, the tokenizer, the model's
folder, the engine itself. Imported inside `doctor`.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trivium.config.run import Run, Source
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

LOOKED_AT_SAMPLES = 4096
LOOKED_AT_TOKENS = 1 << 22
LOOKED_AT_CONVERSATIONS = 64
READ_BLOCK_BYTES = 1 << 16


class Sample(NamedTuple):
    """A conversation of a store, or the end of a document, and by how much the loss of each token counts."""

    ids: np.ndarray
    weights: np.ndarray
    """uint8 [tokens], hundredths; the first token is never a label."""
    is_ready_made: bool
    """Whether its store was made elsewhere."""

    @property
    def supervised(self) -> np.ndarray:
        """The places of the tokens that are learnt, int [supervised]."""
        return 1 + np.flatnonzero(self.weights[1:])


@dataclass(frozen=True)
class Case:
    """A run that is ready to begin.

    Attributes:
        job: the run with its tokenizer, stores and sizes.
        machine: what it would compute on.
        conversations: the first ones of its sources, as they lie in the files.
    """

    job: Job
    machine: Machine
    conversations: list[Conversation]

    @property
    def run(self) -> Run:
        """What the run file says."""
        return self.job.run

    @cached_property
    def workload(self) -> Workload:
        """One step in the planner's numbers."""
        job, machine = self.job, self.machine
        return of_run(job.run, job.shape, job.facts, machine.precision, machine.device_type)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The tokenizer's chat template; None without a usable one."""
        with suppress(ConfigError, BadData):
            return describe_template(self.job.tokenizer)
        return None

    @cached_property
    def samples(self) -> list[Sample]:
        """Some of the stores' samples, spread evenly: few enough to be read in a moment, whatever the stores' size."""
        samples = []
        for built, source in zip(self.job.built, self.run.data.sources, strict=True):
            store, most = built.open(), self.run.data.seq_len
            mean_length = max(1.0, float(np.minimum(store.lengths, most).mean())) if len(store) else 1.0
            share = int(min(LOOKED_AT_SAMPLES, LOOKED_AT_TOKENS / mean_length)) // len(self.job.built)
            for document in spread(len(store), max(1, share)):
                length = int(store.lengths[document])
                ids = store.tokens(document, max(0, length - most), length)
                weights = loss_weights(store, document, max(0, length - most), length)
                weights = np.full(len(ids), FULL_WEIGHT, dtype=np.uint8) if weights is None else weights
                samples.append(Sample(ids, weights, source.store is not None))
        return samples

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """The model's config.json; empty when the weights start at random."""
        return self._model_file("config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The model's generation_config.json; empty where there is none."""
        return self._model_file("generation_config.json")

    def _model_file(self, name: str) -> dict[str, Any]:
        folder = self.job.weights_folder
        return dict(hf.read_json(folder / name)) if folder is not None and (folder / name).is_file() else {}

    @property
    def model_stop_ids(self) -> list[int]:
        """Where the model that training starts from stops writing: generation_config.json, else config.json."""
        said = self.generation_config.get("eos_token_id", self.model_config.get("eos_token_id"))
        return said if isinstance(said, list) else [] if said is None else [said]

    def show(self, token: int) -> str:
        """A token as text."""
        return str(self.job.tokenizer.convert_ids_to_tokens(int(token)))


def spread(num_items: int, num_chosen: int) -> list[int]:
    """At most `num_chosen` of the numbers below `num_items`, evenly spread."""
    if num_items <= num_chosen:
        return list(range(num_items))
    return np.linspace(0, num_items - 1, num_chosen).astype(int).tolist()


def read_conversations(run: Run, with_hub: bool) -> list[Conversation]:
    """The first conversations of every source; of Hub data sets only `with_hub`, since that asks the network.

    Raises: BadData or ConfigError when a source cannot be read.
    """
    sources = [source for source in run.data.sources if source.path or (source.hub and with_hub)]
    found: list[Conversation] = []
    for source in sources:
        found += islice(_conversations(run, source), LOOKED_AT_CONVERSATIONS)
    return found


def _conversations(run: Run, source: Source) -> Iterator[Conversation]:
    corpus = open_corpus(source, run.data.max_document_mib, cache_folder(run))
    if not corpus.has_conversations:
        return
    pieces = (piece for block in corpus.blocks(block_bytes=READ_BLOCK_BYTES) for piece in block.pieces)
    for record in read_records(pieces, corpus.reading):
        if isinstance(record.content, Conversation):
            yield record.content


@dataclass(frozen=True)
class Trial:
    """A case with its engine built, to try things on. Nothing of it is kept: the run begins with another engine.

    Attributes:
        case: what it is a trial of.
        engine: with the run's first weights and no dropout, so that the same computed twice is the same.
        folder: where it may write, on the disk of the run's checkpoints.
    """

    case: Case
    engine: Engine
    folder: Path


def build_trial(case: Case, folder: Path) -> Trial:
    """Load the model and build its engine.

    Raises: ConfigError when the weights or the adapter cannot be.
    """
    job = case.job
    if job.run.adapter is not None:
        adapter = job.run.adapter.model_copy(update={"dropout": 0.0})
        job = replace(job, run=job.run.model_copy(update={"adapter": adapter}))
    torch.manual_seed(job.run.seed)
    return Trial(case, build_engine(job, case.machine), folder)
