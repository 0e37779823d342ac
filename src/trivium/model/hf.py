"""Hugging Face folders: read a model's shape and weights, and write a model that transformers loads.

Folders are untrusted: config.json is only parsed, weights must be safetensors, and file names in an index must not
leave the folder. Weights are copied in pieces, so a model is never in memory twice.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trivium.errors import ConfigError
from trivium.files import (
    TensorSource,
    atomic_write,
    fsync_directory,
    require_free_space,
    write_safetensors,
)
from trivium.model.qwen import Qwen, empty_model
from trivium.model.resolve import read_json, require_model_folder
from trivium.model.shape import QwenShape

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION_CONFIG = "generation_config.json"
MODEL_FILES = ("config.json", GENERATION_CONFIG)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
WEIGHT_FILES = (INDEX, "model*.safetensors")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
STORED_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
PIECE_BYTES, COPY_VALUES = 1 << 26, 1 << 22
MAX_SHARD_BYTES = 5 * 2**30


def find_folder(name: str, with_weights: bool = True) -> Path:
    """The local folder of a model: `name` if it is a folder, else the downloaded Hub repository `owner/name`.

    Raises: ConfigError when `name` is neither, the download fails, or something in the folder is not a regular file.
    """
    if Path(name).is_dir():
        require_model_folder(Path(name))
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(
            f"There is no folder {name!r}, and it is not a Hub id of the form owner/name. Give the path of a model "
            "folder, or an id like Qwen/Qwen3-0.6B-Base."
        )
    from huggingface_hub import snapshot_download

    weights = WEIGHT_FILES + ADAPTER_FILES if with_weights else ()
    wanted = [*MODEL_FILES, *TOKENIZER_FILES, *weights]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # includes errors of the HTTP library, which varies
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{name!r} is not a local folder and could not be downloaded from the Hub: {reason} Check the name and the "
            "connection, log in (hf auth login) if the model is gated, or give the path of a local folder."
        ) from error


def read_stop_ids(*folders: Path) -> list[int]:
    """EOS ids from the first generation_config.json or config.json in `folders` that has any; empty if none has."""
    for folder in folders:
        for name in (GENERATION_CONFIG, "config.json"):
            eos = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
            if eos is not None:
                return [int(token) for token in eos] if isinstance(eos, list) else [int(str(eos))]
    return []


def read_shape(folder: Path) -> QwenShape:
    """The shape of the model in `folder`, from its config.json.

    Raises: ConfigError when the file is missing or the model is not supported.
    """
    return QwenShape.from_hf_config(read_json(folder / "config.json"))


def load_weights(model: Qwen, folder: Path) -> None:
    """Load the folder's safetensors into the model's parameters, keeping their device and dtype.

    Raises: ConfigError as `find_tensors`, before any value is written, and as `read_tensor`.
    """
    files = find_tensors(model.shape, folder)
    for name, parameter in model.named_parameters():
        read_tensor(files[name], name, parameter)


def load_model(shape: QwenShape, folder: Path, dtype: torch.dtype, device: torch.device | str) -> Qwen:
    """A model with the folder's weights, stored and computed in `dtype`, loaded without a copy in another one.

    Raises: ConfigError as `load_weights`.
    """
    model = empty_model(shape).to(dtype).to_empty(device=device)
    load_weights(model, folder)
    model.compute_dtype = dtype
    return model


def read_rows(path: Path, name: str, ids: list[int]) -> Tensor:
    """Rows of a stored tensor, [ids, hidden]."""
    with safe_open(path, framework="pt") as file:
        table = file.get_slice(name)
        first = min(ids)
        if max(ids) - first < 2 * len(ids):
            return table[first : max(ids) + 1][[token - first for token in ids]]
        return torch.cat([table[token : token + 1] for token in ids])


def find_tensors(shape: QwenShape, folder: Path) -> dict[str, Path]:
    """The file of each parameter of a model.

    A stored head next to tied embeddings is accepted if it is identical.

    Raises: ConfigError naming missing, unexpected or differently shaped tensors, or a damaged file.
    """
    files = _tensor_files(folder)
    stored = {name: _header(path, name) for name, path in files.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in empty_model(shape).named_parameters()}
    tied_copy = shape.tie_word_embeddings and HEAD in stored and EMBEDDINGS in stored
    if tied_copy:
        expected[HEAD] = expected[EMBEDDINGS]
    compare(folder, "config.json", expected, stored)
    if tied_copy:
        _require_equal(files[EMBEDDINGS], files[HEAD])
    return files


@torch.no_grad()
def read_tensor(path: Path, name: str, into: Tensor) -> None:
    """Copy a stored tensor in pieces into a tensor of any device and dtype.

    Raises: ConfigError when it holds a NaN or an infinity.
    """
    start = 0
    for piece in _pieces(path, name):
        # A sum is never finite if a value is not, and takes a fifteenth of the time of `isfinite`.
        if not math.isfinite(float(piece.sum())) and not piece.isfinite().all():
            at = start + int((~piece.isfinite()).reshape(len(piece), -1).any(1).nonzero()[0])
            value = "a NaN" if piece.isnan().any() else "an infinity"
            raise ConfigError(
                f"{path} holds {value} in {name}, first in row {at:,}; expected finite numbers, since every result "
                "would be NaN. Nothing was trained. Download the file again and compare its SHA-256 with the "
                "published one; if it is your own, go back to an earlier checkpoint of the run that wrote it."
            )
        into[start : start + len(piece)].copy_(piece)
        start += len(piece)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor, from a single safetensors file or an index."""
    single = folder / WEIGHTS
    if single.exists():
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise damaged(single, error) from None
    if not (folder / INDEX).exists():
        raise ConfigError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}. Trivium reads safetensors only: loading pickled weights "
            "(.bin, .pt) can run code. Download the safetensors version of the model, or check the path."
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / INDEX} has no weight_map of tensor names to files. Download the file again.")
    for shard in set(weight_map.values()):
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ConfigError(
                f"{folder / INDEX} lists the weight file {shard!r}; expected the name of a .safetensors file in the "
                "same folder, without a path. The index is damaged or malicious: download the model from a trusted "
                "source."
            )
        if not (folder / shard).is_file():
            raise ConfigError(f"{folder / INDEX} lists {shard}, which is missing. Download the missing file.")
    return {name: folder / shard for name, shard in weight_map.items()}


