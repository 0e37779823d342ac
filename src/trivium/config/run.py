"""A run as a value: `Run` and its parts, and the five methods as presets.

This is the only file that knows the method names. A method fills in defaults for three independent choices
(`weights`, `trainable`, `loss_tokens`) and for the numbers that go with them; everything below reads those
choices, never the method. Reading YAML, overrides and error places is `trivium.config.load`; nothing here touches
a file. Everybody may import this file; it never imports torch.
"""

import math
import re
from decimal import Decimal
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {
        "weights": "pretrained",
        "trainable": "adapter",
        "loss_tokens": "assistant",
        "optimizer": {"lr": 2e-4, "weight_decay": 0.0, "beta2": 0.999},
        "batch": {"tokens": 16_384},
        "budget": {"epochs": 3.0},
    },
    "qlora": {
        "weights": "nf4",
        "trainable": "adapter",
        "loss_tokens": "assistant",
        "optimizer": {"lr": 2e-4, "weight_decay": 0.0, "beta2": 0.999},
        "batch": {"tokens": 16_384},
        "budget": {"epochs": 3.0},
    },
    "full": {
        "weights": "pretrained",
        "trainable": "everything",
        "loss_tokens": "assistant",
        "optimizer": {"lr": 1e-5, "weight_decay": 0.1, "beta2": 0.999},
        "batch": {"tokens": 16_384},
        "budget": {"epochs": 3.0},
    },
    "continue": {
        "weights": "pretrained",
        "trainable": "everything",
        "loss_tokens": "all",
        "optimizer": {"lr": 1e-5, "weight_decay": 0.1},
    },
    "scratch": {
        "weights": "random",
        "trainable": "everything",
        "loss_tokens": "all",
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
    },
}

COUNT_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
COUNT_PATTERN = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMBT]?)", re.IGNORECASE)


def parse_count(value: object) -> object:
    """Read `25M`, `1.5B` or `1e6` as a whole number; anything else is left for pydantic to judge.

    Suffixes are decimal (K is 1,000), as the field counts parameters and tokens.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (match := COUNT_PATTERN.fullmatch(value.strip())):
        return round(Decimal(match[1]) * COUNT_SUFFIXES[match[2].upper()])
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    """What all parts of a run share: unknown keys and loose types are refused, nothing changes after it is built."""

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
    """The network's own numbers, for a model that is in no catalogue."""

    family: Literal["qwen2", "qwen3"] = "qwen3"
    """`qwen2` has biases on q, k and v; `qwen3` normalises q and k per head instead."""
    hidden_size: Count
    """Width of the residual stream."""
    intermediate_size: Count
    """Width of the SwiGLU feed-forward."""
    num_hidden_layers: Count
    """Number of blocks."""
    num_attention_heads: Count
    """Number of query heads."""
    num_key_value_heads: Count | None = None
    """Number of key and value heads; divides the query heads. Default: as many as query heads."""
    head_dim: Count | None = None
    """Width of one head, even. Default: hidden_size / num_attention_heads."""
    tie_word_embeddings: bool = True
    """Whether the output head is the embedding table."""
    rope_theta: Annotated[float, Field(gt=0)] = 1_000_000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added under the root of RMSNorm."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        heads, key_value_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % key_value_heads:
            raise ValueError(f"num_key_value_heads {key_value_heads} does not divide num_attention_heads {heads}")
        if self.head_dim is None and self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_attention_heads {heads} is no even width of a head; set head_dim"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of channels")
        return self


class Model(Part):
    """Which network is trained."""

    name: str | None = None
    """A catalogue name (`trivium model list`), a Hugging Face folder, or a Hub id."""
    params: Count | None = None
    """A parameter budget such as `25M`: a well-shaped Qwen3 of about that size, for the tokenizer's vocabulary."""
    shape: Shape | None = None
    """The network's numbers one by one."""
    vocab_size: Count | None = None
    """Rows of the embedding table. Default: what the model has, or the tokenizer's size up to a multiple of 64."""

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
    """`bpe`: byte-level BPE with Qwen's pre-tokenizer; `byte`: one token a byte; `char`: one token a character."""
    vocab_size: Count = 4096
    """Number of tokens, special tokens included."""


