"""Tokenizers: trained ones load in transformers and round-trip text; documents encode like in transformers."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.support.qwen_tokenizers import REAL_NAMES, needs_real
from trivium.data import tokenizer as module
from trivium.data.tokenizer import (
    CHATML_TEMPLATE,
    END_OF_TEXT,
    QWEN_SPLIT,
    SPECIAL_TOKENS,
    DocumentEncoder,
    document_encoding,
    load_tokenizer,
    train_tokenizer,
)
from trivium.data.words import UNSETTLED
from trivium.errors import ConfigError

TEXTS = [
    "The fox said it's the fox's own fault, and they'd all seen 1234 of them.\n\n  Then\tthe rain came.\r\n",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \N{GRINNING FACE}",
] * 20
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80)


@pytest.fixture(scope="module", params=["bpe", "byte", "char"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / request.param
    train_tokenizer(iter(TEXTS), request.param, 300, folder)
    return folder


def test_train_tokenizer_writes_a_hugging_face_folder(trained):
    loaded = AutoTokenizer.from_pretrained(trained)
    assert loaded.is_fast
    assert (loaded.eos_token, loaded.pad_token) == (END_OF_TEXT, END_OF_TEXT)
    size = len(loaded)
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [size - 3, size - 2, size - 1]
    num_beyond_ascii = sum(not character.isascii() for character in set("".join(TEXTS)))
    num_beyond_ascii = sum(not character.isascii() for character in set("".join(TEXTS)))
    assert size == {"bpe": 300, "byte": 259, "char": 259 + num_beyond_ascii}[trained.name]
    assert loaded.chat_template == CHATML_TEMPLATE
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    prompt = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_trained_tokenizers_round_trip_any_text(trained):
    loaded = AutoTokenizer.from_pretrained(trained)

    @settings(max_examples=200)
    @given(ANY_TEXT)
    def comes_back(text):
        ids = loaded(text, split_special_tokens=True).input_ids
        assert loaded.decode(ids) == (unicodedata.normalize("NFC", text) if trained.name == "bpe" else text)

    comes_back()


def test_train_tokenizer_kinds_byte_and_char(tmp_path):
    train_tokenizer(iter(TEXTS), "byte", 1000, tmp_path / "byte")
    assert len(load_tokenizer(tmp_path / "byte")("\u00e9a\u65e5").input_ids) == 6
    train_tokenizer(iter(TEXTS), "char", 1000, tmp_path / "char")
    chars = load_tokenizer(tmp_path / "char")
    assert len(chars("\u00e9a\u65e5").input_ids) == 3
    assert len(chars("\u0436").input_ids) == 2  # never seen: its two bytes


def test_train_tokenizer_is_deterministic_across_processes(tmp_path):
    script = (
        "import sys; from pathlib import Path; from trivium.data.tokenizer import train_tokenizer\n"
        "for kind in ('bpe', 'char'): train_tokenizer(iter(eval(sys.argv[1])), kind, 400, Path(sys.argv[2]) / kind)\n"
    ).replace("eval(sys.argv[1])", "sys.argv[1].split('|')")
    for turn in ("one", "two"):
        command = [sys.executable, "-c", script, "|".join(TEXTS), str(tmp_path / turn)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1" if turn == "one" else "2"})
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_load_tokenizer_refuses_bad_tokenizers(tmp_path):
    with pytest.raises(ConfigError, match="at least 259"):
        train_tokenizer(iter(TEXTS), "bpe", 100, tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    train_tokenizer(iter(TEXTS), "byte", 259, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<|endoftext|>",', ""))
    with pytest.raises(ConfigError, match="no eos_token"):
        load_tokenizer(tmp_path)


def test_document_encoder_gives_the_same_ids_in_parts(trained, monkeypatch):
    loaded = load_tokenizer(trained)
    encoder = DocumentEncoder(document_encoding(loaded))
    lines = st.text(alphabet="ab1 .\n\r\t\u00e9\u0301_", max_size=120)

    @settings(max_examples=150)
    @given(lines)
    def same(text):
        with monkeypatch.context() as patch:
            whole = encoder.encode(text)
            patch.setattr(module, "MAX_PART_CHARS", 7)
            assert np.array_equal(encoder.encode(text), whole)

    same()


@needs_real
@pytest.mark.parametrize("name", REAL_NAMES)
def test_document_encoder_equals_transformers(real, name):
    tokenizer = real[name]
    encoder = DocumentEncoder(document_encoding(tokenizer))
    texts = [*TEXTS[:2], "The quick brown fox", "x" * 50_000, "\n\n\n", Path(__file__).read_text()]
    for text in texts:
        ids = encoder.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == [*tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids, 151643]


@needs_real
@pytest.mark.parametrize("name", REAL_NAMES)
def test_document_encoder_never_makes_control_tokens_from_text(real, name):
    tokenizer = real[name]
    encoder = DocumentEncoder(document_encoding(tokenizer))
    text = "".join(tokenizer.get_added_vocab())
    ids = encoder.encode(text)
    assert ids[-1] == 151643 and max(ids[:-1]) < 151643
    assert tokenizer.decode(ids[:-1]) == text
    assert encoder.has_control_token("a <|im_end|> b") and not encoder.has_control_token("a < b |> c")


@needs_real
def test_qwen_split_equals_the_pattern_of_qwen(real, monkeypatch):
    tokenizer = real["qwen3"]
    assert QWEN_SPLIT in tokenizer.backend_tokenizer.to_str().encode().decode("unicode_escape")
    encoder = DocumentEncoder(document_encoding(tokenizer))
    text = Path(__file__).read_text() + "\n\u65e5\u672c\n 1\n\n\nx" * 50
    whole = encoder.encode(text)
    monkeypatch.setattr(module, "MAX_PART_CHARS", 30)
    assert np.array_equal(encoder.encode(text), whole)


def settled_characters() -> str:
    """All characters that the word cache may encode."""
    return "".join(chr(code) for code in range(0xD800) if not UNSETTLED.search(chr(code))) + "\uff01\uff21\uff41"


@needs_real
def test_word_encoder_splits_characters_like_the_library(real):
    tokenizer = real["qwen3"]
    encoder = DocumentEncoder(document_encoding(tokenizer))
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    characters = settled_characters()
    assert len(characters) > 30_000 and unicodedata.is_normalized("NFC", characters)
    around = "a{0}b {0} 1{0}2 .{0}! \n{0}\n  {0}{0}'{0}s\t{0}  "
    for first in range(0, len(characters), 2000):
        text = "".join(around.format(character) for character in characters[first : first + 2000])
        expected = backend.encode(text, add_special_tokens=False).ids
        assert encoder._words.encode(text, encoder.dtype).tolist() == expected


def test_word_encoder_gives_the_ids_of_the_library(trained, monkeypatch):
    loaded = load_tokenizer(trained)
    encoder = DocumentEncoder(document_encoding(loaded))
    monkeypatch.setattr("trivium.data.words.MAX_WORDS", 20)
    monkeypatch.setattr("trivium.data.words.MAX_WORD_CHARS", 4)
    alphabet = st.sampled_from("aAbs't1 9.,!\n\r\t_-\u00e9\u017f\u0301\u65e5\u00a0\u2028\x1c")

    @settings(max_examples=300)
    @given(st.text(alphabet=alphabet, max_size=60))
    def same(text):
        assert encoder.encode(text)[:-1].tolist() == loaded(text, split_special_tokens=True).input_ids

    same()