def _header(path: Path, name: str) -> tuple[int, ...]:
    """The shape of a stored tensor, which must be F32, BF16 or F16."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_slice(name)
            shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None
    if dtype not in ("F32", "BF16", "F16"):
        raise ConfigError(
            f"{path} stores {name} as {dtype}; expected F32, BF16 or F16. Use the unquantized version of this model."
        )
    return shape


def damaged(path: Path, error: Exception) -> ConfigError:
    """The error for a safetensors file that cannot be read."""
    return ConfigError(f"{path} is not a complete safetensors file ({error}). Download it again.")


def compare(
    folder: Path, config: str, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ConfigError if stored names or shapes differ from those of the configured model, naming the first five."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is not part of the model" for name in stored if name not in expected]
    problems += [
        f"{name} has shape {stored[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(
            f"The weights in {folder} do not fit its {config}: {'; '.join(problems[:5])}{more}. "
            "Expected exactly the tensors of that model; use a complete model folder."
        )


def _require_equal(embeddings: Path, head: Path) -> None:
    """Raise ConfigError if the stored head of a tied model differs from its embeddings."""
    pairs = zip(_pieces(embeddings, EMBEDDINGS), _pieces(head, HEAD), strict=True)
    if not all(torch.equal(left, right) for left, right in pairs):
        raise ConfigError(
            f"{head.parent} has tie_word_embeddings true, but its {HEAD} differs from {EMBEDDINGS}. "
            "Set tie_word_embeddings to false in config.json if both were trained, or delete the unused head."
        )


def _pieces(path: Path, name: str) -> Iterator[Tensor]:
    """A stored tensor in pieces of whole rows. The file is opened per call: an open memory map keeps pages in RAM."""
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(name)
        shape = stored.get_shape()
        rows = max(1, PIECE_BYTES // max(1, 4 * int(torch.Size(shape[1:]).numel())))
        for start in range(0, shape[0], rows):
            yield stored[start : start + rows]


def save_folder(
    model: Qwen,
    folder: Path,
    tokenizer_folder: Path | None,
    dtype: torch.dtype,
    generation: Mapping[str, object] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model for transformers: config, generation defaults, weights and tokenizer files, atomically.

    Args:
        dtype: of the stored weights, float32 or bfloat16.
        generation: content of generation_config.json, whose token ids also go to config.json; None takes the EOS, pad
            and BOS of the tokenizer.

    Raises: ConfigError when `folder` holds something other than a model; DoesNotFit when the disk has not enough free
        space.
    """
    if generation is None:
        generation = {} if tokenizer_folder is None else _tokenizer_ids(tokenizer_folder)
    tensors = [tensor_source(name, parameter, dtype) for name, parameter in model.named_parameters()]
    size_bytes = sum(tensor.num_bytes for tensor in tensors) + companion_bytes(tokenizer_folder)
    with replacing(folder, "config.json", size_bytes) as temporary:
        write_model(temporary, model.shape, dtype, tensors, generation, max_shard_bytes)
        write_companions(temporary, tokenizer_folder, generation)


