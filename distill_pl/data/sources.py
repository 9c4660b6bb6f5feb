"""Find the files or hub repository of a dataset of text and read its documents in order."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from distill_pl.data.files import OR_SKIP, FileStream
from distill_pl.errors import InputError, one_line

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".txt": "text"}
COMPRESSED = {".gz", ".zst", ".xz", ".bz2"}
UNREADABLE = {".csv", ".tsv", ".arrow", ".zip", ".tar", ".tgz"}  # may hold text, but this package does not read them
NOT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# words in the name of a folder or file that assign its rows to a split
SPLIT_WORDS = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["validation", "valid", "val", "dev"], "validation"),
    **dict.fromkeys(["test", "testing", "eval", "evaluation"], "test"),
}
SPLIT_WORD = re.compile(rf"(?:.*[-._ 0-9])?({'|'.join(SPLIT_WORDS)})(?:[-._ 0-9].*)?", re.IGNORECASE)  # the last one in a name
SPLITS = ("train", "validation")  # splits that are read
SHOWN = 3  # file names in a message, at most


class TextSource:
    """A dataset whose rows hold documents.

    Args:
        dataset: a Hugging Face hub id; or a local parquet, json, jsonl or txt file (a long txt file is cut into documents), a
            folder of such files (their names assign them to splits: `split_files_by_name`) or a glob (every file is in the
            train split). Files may be compressed: .gz, .bz2, .xz or .zst.
        name: configuration of a hub dataset, such as `sample-10BT`; ignored for local files.
        revision: branch, tag or commit of a hub dataset, None for `main`; ignored for local files.
        text_column: the column that holds the documents.
        skip_bad_rows: skip rows that hold no readable text instead of refusing them.
    """

    def __init__(self, dataset: str, name: str | None = None, revision: str | None = None, text_column: str = "text",
                 skip_bad_rows: bool = False):  # fmt: skip
        self.dataset, self.name, self.revision, self.text_column = str(dataset), name, revision, text_column
        self.skip_bad_rows = skip_bad_rows
        self._path = os.path.abspath(os.path.expanduser(self.dataset))

    @property
    def is_local(self) -> bool:
        """Return whether the dataset is files on this machine and not on the hub.

        Raises InputError for a path without data files, or with files of several kinds.
        """
        return bool(self._files)

    def identity(self) -> tuple[str, dict]:
        """Return a readable name, and a dict of JSON types that differs for every other dataset or version.

        Local files are identified by relative name, size and modification time: a moved folder is the same dataset.
        """
        skip = {"skip_bad_rows": True} if self.skip_bad_rows else {}
        if not self.is_local:
            hub = {"dataset": self.dataset, "name": self.name, "revision": self.revision or "main"}
            return f"{self.dataset}-{self.name or ''}", hub | skip
        stats = [(file.relative_to(self._root).as_posix(), file.stat()) for file in self._files]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        readable = self._files[0].name if len(self._files) == 1 else self._root.name
        return readable, {"files": files, "splits by name": self._is_folder, **skip}

    def open(self, splits: Iterable[str], commit: str | None = None) -> tuple[dict, str | None]:
        """Open those of `splits` that the dataset has, as streams with a position.

        Returns the streams by split, and the commit that they read (None for local files). A later call with this commit reads
        the same text even if the hub's branch has moved.

        Raises:
            InputError: no such dataset, files of no or of several supported kinds, empty files, no train split, or a folder
                of which less would be read than left out.
        """
        streams: dict
        if self.is_local:
            try:
                self._check_left_out()
            except OSError as error:
                problem = f"cannot be read ({one_line(error)}): put that file back"
                raise InputError(f"data.dataset {self.dataset!r} {problem}") from error
            kind = str(_kind(self._files[0]))
            streams = {
                split: FileStream(files, kind, self.text_column, self.dataset, self._root, self.skip_bad_rows)
                for split, files in self._by_split.items()
                if split
            }
        else:
            streams, commit = self._open_hub(commit)
        if "train" not in streams:
            raise InputError(
                f"data.dataset {self.dataset!r} has no train split, only {', '.join(streams)}: name a file or folder train"
            )
        streams = {split: streams[split] for split in splits if split in streams}
        for stream in streams.values():
            if isinstance(stream, FileStream):
                stream.check()
        return streams, commit

    def describe(self) -> tuple[str, str]:
        """Describe in words what is read, such as `3 files`, and which local files are left out and why ("" for none)."""
        if not self.is_local:
            return "the hub's dataset", ""
        read = [*self._by_split["train"], *self._by_split.get("validation", [])]
        return counted(len(read), "file"), ", ".join(
            f"{self._names(paths)} ({why})" for why, paths in self._left_out.items() if paths
        )

    def _check_left_out(self) -> None:
        """Raise InputError if the files left out that may be meant as data are larger, together, than those that are read."""
        files = self._by_split
        lost = [*files.get("", []), *(file for file in self._left_out["no data"] if _suffix(file) in UNREADABLE)]
        read = [file for split in SPLITS for file in files.get(split, [])]
        if read and sum(file.stat().st_size for file in lost) > sum(file.stat().st_size for file in read):
            raise InputError(
                f"data.dataset {self.dataset!r}: most of it would be left out ({self._names(lost)}), and only "
                f"{self._names(read)} read, by the names of the files: rename them, move what is not meant, or give the files "
                f"that are as a glob, such as '{glob.escape(str(self._root))}/**/*{self._files[0].suffix}'"
            )

    @cached_property
    def _by_split(self) -> dict[str, list[Path]]:
        return split_files_by_name(self._root, self._files) if self._is_folder else {"train": self._files}

    @cached_property
    def _left_out(self) -> dict[str, list[Path]]:
        """List the local files that are not read, by reason."""
        reasons = {f"the {split} split": files for split, files in self._by_split.items() if split not in ("", *SPLITS)}
        reasons |= {"no split in the name": self._by_split.get("", []), "hidden": [], "a folder, which ** would enter": [],
                    "a link to nothing": [], "another name of a file that is read": [], "no data": []}  # fmt: skip
        read = {os.path.realpath(file) for file in self._files}
        for path in sorted(set(self._paths) - set(self._files)):
            if self._is_hidden(path):
                reasons["hidden"] += [path] if _kind(path) else []
            elif path.is_dir():
                reasons["a folder, which ** would enter"].append(path)
            elif os.path.realpath(path) in read:
                reasons["another name of a file that is read"].append(path)
            else:
                reasons["no data" if path.exists() else "a link to nothing"].append(path)
        return reasons

    def _names(self, files: list[Path]) -> str:
        names = [os.path.relpath(file, self._root) for file in files]
        return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")

    def _open_hub(self, commit: str | None) -> tuple[dict, str]:
        """Open a dataset on the hub at a commit, by default its newest. Returns the streams by split and the commit."""
        import datasets  # imported here because neither local files nor a finished cache need these seconds of imports
        import huggingface_hub

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # `datasets` also logs the errors that it raises
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

    def texts(self, stream) -> Iterator[str | None]:
        """Yield the document of each row of a stream: "" for null, and None for a bad row that is skipped.

        Raises:
            InputError: the text column is missing or holds no text, or a row cannot be read.
        """
        column = self.text_column
        if isinstance(stream, FileStream):
            yield from stream
            return
        try:
            for row in stream:
                if column not in row:
                    raise InputError(
                        f"data.text_column {column!r} of {self.dataset!r} is none of {', '.join(row)}: name a column of text"
                    )
                text = row[column]
                if isinstance(text, str | None):
                    yield text or ""
                elif self.skip_bad_rows:
                    yield None
                else:
                    problem = f"holds {type(text).__name__}: name a column of text, {OR_SKIP}"
                    raise InputError(f"data.text_column {column!r} of {self.dataset!r} {problem}")
        except InputError:
            raise
        except Exception as error:
            damaged = isinstance(error, ValueError | TypeError)  # what pyarrow and `datasets` raise for unreadable rows
            remedy = "download it, mend or remove that row, and give the files" if damaged else (
                "run the same command again, it continues from what is done"
            )  # fmt: skip
            raise InputError(f"data.dataset {self.dataset!r} cannot be read ({one_line(error)}): {remedy}") from error

    @property
    def _is_folder(self) -> bool:
        return os.path.isdir(self._path)

    @property
    def _root(self) -> Path:
        """Return the folder that the names of local files are relative to."""
        return Path(self._path if self._is_folder else os.path.commonpath([file.parent for file in self._files]))

    @cached_property
    def _paths(self) -> list[Path]:
        """List the local files of any kind that the dataset's name stands for; empty for a dataset on the hub."""
        if self._is_folder:
            return _walk(self._path)
        paths = [self._path] if os.path.isfile(self._path) else sorted(glob.glob(self._path, recursive=True))
        # each file once: a link may lead back to a folder above it
        once = {os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)): path for path in reversed(paths)}
        return sorted(Path(path) for path in once.values() if "**" not in self.dataset or not os.path.isdir(path))

    @cached_property
    def _files(self) -> list[Path]:
        """List the local data files, sorted and all of one kind; empty for a dataset on the hub."""
        looks_local = self.dataset.startswith((".", "/", "~")) or glob.has_magic(self.dataset) or _kind(self._path)
        if not os.path.exists(self._path) and not looks_local:
            return []
        files = [path for path in self._paths if path.is_file() and not self._is_hidden(path)]
        if not files:
            raise InputError(
                f"data.dataset {self.dataset!r}: no such file or folder, or nothing in it that is not hidden; give a "
                "file, folder or glob of parquet, jsonl, json or txt, or the id of a dataset on the Hugging Face hub"
            )
        kinds = {kind for file in files if (kind := _kind(file))}
        if not kinds:
            suffixes = ", ".join(sorted({file.suffix or file.name for file in files}))
            raise InputError(f"data.dataset {self.dataset!r} must be parquet, jsonl, json or txt, and holds {suffixes}")
        if len(kinds) > 1:
            mix = " and ".join(sorted(kinds))
            raise InputError(f"data.dataset {self.dataset!r} mixes {mix} files: choose one kind, as in '*.txt'")
        # each once: of a file and links to it, the first name
        data_files = sorted({os.path.realpath(file): file for file in reversed(files) if _kind(file)}.values())
        if not any(file.stat().st_size for file in data_files):
            raise InputError(f"data.dataset {self.dataset!r} is empty: every file in it has 0 bytes")
        return data_files

    def _is_hidden(self, file: Path) -> bool:
        """Return whether a folder's file, or a folder on the way to it, has a name that begins with a dot."""
        return self._is_folder and any(part.startswith(".") for part in file.relative_to(self._path).parts)


