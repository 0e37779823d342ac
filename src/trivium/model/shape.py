"""The shape of a dense Qwen or Llama model: config.json, its validation, parameter counts. Never imports torch.

`QwenShape.layer_matrices` lists a layer's weight matrices, from which parameter counts, FLOPs, memory, adapter sizes
and quantized sizes are computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from trivium.errors import ConfigError

Family = Literal["qwen2", "qwen3", "llama"]

SIZE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# Far above every published model: larger values are mistakes, or made to exhaust the memory of the reader.
MAX_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 30,
}

# Kinds of scaled rotary positions that extend a model's length after training.
ADDED_AFTER_TRAINING = {"default", "yarn", "dynamic"}

# The loss is computed in chunks of logits. Each chunk updates the whole gradient of a trained head, which makes small
# chunks slow; a frozen head has no gradient. On a CPU the softmax processes a chunk in slices that fit the cache.
LOGITS_CHUNK_BYTES, FROZEN_HEAD_CHUNK_BYTES, MIN_CHUNK_ROWS = 1 << 28, 1 << 26, 64
CPU_SLICE_VALUES = 1 << 20


def loss_chunk_rows(vocab_size: int, dtype_bytes: int, is_trained: bool) -> int:
    """Supervised tokens per chunk of the loss, for a trained or frozen head."""
    chunk_bytes = LOGITS_CHUNK_BYTES if is_trained else FROZEN_HEAD_CHUNK_BYTES
    return max(MIN_CHUNK_ROWS, chunk_bytes // (vocab_size * dtype_bytes))


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a decoder layer.

    Attributes:
        name: of its module, for example `q_proj`.
        copies: number in a layer.
        active: number that a token is multiplied with.
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool = False
    copies: int = 1
    active: int = 1

    @property
    def num_values(self) -> int:
        """Weights of one copy."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Traits:
    """What the families of this one network differ in.

    Attributes:
        architecture: class of transformers.
        own_keys: keys of config.json that other families do not have, or have with other defaults.
        qkv_bias: whether the query, key and value projections add a bias.
        qk_norm: whether queries and keys are normalized per head.
        even_heads: whether transformers requires a hidden size that is a multiple of the attention heads.
        head_dim: if config.json has none; None for the hidden size per attention head.
        max_position_embeddings: if config.json has none.
        rope_theta: of all published models; None if they differ.
    """

    architecture: str
    own_keys: dict[str, object]
    qkv_bias: bool = False
    qk_norm: bool = False
    even_heads: bool = False
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rope_theta: float | None = 1e6


# transformers gives a Llama without token ids those of another tokenizer, so they are written as null.
LLAMA_KEYS: dict[str, object] = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
LLAMA_KEYS |= {"bos_token_id": None, "eos_token_id": None}

FAMILIES: dict[Family, Traits] = {
    "qwen2": Traits("Qwen2ForCausalLM", {"use_sliding_window": False}, qkv_bias=True),
    "qwen3": Traits(
        "Qwen3ForCausalLM", {"use_sliding_window": False, "attention_bias": False}, qk_norm=True, head_dim=128
    ),
    "llama": Traits(
        "LlamaForCausalLM",
        LLAMA_KEYS,
        even_heads=True,
        max_position_embeddings=2048,
        rope_theta=None,
    ),
}