class Tokenizer(Part):
    """Where the tokenizer comes from. Default: the model's own; a small BPE trained on the data when it has none."""

    path: str | None = None
    """A folder with tokenizer.json, or a Hub id."""
    train: TrainTokenizer | None = None
    """Train one on the data."""

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
    """A Hub data set id."""
    store: str | None = None
    """A ready Megatron store: the common prefix of its .bin and .idx. It is trained on as it is."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the training tokens, relative to the other sources' weights. All sources have one, or none has."""
    field: str = "text"
    """The JSON field or Parquet column that holds the text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What one document is in a plain text file; paragraphs are separated by blank lines."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set."""
    revision: str | None = None
    """Git revision of a Hub data set."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"] = "auto"
    """How a row says what it holds; `auto` finds out from each file's first rows."""
    fields: dict[str, str] = {}
    """For rows that name things in their own way: which of their fields is `messages`, `role`, `content`, `prompt`,
    `input`, `answer`, `system`, `tools` or `history`, such as {prompt: question, answer: response}."""
    roles: dict[str, str] = {}
    """For messages whose roles have names of their own: which is `system`, `user`, `assistant` or `tool`, such as
    {Mensch: user, KI: assistant}."""
    dataset: str | None = None
    """An entry of the LLaMA-Factory dataset_info.json that `path` names; it says file, format and fields."""

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
                raise ValueError(f"fields names {name!r}; it maps from {', '.join(known)}")
        for role in self.roles.values():
            if role not in ("system", "user", "assistant", "tool"):
                raise ValueError(f"roles maps to {role!r}; a role is system, user, assistant or tool")
        if self.dataset is not None and (self.fields or self.roles or self.format != "auto"):
            raise ValueError("dataset says format, fields and roles itself; leave those out, or leave dataset out")
        return self


class Data(Part):
    """What is learnt from, and how it is cut."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Where the documents come from."""
    seq_len: Annotated[Count, Field(ge=8)] = 1024
    """Tokens a row; a longer document goes on in the next row, a conversation stays in one."""
    overlong: Literal["drop", "split", "truncate"] = "drop"
    """A conversation longer than seq_len: `drop` leaves out the turns that do not fit; `split` begins anew at the
    oldest user turn from which they fit; `truncate` cuts the end off the answer. All are counted, and an answer's end
    token is never cut."""
    reasoning_share: Share | None = None
    """Share of the training tokens that conversations with reasoning make up. Default: as the data has it."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Share of the documents kept out of training and used for evaluation; chosen by content, so no copy leaks."""
    max_reject_share: Share = 0.01
    """The build stops with exit 4 when a larger share of the rows is unusable."""
    max_document_mib: Annotated[float, Field(gt=0)] = 16.0
    """A longer document is rejected as absurdly long."""
    workers: Annotated[Count, Field(le=512)] | None = None
    """Processes that tokenise. Default: one a core."""
    cache_dir: str | None = None
    """Where token stores and trained tokenizers are kept. Default: `cache` beside the runs."""

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
            raise ValueError("some sources have a weight and some have none; give every source a weight, or none")
        return self


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapter(Part):
    """A low-rank adapter (LoRA): what is trained when the weights are not."""

    rank: Annotated[Count, Field(le=4096)] = 16
    """Rank of each update."""
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    """The update is scaled by alpha / rank (rsLoRA: by alpha / sqrt(rank)). Default: twice the rank."""
    targets: Annotated[list[Projection], Field(min_length=1)] = list(get_args(Projection))
    """Which projections of every layer are adapted."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the adapter's inputs that a training step drops."""
    init: Literal["default", "pissa", "loftq"] = "default"
    """`zero` begins as the base model; `pissa` with its largest singular values; `loftq` makes up for NF4's error."""
    rslora: bool = False
    """Scale by the root of the rank."""
    dora: bool = False
    """Train the magnitude of each weight column apart from its direction."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1.0)] = 1.0
    """LoRA+: the second matrix learns at this multiple of the learning rate."""
    train_tokens: list[str] | None = None
    """Tokens whose rows in the embedding and the head are trained too. Default: those that the data needs and the model
    never learnt."""

    @property
    def scaling(self) -> float:
        """What the update is multiplied by."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rslora else alpha / self.rank


