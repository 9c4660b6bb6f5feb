"""Read the documents of local parquet, json, jsonl and txt files row by row, starting at an exact position.

Only the text column is read, so files may differ in all other columns. The library `datasets` would read every column of every
file, cast it to the types of the first file and refuse files that differ, with errors that name neither file nor row.
"""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, TextIO, cast

from distill_pl.errors import InputError, one_line

HEAD_ROWS = 100  # rows of each file in which `check` looks for the text column
DOCUMENT_CHARACTERS = 2**14  # least length of a txt file's document that a blank line ends
DOCUMENT_END = "<|endoftext|>"  # a line that ends a document of a txt file and belongs to none
OR_SKIP = "or skip all such rows by data.skip_bad_rows true"
BOM = b"\xef\xbb\xbf"  # that some programs write at the beginning of a file
BATCH_ROWS = 1024  # rows of parquet decoded at a time


class FileStream:
    """The documents of files of one kind, in order, with the position of the next one.

    Args:
        files: the files, in the order in which they are read.
        kind: "parquet", "json" (also JSON lines) or "text" (cut into documents by `_documents`).
        text_column: the column that holds the documents.
        dataset: how the user named the dataset, for messages.
        root: the folder that file names in messages are relative to.
        skip_bad_rows: skip rows that hold no readable text instead of refusing them.
    """

    def __init__(self, files: list[Path], kind: str, text_column: str, dataset: str, root: Path, skip_bad_rows: bool = False):
        self.files, self.kind, self.text_column, self.dataset, self.root = files, kind, text_column, dataset, root
        self.skip_bad_rows = skip_bad_rows
        self._position = {"file": 0, "row": 0}

    def state_dict(self) -> dict[str, int]:
        """Return the position after the row that was yielded last: a file's index and the number of its rows that were read."""
        return dict(self._position)

    def load_state_dict(self, position: dict[str, int]) -> None:
        """Continue at a position that `state_dict` returned."""
        self._position = dict(position)

    def check(self) -> None:
        """Read the head of every file. Raises InputError if one cannot be opened or lacks the text column."""
        for file in self.files:
            head = [value for _, value in islice(self._rows(file, 0), HEAD_ROWS)]
            if head and all(isinstance(value, _Missing) for value in head):
                columns = f"{self._name(file)} is none of {', '.join(head[0].columns)}"
                raise InputError(
                    f"data.text_column {self.text_column!r} of {self.dataset!r} in {columns}: name a column of text"
                )

    def __iter__(self) -> Iterator[str | None]:
        """Yield the document of each row: "" for null, and None for a bad row that is skipped.

        Raises:
            InputError: a row that is not text, named by file and row, unless such rows are skipped; or a damaged file.
        """
        while self._position["file"] < len(self.files):
            file = self.files[self._position["file"]]
            for label, value in self._rows(file, self._position["row"]):
                self._position["row"] += 1
                if isinstance(value, _Missing):
                    value = None
                if isinstance(value, str) and not is_unicode(value):
                    value = ValueError("it is not valid UTF-8 text")
                if isinstance(value, str | None):
                    yield value or ""
                elif self.skip_bad_rows:
                    yield None
                else:
                    self._refuse(f"{label} of {self._name(file)}", value)
            self._position = {**self._position, "file": self._position["file"] + 1, "row": 0}

    def _refuse(self, where: str, value: Any) -> None:
        """Raise InputError for the row at `where`, whose value is not text or is the error of reading it."""
        if isinstance(value, Exception):
            problem = f"{where} cannot be read ({one_line(value)})"
            raise InputError(f"data.dataset {self.dataset!r}: {problem}: mend or remove that row, {OR_SKIP}")
        raise InputError(
            f"data.text_column {self.text_column!r} of {self.dataset!r} holds {type(value).__name__} in {where}: name a column "
            f"of text, {OR_SKIP}"
        )

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def _rows(self, file: Path, first: int) -> Iterator[tuple[str, Any]]:
        """Yield for each row from `first` on a label such as `line 3` and its value, or the error of reading it."""
        read = {"parquet": _parquet_rows, "json": _json_rows, "text": _text_rows}[self.kind]
        done = first
        try:
            with open_decompressed(file) as handle:
                for row in read(handle, self.text_column, first):
                    done += 1
                    yield row
        except InputError:
            raise
        except Exception as error:
            what = f"{self._name(file)}: {one_line(error)}"
            if done:
                raise InputError(
                    f"data.dataset {self.dataset!r} cannot be read after row {done} ({what}): replace that file"
                ) from error
            raise InputError(
                f"data.dataset {self.dataset!r} cannot be opened ({what}): replace that file or permit reading it"
            ) from error


