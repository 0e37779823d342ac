"""Records and blocks: every bad record has a reason, and block borders do not change the records."""

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.chat.formats import Document
from trivium.data.rejects import Reason, Reject
from trivium.data.source.blocks import START, Position, SourceFile, list_files, read_blocks
from trivium.data.source.records import DataRecord, Piece, Reading, read_records
from trivium.errors import BadData, ConfigError

MAX_RECORD_BYTES = 2000
READING = Reading("text", "file", MAX_RECORD_BYTES)

BAD_JSON_RECORDS = [
    (b"nonsense", Reason.NOT_JSON),
    (b"{'text': 'a'}", Reason.NOT_JSON),
    (b'{"text": "a\tb"}', Reason.NOT_JSON),
    (b"\xef\xbb\xbf" + b'{"text": "a mark in the middle"}', Reason.NOT_JSON),
    (b'{"text": "a"', Reason.CUT_OFF),
    (b'{"text": "a', Reason.CUT_OFF),
    (b'{"text": ', Reason.CUT_OFF),
    (b'{"text": "a"}{"text": "b"}', Reason.TWO_VALUES),
    (b'{"text": "a"}, ', Reason.TWO_VALUES),
    (b"[" * 1500 + b"]" * 400, Reason.TOO_DEEP),
    (b'["a"]', Reason.NOT_OBJECT),
    (b'"a"', Reason.NOT_OBJECT),
    (b"17", Reason.NOT_OBJECT),
    (b"null", Reason.NOT_OBJECT),
    (b"{}", Reason.NO_FIELD),
    (b'{"content": "a", "id": 3}', Reason.NO_FIELD),
    (b'{"text": null}', Reason.NULL),
    (b'{"text": 5}', Reason.WRONG_TYPE),
    (b'{"text": true}', Reason.WRONG_TYPE),
    (b'{"text": ["a"]}', Reason.WRONG_TYPE),
    (b'{"text": {"a": "b"}}', Reason.WRONG_TYPE),
    (b'{"text": ""}', Reason.EMPTY),
    (b'{"text": " \\n\\t\\u3000"}', Reason.EMPTY),
    (b'{"text": "\xff"}', Reason.NOT_UTF8),
    (b'{"text": "\xed\xa0\x80"}', Reason.NOT_UTF8),
    (b'{"text": "a\\u0000b"}', Reason.NUL),
    (b'{"text": "a\x00b"}', Reason.NUL),
    (b'{"text": "\\ud800 alone"}', Reason.SURROGATE),
    (b'{"text": "\\udc00\\ud83d"}', Reason.SURROGATE),
    (b'{"text": "' + b"a" * MAX_RECORD_BYTES + b'"}', Reason.TOO_LONG),
]

GOOD_JSON_RECORDS = [
    (b'{"text": "a", "number": ' + b"9" * 1900 + b"}", "a"),
    (b'{"text": "a", "number": 1e999, "other": NaN, "third": -Infinity}', "a"),
    (b'{"text": "first", "text": "last"}', "last"),
    (b'{"text": "\\ud83d\\ude00"}', "\N{GRINNING FACE}"),
    (b'{"text": "windows"}\r', "windows"),
    ('{"text": "caf\u00e9\u2028line"}'.encode(), "caf\u00e9\u2028line"),
]


def text_or_reason(record: DataRecord) -> str:
    return record.content.text if isinstance(record.content, Document) else record.content.reason


def read(path: Path, documents: str = "file", block_bytes: int = 1 << 19, start: Position = START):
    reading = Reading("text", documents, MAX_RECORD_BYTES)
    for block in read_blocks(list_files(path), reading, start, block_bytes):
        for piece in block.pieces:
            for record in read_records([piece], reading):
                yield (record.file, record.line, text_or_reason(record))


@pytest.mark.parametrize(("raw", "reason"), BAD_JSON_RECORDS)
def test_read_records_rejects_bad_records_and_keeps_the_others(raw, reason):
    data = b'{"text": "before"}\n' + raw + b'\n{"text": "after"}\n'
    before, bad, after = read_records([Piece("f", "json", 1, data)], READING)
    assert (before.content.text, after.content.text, after.line) == ("before", "after", 3)
    assert isinstance(bad.content, Reject) and bad.line == bad.content.line
    assert (bad.line, bad.content.reason) == (2, reason)


