"""Tokenizer, base model and data that most tests share and do not modify."""

from pathlib import Path

import pytest

from tests.doctor.cases import chat_rows, text_rows, thinking_tokenizer, write_rows
from tests.support.models import byte_tokenizer, write_base


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> Path:
    """A tied model with ChatML that stops at the end of a turn."""
    return write_base(tmp_path_factory.mktemp("base") / "model", tokenizer)


@pytest.fixture(scope="session")
def thinker(tmp_path_factory) -> Path:
    """A model with Qwen3's template, which knows reasoning and tools."""
    folder = tmp_path_factory.mktemp("thinker")
    return write_base(folder / "model", thinking_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_rows())


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", text_rows())
