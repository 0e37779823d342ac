"""Low-rank adapters in a Qwen, through PEFT: put in, saved, loaded, folded into the weights.

The layers, their arithmetic and their file format are PEFT's, so what is saved here loads wherever PEFT adapters do.
Two things are Trivium's: the first values, which depend on the seed and the tensor's name alone, and the products,
which run in the dtype of what comes in while the trained values stay fp32. Does not choose tokens, ranks or rates.
`engine` and `use` import this file; it imports torch, and PEFT where it is needed.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from trivium.model.quantize import NF4Linear
from trivium.model.qwen import Linear, Qwen, own_seed
from trivium.model.tokens import TrainableTokens

CONFIG, WEIGHTS = hf.ADAPTER_FILES
PROJECTIONS = get_args(Projection)
NAME = "default"  # PEFT's name for an adapter that is alone
# Of adapter_config.json: what `load` reads, and what changes nothing that is computed. Anything else must be unset.
READ_KEYS = {"peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora"}
READ_KEYS |= {"init_lora_weights", "trainable_token_indices"}
INERT_KEYS = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"}
INERT_KEYS |= {"loftq_config", "eva_config", "qalora_group_size", "megatron_core", "ensure_weight_tying"}
UNSET = (None, False, "none", {}, [])
TWIN_COSINE = 0.99
# First values that leave the base weights alone; the other kinds need a base of their own.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def inject(
    model: Qwen, config: Adapter, seed: int, token_ids: Sequence[int] = (), weights_folder: Path | None = None
) -> Any:
    """Put an adapter into a plain or NF4 model, and freeze all but it. What is trained is fp32, whatever the base is.

    Args:
        token_ids: tokens whose rows in the embedding, and in the head where that is another tensor, are trained too.
        weights_folder: the unquantized model, which `init: loftq` compares with.

    Returns: PEFT's LoraConfig. With `pissa` the base weights become what the adapter leaves of them.

    Raises: ConfigError when `pissa` or `loftq` cannot begin: a rank above the matrices' own, or the other kind of base.
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
    with torch.random.fork_rng():  # what PEFT draws is replaced
        inject_adapter_in_model(peft_config, model, NAME)
    files = {}
    if config.init == "loftq":
        assert weights_folder is not None
        files = hf.find_tensors(_empty_like(model), weights_folder)
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
    """Refuse a start from singular vectors that are not there."""
    block: Any = model.model.layers[0]
    layers = [module for path, module in block.named_modules() if path.endswith(tuple(config.targets))]
    least = min(min(layer.in_features, layer.out_features) for layer in layers)
    if config.init != "default" and config.rank > least:
        raise ConfigError(
            f"adapter.rank is {config.rank}, and adapter.init {config.init} takes that many singular vectors of "
            f"matrices that have {least}. Set a rank of at most {least}, or init: default."
        )
    if config.init == "pissa" and any(isinstance(layer, NF4Linear) for layer in layers):
        raise ConfigError(
            "adapter.init pissa takes its part out of the base weights, and weights in nf4 stay as they are packed. "
            "Set adapter.init to loftq or zero, or use method lora."
        )


def _whole(number: float) -> Any:
    """32 rather than 32.0: what reads adapter_config.json elsewhere may insist on a whole number."""
    return int(number) if number.is_integer() else number


def _adapted(model: Qwen) -> Iterator[tuple[str, Any]]:
    """The path and PEFT layer of each adapted projection."""
    from peft.tuners.lora import LoraLayer

    yield from ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))


def _compute_in_the_dtype_of_the_input(layer: Any) -> None:
    """Make A and B cast their fp32 values to the input's dtype, where PEFT would cast the input to fp32."""
    layer.cast_input_dtype_enabled = False
    for projections in (layer.lora_A, layer.lora_B):
        weight = projections[NAME].weight
        with torch.device("meta"):
            projections[NAME] = Linear(weight.shape[1], weight.shape[0], bias=False)
        projections[NAME].weight = nn.Parameter(weight.detach().float())


@torch.no_grad()
def _start_uniform(layer: Any, key: int) -> None:
    """A as PEFT draws it, from a CPU generator; B zero: the adapter begins as the base model."""
    weight = layer.lora_A[NAME].weight
    generator = torch.Generator().manual_seed(key)
    weight.copy_(nn.init.kaiming_uniform_(torch.empty(weight.shape), a=math.sqrt(5), generator=generator))


@torch.no_grad()
def _start_principal(layer: Any, key: int) -> None:
    """The largest singular values move from the base into the adapter. Source: PiSSA, arXiv:2404.02948.

    PEFT's own would round both to a 16-bit base's dtype, and their sum would no longer be the base.
    """
    weight = layer.base_layer.weight
    taken = _start_low_rank(layer, weight.float(), key)
    weight.copy_(weight.float() - taken)