def counted(number: int, what: str) -> str:
    """Format a number of things: `1 file`, `1,234 files`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def split_files_by_name(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Assign files below `root` to the splits "train", "validation", "test" by the words in their names, like `datasets`.

    The innermost folder that names a split decides, else the file's own name (a word of SPLIT_WORDS between digits, spaces or
    any of `-._`). Files whose names contain no such word are the train split if no other file is, else they are listed under
    "". Unlike in `datasets`, a file is in one split only, and folders that are links or begin with two underscores are read
    too.
    """
    by_split: dict[str, list[Path]] = {}
    for file in files:
        *folders, name = file.relative_to(root).parts
        words = (SPLIT_WORD.fullmatch(part) for part in [*reversed(folders), name])
        by_split.setdefault(next((SPLIT_WORDS[word[1].lower()] for word in words if word), ""), []).append(file)
    if "" in by_split and "train" not in by_split:
        by_split["train"] = by_split.pop("")
    return by_split


def _walk(folder: str) -> list[Path]:
    """List the files below a folder, sorted; a linked folder is entered, but none twice."""

    def refuse(error: OSError) -> None:
        raise InputError(f"data.dataset {folder!r} cannot be read ({one_line(error)}): permit it") from error

    files, entered = [], set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(root)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        files += [Path(root, name) for name in names]
    return sorted(files)


def _kind(file: str | Path) -> str | None:
    """Return the kind of a file ("parquet", "json" or "text"), or None for one that is no data, such as README.md."""
    return None if Path(file).name in NOT_DATA else KINDS.get(_suffix(file))


def _suffix(file: str | Path) -> str:
    file = Path(Path(file).name.lower())
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
