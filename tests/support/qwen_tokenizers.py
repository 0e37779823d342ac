"""The four published Qwen tokenizers, rebuilt byte for byte from two Python packages and checked by their SHA-256.

`make tokenizers` runs this file. The vocabulary comes from the wheel of `dashscope` (Alibaba's client library), which
is downloaded, read as a zip file and never installed; the chat templates come from the installed `trl`. No model hub
is asked. The result: `.cache/tokenizers/NAME/` with `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.
"""

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

CACHE = Path(__file__).resolve().parents[2] / ".cache"
REAL = CACHE / "tokenizers"
REAL_NAMES = ("qwen2.5-base", "qwen2.5-instruct", "qwen3-base", "qwen3")
needs_real = pytest.mark.usefixtures("qwen_tokenizers")

WHEEL = "dashscope==2.0.2"
WHEEL_SHA256 = "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258"
RANKS_FILE = "dashscope/resources/qwen.tiktoken"
NUM_RANKS = 151_643
# Of the files on the Hub, except `tokenizer.json` of the three older ones: the Hub has it with merges as strings.
SHA256 = {
    "qwen2.5-base/chat_template.jinja": "44d5f08f3f72b837eaad09f13a54c1f9f4eb58d75240334548b7fd52a5437fa5",
    "qwen2.5-base/tokenizer.json": "9c5ae00e602b8860cbd784ba82a8aa14e8feecec692e7076590d014d7b7fdafa",
    "qwen2.5-base/tokenizer_config.json": "c91efca15ceff6e9ee9424db58a6f59cd41294e550a86cbd07e3c1fb500b34f9",
    "qwen2.5-instruct/chat_template.jinja": "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f",
    "qwen2.5-instruct/tokenizer.json": "9c5ae00e602b8860cbd784ba82a8aa14e8feecec692e7076590d014d7b7fdafa",
    "qwen2.5-instruct/tokenizer_config.json": "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583",
    "qwen3-base/chat_template.jinja": "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5",
    "qwen3-base/tokenizer.json": "9c5ae00e602b8860cbd784ba82a8aa14e8feecec692e7076590d014d7b7fdafa",
    "qwen3-base/tokenizer_config.json": "3c04ed3ca964ea2f6b2b5faf0dc4d31aec1cb1e8b4bcf63f402d295046b422b5",
    "qwen3/chat_template.jinja": "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8",
    "qwen3/tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "qwen3/tokenizer_config.json": "d5d09f07b48c3086c508b30d1c9114bd1189145b74e982a265350c923acd8101",
}

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|{kind}_{edge}|>" for kind in ("object_ref", "box", "quad", "vision") for edge in ("start", "end")),
    *(f"<|{kind}_pad|>" for kind in ("vision", "image", "video")),
]
ADDED = [
    *("<tool_call>", "</tool_call>"),
    *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
    *("<|repo_name|>", "<|file_sep|>"),
]
ADDED_IN_QWEN3 = ["<tool_response>", "</tool_response>", "<think>", "</think>"]

