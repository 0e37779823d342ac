"""Tokenizers: load and check one, train a small one, encode documents.

A trained tokenizer is a plain Hugging Face folder. Worker processes use `DocumentEncoder`, which needs only the
`tokenizers` library, since importing transformers takes seconds.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from trivium.data.words import WordEncoder
from trivium.errors import ConfigError, first_lines
from trivium.files import atomic_write, require_regular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Pattern of Qwen2, 2.5 and 3 that splits text into words before BPE. Source: pre_tokenizer in Qwen's tokenizer.json.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHARACTER_SPLIT = r"[\s\S]"

CHATML_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Limits memory: the library needs about 90 bytes per character of a part.
MAX_PART_CHARS = 1 << 14
MAX_LAYERS = 1 << 10  # far above every published model

TokenizerKind = Literal["bpe", "byte", "char"]


def load_tokenizer(name: str | Path) -> "PreTrainedTokenizerFast":
    """Load a tokenizer folder or Hub id with transformers, and check that it is usable for training.

    Raises: ConfigError when it does not exist, is not a fast tokenizer, has no eos_token, or its ids have gaps.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if not folder.exists() and (folder.is_absolute() or str(name).startswith((".", "~"))):
        raise ConfigError(
            f"Tokenizer {name}: no such folder. Expected one with tokenizer.json, or a Hub id, e.g. Qwen/Qwen3-0.6B."
        )
    if folder.is_dir():
        require_regular(*folder.iterdir())
        _require_few_layers(folder / "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder if folder.exists() else name), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError(
            f"Tokenizer {name} cannot be loaded ({first_lines(error)}). Expected a folder with tokenizer.json and "
            "tokenizer_config.json, or a Hub id that is in the local cache or reachable from here."
        ) from error
    if tokenizer is None or not tokenizer.is_fast:
        raise ConfigError(
            f"Tokenizer {name} has no tokenizer.json. Expected a fast tokenizer; use one that has this file, for "
            "example Qwen/Qwen3-0.6B."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"Tokenizer {name} has no eos_token, which marks the end of each document. Set it in tokenizer_config.json."
        )
    ids = sorted(tokenizer.get_vocab().values())
    if ids != list(range(len(ids))):
        raise ConfigError(
            f"Tokenizer {name} has {len(ids)} tokens with ids up to {ids[-1]}. Expected ids from 0 without gaps or "
            "duplicates; its files probably come from different tokenizers, so download it again."
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def _require_few_layers(config: Path) -> None:
    """Raise ConfigError for a config.json with an absurd number of layers: transformers reads it with a tokenizer."""
    try:
        layers = json.loads(config.read_bytes()).get("num_hidden_layers", 0)
    except (OSError, ValueError, AttributeError):
        return  # no config.json of a model
    if type(layers) is not int or layers > MAX_LAYERS:
        raise ConfigError(
            f"{config}: num_hidden_layers is {layers!r}; expected a whole number of at most {MAX_LAYERS:,}. Correct "
            "it, or download the file again."
        )


def load_for_counting(folder: Path) -> "PreTrainedTokenizerFast":
    """Load a tokenizer folder in about a second, without torch and without the checks of `load_tokenizer`.

    Raises: ConfigError when it cannot be loaded.
    """
    from transformers import PreTrainedTokenizerFast

    _require_few_layers(folder / "config.json")
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ConfigError(
            f"Tokenizer {folder} cannot be loaded ({first_lines(error)}). Expected tokenizer.json and "
            "tokenizer_config.json of one model. Download them again."
        ) from error


def train_tokenizer(texts: Iterable[str], kind: TokenizerKind, vocab_size: int, folder: Path) -> None:
    """Train a tokenizer and save it as a Hugging Face folder; the same texts give byte-identical files.

    The vocabulary contains the 256 bytes, so any text can be encoded and decodes to itself (`bpe` first normalizes to
    NFC, as Qwen does), and Qwen's three special tokens.
    - `bpe`: byte-level BPE on words split by Qwen's pattern; fewer than `vocab_size` tokens if the texts are short.
    - `byte`: only the bytes, always 259 tokens.
    - `char`: a token for each of the most frequent characters, UTF-8 bytes for the rest.

    Raises: ConfigError when `vocab_size` is below 259 (256 bytes and 3 special tokens).
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"The tokenizer's vocab_size is {vocab_size}. Set at least {MIN_VOCAB_SIZE}: the 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens."
        )
    num_ordinary = vocab_size - len(SPECIAL_TOKENS)
    trained = {"bpe": _train_bpe, "byte": _train_byte, "char": _train_char}[kind](texts, num_ordinary)
    trained.decoder = decoders.ByteLevel()
    trained.add_special_tokens(list(SPECIAL_TOKENS))
    _save(trained, folder)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split_then_bytes(QWEN_SPLIT)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_byte(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocab(), merges=[]))
    tokenizer.pre_tokenizer = _split_then_bytes(QWEN_SPLIT)  # for speed: the library is slow on long words
    return tokenizer


def _train_char(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Add non-ASCII characters to the byte vocabulary, most frequent first; `ignore_merges` makes BPE use them."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    vocab = _byte_vocab()
    for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(vocab) == vocab_size:
            break
        if not character.isascii():
            vocab[_byte_level(character)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = _split_then_bytes(CHARACTER_SPLIT)
    return tokenizer


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_vocab() -> dict[str, int]:
    """Ids of the 256 bytes, in their printable byte-level form and in the order of the library's trainer."""
    return {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def _byte_level(text: str) -> str:
    """The byte-level form of a text."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in pieces)


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in SPECIAL_TOKENS
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    atomic_write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    atomic_write(folder / "chat_template.jinja", CHATML_TEMPLATE)


@dataclass(frozen=True)
class Encoding:
    """Everything that the token ids of a document depend on, sent to worker processes."""

    tokenizer_json: str
    """The backend tokenizer, with every control token marked special."""
    end_id: int
    """Appended to each document: `<|endoftext|>` if the vocabulary has it, else the tokenizer's eos_token."""
    vocab_size: int
    """Number of ids, including added tokens."""

    @property
    def added_ids(self) -> list[int]:
        """Ids of the added tokens, including control tokens."""
        return sorted(token["id"] for token in json.loads(self.tokenizer_json)["added_tokens"])

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of `end_id` and `tokenizer_json`."""
        return hashlib.sha256(f"{self.end_id}\n{self.tokenizer_json}".encode()).hexdigest()


def document_encoding(tokenizer: "PreTrainedTokenizerFast") -> Encoding:
    """The encoding of documents with a loaded tokenizer.

    It is built from the loaded object since Qwen3-Base has four tokens only in tokenizer_config.json. Qwen does not
    mark tokens like `<think>` as special, so plain text could produce them; here every added token that is special or
    in angle brackets is a control token.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    for token in content["added_tokens"]:
        token["special"] = token["special"] or re.fullmatch(r"<.+>", token["content"]) is not None
    end_id = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    return Encoding(
        tokenizer_json=json.dumps(content, ensure_ascii=False),
        end_id=int(end_id),
        vocab_size=len(tokenizer),
    )


class DocumentEncoder:
    """Encodes documents as token ids followed by `end_id`; control tokens in a text are encoded as plain text."""

    def __init__(self, encoding: Encoding) -> None:
        content = json.loads(encoding.tokenizer_json)
        self._tokenizer = Tokenizer.from_str(encoding.tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._end_id = encoding.end_id
        self.dtype = token_dtype(encoding.vocab_size)
        tokens: list[str] = [token["content"] for token in content["added_tokens"] if token["special"]]
        tokens.sort(key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        pattern = _word_pattern(content)
        self._words = WordEncoder(self._tokenizer, pattern) if pattern else None

    def has_control_token(self, text: str) -> bool:
        """Whether the text contains the text of a control token."""
        return self._control.search(text) is not None

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text and the end token, [tokens] of `dtype` (uint16 or int32)."""
        return np.concatenate([*map(self._encode_part, self._parts(text)), np.array([self._end_id], dtype=self.dtype)])

    def _encode_part(self, part: str) -> np.ndarray:
        ids = self._words.encode(part, self.dtype) if self._words else None
        if ids is None:
            (encoded,) = self._tokenizer.encode_batch_fast([part], add_special_tokens=False)
            ids = np.array(encoded.ids, dtype=self.dtype)
        return ids

    def _parts(self, text: str) -> Iterator[str]:
        """Split a long text before lines that start with a letter or digit, which no token can cross."""
        start = 0
        while self._words and len(text) - start > MAX_PART_CHARS:
            cut = text.rfind("\n", start, start + MAX_PART_CHARS) + 1
            while cut > start and not text[cut].isalnum():
                cut = text.rfind("\n", start, cut - 1) + 1
            if cut <= start:
                later = re.compile(r"\n(?=[^\W_])").search(text, start + MAX_PART_CHARS - 1)
                if later is None:
                    break
                cut = later.end()
            yield text[start:cut]
            start = cut
        yield text[start:]


def _word_pattern(content: dict[str, Any]) -> str | None:
    """The split pattern of a tokenizer.json if `WordEncoder` can reproduce it; else None."""
    steps = (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    plain = (
        content["model"]["type"] == "BPE"
        and not content["model"].get("dropout")
        and (content["normalizer"] is None or content["normalizer"]["type"] == "NFC")
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and not steps[1]["use_regex"]
        and not steps[1]["add_prefix_space"]
        and all(token["special"] for token in content["added_tokens"])
    )
    pattern = steps[0]["pattern"].get("Regex") if plain else None
    return pattern if pattern in (QWEN_SPLIT, CHARACTER_SPLIT) else None


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids, else int32. Source: `DType.optimal_dtype` of megatron.core.datasets.indexed_dataset."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)
