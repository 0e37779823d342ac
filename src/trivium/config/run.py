"""A run as a value: `Run` and its parts, and the five methods as presets.

This is the only file that knows the method names. A method sets defaults for three independent choices (`weights`,
`trainable`, `loss_tokens`) and for the numbers that go with them; all other code reads those choices, never the method.
The docstrings of the fields are the help texts of `trivium config explain`. Never imports torch.
"""

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from trivium.config.inputs import Count, Data, Model, Part, Share, Tokenizer, exactly_one

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {
        "weights": "pretrained",
        "trainable": "adapter",
        "loss_tokens": "assistant",
        "optimizer": {"lr": 2e-4, "weight_decay": 0.0, "beta2": 0.999},
    },
    "qlora": {
        "weights": "nf4",
        "trainable": "adapter",
        "loss_tokens": "assistant",
        "optimizer": {"lr": 2e-4, "weight_decay": 0.0, "beta2": 0.999},
    },
    "full": {
        "weights": "pretrained",
        "trainable": "everything",
        "loss_tokens": "assistant",
        "optimizer": {"lr": 1e-5, "weight_decay": 0.1, "beta2": 0.999},
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

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapter(Part):
    """A low-rank adapter (LoRA), trained while the base model is frozen."""

    rank: Annotated[Count, Field(le=4096)] = 16
    """Rank of the adapter matrices."""
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    """The update is scaled by alpha / rank (rsLoRA: by alpha / sqrt(rank)). Default: twice the rank."""
    targets: list[Projection] = Field(list(get_args(Projection)), min_length=1)
    """Projections of every layer to adapt."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout of the adapter's inputs in training."""
    init: Literal["default", "pissa", "loftq"] = "default"
    """`default`: start as the base model; `pissa`: from the largest singular values of the weights; `loftq`: from the
    quantization error of NF4."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    dora: bool = False
    """DoRA: train magnitude and direction of each weight separately."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1.0)] = 1.0
    """LoRA+: learning rate of the B matrices as a multiple of `optimizer.lr`."""
    train_tokens: list[str] | None = None
    """Tokens whose embedding and head rows are trained too. Default: those in the data that the model was
    never trained on."""

    @property
    def scaling(self) -> float:
        """The factor of the adapter's update."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rslora else alpha / self.rank


class Optimizer(Part):
    """AdamW; weight decay applies to matrices only."""

    lr: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Peak learning rate. Default: by method."""
    weight_decay: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Decoupled weight decay of matrices, not of norms and biases. Default: by method."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay rate of the first moment."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay rate of the second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Epsilon of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Clip the global gradient norm to this."""
    state_dtype: Literal["fp32", "8bit", "paged-8bit"] = "fp32"
    """Type of AdamW's optimizer state. 8-bit types need bitsandbytes; paged state moves to host memory when
    the GPU's is full."""


class Schedule(Part):
    """Learning rate schedule: linear warmup, then one of four shapes."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """`wsd` (warmup, stable, decay) keeps the peak, then decays linearly over the last `decay_ratio`."""
    warmup_ratio: Share = 0.02
    """Share of the steps used for warmup."""
    decay_ratio: Share = 0.2
    """Share of the steps used for the decay of `wsd`."""
    min_lr_ratio: Share = 0.1
    """Final learning rate as a share of the peak."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "wsd" and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError("warmup_ratio + decay_ratio is over 1; lower one of them")
        return self


class Budget(Part):
    """Training length; set at most one key. Default: 3 epochs for `loss_tokens: assistant`, up to 16 if the data is too
    small for 100 steps; otherwise 1 epoch."""

    steps: Count | None = None
    """Optimizer steps."""
    tokens: Count | None = None
    """Training tokens, rounded up to whole steps; padding counts."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the data."""

    @property
    def is_open(self) -> bool:
        """Whether the amount of data decides the length."""
        return self.steps is self.tokens is self.epochs is None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.is_open:
            exactly_one(self, ("steps", "tokens", "epochs"))
        return self


class BatchSize(Part):
    """Batch sizes in tokens, so that they mean the same at every sequence length."""

    tokens: Count | None = None
    """Tokens per optimizer step. Default: 16,384 for `loss_tokens: assistant`, otherwise 32,768; for small data, halved
    until the run has 100 steps, but not below 1,024 or data.seq_len."""
    micro_tokens: Count | None = None
    """Tokens per micro-batch (one forward and backward pass). Default: 8,192 (on a CPU 2,048) or the largest
    number below that divides the step, less if the planner finds that it does not fit the device."""


class Parallel(Part):
    """Several devices, for `trivium plan`. Training on more than one is not supported yet."""

    devices: Count = 1
    """Number of devices."""
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "fsdp2"
    """How devices share the work: `ddp` replicates everything; `zero2` (DeepSpeed) shards gradients and optimizer
    state; `fsdp2` and `zero3` shard the weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What to keep in host memory: nothing, optimizer state and master weights (`optimizer`), or the weights too."""


class Eval(Part):
    """Evaluation: loss on the held-out documents."""

    every_steps: Count | None = None
    """Steps between evaluations. Default: a tenth of the run."""
    max_tokens: Count = 262_144
    """Maximum held-out tokens per evaluation; always the same ones."""


class Sample(Part):
    """Samples of generated text during training."""

    prompts: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Prompts to complete. Default: no samples."""
    every_steps: Count | None = None
    """Steps between samples. Default: a tenth of the run."""
    max_new_tokens: Count = 96
    """Maximum tokens of a sample."""
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.8
    """Sampling temperature; 0 is greedy."""


class Checkpoint(Part):
    """Checkpoints, from which an interrupted run resumes."""

    every_steps: Count | None = None
    """Steps between checkpoints. Default: a tenth of the run, at most 500."""
    keep: Count = 2
    """Number of checkpoints to keep."""


class Log(Part):
    """Logging of metrics."""

    every_steps: Count | None = None
    """Steps between entries of metrics.jsonl. Default: a fiftieth of the run, at most 10."""
    trackers: list[Literal["trackio", "wandb", "tensorboard"]] = Field([])
    """Experiment trackers that also receive the metrics."""


class Run(Part):
    """Everything that decides what a training run does. The same Run gives the same weights, bit for bit."""

    method: Literal["lora", "qlora", "full", "continue", "scratch"]
    """The training method. It only sets defaults of the other keys."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name of the run folder. Default: the run file's name; in Python without a run file, the method."""
    model: Model
    """The model to train."""
    data: Data
    """The training data."""
    weights: Literal["pretrained", "nf4", "random"]
    """Initial weights."""
    trainable: Literal["adapter", "everything"]
    """Which parameters are trained."""
    loss_tokens: Literal["assistant", "all"]
    """Which tokens are supervised."""
    tokenizer: Tokenizer | None = None
    """The tokenizer. Default: the model's own, otherwise a small BPE trained on the data."""
    adapter: Adapter | None = None
    """The LoRA adapter, if one is trained."""
    optimizer: Optimizer
    """AdamW's settings."""
    schedule: Schedule = Schedule()
    """Learning rate schedule."""
    budget: Budget = Budget()
    """Training length."""
    batch: BatchSize = BatchSize()
    """Batch size in tokens."""
    activation_checkpointing: bool | None = None
    """Keep only each layer's input and recompute the rest in the backward pass: much less memory, a third more
    compute. Default: off, or on if the planner finds that the run does not fit the device otherwise."""
    parallel: Parallel = Parallel()
    """Number of devices and strategy."""
    eval: Eval = Eval()
    """Loss on held-out documents."""
    sample: Sample = Sample()
    """Samples of generated text during training."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints."""
    log: Log = Log()
    """Logging of metrics."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype of matrix products; trained weights are always fp32. `auto` measures what the device is fast at."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `mps` or `xpu`; `auto` uses the accelerator if there is one."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of initial weights, data order and samples."""
    runs_dir: str = "runs"
    """Parent folder of run folders."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        seq_len, batch = self.data.seq_len, self.batch
        if batch.tokens is not None and batch.tokens % seq_len:
            raise ValueError(
                f"batch.tokens {batch.tokens} is not a multiple of data.seq_len {seq_len}; "
                f"set it to the nearest multiple, {max(1, round(batch.tokens / seq_len)) * seq_len}"
            )
        if batch.micro_tokens is not None and (batch.micro_tokens % seq_len or self.step_tokens % batch.micro_tokens):
            raise ValueError(
                f"batch.micro_tokens {batch.micro_tokens} must be a multiple of data.seq_len {seq_len} "
                f"and divide batch.tokens {self.step_tokens}"
            )
        rows, trained = self.model.vocab_size, self.tokenizer.train if self.tokenizer else None
        if rows is not None and trained is not None and rows < trained.vocab_size:
            raise ValueError(
                f"model.vocab_size {rows} is less than tokenizer.train.vocab_size {trained.vocab_size}; "
                "every token needs an embedding row"
            )
        if (self.adapter is None) == (self.trainable == "adapter"):
            if self.adapter is None:
                raise ValueError("adapter is empty and trainable is adapter; remove adapter to use its defaults")
            raise ValueError(
                f"adapter is set and trainable is {self.trainable}; remove adapter, or set trainable: adapter"
            )
        if self.trainable == "adapter" and self.weights == "random":
            raise ValueError(
                "trainable: adapter needs pretrained weights; with weights: random set trainable: everything"
            )
        if self.weights == "nf4" and self.trainable != "adapter":
            raise ValueError("weights: nf4 cannot be trained; set trainable: adapter")
        if self.adapter is not None and self.adapter.init == "loftq" and self.weights != "nf4":
            raise ValueError("adapter.init: loftq needs weights: nf4; set method: qlora, or remove adapter.init")
        if self.weights != "random" and self.model.name is None:
            raise ValueError(f"weights: {self.weights} needs model.name, a folder or Hub id that holds weights")
        return self

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step, if the data is not small."""
        return self.batch.tokens or max(1, usual_step(self.loss_tokens) // self.data.seq_len) * self.data.seq_len

    @property
    def default_epochs(self) -> float:
        """Passes over the data if the run file leaves the budget open and the data is not small."""
        return usual_epochs(self.loss_tokens)

    @property
    def sequences_per_step(self) -> int:
        """Packed sequences per optimizer step."""
        return self.step_tokens // self.data.seq_len

    @property
    def sequences_per_micro_batch(self) -> int:
        """Packed sequences per micro-batch; divides `sequences_per_step`."""
        if self.batch.micro_tokens is not None:
            return self.batch.micro_tokens // self.data.seq_len
        return math.gcd(self.sequences_per_step, max(1, 8192 // self.data.seq_len))


def usual_step(loss_tokens: str) -> int:
    """Tokens per optimizer step, unless the run file sets it or the data is small."""
    return 16_384 if loss_tokens == "assistant" else 32_768


def usual_epochs(loss_tokens: str) -> float:
    """Passes over the data, unless the run file sets it or the data is small."""
    return 3.0 if loss_tokens == "assistant" else 1.0


def with_method_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The user's values over the defaults of their method; validation refuses an unknown method.

    A missing adapter is added if it is trained.
    """
    defaults = METHOD_DEFAULTS.get(values.get("method", ""), {}) if isinstance(values.get("method"), str) else {}
    merged = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(values.get(key), dict):
            merged[key] = {**default, **values[key]}
    if merged.get("trainable") == "adapter":
        merged.setdefault("adapter", {})
    return merged
