"""Find the files or hub repository of a dataset of text and read its documents in order."""

import glob
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from distill_pl.data.files import FileStream
from distill_pl.errors import InputError, one_line

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".txt": "text"}
COMPRESSED = {".gz", ".zst", ".xz", ".bz2"}
NOT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class TextSource:
    """A dataset whose rows hold documents.

    Args:
        dataset: a Hugging Face hub id; or a local parquet, json, jsonl or txt file (a txt file is one document), a folder
            of such files (their names assign them to splits, as in `datasets`) or a glob (every file is in the train
            split). Files may be compressed: .gz, .bz2, .xz, or .zst where the `zstandard` package is installed.
        name: configuration of a hub dataset, such as `sample-10BT`; ignored for local files.
        revision: branch, tag or commit of a hub dataset, None for `main`; ignored for local files.
        text_column: the column that holds the documents.
    """

    def __init__(self, dataset: str, name: str | None = None, revision: str | None = None, text_column: str = "text"):
        self.dataset, self.name, self.revision, self.text_column = dataset, name, revision, text_column
        self._path = os.path.abspath(os.path.expanduser(dataset))

    def identity(self) -> tuple[str, dict]:
        """Return a readable name, and what distinguishes this dataset and version from every other, as JSON types.

        Local files are identified by relative name, size and modification time: a moved folder is the same dataset.
        """
        if not self.is_local:
            hub = {"dataset": self.dataset, "name": self.name, "revision": self.revision or "main"}
            return f"{self.dataset}-{self.name or ''}", hub
        stats = [(file.relative_to(self._root).as_posix(), file.stat()) for file in self._files]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        readable = self._files[0].name if len(self._files) == 1 else self._root.name
        return readable, {"files": files, "splits by name": self._is_folder}

    def open(self, splits: Iterable[str], commit: str | None = None) -> tuple[dict, str | None]:
        """Open those of `splits` that the dataset has, as streams with a position.

        Returns the streams by split, and the commit that they read (None for local files). Given to the next call, this
        commit makes it read the same text though the hub's branch has moved.

        Raises:
            InputError: no such dataset, files of no or of several supported kinds, empty files, or no train split.
        """
        streams: dict
        if self.is_local:
            by_split = self._files_by_split()
            kind = str(_kind(self._files[0]))
            streams = {
                split: FileStream([Path(file) for file in files], kind, self.text_column, self.dataset, self._root)
                for split, files in by_split.items()
            }
        else:
            streams, commit = self._open_hub(commit)
        if "train" not in streams:
            raise InputError(f"data.dataset {self.dataset!r} has no train split, only {', '.join(streams)}")
        streams = {split: streams[split] for split in splits if split in streams}
        for stream in streams.values():
            if isinstance(stream, FileStream):
                stream.check()
        return streams, commit

    def _files_by_split(self) -> dict[str, list[str]]:
        if self._is_folder:
            return split_files_by_name(self._root, self._files)
        return {"train": list(map(str, self._files))}

    def _open_hub(self, commit: str | None) -> tuple[dict, str]:
        """Open a dataset on the hub at a commit, by default its newest. Returns the streams by split and the commit."""
        import datasets  # imported here because neither local files nor a finished cache need these seconds of imports
        import huggingface_hub

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the errors that it raises
        huggingface_hub.logging.set_verbosity_error()
        try:
            commit = commit or huggingface_hub.HfApi().dataset_info(self.dataset, revision=self.revision).sha
            return datasets.load_dataset(self.dataset, self.name, revision=commit, streaming=True), str(commit)
        except Exception as error:
            raise InputError(
                f"data.dataset {self.dataset!r} cannot be opened on the hub with data.name {self.name!r}, data.revision "
                f"{self.revision!r}: it does not exist or the hub cannot be reached; a local file or folder will do as well "
                f"({one_line(error)})"
            ) from error

    def texts(self, stream) -> Iterator[str]:
        """Yield the document of each row of a stream, "" for null.

        Raises:
            InputError: the text column is missing or holds no text, or a row cannot be read.
        """
        column = self.text_column
        if isinstance(stream, FileStream):
            yield from stream
            return
        try:
            for row in stream:
                if not isinstance(text := row.get(column, 0), str | None):
                    problem = f"holds {type(text).__name__}" if column in row else f"is none of {', '.join(row)}"
                    raise InputError(f"data.text_column {column!r} of {self.dataset!r} {problem}: name a column of text")
                yield text or ""
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"data.dataset {self.dataset!r} cannot be read ({one_line(error)}): run the same command again, it continues "
                "from what is done"
            ) from error

    @property
    def is_local(self) -> bool:
        """Return whether the dataset is files on this machine and not on the hub."""
        return bool(self._files)

    @property
    def _is_folder(self) -> bool:
        return os.path.isdir(self._path)

    @property
    def _root(self) -> Path:
        """Return the folder that the names of local files are relative to."""
        return Path(self._path if self._is_folder else os.path.commonpath([file.parent for file in self._files]))

    @cached_property
    def _files(self) -> list[Path]:
        """List the local data files, sorted and all of one kind; empty for a dataset on the hub."""
        looks_local = self.dataset.startswith((".", "/", "~")) or glob.has_magic(self.dataset) or _kind(self._path)
        if not os.path.exists(self._path) and not looks_local:
            return []
        pattern = os.path.join(glob.escape(self._path), "**") if self._is_folder else self._path
        paths = [self._path] if os.path.isfile(self._path) else glob.glob(pattern, recursive=True)
        files = sorted(Path(path) for path in paths if os.path.isfile(path))
        if not files:
            raise InputError(
                f"data.dataset {self.dataset!r}: no such file or folder, or nothing in it; give a file, folder or glob "
                "of parquet, jsonl, json or txt, or the id of a dataset on the Hugging Face hub"
            )
        kinds = {kind for file in files if (kind := _kind(file))}
        if not kinds:
            suffixes = ", ".join(sorted({file.suffix or file.name for file in files}))
            raise InputError(f"data.dataset {self.dataset!r} must be parquet, jsonl, json or txt, and holds {suffixes}")
        if len(kinds) > 1:
            mix = " and ".join(sorted(kinds))
            raise InputError(f"data.dataset {self.dataset!r} mixes {mix} files: choose one kind, as in '*.txt'")
        data_files = [file for file in files if _kind(file)]
        if not any(file.stat().st_size for file in data_files):
            raise InputError(f"data.dataset {self.dataset!r} is empty: every file in it has 0 bytes")
        return data_files


def split_files_by_name(root: Path, files: list[Path]) -> dict[str, list[str]]:
    """Return those of `files`, all below `root`, that belong to each split by the naming rules of `datasets`.

    `load_dataset(root)` applies the same rules, but takes LICENSE.md for data. They have no public interface: this function
    alone depends on the internals of `datasets.data_files`.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    matches = DataFilesDict.from_patterns(get_data_patterns(str(root)), base_path=str(root))
    by_split = {str(split): sorted(set(map(str, files)) & set(names)) for split, names in matches.items()}
    return {split: names for split, names in by_split.items() if names}


def _kind(file: str | Path) -> str | None:
    """Return the `datasets` builder that reads a file, None for a file without rows such as README.md or config.json."""
    file = Path(file)
    suffix = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
    return None if file.name in NOT_DATA else KINDS.get(suffix)
