"""Pipes, devices and sockets where a file should be, and absurd sizes, are refused before they are read."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from trivium.data.source.blocks import list_files
from trivium.data.tokenizer import load_tokenizer
from trivium.errors import BadData, ConfigError, TriviumError
from trivium.model import hf
from trivium.model.resolve import shape_of_name
from trivium.use.load import find

SPECIAL: dict[str, Callable[[Path], object]] = {
    "named pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(path.name),
}


@pytest.fixture(autouse=True)
def never_hang() -> Iterator[None]:
    """What would wait for ever fails instead."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_folder_with_a_special_file_is_refused(
    name: str, kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    monkeypatch.chdir(folder)  # the path of a socket must be short
    (folder / name).unlink()
    SPECIAL[kind](folder / name)
    for read in (hf.find_folder, find, shape_of_name, load_tokenizer):
        with pytest.raises(ConfigError, match=f"{folder / name} is a {kind}; expected a regular file"):
            read(str(folder))


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_data_files_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sound.txt").write_text("text")
    SPECIAL[kind](tmp_path / "bad.jsonl")
    for source in (tmp_path, tmp_path / "bad.jsonl"):
        with pytest.raises(ConfigError, match=f"bad.jsonl is a {kind}"):
            list_files(source)


def test_a_broken_link_in_a_data_folder_is_named(tmp_path: Path):
    (tmp_path / "sound.txt").write_text("text")
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(BadData, match="gone.jsonl: is a link to nowhere.jsonl, which is not there"):
        list_files(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1e9),
        ("hidden_size", 1 << 40),
        ("vocab_size", 10**12),
        ("num_attention_heads", 1 << 20),
        ("head_dim", 1 << 31),
    ],
)
def test_absurd_sizes_are_refused_by_name(key: str, value: float, base: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    for read in (lambda: hf.read_shape(folder), lambda: shape_of_name(str(folder))):
        with pytest.raises(ConfigError, match=f"{key} is"):
            read()
    with suppress(TriviumError):  # sizes other than the number of layers are harmless here
        load_tokenizer(folder)
        assert key != "num_hidden_layers"


def test_a_tokenizer_beside_an_absurd_number_of_layers_is_refused(base: Path, tmp_path: Path):
    """transformers would list a thousand million layers to load a tokenizer."""
    shutil.copytree(base, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    del config["layer_types"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000000; expected"):
        load_tokenizer(tmp_path / "model")