# What the templates of the base models have where the template that TRL carries has the second text.
BASE_TEMPLATE = {
    "qwen2.5": [
        ("You are a helpful assistant.", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ],
    "qwen3": [
        ('message.role == "user" and not(', 'message.role == "user" and message.content is string and not('),
        (
            "",
            "    {%- if message.content is string %}\n        {%- set content = message.content %}\n"
            "    {%- else %}\n        {%- set content = '' %}\n    {%- endif %}\n",
        ),
        ("message.role + '\\n' + message.content + '<|im_end|>'", "message.role + '\\n' + content + '<|im_end|>'"),
        (
            "        {%- set content = message.content %}\n        {%- set reasoning_content = '' %}\n",
            "        {%- set reasoning_content = '' %}\n",
        ),
        (
            "message.reasoning_content is defined and message.reasoning_content is not none %}",
            "message.reasoning_content is string %}",
        ),
        (
            "            {%- if '</think>' in message.content %}\n"
            "                {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n"
            "                {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n')",
            "            {%- if '</think>' in content %}\n"
            "                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n')",
        ),
        ("                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n", None),
        (
            "        {{- message.content }}\n        {{- '\\n</tool_response>'",
            "        {{- content }}\n        {{- '\\n</tool_response>'",
        ),
    ],
}


def download_wheel(folder: Path) -> Path:
    """The pinned wheel, from the package index that pip is set up for."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", WHEEL]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    (wheel,) = folder.glob("dashscope-*.whl")
    check_sha256(wheel, WHEEL_SHA256)
    return wheel


def check_sha256(file: Path, expected: str) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise SystemExit(f"{file} has the SHA-256 {found}; expected {expected}")


def read_ranks(wheel: Path) -> dict[bytes, int]:
    """Byte sequences by their rank, which is their token id too."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(RANKS_FILE).split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    assert sorted(ranks.values()) == list(range(NUM_RANKS))
    return ranks


def last_merge(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two parts that a token is merged from: what BPE makes of its bytes with the merges that rank before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, NUM_RANKS) for left, right in pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        assert pairs[best] < ranks[token]
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    left, right = parts
    return left, right


def printable_bytes() -> dict[int, str]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


def byte_level_bpe(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The `model` of tokenizer.json."""
    alphabet = printable_bytes()
    names = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    ordered = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {names[token]: ranks[token] for token in sorted(ranks, key=ranks.__getitem__)},
        "merges": [[names[part] for part in last_merge(ranks, token)] for token in ordered],
    }


def added_tokens(contents: Iterable[str]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": NUM_RANKS + number, "content": content, **flags, "special": content in SPECIAL}
        for number, content in enumerate(contents)
    ]


def tokenizer_json(model: dict[str, Any], contents: Iterable[str]) -> str:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(contents),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False, indent=2)


def tokenizer_config(contents: Iterable[str], template: str, eos_token: str) -> str:
    content = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token.pop("id")): token for token in added_tokens(contents)},
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos_token,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True)


def chat_template(family: str, is_base: bool) -> str:
    trl = importlib.util.find_spec("trl")
    assert trl is not None and trl.origin is not None, "trl is not installed"
    template = (Path(trl.origin).parent / "chat_templates" / f"{family.replace('.', '_')}.jinja").read_text()
    for base, chat in BASE_TEMPLATE[family] if is_base else ():
        template = template.replace(chat, base) if chat is not None else template.replace(base, "")
    return template


def write_tokenizer(folder: Path, name: str, model: dict[str, Any]) -> None:
    """Write one tokenizer's folder. `tokenizer.json` of Qwen3's base models does not have Qwen3's four new tokens."""
    family, is_base = name.split("-")[0], name.endswith("-base")
    template = chat_template(family, is_base)
    contents = [*SPECIAL, *ADDED, *(ADDED_IN_QWEN3 if family == "qwen3" else [])]
    config = tokenizer_config(contents, template, "<|endoftext|>" if is_base else "<|im_end|>")
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(model, contents if name == "qwen3" else [*SPECIAL, *ADDED]))
    (folder / "tokenizer_config.json").write_text(config + ("\n" if name == "qwen3" else ""))
    (folder / "chat_template.jinja").write_text(template)


NOT_BUILT = "the published Qwen tokenizers are not in .cache/tokenizers; run `make tokenizers`"


def real_tokenizer(name: str) -> Path:
    """The folder of one published tokenizer; where it was not built the test is skipped, in CI it fails."""
    if is_complete():
        return REAL / name
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(NOT_BUILT)


def is_complete() -> bool:
    return all((REAL / file).is_file() for file in SHA256)


def build() -> None:
    """Make all four folders; they appear together, when every file is right."""
    temporary = CACHE / f"tokenizers.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        model = byte_level_bpe(read_ranks(download_wheel(temporary / "wheel")))
        for name in REAL_NAMES:
            write_tokenizer(temporary / "made" / name, name, model)
        for file, expected in SHA256.items():
            check_sha256(temporary / "made" / file, expected)
        shutil.rmtree(REAL, ignore_errors=True)
        (temporary / "made").rename(REAL)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    if not is_complete():
        print(f"Building Qwen's tokenizers in {REAL} from {WHEEL} and trl.", flush=True)
        build()
