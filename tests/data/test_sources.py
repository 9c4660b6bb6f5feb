"""The files of a folder are assigned to splits by their names; none is left out without a word."""

import os
from pathlib import Path

import pytest

from distill_pl.data.sources import TextSource, split_files_by_name
from distill_pl.errors import InputError

LAYOUTS = {
    "named": {"train": ["train-00000.jsonl", "train-00001.jsonl"], "validation": ["validation.jsonl"]},
    "folders": {"train": ["train/a.jsonl"], "validation": ["dev/a.jsonl"], "test": ["test/train.jsonl"]},
    "unnamed": {"train": ["part-0.jsonl", "part-1.jsonl"]},
    "unnamed train": {"train": ["validated.jsonl", "wiki.jsonl"], "validation": ["my_val.jsonl"]},
    "some unnamed": {"train": ["x/train.jsonl"], "": ["wiki.jsonl"], "test": ["eval 1.jsonl"]},
    "capitals": {"train": ["Train.jsonl"], "validation": ["VAL-1.jsonl"], "test": ["Wiki.Test.jsonl"]},
    "two names": {"train": ["data-test/training-a/dev.jsonl"], "validation": ["train.val.jsonl"]},
}


def write(folder: Path, names: list[str], text: str = '{"text": "a"}\n') -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_files_by_name(layout):
    by_split = {split: [Path("/root", name) for name in names] for split, names in LAYOUTS[layout].items()}
    assert split_files_by_name(Path("/root"), sum(by_split.values(), [])) == by_split


def read(dataset) -> tuple[list[str], str]:
    """Return the names of the files that a folder or glob is read from, and what is said of the others."""
    source = TextSource(str(dataset))
    streams, _ = source.open(["train", "validation"])
    return sorted(file.name for stream in streams.values() for file in stream.files), source.describe()[1]


def test_every_file_is_read_or_named(tmp_path):
    data = tmp_path / "data"
    write(
        data, ["a.jsonl", "b[1].jsonl", "__c/c.jsonl", "validation.jsonl", "test.jsonl", ".d/d.jsonl", ".DS_Store", "README.md"]
    )
    write(tmp_path, ["elsewhere/e.jsonl"])
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "linked" / "back").symlink_to(data)  # a loop
    (data / "gone.jsonl").symlink_to(tmp_path / "nothing")
    names, left_out = read(data)
    assert names == ["a.jsonl", "b[1].jsonl", "c.jsonl", "e.jsonl", "validation.jsonl"]
    assert left_out == ("test.jsonl (the test split), .d/d.jsonl (hidden), gone.jsonl (a link to nothing), README.md (no data)")
    assert read(data / "*.jsonl")[0] == ["a.jsonl", "b[1].jsonl", "test.jsonl", "validation.jsonl"]
    assert read(data / "[a_]*") == (["a.jsonl"], "__c (a folder, which ** would enter)")
    assert read(data / "**" / "[ace]*.jsonl") == (["a.jsonl", "c.jsonl", "e.jsonl"], "")


def test_a_file_and_links_to_it_are_read_once(tmp_path):
    write(tmp_path, ["data/part1.jsonl", "elsewhere/part2.jsonl"])
    links = {"latest.jsonl": "data/part1.jsonl", "x.jsonl": "elsewhere/part2.jsonl", "y.jsonl": "data/x.jsonl"}
    for name, target in links.items():
        (tmp_path / "data" / name).symlink_to(tmp_path / target)
    names = "part1.jsonl, y.jsonl (another name of a file that is read)"
    assert read(tmp_path / "data") == (["latest.jsonl", "x.jsonl"], names)


def test_the_names_of_many_files_are_not_all_listed(tmp_path):
    write(tmp_path, ["a.jsonl", *(f"{i}.md" for i in range(9))])
    assert read(tmp_path)[1] == "0.md, 1.md, 2.md and 6 more (no data)"


@pytest.mark.parametrize("large, small", [
    ("wiki.jsonl", "train.jsonl"), ("big.csv", "small.jsonl"), ("a.tsv.gz", "a.json.gz"), ("B.CSV", "a.txt"),
])  # fmt: skip
def test_most_of_a_folder_is_not_left_out(large, small, tmp_path):
    write(tmp_path, [large], 9 * '{"text": "a"}\n')
    write(tmp_path, [small])
    with pytest.raises(InputError, match=rf"most of it would be left out \({large}\), and only {small} read.* glob"):
        read(tmp_path)
    write(tmp_path, [small], 10 * '{"text": "a"}\n')
    assert read(tmp_path)[0] == [small] and large in read(tmp_path)[1]


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=f"data.dataset '{tmp_path}' cannot be read .*Permission denied.*: permit it"):
        read(tmp_path)


def rows_of_a_hub(error=None, rows=()):
    yield from rows
    if error:
        raise error


@pytest.mark.parametrize(
    "error, remedy",
    [(ConnectionError("reset"), "run the same command again, it continues"), (ValueError("JSON parse error"), "download it")],
)
def test_the_same_command_is_promised_to_continue_only_where_it_may(error, remedy):
    with pytest.raises(InputError, match=f"'org/set' cannot be read .*{error}.*: {remedy}"):
        list(TextSource("org/set").texts(rows_of_a_hub(error)))


def test_bad_rows_of_a_hub_dataset():
    rows = [{"text": "a"}, {"text": None}, {"text": 3}]
    with pytest.raises(InputError, match="data.text_column 'text' of 'org/set' holds int: .*data.skip_bad_rows true"):
        list(TextSource("org/set").texts(rows_of_a_hub(rows=rows)))
    assert list(TextSource("org/set", skip_bad_rows=True).texts(rows_of_a_hub(rows=rows))) == ["a", "", None]
    with pytest.raises(InputError, match="'text' of 'org/set' is none of body: name a column of text$"):
        list(TextSource("org/set", skip_bad_rows=True).texts(rows_of_a_hub(rows=[{"body": "a"}])))