@pytest.mark.parametrize(("raw", "text"), GOOD_JSON_RECORDS)
def test_read_records_keeps_unusual_but_valid_records(raw, text):
    (record,) = read_records([Piece("f", "json", 1, raw)], READING)
    assert (record.content, record.num_bytes) == (Document(text), len(text.encode()))


def test_missing_field_reject_lists_the_fields():
    (record,) = read_records([Piece("f", "json", 1, b'{"content": "a", "id": 3}')], READING)
    assert record.content.detail == "no 'text'; it has 'content', 'id'"


def test_read_records_with_bom_blank_lines_and_no_last_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}')
    assert list(read(path)) == [("a.jsonl", 1, "a"), ("a.jsonl", 4, "b")]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be"])
def test_read_records_rejects_utf16(tmp_path, codec):
    mark = "" if codec == "utf-16" else "\ufeff"
    (tmp_path / "a.txt").write_bytes((mark + "two\nlines").encode(codec))
    assert {row[2] for row in read(tmp_path, "line")} == {Reason.UTF16}
    assert [row[2] for row in read(tmp_path, "file")] == [Reason.UTF16]


def test_read_records_of_files_paragraphs_and_lines(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\r\none\r\ntwo\r\n \t\r\n\r\n  three\n\n\n")
    (tmp_path / "a.md").write_bytes(b" \n")
    assert list(read(tmp_path)) == [("a.md", 1, Reason.EMPTY), ("b.txt", 1, "\none\ntwo\n \t\n\n  three\n\n\n")]
    assert list(read(tmp_path, "paragraph")) == [("b.txt", 2, "one\ntwo"), ("b.txt", 6, "  three")]
    assert list(read(tmp_path, "line")) == [("b.txt", 2, "one"), ("b.txt", 3, "two"), ("b.txt", 6, "  three")]


BYTES_OF_TEXT = st.text(alphabet="ab \n\r\t\u00e9", max_size=60).map(str.encode)


@settings(max_examples=150)
@given(
    data=BYTES_OF_TEXT,
    documents=st.sampled_from(["line", "paragraph"]),
    block_bytes=st.integers(1, 40),
    long=st.integers(3, 12),
)
def test_read_blocks_gives_the_same_records_for_any_block_size(tmp_path_factory, data, documents, block_bytes, long):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(data)
    reading = Reading("text", documents, long)

    def rows(size: int, start: Position = START):
        for block in read_blocks([SourceFile(path, "a")], reading, start, size):
            yield block.after, [(one.line, text_or_reason(one)) for one in read_records(block.pieces, reading)]

    whole = [row for _, found in rows(1 << 19) for row in found]
    blocks = list(rows(block_bytes))
    assert [row for _, found in blocks for row in found] == whole
    for index, (after, _) in enumerate(blocks):
        rest = [row for _, found in rows(block_bytes, after) for row in found]
        assert rest == [row for _, found in blocks[index + 1 :] for row in found]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.zst", ".parquet"])
def test_read_blocks_gives_the_same_records_from_any_container(tmp_path, suffix):
    texts = [f"document {number} " + "word " * random.Random(number).randrange(60) for number in range(300)]
    path = tmp_path / f"a{suffix}"
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": [1] * 300, "text": texts}), path, row_group_size=70)
    elif suffix.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else lines)
    expected = [(path.name, number + 1, text) for number, text in enumerate(texts)]
    assert list(read(path, block_bytes=1500)) == expected
    reading = Reading("text", "file", MAX_RECORD_BYTES)
    blocks = list(read_blocks(list_files(path), reading, block_bytes=1500))
    middle = len(blocks) // 2
    num_before = sum(len(list(read_records(block.pieces, reading))) for block in blocks[:middle])
    assert list(read(path, block_bytes=700, start=blocks[middle - 1].after)) == expected[num_before:]


