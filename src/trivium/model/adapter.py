"""LoRA adapters, through PEFT: inject, save, load and merge.

Layers and file format are PEFT's, so saved adapters load wherever PEFT adapters do. Two things differ: initial values
depend only on the seed and the tensor's name, and products run in the dtype of the input while trained values stay
fp32.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trivium.config.run import Adapter, Projection
from trivium.errors import ConfigError
from trivium.files import atomic_write, write_safetensors
from trivium.model import hf
from trivium.model.card import CARD, adapter_card
from trivium.model.quantize import NF4Linear
from trivium.model.qwen import Linear, Qwen, empty_model, own_seed
from trivium.model.tokens import TrainableTokens

CONFIG, WEIGHTS = hf.ADAPTER_FILES
PROJECTIONS = get_args(Projection)
NAME = "default"  # PEFT's name of a single adapter
# Keys of adapter_config.json that `load` reads, and keys that do not affect results. All others must be unset.
READ_KEYS = {"peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora"}
READ_KEYS |= {"init_lora_weights", "trainable_token_indices"}
INERT_KEYS = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"}
INERT_KEYS |= {"loftq_config", "eva_config", "qalora_group_size", "megatron_core", "ensure_weight_tying"}
UNSET = (None, False, "none", {}, [])
# Initializations that do not modify the base weights.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def inject(
    model: Qwen, config: Adapter, seed: int, token_ids: Sequence[int] = (), weights_folder: Path | None = None
) -> Any:
    """Add an adapter to a plain or NF4 model and freeze everything else. Trained values are fp32.

    Args:
        token_ids: trainable tokens, in the embedding and in an untied head.
        weights_folder: the unquantized model, needed by `init: loftq`.

    Returns: PEFT's LoraConfig. `init: pissa` subtracts the initial adapter from the base weights.

    Raises: ConfigError when the rank is too large for `pissa` or `loftq`, or for `pissa` on an NF4 model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    _check_start(model, config)
    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=_whole(2.0 * config.rank if config.alpha is None else config.alpha),
        target_modules=list(config.targets),
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    with torch.random.fork_rng():  # PEFT's initial values are replaced below
        inject_adapter_in_model(peft_config, model, NAME)
    files = {}
    if config.init == "loftq":
        assert weights_folder is not None
        files = hf.find_tensors(model.shape, weights_folder)
    for path, layer in _adapted(model):
        _compute_in_the_dtype_of_the_input(layer)
        if config.init == "default":
            _start_uniform(layer, own_seed(seed, path))
        elif config.init == "pissa":
            _start_principal(layer, own_seed(seed, path))
        else:
            _start_quantization_error(layer, own_seed(seed, path), files[f"{path}.weight"], f"{path}.weight")
        if config.dora:
            _start_magnitude(layer)
    if token_ids:
        peft_config.trainable_token_indices = _train_rows(model, token_ids)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_stored_name(name) is not None)
    return peft_config


def _check_start(model: Qwen, config: Adapter) -> None:
    """Raise ConfigError for an initialization that the rank or the NF4 weights rule out."""
    block: Any = model.model.layers[0]
    layers = [module for path, module in block.named_modules() if path.endswith(tuple(config.targets))]
    least = min(min(layer.in_features, layer.out_features) for layer in layers)
    if config.init != "default" and config.rank > least:
        raise ConfigError(
            f"adapter.rank is {config.rank}, and adapter.init {config.init} needs that many singular vectors, but the "
            f"smallest matrix has only {least}. Set adapter.rank to at most {least}, or adapter.init to default."
        )
    if config.init == "pissa" and any(isinstance(layer, NF4Linear) for layer in layers):
        raise ConfigError(
            "adapter.init pissa changes the base weights, but nf4 weights cannot be changed. "
            "Set adapter.init to loftq or default, or set method: lora."
        )


def _whole(number: float) -> Any:
    """32 rather than 32.0, since other readers of adapter_config.json may require an integer."""
    return int(number) if number.is_integer() else number


def _adapted(model: Qwen) -> Iterator[tuple[str, Any]]:
    """The path and PEFT layer of each adapted projection."""
    from peft.tuners.lora import LoraLayer

    yield from ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))