def write_model(
    folder: Path,
    shape: QwenShape,
    dtype: torch.dtype,
    tensors: Iterable[TensorSource],
    generation: Mapping[str, object],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the weights into an existing folder.

    The config has the dtype twice, like `rope_theta`: readers before transformers 4.56 know only `torch_dtype`.

    Args:
        dtype: what config.json says of the tensors.
        generation: see `save_folder`.
    """
    name = str(dtype).removeprefix("torch.")
    config = shape.to_hf_config() | {"dtype": name, "torch_dtype": name} | _token_ids(generation)
    atomic_write(folder / "config.json", as_json(config))
    _write_weights(folder, tensors, max_shard_bytes)


@contextmanager
def replacing(folder: Path, mark: str, size_bytes: int) -> Iterator[Path]:
    """A temporary folder for `size_bytes` that is fsynced and replaces `folder` at the end of the block.

    Raises: ConfigError when `folder` has files but no file `mark`; DoesNotFit when the disk has not enough free space.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / mark).exists():
        raise ConfigError(
            f"{folder} is not empty and has no {mark}, so it was not touched. Choose another output folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(folder.parent, size_bytes, "the result")
    temporary, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("writing", "replaced"))
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    fsync_directory(temporary)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(temporary, folder)
    fsync_directory(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def companion_bytes(tokenizer_folder: Path | None) -> int:
    """Bytes of the tokenizer files that `write_companions` copies."""
    files = [] if tokenizer_folder is None else [tokenizer_folder / name for name in TOKENIZER_FILES]
    return sum(file.stat().st_size for file in files if file.is_file())


def write_companions(folder: Path, tokenizer_folder: Path | None, generation: Mapping[str, object]) -> None:
    """Write generation_config.json and copy the tokenizer's files."""
    atomic_write(folder / GENERATION_CONFIG, as_json(generation))
    for name in TOKENIZER_FILES:
        if tokenizer_folder is not None and (tokenizer_folder / name).is_file():
            atomic_write(folder / name, (tokenizer_folder / name).read_bytes())


def as_json(content: Mapping[str, object]) -> str:
    """JSON text as in all files of a model folder."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _token_ids(generation: Mapping[str, object]) -> dict[str, object]:
    """The special token ids of config.json, which has a single EOS id: the first."""
    ids = {key: generation[key] for key in TOKEN_IDS if key in generation}
    if isinstance(ids.get("eos_token_id"), list):
        ids["eos_token_id"] = ids["eos_token_id"][0]
    return ids


def _tokenizer_ids(tokenizer_folder: Path) -> dict[str, object]:
    """The ids of a tokenizer's EOS, pad and BOS tokens, with the keys of generation_config.json."""
    config = read_json(tokenizer_folder / "tokenizer_config.json")
    added = cast("list[dict[str, object]]", read_json(tokenizer_folder / "tokenizer.json").get("added_tokens") or [])
    id_of = {token["content"]: token["id"] for token in added}
    ids: dict[str, object] = {}
    for role in ("bos", "eos", "pad"):
        token = config.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in id_of:
            ids[f"{role}_token_id"] = id_of[content]
    return ids


def _write_weights(folder: Path, tensors: Iterable[TensorSource], max_shard_bytes: int) -> None:
    """Write one safetensors file, or several of at most `max_shard_bytes` and an index."""
    shards: list[list[TensorSource]] = [[]]
    for source in tensors:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + source.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(source)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, {"format": "pt"})
        weight_map |= dict.fromkeys((source.name for source in shard), name)
    if len(shards) > 1:
        total_size = sum(source.num_bytes for shard in shards for source in shard)
        atomic_write(folder / INDEX, as_json({"metadata": {"total_size": total_size}, "weight_map": weight_map}))


def tensor_source(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> TensorSource:
    """A tensor to write, converted to `dtype` and copied to the host a few megabytes at a time."""
    dtype = dtype or tensor.dtype

    def read() -> Iterator[memoryview]:
        for piece in tensor.detach().reshape(-1).split(COPY_VALUES):
            yield piece.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data

    return TensorSource(name, STORED_DTYPES[dtype], tuple(tensor.shape), tensor.numel() * dtype.itemsize, read)


def stored_sources(path: Path) -> list[TensorSource]:
    """The tensors of a safetensors file in its order, to write exactly as they are stored.

    Raises: ConfigError when the file is damaged or a tensor is not F32, BF16 or F16.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.offset_keys()
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None
    return [stored_source(path, name) for name in names]


def stored_source(path: Path, name: str) -> TensorSource:
    """A tensor to write exactly as it is stored in a safetensors file.

    Raises: ConfigError when it is not F32, BF16 or F16.
    """
    shape = _header(path, name)
    with safe_open(path, framework="pt") as file:
        dtype = file.get_slice(name)[:0].dtype

    def read() -> Iterator[memoryview]:
        for piece in _pieces(path, name):
            yield piece.contiguous().view(torch.uint8).numpy().data

    return TensorSource(name, STORED_DTYPES[dtype], shape, math.prod(shape) * dtype.itemsize, read)