@dataclass(frozen=True)
class QwenShape:
    """The configuration of a model; Qwen2.5 is family `qwen2`, and SmolLM2 is family `llama`.

    Raises: ConfigError naming an invalid field.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ConfigError(f"The model family is {self.family!r}; expected 'qwen2' (Qwen2.5), 'qwen3' or 'llama'.")
        for field in SIZE_FIELDS:
            value = getattr(self, field)
            if type(value) is not int or value <= 0:
                raise ConfigError(f"The model's {field} is {value!r}; give a whole number above zero.")
            if value > MAX_SIZES[field]:
                raise ConfigError(
                    f"The model's {field} is {value:,}; expected at most {MAX_SIZES[field]:,}, far more than any "
                    "published model has. Correct the config.json or the run file, or download the config.json again."
                )
        for field in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, field)
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ConfigError(f"The model's {field} is {value!r}; give a number above zero.")
        if type(self.tie_word_embeddings) is not bool:
            raise ConfigError(f"The model's tie_word_embeddings is {self.tie_word_embeddings!r}; give true or false.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key-value heads "
                "evenly; make num_key_value_heads a divisor of num_attention_heads."
            )
        if self.traits.even_heads and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"The model's hidden_size {self.hidden_size} is not a multiple of its {self.num_attention_heads} "
                f"attention heads, and transformers loads no {self.family} model like that. Change one of the two."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"The model's head_dim is {self.head_dim}; rotary positions rotate pairs of channels, so make it even."
            )

    @property
    def traits(self) -> Traits:
        """What the model's family differs in."""
        return FAMILIES[self.family]

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections add a bias."""
        return self.traits.qkv_bias

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized per head."""
        return self.traits.qk_norm

    @property
    def num_embedding_params(self) -> int:
        """Parameters of the embeddings and of an untied head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def layer_matrices(self) -> tuple[Matrix, ...]:
        """The weight matrices of one layer, in the order of the forward pass."""
        hidden, wide = self.hidden_size, self.intermediate_size
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return (
            Matrix("q_proj", query, hidden, self.qkv_bias),
            Matrix("k_proj", key_value, hidden, self.qkv_bias),
            Matrix("v_proj", key_value, hidden, self.qkv_bias),
            Matrix("o_proj", hidden, query),
            Matrix("gate_proj", wide, hidden),
            Matrix("up_proj", wide, hidden),
            Matrix("down_proj", hidden, wide),
        )

    @property
    def num_layer_matmul_params(self) -> int:
        """Weights of a layer's matrices."""
        return sum(matrix.copies * matrix.num_values for matrix in self.layer_matrices())

    @property
    def num_layer_active_params(self) -> int:
        """Weights of a layer's matrices that a token is multiplied with."""
        return sum(matrix.active * matrix.num_values for matrix in self.layer_matrices())

    @property
    def num_matmul_params(self) -> int:
        """Weights that a token is multiplied with: layers and output head, without the embedding lookup."""
        return self.num_hidden_layers * self.num_layer_active_params + self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """Parameters of the model; tied embeddings count once."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        biases = sum(matrix.copies * matrix.out_features for matrix in self.layer_matrices() if matrix.has_bias)
        layers = self.num_hidden_layers * (self.num_layer_matmul_params + norms + biases)
        return self.num_embedding_params + layers + self.hidden_size

    def to_hf_config(self) -> dict[str, object]:
        """The config.json of this shape, without dtype and the tokenizer's token ids.

        It has `rope_theta` twice: transformers 5 reads `rope_parameters`; older readers would silently use 10,000.
        """
        config: dict[str, object] = {
            "architectures": [self.traits.architecture],
            "model_type": self.family,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }
        return config | self.traits.own_keys | {field: getattr(self, field) for field in SIZE_FIELDS}

    @classmethod
    def from_hf_config(cls, config: Mapping[str, object]) -> "QwenShape":
        """The shape in a parsed config.json.

        Raises: ConfigError when it asks for remote code, quantized weights or an unsupported architecture.
        """
        family = config.get("model_type")
        if family not in get_args(Family):
            raise ConfigError(
                f"The model's config.json has model_type {family!r}; Trivium trains dense Qwen2.5 ('qwen2'), Qwen3 "
                "('qwen3') and Llama ('llama', for example SmolLM2) models. Choose one of those."
            )
        _refuse_foreign_code(config)
        _refuse_other_arithmetic(config)
        missing = [field for field in SIZE_FIELDS[:6] if config.get(field) is None]
        if missing:
            raise ConfigError(
                f"The model's config.json lacks {', '.join(missing)}, needed to build the model. Download it again."
            )
        sizes = {field: cast(int, config[field]) for field in SIZE_FIELDS[:6]}
        traits = FAMILIES[cast(Family, family)]
        return cls(
            family=cast(Family, family),
            **sizes,
            head_dim=_head_dim(config, traits),
            tie_word_embeddings=cast(bool, config.get("tie_word_embeddings", False)),
            rope_theta=_rope_theta(config),
            rms_norm_eps=cast(float, config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=cast(int, config.get("max_position_embeddings", traits.max_position_embeddings)),
        )


def _refuse_foreign_code(config: Mapping[str, object]) -> None:
    """Raise ConfigError for keys that make a loader run code or kernels, and for quantized weights."""
    for key, value in config.items():
        if value is None or value is False:
            continue
        if key in ("auto_map", "custom_pipelines") or "trust_remote_code" in key or "_implementation" in key:
            raise ConfigError(
                f"The model's config.json has the key {key!r}, which makes loaders run code from the folder. Trivium "
                "never runs such code; remove the key if this is a plain model without code of its own."
            )
        if key in ("quantization_config", "compression_config"):
            raise ConfigError(
                f"The model's config.json has the key {key!r}, so its weights are quantized. Trivium needs bf16, fp16 "
                "or fp32 weights; use the unquantized version of this model."
            )


def _refuse_other_arithmetic(config: Mapping[str, object]) -> None:
    """Raise ConfigError for settings that this network does not implement; no model in the catalog uses them."""
    layer_types = cast("list[object]", config.get("layer_types") or [])
    found = ""
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        found = "sliding-window attention (use_sliding_window or layer_types)"
    elif config.get("hidden_act", "silu") != "silu":
        found = f"hidden_act {config['hidden_act']!r}"
    elif config.get("pretraining_tp") not in (None, 1):
        found = f"pretraining_tp {config['pretraining_tp']!r}"
    else:
        found = next((f"{key} true" for key in ("attention_bias", "mlp_bias") if config.get(key)), "")
    if found:
        raise ConfigError(
            f"The model's config.json asks for {found}, which Trivium does not support and no published dense Qwen2.5, "
            "Qwen3 or SmolLM2 model uses. Choose a model with full attention, SiLU and the family's default biases."
        )


def _head_dim(config: Mapping[str, object], traits: Traits) -> int:
    """The head size, with the family's default if the key is missing, as in the published Qwen2.5 configs."""
    if config.get("head_dim") is not None:
        return cast(int, config["head_dim"])
    if traits.head_dim is not None:
        return traits.head_dim
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    if type(hidden_size) is not int or type(num_heads) is not int or num_heads <= 0 or hidden_size % num_heads:
        raise ConfigError(
            f"The model's config.json has no head_dim, and hidden_size {hidden_size!r} is not a multiple of "
            f"num_attention_heads {num_heads!r}. Add head_dim, or correct these two values."
        )
    return hidden_size // num_heads


def _rope_theta(config: Mapping[str, object]) -> float:
    """The base of the rotary positions, from the transformers 5 key or the older ones."""
    rope: dict[str, object] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"The model's config.json has {key} {value!r}; expected a mapping or null.")
        rope |= cast("dict[str, object]", value or {})
    kinds = {rope.get("rope_type", "default"), rope.get("type", "default")}
    if kinds != {"default"} or set(rope) - {"rope_type", "type", "rope_theta"}:
        advice = (
            "Remove the scaling to train at the model's original length; you can add it back for inference."
            if kinds <= ADDED_AFTER_TRAINING
            else "The weights were trained with it, so choose a model without."
        )
        raise ConfigError(
            f"The model's config.json scales its rotary positions ({rope}), which Trivium does not support. {advice}"
        )
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ConfigError(
            "The model's config.json has no rope_theta, and there is no safe default: Qwen uses 1000000, Llama 2 "
            "10000. Add the value that the model was trained with."
        )
    return cast(float, theta)