def _compute_in_the_dtype_of_the_input(layer: Any) -> None:
    """Make A and B cast their fp32 values to the input's dtype; PEFT would cast the input to fp32."""
    layer.cast_input_dtype_enabled = False
    for projections in (layer.lora_A, layer.lora_B):
        weight = projections[NAME].weight
        with torch.device("meta"):
            projections[NAME] = Linear(weight.shape[1], weight.shape[0], bias=False)
        projections[NAME].weight = nn.Parameter(weight.detach().float())


@torch.no_grad()
def _start_uniform(layer: Any, key: int) -> None:
    """PEFT's default, from a CPU generator: A is Kaiming-uniform and B is zero."""
    weight = layer.lora_A[NAME].weight
    generator = torch.Generator().manual_seed(key)
    weight.copy_(nn.init.kaiming_uniform_(torch.empty(weight.shape), a=math.sqrt(5), generator=generator))


@torch.no_grad()
def _start_principal(layer: Any, key: int) -> None:
    """Move the largest singular values from the base into the adapter. Source: PiSSA, arXiv:2404.02948.

    PEFT's version rounds the adapter to the dtype of a 16-bit base, so that their sum differs from the original weight.
    """
    weight = layer.base_layer.weight
    taken = _start_low_rank(layer, weight.float(), key)
    weight.copy_(weight.float() - taken)


@torch.no_grad()
def _start_quantization_error(layer: Any, key: int, file: Path, name: str) -> None:
    """Approximate the quantization error of NF4. Source: LoftQ, arXiv:2310.08659, with one step.

    PEFT's version needs a GPU and ignores the adapter's scaling.
    """
    weight = layer.base_layer.weight
    lost = torch.empty(weight.shape, device=weight.device)
    hf.read_tensor(file, name, lost)
    _start_low_rank(layer, lost - weight.float(), key)


def _start_low_rank(layer: Any, matrix: Tensor, key: int) -> Tensor:
    """Initialize with the best low-rank approximation of an fp32 matrix, keep a copy for `save`, and return it.

    Sixteen power iterations are nearly as exact as a full SVD and take seconds instead of hours.
    """
    with torch.random.fork_rng():
        torch.manual_seed(key)
        left, values, right = torch.svd_lowrank(matrix, layer.r[NAME], niter=16)
    root = (values / layer.scaling[NAME]).sqrt()
    for projection, start in ((layer.lora_A[NAME], root[:, None] * right.T), (layer.lora_B[NAME], left * root)):
        projection.weight.copy_(start)
        projection.register_buffer("start", projection.weight.clone(), persistent=False)
    return layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight)


@torch.no_grad()
def _start_magnitude(layer: Any) -> None:
    """Initialize DoRA's magnitudes with the norms of the weight, and compute all magnitudes in fp32.

    PEFT multiplies A and B with an identity matrix, which takes a gigabyte for a wide projection, and rounds magnitudes
    to the input's dtype.
    """
    magnitude = layer.lora_magnitude_vector[NAME]
    magnitude.get_lora_weight, magnitude.get_weight_norm = _product, _magnitude
    product = _product(layer.lora_A[NAME], layer.lora_B[NAME])
    magnitude.weight = nn.Parameter(_magnitude(layer.base_layer.weight, product, layer.scaling[NAME]))


@torch.no_grad()
def _product(lora_A: Linear, lora_B: Linear, adapter_name: str = NAME) -> Tensor:
    return lora_B.weight @ lora_A.weight


@torch.no_grad()
def _magnitude(weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str = NAME) -> Tensor:
    """Norm of each row of the adapted weight, fp32 (out,)."""
    return (weight.float() + scaling * lora_weight.float()).norm(dim=1)


def _train_rows(model: Qwen, token_ids: Sequence[int]) -> Any:
    """Make tokens trainable; returns PEFT's `trainable_token_indices`: a list if embeddings are tied, else a dict."""
    ids = list(dict.fromkeys(token_ids))
    tables = ["model.embed_tokens"] if model.shape.tie_word_embeddings else ["model.embed_tokens", "lm_head"]
    for path in tables:
        table = model.get_submodule(path)
        assert isinstance(table, nn.Embedding | nn.Linear)
        model.set_submodule(path, TrainableTokens(table, ids))
    return ids if model.shape.tie_word_embeddings else {path.rpartition(".")[2]: ids for path in tables}