@torch.no_grad()
def _start_quantization_error(layer: Any, key: int, file: Path, name: str) -> None:
    """The adapter begins as most of what NF4 has lost. Source: LoftQ, arXiv:2310.08659, with one step.

    PEFT's own needs a GPU, and leaves out that the adapter's product is scaled.
    """
    weight = layer.base_layer.weight
    lost = torch.empty(weight.shape, device=weight.device)
    hf.read_tensor(file, name, lost)
    _start_low_rank(layer, lost - weight.float(), key)


def _start_low_rank(layer: Any, matrix: Tensor, key: int) -> Tensor:
    """Begin with the best low-rank part of an fp32 matrix, remembered for `save`; returns that part.

    Sixteen power iterations find it nearly as well as a full decomposition, in seconds instead of hours.
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
    """DoRA begins with the magnitudes that the weight has; all of them are computed in fp32.

    PEFT multiplies A and B with a unit matrix, which for a wide projection takes a gigabyte, and rounds the magnitudes
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
    """Length of each row of the adapted weight, fp32 (out,)."""
    return (weight.float() + scaling * lora_weight.float()).norm(dim=1)


def _empty_like(model: Qwen) -> Qwen:
    """A plain model of the same shape, without values."""
    with torch.device("meta"):
        return Qwen(model.shape)


def _train_rows(model: Qwen, token_ids: Sequence[int]) -> Any:
    """Train these tokens' rows; returns what adapter_config.json says of it, by PEFT's rules for tied and untied."""
    ids = list(dict.fromkeys(token_ids))
    tables = ["model.embed_tokens"] if model.shape.tie_word_embeddings else ["model.embed_tokens", "lm_head"]
    for path in tables:
        table = model.get_submodule(path)
        assert isinstance(table, nn.Embedding | nn.Linear)
        model.set_submodule(path, TrainableTokens(table, ids))
    return ids if model.shape.tie_word_embeddings else {path.rpartition(".")[2]: ids for path in tables}


def _stored_name(name: str) -> str | None:
    """The name in an adapter's file of one of the model's parameters; None for those that are not trained."""
    if name.endswith(".rows"):
        name = f"{name.removesuffix('rows')}token_adapter.trainable_tokens_delta"
    elif ".lora_" not in name:
        return None
    name = name.replace(f"lora_magnitude_vector.{NAME}.weight", "lora_magnitude_vector").replace(f".{NAME}", "")
    return f"base_model.model.{name}"


def _trained(model: Qwen) -> dict[str, Tensor]:
    """The adapter's tensors by the names they have in its file."""
    named = ((_stored_name(name), parameter) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter in named if name is not None}


