"""Rows of local files are read from any position on, and one that holds no text is named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_pl.data import files
from distill_pl.data.files import FileStream
from distill_pl.errors import InputError

TEXTS = [f"text {i} \u00e9" for i in range(9)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
BAD_LINES = {
    "surrogate": (b'{"text": "half \\ud800 a pair"}\n', "ValueError: it is not valid UTF-8 text"),
    "cut": (b'{"text": "cut sho', "JSONDecodeError"),
    "latin1": ('{"text": "caf\u00e9"}\n'.encode("latin-1"), "UnicodeDecodeError"),
    "no object": (b'"text"\n', "it is str, not an object"),
    "no text": (b'{"text": 3}\n', "holds int in line 10 of shard-1.jsonl"),
}


def stream(folder, kind="json", **options) -> FileStream:
    return FileStream(sorted(folder.iterdir()), kind, "text", str(folder), folder, **options)


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        "\ufeff" + LINES.replace("\n", "\r\n\r\n"),
        json.dumps([{"text": text} for text in TEXTS], indent=1),
        json.dumps(TEXTS),
    ],
    ids=["lines", "BOM and blank lines", "array of objects", "array of strings"],
)
def test_every_form_of_json_from_every_position(content, tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_bytes(content.encode())
    whole, positions = stream(tmp_path), []
    texts = [(positions.append(whole.state_dict()), text)[1] for text in whole]
    assert texts == TEXTS * 2
    for done, position in enumerate(positions, 1):
        continued = stream(tmp_path)
        continued.load_state_dict(position)
        assert list(continued) == texts[done:]


@pytest.mark.parametrize("head", [b"", b"\x50\x2a\x4d\x18\x04\0\0\0size"], ids=["zstd", "pzstd, a skippable frame first"])
def test_zstandard_is_read_whole_or_named(tmp_path, head):
    file = tmp_path / "a.jsonl.zst"
    whole = head + pa.compress(LINES.encode(), codec="zstd", asbytes=True)
    file.write_bytes(whole)
    assert list(stream(tmp_path)) == TEXTS
    file.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="cannot be (opened|read after row .*) .*a.jsonl.zst: "):
        list(stream(tmp_path))


def test_a_bom_before_a_blank_line_is_no_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(files.BOM + b"\n" + LINES.encode())
    assert list(stream(tmp_path)) == TEXTS


def test_one_object_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "alone", "id": 1}, indent=2))
    assert list(stream(tmp_path)) == ["alone"]


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_broken_row_is_named(name, tmp_path):
    row, problem = BAD_LINES[name]
    for i in range(3):
        (tmp_path / f"shard-{i}.jsonl").write_bytes(LINES.encode() + (row if i == 1 else b""))
    rows = stream(tmp_path)
    rows.check()  # looks at every file's head, which may hold a broken row
    with pytest.raises(InputError, match=f"{problem}.*skip all such rows by data.skip_bad_rows true") as caught:
        list(rows)
    assert "\n" not in str(caught.value)
    assert list(stream(tmp_path, skip_bad_rows=True)) == [*TEXTS, *TEXTS, None, *TEXTS]


def test_a_broken_row_of_parquet_is_named(tmp_path):
    texts = pa.array([b"good", b"caf\xe9", None]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 2 of a.parquet cannot be read .*UnicodeDecodeError"):
        list(stream(tmp_path, "parquet"))
    assert list(stream(tmp_path, "parquet", skip_bad_rows=True)) == ["good", None, ""]


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(InputError, match="the text from line 1 on of a.txt cannot be read .*not valid UTF-8"):
        list(stream(tmp_path, "text"))


CUTS = {
    "blank lines": ["six\n\nwords\n\n", "and\n\nmore\n\n", "end\n"],
    "no blank lines": ["one\ntwo\nthree\nfour\n5\n", "six\nseven\neight\nnine\n", "ten"],
    "no line ends": ["0123456789" * 2, "abcdefghij" * 2, "end"],
    "one document": ["short\n\n"],
    "lines end as in Windows": ["six\r\n\r\nwords\r\n\r\n", "end\r\n"],
}


@pytest.mark.parametrize("name", CUTS)
def test_a_long_txt_is_cut_into_documents(name, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DOCUMENT_CHARACTERS", 10)
    for file in ("a.txt", "b.txt"):
        (tmp_path / file).write_bytes(("\ufeff" + "".join(CUTS[name])).encode())
    whole, positions = stream(tmp_path, "text"), []
    texts = [(positions.append(whole.state_dict()), text)[1] for text in whole]
    assert texts == [document.replace("\r\n", "\n") for document in CUTS[name]] * 2
    for done, position in enumerate(positions, 1):
        continued = stream(tmp_path, "text")
        continued.load_state_dict(position)
        assert list(continued) == texts[done:]


def test_marked_ends_of_a_txts_documents(tmp_path):
    text = "<|endoftext|>\none\n<|endoftext|>\n\n<|endoftext|> \ntwo <|endoftext|> words\n\n<|endoftext|>\n"
    (tmp_path / "a.txt").write_text(text + "caf\udce9", errors="surrogateescape")
    rows = stream(tmp_path, "text", skip_bad_rows=True)
    assert list(rows) == ["one\n", "two <|endoftext|> words\n\n", None]
    with pytest.raises(InputError, match="the text from line 9 on of a.txt cannot be read"):
        list(stream(tmp_path, "text"))


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_file_without_the_text_column_is_named_before_work_begins(kind, tmp_path):
    for name, column in (("a", "text"), ("b", "body")):
        if kind == "json":
            (tmp_path / f"{name}.jsonl").write_text(json.dumps({column: "x", "id": 1}) + "\n")
        else:
            pq.write_table(pa.table({column: ["x"], "id": [1]}), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=r"data.text_column 'text' .* b\.\w+ is none of body, id: name a column"):
        stream(tmp_path, kind).check()