def _stored_name(name: str) -> str | None:
    """The name of a parameter in PEFT's adapter file; None if it is not trained."""
    if name.endswith(".rows"):
        name = f"{name.removesuffix('rows')}token_adapter.trainable_tokens_delta"
    elif ".lora_" not in name:
        return None
    name = name.replace(f"lora_magnitude_vector.{NAME}.weight", "lora_magnitude_vector").replace(f".{NAME}", "")
    return f"base_model.model.{name}"


def _trained(model: Qwen) -> dict[str, Tensor]:
    """The adapter's tensors by their names in PEFT's adapter file."""
    named = ((_stored_name(name), parameter) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter in named if name is not None}


def save(
    model: Qwen, folder: Path, base_name: str, tokenizer_folder: Path | None, generation: Mapping[str, object]
) -> None:
    """Write a PEFT adapter for the published base model, with tokenizer, generation_config.json and card, atomically.

    A `pissa` or `loftq` adapter is converted to one of twice the rank that holds only the change made by training:
    s (B A - B0 A0) = s [B, -B0] [A; A0]. Source: arXiv:2404.02948, appendix C.

    Args:
        base_name: folder or Hub id of the base model.
        generation: content of generation_config.json.

    Raises: ConfigError when `folder` holds something other than an adapter; TriviumError when the disk is full.
    """
    tensors = {name: tensor.detach() for name, tensor in _trained(model).items()}
    content = _config_content(model) | {"base_model_name_or_path": base_name}
    for path, layer in _adapted(model):
        lora_A, lora_B = layer.lora_A[NAME], layer.lora_B[NAME]
        if hasattr(lora_A, "start"):
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.cat([lora_A.weight.detach(), lora_A.start])
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.cat([lora_B.weight.detach(), -lora_B.start], 1)
            rank = 2 * layer.r[NAME]
            content |= {"r": rank, "lora_alpha": _whole(layer.scaling[NAME] * rank), "use_rslora": False}
    sources = [hf.tensor_source(name, tensor, torch.float32) for name, tensor in tensors.items()]
    size_bytes = sum(source.num_bytes for source in sources) + hf.companion_bytes(tokenizer_folder)
    with hf.replacing(folder, CONFIG, size_bytes) as temporary:
        atomic_write(temporary / CONFIG, hf.as_json(content))
        atomic_write(temporary / CARD, adapter_card(content))
        hf.write_companions(temporary, tokenizer_folder, generation)
        write_safetensors(temporary / WEIGHTS, sources, {"format": "pt"})


def _config_content(model: Any) -> dict[str, Any]:
    """PEFT's adapter_config.json for inference, in a fixed order."""
    import peft

    content = model.peft_config[NAME].to_dict()
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    return content | {"inference_mode": True, "init_lora_weights": True, "peft_version": peft.__version__}


def load(model: Qwen, folder: Path) -> None:
    """Load an adapter written by PEFT or `save` into a plain or NF4 model.

    Raises: ConfigError when the adapter is of an unsupported kind, damaged, or for another model.
    """
    config, token_ids = _read_config(folder, model.shape.tie_word_embeddings)
    path = folder / WEIGHTS
    if not path.exists():
        raise ConfigError(
            f"{folder} has no {WEIGHTS}. Trivium reads safetensors only: loading a pickled adapter_model.bin can run "
            "code. Save the adapter again with PEFT's save_pretrained, which writes safetensors."
        )
    inject(model, config, seed=0, token_ids=token_ids)
    tensors = _trained(model)
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise hf.damaged(path, error) from None
    hf.compare(folder, CONFIG, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, stored)
    for name, tensor in tensors.items():
        hf.read_tensor(path, name, tensor)


