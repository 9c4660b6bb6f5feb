"""Rows of local files are read from any position on, and one that holds no text is named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_pl.data.files import FileStream
from distill_pl.errors import InputError

TEXTS = [f"text {i} \u00e9" for i in range(9)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
BAD_LINES = {
    "surrogate": (b'{"text": "half \\ud800 a pair"}\n', "ValueError: it is not valid UTF-8 text"),
    "cut": (b'{"text": "cut sho', "JSONDecodeError"),
    "latin1": ('{"text": "caf\u00e9"}\n'.encode("latin-1"), "UnicodeDecodeError"),
    "no object": (b'"text"\n', "it is str, not an object"),
}


def stream(folder, kind="json") -> FileStream:
    return FileStream(sorted(folder.iterdir()), kind, "text", str(folder), folder)


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
    with pytest.raises(InputError, match=f"line 10 of shard-1.jsonl cannot be read .*{problem}") as caught:
        list(rows)
    assert "\n" not in str(caught.value)


def test_a_broken_row_of_parquet_is_named(tmp_path):
    texts = pa.array([b"good", b"caf\xe9", None]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 2 of a.parquet cannot be read .*UnicodeDecodeError"):
        list(stream(tmp_path, "parquet"))


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(InputError, match="the text of a.txt cannot be read .*not valid UTF-8"):
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