class Optimizer(Part):
    """AdamW; weight decay falls on matrices only."""

    lr: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Peak learning rate. Default: by method."""
    weight_decay: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Decoupled weight decay of matrices; norms and biases have none. Default: by method."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the mean of the gradient."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the mean of its square."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """The gradient's global norm is scaled down to this."""
    state_dtype: Literal["fp32", "8bit", "paged-8bit"] = "fp32"
    """How AdamW's moments are kept; the 8-bit ones need bitsandbytes, paged ones lie in the host's memory when the
    GPU's is full."""


class Schedule(Part):
    """The learning rate as a function of the step: a linear warm-up, then one of four forms."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """`wsd` holds the peak and falls linearly over the last `decay_ratio`."""
    warmup_ratio: Share = 0.02
    """Share of the steps spent warming up."""
    decay_ratio: Share = 0.2
    """Share of the steps in which `wsd` falls."""
    min_lr_ratio: Share = 0.1
    """The rate ends at this share of the peak, and stays there."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "wsd" and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError("warmup_ratio + decay_ratio is over 1; the two phases of wsd do not fit the run")
        return self


class Budget(Part):
    """How long the run is; exactly one of the three."""

    steps: Count | None = None
    """Optimizer steps."""
    tokens: Count | None = None
    """Training tokens, rounded up to whole steps; every row counts as full."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the data."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        exactly_one(self, ("steps", "tokens", "epochs"))
        return self


class BatchSize(Part):
    """Batch sizes in tokens, so that they mean the same at every sequence length."""

    tokens: Count = 32_768
    """Tokens of one optimizer step."""
    micro_tokens: Count | None = None
    """Tokens of one forward and backward. Default: as many rows as fit 8,192 tokens and divide the step, or fewer where
    the planner finds that those do not fit the device."""


class Parallel(Part):
    """Several devices, as `trivium plan` foresees them. Training on more than one is refused until it is built."""

    devices: Count = 1
    """Devices that train together."""
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "fsdp2"
    """How several devices share the work: `ddp` repeats everything on each; `zero2` (DeepSpeed) shards gradients and
    moments; `fsdp2` and `zero3` shard the weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in the host's memory: nothing, moments and master weights (`optimizer`), or all sharded weights too."""


class Eval(Part):
    """Loss on the held-out documents."""

    every_steps: Count | None = None
    """Steps between evaluations. Default: a tenth of the run."""
    max_tokens: Count = 262_144
    """At most this many held-out tokens are read each time; always the same ones."""


class Sample(Part):
    """Text the model writes along the way."""

    prompts: list[Annotated[str, Field(min_length=1)]] = []
    """Beginnings to complete; none, no samples."""
    every_steps: Count | None = None
    """Steps between samples. Default: a tenth of the run."""
    max_new_tokens: Count = 96
    """Length of a sample."""
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.8
    """0 takes the likeliest token each time."""


class Checkpoint(Part):
    """What a killed run loses at most."""

    every_steps: Count | None = None
    """Steps between checkpoints. Default: a tenth of the run, at most 500."""
    keep: Count = 2
    """How many of the newest are kept."""


class Log(Part):
    """How often figures are written."""

    every_steps: Count = 10
    """Steps between lines of metrics.jsonl."""
    trackers: list[Literal["trackio", "wandb", "tensorboard"]] = []
    """Where metrics go beside metrics.jsonl."""