def _read_config(folder: Path, tied: bool) -> tuple[Adapter, list[int]]:
    """The adapter settings and trainable tokens of an adapter_config.json."""
    content: dict[str, Any] = hf.read_json(folder / CONFIG)
    ids, tables = _token_ids(content, tied)
    problems = _not_computed(content) + ([] if ids is not None else [f"trainable_token_indices {tables!r}"])
    if problems or ids is None:
        raise ConfigError(
            f"{folder / CONFIG} has {'; '.join(problems)}, which is not supported. Trivium supports LoRA, rsLoRA and "
            f"DoRA adapters of the projections {', '.join(PROJECTIONS)}, with or without trainable tokens in both "
            "embedding and head. Merge this adapter with PEFT and use the merged model."
        )
    try:
        config = Adapter(
            rank=content["r"],
            alpha=float(content["lora_alpha"]),
            targets=_targets(content),
            dropout=float(content.get("lora_dropout") or 0.0),
            rslora=bool(content.get("use_rslora")),
            dora=bool(content.get("use_dora")),
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(
            f"{folder / CONFIG} is not a complete LoRA configuration: {reason}. Download it again."
        ) from None
    return config, ids


def _not_computed(content: Mapping[str, Any]) -> list[str]:
    """The unsupported settings of an adapter_config.json, as `key value`."""
    wanted = {
        "peft_type": content.get("peft_type") == "LORA",
        "init_lora_weights": content.get("init_lora_weights", True) in PLAIN_INITS,
        "target_modules": bool(_targets(content)) and set(_targets(content)) <= set(PROJECTIONS),
    }
    problems = [key for key, computed in wanted.items() if not computed]
    problems += [key for key in content if key not in READ_KEYS | INERT_KEYS and content[key] not in UNSET]
    return [f"{key} {content.get(key)!r}" for key in problems]


def _targets(content: Mapping[str, Any]) -> list[Any]:
    """Names of the adapted projections, without the full paths that PEFT writes for small models."""
    targets = content.get("target_modules")
    return sorted({str(path).rpartition(".")[2] for path in targets}) if isinstance(targets, list) else []


def _token_ids(content: Mapping[str, Any], tied: bool) -> tuple[list[int] | None, object]:
    """The trainable tokens, or None if embedding and head have different ones; and the setting as stored."""
    said = content.get("trainable_token_indices") or []
    tables = {"embed_tokens": said} if isinstance(said, list) and (tied or not said) else said
    names = {"embed_tokens"} if tied or not said else {"embed_tokens", "lm_head"}
    if not isinstance(tables, dict) or set(tables) != names:
        return None, said
    ids = tables["embed_tokens"]
    return (ids if all(other == ids for other in tables.values()) else None), said


@torch.no_grad()
def merge(model: Qwen) -> Qwen:
    """A plain fp32 model with adapter and trainable tokens merged; unchanged weights may share memory with `model`.

    NF4 weights are dequantized, since the adapter was trained on those.
    """
    plain = empty_model(model.shape)
    for path, module in plain.named_modules():
        ours = model.get_submodule(path)
        for attribute, _ in list(module.named_parameters(recurse=False)):
            value = _folded(ours) if attribute == "weight" else getattr(ours, attribute)
            module.register_parameter(attribute, nn.Parameter(value.detach().float(), requires_grad=False))
    return plain


def _folded(module: Any) -> Tensor:
    """A module's merged weight, fp32. Source for the magnitude: DoRA, arXiv:2402.09353, eq. 5."""
    if isinstance(module, TrainableTokens):
        return module.folded()
    if not hasattr(module, "lora_A"):
        return module.weight
    weight = module.base_layer.weight.float()
    weight = weight + module.scaling[NAME] * (module.lora_B[NAME].weight @ module.lora_A[NAME].weight)
    if NAME in module.lora_magnitude_vector:
        weight *= (module.lora_magnitude_vector[NAME].weight / weight.norm(dim=1))[:, None]
    return weight


def likeness(table: Tensor, row: int) -> float:
    """The largest cosine of a row of `table`, (N, D), to another row; 1 for a row of zeros.

    Norms do not show this: chat models have trained rows a hundred times smaller than the others.
    """
    if not table[row].any():
        return 1.0
    rows = F.normalize(table.float(), dim=1)
    cosines = rows @ rows[row]
    cosines[row] = -1.0
    return float(cosines.max())
