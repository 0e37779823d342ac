"""Measures the loss on held-out documents and conversations, over the tokens that training would supervise.

Files are tokenized as for training; the losses come from transformers in padded batches, independent of the engine.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from trivium.config.inputs import Data, Source
from trivium.config.load import load_run
from trivium.data.batch.pack import NO_LABEL, Batch, sequential_batches
from trivium.data.chat.samples import ConversationSettings
from trivium.data.store.build import BuildSettings, build_sources
from trivium.engine.prepare import prepare
from trivium.engine.runfolder import RunFolder
from trivium.errors import BadData, ConfigError, count_of
from trivium.use.load import Loaded

BATCH_TOKENS = 8192
HEAD_ROWS = 1024
MAX_DOCUMENT_MIB: float = Data.model_fields["max_document_mib"].default
DEFAULT_SEQ_LEN: int = Data.model_fields["seq_len"].default


@dataclass(frozen=True)
class Passage:
    """A sequence of tokens for one forward pass.

    Attributes:
        ids: int64 [T].
        labels: int64 [T], the next token, or NO_LABEL if that is not supervised.
        weights: float32 [T], the loss weight of each label.
    """

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int]) -> "Passage":
        """A text whose tokens are all supervised."""
        whole = np.array(ids, dtype=np.int64)
        return cls(whole, np.append(whole[1:], NO_LABEL), np.ones(len(whole), dtype=np.float32))

    def end(self, num_tokens: int) -> "Passage":
        """The last tokens; in a conversation, these are the answer."""
        return Passage(self.ids[-num_tokens:], self.labels[-num_tokens:], self.weights[-num_tokens:])


@dataclass(frozen=True)
class HeldOut:
    """A model's loss on a held-out set.

    Attributes:
        loss: weighted mean, nats per supervised token.
        perplexity: exp(loss).
        bits_per_byte: the loss per byte of the supervised text, comparable between tokenizers.
        num_tokens: number of supervised tokens.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int


def passages_of_run(path: Path, note: Callable[[str], None]) -> list[Passage]:
    """The held-out set of a run.

    Raises: ConfigError when it is empty; see `prepare` for missing data.
    """
    folder = RunFolder.existing(path)
    job = prepare(load_run(folder.run_yaml, []).run, note)
    passages = _passages(job.held_out)
    if not passages:
        raise ConfigError(f"The run {path} has no held-out documents. Add --held-out FILE.")
    return passages


def passages_of_file(
    path: Path, tokenizer: Any, seq_len: int = DEFAULT_SEQ_LEN, note: Callable[[str], None] = lambda text: None
) -> list[Passage]:
    """The records of a file of documents or conversations, as training reads them; rejects are left out.

    Args:
        path: a file or folder in any format that training reads.
        tokenizer: with its chat template.
        seq_len: longer documents are split; longer conversations keep the messages that fit.
        note: called with the number of records that were left out.

    Raises: ConfigError or BadData when the file is missing or has no supervised token.
    """
    with tempfile.TemporaryDirectory(prefix="trivium-held-out-") as cache_dir:
        settings = BuildSettings(
            cache_dir=Path(cache_dir),
            conversations=ConversationSettings(seq_len),
            held_out=0.0,
            max_reject_share=1.0,
            max_document_mib=MAX_DOCUMENT_MIB,
        )
        (built,) = build_sources([Source(path=str(path))], tokenizer, settings)
        for key, noun in (("rejected", "rejected record"), ("duplicates", "duplicate"), ("dropped_turns", "answer")):
            if built.report[key]:
                note(f"{path}: left out {count_of(built.report[key], noun)}")
        store = built.open()
        passages = _passages(sequential_batches(store, seq_len, seq_len, store.num_tokens))
    if not passages:
        raise BadData(f"{path} has no supervised tokens. Give a file of documents, or of conversations with answers.")
    return passages


def _passages(batches: Sequence[Batch]) -> list[Passage]:
    """The pieces of packed batches that have supervised tokens."""
    passages = []
    for batch in batches:
        weights = torch.ones(len(batch.tokens))
        if batch.supervised_weights is not None:
            weights[batch.supervised[: batch.num_supervised]] = batch.supervised_weights[: batch.num_supervised]
        for start, stop in pairwise(batch.bounds):
            labels = batch.labels[start:stop].numpy()
            if (labels != NO_LABEL).any():
                passages.append(Passage(batch.tokens[start:stop].numpy(), labels, weights[start:stop].numpy()))
    return passages


@torch.inference_mode()
def measure(
    loaded: Loaded, passages: Sequence[Passage], every: Callable[[int, int], None] = lambda done, total: None
) -> HeldOut:
    """The loss of a model on a held-out set; no passage attends to another.

    Args:
        loaded: the model.
        passages: tokens of its tokenizer.
        every: called with (passages done, number of passages).
    """
    network, head = loaded.network.model, loaded.network.get_output_embeddings()
    sum_losses = sum_weights = 0.0
    num_tokens = num_bytes = num_read = 0
    for batch in _batches(passages):
        ids, labels, weights = (tensor.to(network.device) for tensor in _padded(batch))
        # Padding is on the right, so causal attention needs no mask.
        hidden = network(input_ids=ids, use_cache=False).last_hidden_state
        places = labels != NO_LABEL
        for rows, targets, shares in zip(
            *(values[places].split(HEAD_ROWS) for values in (hidden, labels, weights)), strict=True
        ):
            losses = cross_entropy(head(rows).float(), targets, reduction="none")
            sum_losses += float((losses.double() * shares).sum())
        sum_weights += float(weights[places].double().sum())
        num_tokens += int(places.sum())
        texts = loaded.tokenizer.batch_decode(
            [one.labels[one.labels != NO_LABEL] for one in batch], skip_special_tokens=True
        )
        num_bytes += sum(len(text.encode(errors="replace")) for text in texts)
        num_read += len(batch)
        every(num_read, len(passages))
    loss = sum_losses / sum_weights
    bits_per_byte = loss * num_tokens / math.log(2) / max(1, num_bytes)
    return HeldOut(loss, math.exp(min(loss, 700.0)), bits_per_byte, num_tokens)


def _batches(passages: Sequence[Passage]) -> Iterator[list[Passage]]:
    """Batches of passages of similar length, at most BATCH_TOKENS with padding."""
    batch: list[Passage] = []
    for passage in sorted(passages, key=lambda passage: len(passage.ids)):
        if batch and (len(batch) + 1) * len(passage.ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(passage)
    if batch:
        yield batch


def _padded(batch: Sequence[Passage]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and weights, each [passages, longest], right-padded."""
    ids = pad_sequence([torch.from_numpy(passage.ids) for passage in batch], batch_first=True)
    labels = pad_sequence([torch.from_numpy(passage.labels) for passage in batch], True, NO_LABEL)
    return ids, labels, pad_sequence([torch.from_numpy(passage.weights) for passage in batch], batch_first=True)