def save(
    model: Qwen, folder: Path, base_name: str, tokenizer_folder: Path | None, generation: Mapping[str, object]
) -> None:
    """Write the adapter as PEFT reads it, for the base model as it was published, with tokenizer and generation.

    An adapter that began as `pissa` or `loftq` becomes one of twice the rank, which adds what training has added:
    s (B A - B0 A0) = s [B, -B0] [A; A0]. Written beside `folder` and renamed, so what stands there is always whole.

    base_name: the base model's folder or Hub id. generation: the content of generation_config.json.

    Raises: ConfigError when something that is no adapter stands at `folder`; TriviumError when the disk is too full.

    Source: PEFT's conversion of PiSSA to LoRA, arXiv:2404.02948, appendix C.
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
    with hf.replacing(folder, CONFIG, sum(source.num_bytes for source in sources)) as beside:
        atomic_write(beside / CONFIG, hf.as_json(content))
        hf.write_companions(beside, tokenizer_folder, generation)
        write_safetensors(beside / WEIGHTS, sources, {"format": "pt"})


def _config_content(model: Any) -> dict[str, Any]:
    """adapter_config.json, but for the base's name: PEFT's own fields, ready to be used and in a fixed order."""
    import peft

    content = model.peft_config[NAME].to_dict()
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    return content | {"inference_mode": True, "init_lora_weights": True, "peft_version": peft.__version__}


def load(model: Qwen, folder: Path) -> None:
    """Put an adapter that PEFT or `save` has written into a plain or NF4 model, ready to be used or trained on.

    Raises: ConfigError when the folder asks for what Trivium does not compute, is damaged, or is of another model.
    """
    config, token_ids = _read_config(folder, model.shape.tie_word_embeddings)
    path = folder / WEIGHTS
    if not path.exists():
        raise ConfigError(
            f"{folder} has no {WEIGHTS}. Trivium reads safetensors only: a pickled adapter_model.bin can run code when "
            "it is opened. Save the adapter again with PEFT's save_pretrained, which writes safetensors."
        )
    inject(model, config, seed=0, token_ids=token_ids)
    tensors = _trained(model)
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a whole safetensors file ({error}). Fetch it again.") from None
    hf.compare(folder, CONFIG, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, stored)
    for name, tensor in tensors.items():
        hf.read_tensor(path, name, tensor)


def _read_config(folder: Path, tied: bool) -> tuple[Adapter, list[int]]:
    """Trivium's own settings of an adapter_config.json, and the tokens whose rows it trains."""
    content: dict[str, Any] = hf.read_json(folder / CONFIG)
    ids, tables = _token_ids(content, tied)
    problems = _not_computed(content) + ([] if ids is not None else [f"trainable_token_indices {tables!r}"])
    if problems or ids is None:
        raise ConfigError(
            f"{folder / CONFIG} asks for {'; '.join(problems)}. Trivium reads LoRA, rsLoRA and DoRA adapters of the "
            f"projections {', '.join(PROJECTIONS)}, with token rows trained in the embedding and the head or without; "
            "merge this one with PEFT and use the result."
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
        raise ConfigError(f"{folder / CONFIG} is no complete LoRA configuration: {reason}. Fetch it again.") from None
    return config, ids


def _not_computed(content: Mapping[str, Any]) -> list[str]:
    """What an adapter_config.json asks for and Trivium does not compute, as `key value`."""
    wanted = {
        "peft_type": content.get("peft_type") == "LORA",
        "init_lora_weights": content.get("init_lora_weights", True) in PLAIN_INITS,
        "target_modules": bool(_targets(content)) and set(_targets(content)) <= set(PROJECTIONS),
    }
    problems = [key for key, computed in wanted.items() if not computed]
    problems += [key for key in content if key not in READ_KEYS | INERT_KEYS and content[key] not in UNSET]
    return [f"{key} {content.get(key)!r}" for key in problems]


def _targets(content: Mapping[str, Any]) -> list[Any]:
    """Names of the adapted projections; PEFT writes whole paths for small models, and all of them must have tensors."""
    targets = content.get("target_modules")
    return sorted({str(path).rpartition(".")[2] for path in targets}) if isinstance(targets, list) else []


def _token_ids(content: Mapping[str, Any], tied: bool) -> tuple[list[int] | None, object]:
    """The tokens whose rows an adapter trains, the same wherever the model has them, else None; and what it says."""
    said = content.get("trainable_token_indices") or []
    tables = {"embed_tokens": said} if isinstance(said, list) and (tied or not said) else said
    names = {"embed_tokens"} if tied or not said else {"embed_tokens", "lm_head"}
    if not isinstance(tables, dict) or set(tables) != names:
        return None, said
    ids = tables["embed_tokens"]
    return (ids if all(other == ids for other in tables.values()) else None), said


@torch.no_grad()
def merge(model: Qwen) -> Qwen:
    """A plain fp32 model with the adapter and the trained rows folded in; what they do not touch may be shared.

    From an NF4 model it has the unpacked weights, which are what the adapter was trained on.
    """
    plain = _empty_like(model)
    for path, module in plain.named_modules():
        ours = model.get_submodule(path)
        for attribute, _ in list(module.named_parameters(recurse=False)):
            value = _folded(ours) if attribute == "weight" else getattr(ours, attribute)
            module.register_parameter(attribute, nn.Parameter(value.detach().float(), requires_grad=False))
    return plain


def _folded(module: Any) -> Tensor:
    """A module's weight with what was trained on it, fp32. Source for the magnitude: DoRA, arXiv:2402.09353, eq. 5."""
    if isinstance(module, TrainableTokens):
        return module.folded()
    if not hasattr(module, "lora_A"):
        return module.weight
    weight = module.base_layer.weight.float()
    weight = weight + module.scaling[NAME] * (module.lora_B[NAME].weight @ module.lora_A[NAME].weight)
    if NAME in module.lora_magnitude_vector:
        weight *= (module.lora_magnitude_vector[NAME].weight / weight.norm(dim=1))[:, None]
    return weight


def untrained_rows(
    embedding: Tensor, head: Tensor | None, ids: Collection[int], reserved_ids: Collection[int]
) -> list[int]:
    """Which of `ids` were never trained: a row of zeros, or one in the same direction as another reserved token's.

    What training never shows is only ever pushed away, all such rows alike: in a model that began at random their
    cosines are above 0.999. embedding, head: (V, D); `head` is None where it is the embedding. The size of a row says
    nothing: chat models have trained ones a hundred times smaller than the others.
    """
    untrained = set()
    for table in (embedding, head):
        if table is not None:
            reserved = F.normalize(table[list(reserved_ids)].float(), dim=1)
            others = torch.tensor(list(reserved_ids), device=table.device)
            for token in ids:
                cosines = reserved @ F.normalize(table[token].float(), dim=0)
                if not table[token].any() or (cosines[others != token] > TWIN_COSINE).any():
                    untrained.add(token)
    return [token for token in ids if token in untrained]