def test_read_blocks_of_parquet_bytes_nulls_and_numbers(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([b"good", b"\xff\n", None, "\u00e9".encode()]), "n": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = [row[1:] for row in read(tmp_path)]
    assert found == [(1, "good"), (2, Reason.NOT_UTF8), (3, Reason.NULL), (4, "\u00e9")]
    reading = Reading("n", "file", MAX_RECORD_BYTES)
    blocks = read_blocks(list_files(tmp_path), reading)
    assert {one.content.reason for block in blocks for one in read_records(block.pieces, reading)} == {
        Reason.WRONG_TYPE
    }


def test_list_files_sorts_and_follows_links_once(tmp_path):
    (tmp_path / "b" / "inner").mkdir(parents=True)
    for name in ("b/inner/2.txt", "b/1.txt", "a.txt", "b/.hidden.txt", "b/image.png"):
        (tmp_path / name).write_text(name)
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    os.symlink("1.txt", tmp_path / "b" / "link.txt")
    assert [file.name for file in list_files(tmp_path)] == ["a.txt", "b/1.txt", "b/inner/2.txt", "b/link.txt"]


def test_links_that_lead_out_of_a_data_folder_are_refused(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "diary.txt").write_text("mine")
    for number, (link, target) in enumerate([("diary.txt", "../secret/diary.txt"), ("more", "../secret")]):
        folder = tmp_path / f"set-{number}"
        folder.mkdir()
        (folder / "a.txt").write_text("a")
        (folder / link).symlink_to(target)
        with pytest.raises(BadData, match=rf"{folder / link}: is a link to {tmp_path / 'secret'}.*, outside of"):
            list_files(folder)
    (tmp_path / "given.txt").symlink_to("secret/diary.txt")
    (tmp_path / "given").symlink_to("secret")
    assert [file.name for file in list_files(tmp_path / "given.txt")] == ["given.txt"]
    assert [file.name for file in list_files(tmp_path / "given")] == ["diary.txt"]


def test_links_of_the_hub_cache_are_followed(tmp_path):
    """As huggingface_hub lays out a downloaded data set, and not to the blobs of another one."""
    for name in ("mine", "other"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "0af3").write_text("text")
    snapshot = tmp_path / "mine" / "snapshots" / "4f2c"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "a.txt").symlink_to("../../../blobs/0af3")
    assert [file.name for file in list_files(snapshot)] == ["data/a.txt"]
    assert [file.name for file in list_files(snapshot / "data")] == ["a.txt"]
    (snapshot / "b.txt").symlink_to("../../../other/blobs/0af3")
    with pytest.raises(BadData, match="outside of"):
        list_files(snapshot)


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def refusal(path: Path) -> str:
    with pytest.raises((BadData, ConfigError)) as caught:
        list(read(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_unreadable_sources_are_errors(tmp_path):
    assert "no such file" in refusal(tmp_path / "nowhere")
    assert "no supported files" in refusal(tmp_path)
    for name, content, expected in [
        ("a.docx", b"x", "file type .docx is not supported"),
        ("a.gz", b"x", "file type .gz is not supported"),
        ("plain.jsonl.gz", b'{"text": "a"}\n', "Not a gzipped file"),
        ("cut.jsonl.gz", gzip.compress(os.urandom(5000))[:3000], "EOFError"),
        ("bent.txt.gz", gzip.compress(b"a" * 500)[:-8] + b"12345678", "cannot be read to the end"),
        ("plain.txt.zst", b"not zstd at all", "cannot be read to the end"),
        ("cut.txt.zst", zstd(os.urandom(1500))[:-200], "cannot be read to the end"),
        ("cut-list.json", b'[{"text": "a"}, {"text": "b', "cut off or invalid after entry 1"),
        ("no-list.json", b'[{"text": "a"} {"text": "b"}]', "after entry 1"),
        ("a.parquet", b"PAR1 and no more", "not a valid Parquet"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert expected in refusal(tmp_path / name)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "b.parquet")
    assert "no column 'text'. Set `field` to one of body" in refusal(tmp_path / "b.parquet")


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.floats(allow_nan=False))),
    st.sampled_from([None, 1]),
    st.integers(1, 60),
    st.integers(0, 20),
)
def test_json_list_gives_its_entries_from_any_position(tmp_path_factory, entries, indent, block_bytes, begin):
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(entries, indent=indent), encoding="utf-8")
    start = Position(0, min(begin, len(entries)), min(begin, len(entries)) + 1)
    blocks = read_blocks([SourceFile(path, "a")], Reading("text", "file", MAX_RECORD_BYTES), start, block_bytes)
    pieces = [piece for block in blocks for piece in block.pieces]
    found = [json.loads(line) for piece in pieces for line in piece.data.splitlines()]
    assert found == entries[begin:]
    assert [piece.first_line for piece in pieces[:1]] == ([begin + 1] if found else [])
