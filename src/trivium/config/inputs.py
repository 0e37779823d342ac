"""What a run reads, as values: model, tokenizer and data, and the types that all parts of a run share.

The docstrings of the fields are the help texts of `trivium config explain`. Never imports torch.
"""

import re
from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

COUNT_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
COUNT_PATTERN = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMBT]?)", re.IGNORECASE)


def parse_count(value: object) -> object:
    """Read `25M`, `1.5B` or `1e6` as a whole number; anything else is left to pydantic. Suffixes are decimal."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (match := COUNT_PATTERN.fullmatch(value.strip())):
        return round(Decimal(match[1]) * COUNT_SUFFIXES[match[2].upper()])
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    """Base of all parts of a run: refuses unknown keys and loose types, and is immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def exactly_one(part: Part, names: tuple[str, ...]) -> None:
    """Raise ValueError unless exactly one of the named fields is set."""
    given = [name for name in names if getattr(part, name) is not None]
    if len(given) != 1:
        found = "none of them" if not given else " and ".join(given)
        raise ValueError(f"found {found}; set exactly one of {', '.join(names)}")


class Shape(Part):
    """The network's dimensions, for a model that is not in the catalog."""

    family: Literal["qwen2", "qwen3", "llama"] = "qwen3"
    """`qwen2` has biases on q, k and v; `qwen3` has per-head RMSNorm of q and k instead; `llama` has neither."""
    hidden_size: Count
    """Width of the residual stream."""
    intermediate_size: Count
    """Width of the SwiGLU feed-forward."""
    num_hidden_layers: Count
    """Number of transformer blocks."""
    num_attention_heads: Count
    """Number of query heads."""
    num_key_value_heads: Count | None = None
    """Number of key and value heads; divides the query heads. Default: as many as query heads."""
    head_dim: Count | None = None
    """Width of one head, even. Default: hidden_size / num_attention_heads."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output head."""
    rope_theta: Annotated[float, Field(gt=0)] = 1_000_000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of RMSNorm."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        heads, key_value_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % key_value_heads:
            raise ValueError(f"num_key_value_heads {key_value_heads} does not divide num_attention_heads {heads}")
        if self.head_dim is None and self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_attention_heads {heads} is not an even head width; set head_dim"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even head_dim")
        return self


class Model(Part):
    """The model to train."""

    name: str | None = None
    """A catalog name (`trivium model list`), a Hugging Face folder, or a Hub id."""
    params: Count | None = None
    """A parameter count, for example `25M`: a Qwen3 of about that size for the tokenizer's vocabulary."""
    shape: Shape | None = None
    """The network's dimensions one by one."""
    vocab_size: Count | None = None
    """Rows of the embedding. Default: the model's, or the tokenizer's size rounded up to a multiple of 64."""

    @model_validator(mode="before")
    @classmethod
    def from_shorthand(cls, value: object) -> object:
        if isinstance(value, str):
            return {"params" if COUNT_PATTERN.fullmatch(value.strip()) else "name": value}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        exactly_one(self, ("name", "params", "shape"))
        return self


class TrainTokenizer(Part):
    """A tokenizer trained on the run's own data."""

    kind: Literal["bpe", "byte", "char"] = "bpe"
    """`bpe`: byte-level BPE with Qwen's pre-tokenizer; `byte`: one token per byte; `char`: one token per character."""
    vocab_size: Count = 4096
    """Number of tokens, special tokens included."""


class Tokenizer(Part):
    """The tokenizer. Default: the model's own; a small BPE trained on the data if the model has none."""

    path: str | None = None
    """A folder with tokenizer.json, or a Hub id."""
    train: TrainTokenizer | None = None
    """Train a tokenizer on the data."""

    @model_validator(mode="before")
    @classmethod
    def from_shorthand(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        exactly_one(self, ("path", "train"))
        return self


class Source(Part):
    """One source of documents or conversations."""

    path: str | None = None
    """A file (.txt .md .jsonl .json .parquet, plain or .gz/.zst) or a folder of them."""
    hub: str | None = None
    """A dataset id on the Hugging Face Hub."""
    store: str | None = None
    """An existing Megatron token store: the common prefix of its .bin and .idx files. Used as is."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the training tokens, relative to the other sources' weights. Set it for all sources or for none."""
    field: str = "text"
    """The JSON field or Parquet column that holds the text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What counts as one document in a plain text file; paragraphs are separated by blank lines."""
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""
    revision: str | None = None
    """Git revision of a Hub dataset."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"] = "auto"
    """Format of the records; `auto` detects it from each file's first records."""
    fields: dict[str, str] = {}
    """Names of the records' fields, if they differ from `messages`, `role`, `content`, `prompt`, `input`, `answer`,
    `system`, `tools` or `history`; for example {prompt: question, answer: response}."""
    roles: dict[str, str] = {}
    """Names of the messages' roles, if they differ from `system`, `user`, `assistant` and `tool`; for example
    {human: user, bot: assistant}."""
    dataset: str | None = None
    """An entry of the LLaMA-Factory dataset_info.json at `path`, which gives file, format and fields."""

    @model_validator(mode="before")
    @classmethod
    def from_shorthand(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        exactly_one(self, ("path", "hub", "store"))
        known = ("messages", "role", "content", "prompt", "input", "answer", "system", "tools", "history")
        for name in self.fields:
            if name not in known:
                raise ValueError(f"fields has the key {name!r}; expected one of {', '.join(known)}")
        for role in self.roles.values():
            if role not in ("system", "user", "assistant", "tool"):
                raise ValueError(f"roles maps to {role!r}; expected system, user, assistant or tool")
        if self.dataset is not None and (self.fields or self.roles or self.format != "auto"):
            raise ValueError("dataset already gives format, fields and roles; remove those, or remove dataset")
        return self


class Data(Part):
    """The training data, and how it is split into sequences."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Files, Hub datasets or token stores to train on."""
    seq_len: Annotated[Count, Field(ge=8)] = 1024
    """Length of a packed sequence in tokens. Longer documents continue in the next; a conversation stays in one."""
    overlong: Literal["drop", "split", "truncate"] = "drop"
    """A conversation longer than seq_len: `drop` leaves out the messages that do not fit; `split` starts another
    sample at the oldest user message from which they fit; `truncate` cuts the answer and keeps its end token."""
    reasoning_share: Share | None = None
    """Share of the training tokens from conversations with reasoning. Default: as in the data."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share of the documents kept out of training for evaluation. Chosen by content, so copies stay together. Default:
    0.01; for small data, enough for about 20 documents, at most 0.1."""
    max_reject_share: Share = 0.01
    """Stop with exit code 4 if a larger share of the records is rejected."""
    max_document_mib: Annotated[float, Field(gt=0)] = 16.0
    """Longer documents are rejected."""
    workers: Annotated[Count, Field(le=512)] | None = None
    """Number of tokenizer processes. Default: one per core."""
    cache_dir: str | None = None
    """Folder of token stores and trained tokenizers. Default: `cache` next to `runs_dir`."""

    @model_validator(mode="before")
    @classmethod
    def from_shorthand(cls, value: object) -> object:
        if isinstance(value, str):
            return {"sources": [value]}
        return {"sources": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("some sources have a weight and some do not; give every source a weight, or none")
        return self