class Run(Part):
    """Everything that decides what a training run does. The same Run gives the same weights, bit for bit."""

    method: Literal["lora", "qlora", "full", "continue", "scratch"]
    """The way to train. It only sets defaults for the choices below."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name of the run folder. Default: the run file's name."""
    model: Model
    """Which network."""
    data: Data
    """Which data."""
    weights: Literal["pretrained", "nf4", "random"]
    """What the weights start as."""
    trainable: Literal["adapter", "everything"]
    """What is trained."""
    loss_tokens: Literal["assistant", "all"]
    """Which tokens carry loss."""
    tokenizer: Tokenizer | None = None
    """Where the tokenizer comes from. Default: the model's own, else a small BPE trained on the data."""
    adapter: Adapter | None = None
    """The adapter's numbers, where one is trained."""
    optimizer: Optimizer
    """AdamW's numbers."""
    schedule: Schedule = Schedule()
    """The learning rate over the run."""
    budget: Budget = Budget(epochs=1.0)
    """How long."""
    batch: BatchSize = BatchSize()
    """How much at a time."""
    activation_checkpointing: bool | None = None
    """Keep each layer's input only, and compute the rest of it again in backward: much less memory, a third more
    arithmetic. Default: off, or on where the planner finds that the run does not fit the device otherwise."""
    parallel: Parallel = Parallel()
    """On how many devices."""
    eval: Eval = Eval()
    """Loss on held-out documents."""
    sample: Sample = Sample()
    """Text written along the way."""
    checkpoint: Checkpoint = Checkpoint()
    """How often the run is saved."""
    log: Log = Log()
    """How often figures are written."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the matrix products; weights and moments are always fp32. `auto` asks the device by a probe."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `mps`, `xpu`; `auto` takes the accelerator if there is one."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the first weights, the order of the data, and the samples."""
    runs_dir: str = "runs"
    """Where run folders are made."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        seq_len, batch = self.data.seq_len, self.batch
        if batch.tokens % seq_len:
            raise ValueError(
                f"batch.tokens {batch.tokens} is not a multiple of data.seq_len {seq_len}; "
                f"the nearest that is: {max(1, round(batch.tokens / seq_len)) * seq_len}"
            )
        if batch.micro_tokens is not None and (batch.micro_tokens % seq_len or batch.tokens % batch.micro_tokens):
            raise ValueError(
                f"batch.micro_tokens {batch.micro_tokens} must be a multiple of data.seq_len {seq_len} "
                f"and divide batch.tokens {batch.tokens}"
            )
        rows, trained = self.model.vocab_size, self.tokenizer.train if self.tokenizer else None
        if rows is not None and trained is not None and rows < trained.vocab_size:
            raise ValueError(
                f"model.vocab_size {rows} is less than tokenizer.train.vocab_size {trained.vocab_size}; "
                "a token without a row cannot be read"
            )
        if (self.adapter is None) == (self.trainable == "adapter"):
            found = "not set" if self.adapter is None else "set"
            raise ValueError(
                f"adapter is {found} and trainable is {self.trainable}; an adapter is set where trainable is adapter, "
                "and nowhere else"
            )
        if self.trainable == "adapter" and self.weights == "random":
            raise ValueError(
                "trainable: adapter on weights: random trains a correction of noise; set trainable: everything"
            )
        if self.weights == "nf4" and self.trainable != "adapter":
            raise ValueError("weights: nf4 cannot be trained themselves; set trainable: adapter")
        if self.adapter is not None and self.adapter.init == "loftq" and self.weights != "nf4":
            raise ValueError("adapter.init: loftq makes up for the error of weights: nf4; use it with method qlora")
        if self.weights != "random" and self.model.name is None:
            raise ValueError(f"weights: {self.weights} needs model.name, a folder or Hub id that holds weights")
        return self

    @property
    def sequences_per_step(self) -> int:
        """Rows of `data.seq_len` tokens that one optimizer step consumes."""
        return self.batch.tokens // self.data.seq_len

    @property
    def sequences_per_micro_batch(self) -> int:
        """Rows of one forward and backward; divides `sequences_per_step`."""
        if self.batch.micro_tokens is not None:
            return self.batch.micro_tokens // self.data.seq_len
        return math.gcd(self.sequences_per_step, max(1, 8192 // self.data.seq_len))


def with_method_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The user's values over the defaults of their method; an unknown method is left for validation to refuse.

    A budget is taken whole, since only one of its keys may be set. An adapter where one is trained needs no mention.
    """
    defaults = METHOD_DEFAULTS.get(values.get("method", ""), {}) if isinstance(values.get("method"), str) else {}
    merged = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(values.get(key), dict) and key != "budget":
            merged[key] = {**default, **values[key]}
    if merged.get("trainable") == "adapter":
        merged.setdefault("adapter", {})
    return merged
