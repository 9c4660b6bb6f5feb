"""The files of a folder are assigned to splits by their names."""

import pytest

from distill_pl.data.sources import split_files_by_name

LAYOUTS = {
    "named": {"train": ["train-00000.jsonl", "train-00001.jsonl"], "validation": ["validation.jsonl"]},
    "folders": {"train": ["train/a.jsonl"], "validation": ["dev/a.jsonl"]},
    "unnamed": {"train": ["part-0.jsonl", "part-1.jsonl"]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_files_by_name(layout, tmp_path):
    by_split = {split: [tmp_path / name for name in names] for split, names in LAYOUTS[layout].items()}
    files = sum(by_split.values(), [])
    for file in [*files, tmp_path / "LICENSE.md"]:
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"text": "a"}\n')
    assert split_files_by_name(tmp_path, files) == {split: list(map(str, names)) for split, names in by_split.items()}