class _Missing:
    """The value of a row without the text column; it counts as null."""

    def __init__(self, columns: list[str]):
        self.columns = columns


def open_decompressed(file: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressing gzip, bzip2, xz and zstandard, which its first bytes identify."""
    with open(file, "rb") as plain:
        head = plain.read(10)
    if head[:2] == b"\x1f\x8b":
        return cast("IO[bytes]", gzip.open(file, "rb"))
    if head[:3] == b"BZh" and head[4:] == b"1AY&SY":
        return bz2.open(file, "rb")
    if head[:6] == b"\xfd7zXZ\0":
        return lzma.open(file, "rb")
    of_pzstd = b"\x50" <= head[:1] < b"\x60" and head[1:4] == b"\x2a\x4d\x18"
    if of_pzstd or head[:4] == b"\x28\xb5\x2f\xfd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))  # type: ignore[arg-type]
    return open(file, "rb")


def is_unicode(text: str) -> bool:
    """Return whether a tokenizer can encode a text: it cannot if the text contains half a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(handle: IO[bytes], column: str, first: int) -> Iterator[tuple[str, Any]]:
    """Yield label and value of each row from `first` on, reading only the row groups that contain them."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(handle) as file:
        missing = None if column in file.schema_arrow.names else _Missing(file.schema_arrow.names)
        row = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row + count <= first:
                row += count
            elif missing:
                yield from ((f"row {number + 1}", missing) for number in range(max(row, first), row + count))
                row += count
            else:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                    for value in _values(batch.column(0)):
                        row += 1
                        if row > first:
                            yield f"row {row}", value


def _values(array) -> list:
    """Convert an Arrow array to Python values; a value that fails becomes its error."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_attempt(scalar.as_py) for scalar in array]


def _json_rows(handle: IO[bytes], column: str, first: int) -> Iterator[tuple[str, Any]]:
    """Yield label and value of each row from `first` on: of JSON lines, an array, or one object over several lines."""
    lines = ((number, line) for number, line in enumerate(handle, 1) if line.removeprefix(BOM).strip())
    number, line = next(lines, (0, b""))
    line = line.removeprefix(BOM)
    if not line:
        return
    if line.lstrip().startswith(b"[") or (line.strip() == b"{" and isinstance(_attempt(json.loads, line), Exception)):
        whole = json.loads(line + handle.read())
        for row, value in enumerate(whole if isinstance(whole, list) else [whole]):
            if row >= first:
                yield f"item {row + 1}", value if isinstance(value, str) else _cell(value, column)
        return
    row = 0
    while line:
        if row >= first:
            value = _attempt(json.loads, line)
            yield f"line {number}", value if isinstance(value, Exception) else _cell(value, column)
        row += 1
        number, line = next(lines, (0, b""))


def _cell(row: Any, column: str) -> Any:
    """Return a JSON row's value in the column, _Missing if it has none, or an error if the row is no object."""
    if not isinstance(row, dict):
        return ValueError(f"it is {type(row).__name__}, not an object with a key {column!r}")
    return row[column] if column in row else _Missing(list(row))


def _text_rows(handle: IO[bytes], column: str, first: int) -> Iterator[tuple[str, Any]]:
    """Yield label and text of each document of a txt file from number `first` on, without blank ones."""
    # surrogateescape: bytes that are not UTF-8 become half surrogate pairs, and the error then names the row
    lines = io.TextIOWrapper(handle, "utf-8-sig", "surrogateescape")
    documents = ((line, text) for line, text in _documents(lines) if text.strip())
    for line, text in islice(documents, first, None):
        yield f"the text from line {line} on", text


def _documents(lines: TextIO) -> Iterator[tuple[int, str]]:
    """Cut a text into documents and yield each with the number of its first line.

    Part of a corpus in one file can then be held out, and the file is never in memory as a whole. A line DOCUMENT_END ends a
    document, as does the first blank line after DOCUMENT_CHARACTERS or, if there is none, the end of a line, or of
    DOCUMENT_CHARACTERS of a longer line, after twice as many.
    """
    begin, number, parts, size = 1, 1, list[str](), 0
    for line in iter(partial(lines.readline, DOCUMENT_CHARACTERS), ""):
        number += line.endswith("\n")
        marked = line.strip() == DOCUMENT_END
        if not marked:
            parts.append(line)
            size += len(line)
        if marked or size >= (2 if line.strip() else 1) * DOCUMENT_CHARACTERS:
            yield begin, "".join(parts)
            begin, parts, size = number, [], 0
    yield begin, "".join(parts)


def _attempt(function, *arguments) -> Any:
    """Call a function and return its result or the error that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return error
