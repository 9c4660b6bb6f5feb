"""Text -> packed token ids on disk -> memory-mapped chunks.

Tokenising inside the training loop is ten times slower than reading packed ids back and hard to resume exactly, so the
text is packed once:

    cache/<name>-<key>/train.bin        documents, EOS after each, one after the other; chunk i is ids [i*T, (i+1)*T)
                       validation.bin   the same, of documents that train.bin never holds
                       sidecar.json     how many of those ids are sure, and where in the dataset they end

The sidecar is replaced atomically once the ids are on disk. After a kill the files are cut back to what it vouches for
and the dataset goes on from the position in it: the bytes are those of an uninterrupted preparation.
"""

import glob
import hashlib
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from distill_pl.errors import InputError

FORMAT = 2  # part of the key: raise it when the same text would be packed differently
FILES = ["validation", "train"]  # in the order in which they are filled
KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".txt": "text"}
COMPRESSED = {".gz", ".zst", ".xz", ".bz2"}
NOT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 2_000_000  # whichever comes first; batches of thousands were slower
SAVE_TOKENS, SAVE_SECONDS = 4_000_000, 3.0  # a kill costs at most this much work
PROGRESS_SECONDS = 5.0
CRC_TOKENS = 2**24  # checked at a time


class Chunks:
    """The packed text of one (dataset, revision, tokenizer, sequence length), on disk in a folder keyed by just those.

    Validation chunks are the head of the dataset's `validation` split or, where it has none, its first documents, and
    training starts after them: whatever the token budget, the held-out text is the same and is never trained on.

    Args:
        dataset: a Hugging Face hub id, or a local parquet, json, jsonl or txt file (a txt file is one document), a
            folder of them (splits follow from the file names, as in `datasets`) or a glob (all of it is training
            text). Files may be compressed (.gz, .zst).
        name: the configuration of a hub dataset, such as `sample-10BT`; ignored for local data.
        revision: branch, tag or commit of a hub dataset, `main` unless told; ignored for local data.
        text_column: the column that holds the documents; rows where it is null or empty are skipped.
        tokenizer: a fast Hugging Face tokenizer with an EOS token.
        sequence_length: tokens in a chunk.
        validation_chunks: how many chunks are held out.
        cache: the folder in which the folders of all datasets lie.
    """

    def __init__(
        self,
        *,
        dataset: str,
        name: str | None = None,
        revision: str | None = None,
        text_column: str = "text",
        tokenizer,
        sequence_length: int,
        validation_chunks: int,
        cache: str | Path,
    ):
        self.dataset, self.name, self.revision, self.text_column = dataset, name, revision, text_column
        self.tokenizer, self.sequence_length, self.validation_chunks = tokenizer, sequence_length, validation_chunks
        self.cache = Path(cache).expanduser()
        self._intact: dict[str, int] = {}  # by file, the tokens whose checksum was found right

    def check(self) -> None:
        """Look for what would make `prepare` fail; write nothing, read at most the head of each split.

        Raises:
            InputError: no such dataset, an empty one, one without the text column, a tokenizer without EOS, or
                packed files that are damaged.
        """
        if self._sidecar():
            return  # its text was readable once; a compute node without internet may still train on it
        for split, stream in self._splits(None)[0].items():
            if next(self._texts(stream), None) is None:
                raise InputError(f"data.dataset {self.dataset!r} is empty: its {split} split has no rows")

    def prepare(self, train_chunks: int) -> None:
        """Pack until `train` has at least `train_chunks` chunks or the dataset ends, adding to what is there already.

        Any number of processes may call this at once: one packs, the others wait for it.

        Raises:
            InputError: as `check`; or the held-out chunks cannot be filled, or the cache cannot be written.
        """
        chunks = {"validation": self.validation_chunks, "train": train_chunks}
        need = {name: count * self.sequence_length for name, count in chunks.items()}
        if self._done(need):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _lock(self.folder):
                if not self._done(need):
                    self._pack(need)
        except OSError as error:  # of writing only: errors of reading the dataset are InputErrors by now
            raise InputError(
                f"cannot write packed text to {self.folder} ({_line(error)}): free space, allow it or choose another "
                "data.cache; what is packed is kept, the same command goes on from it"
            ) from error

    @property
    def train(self) -> np.ndarray:
        """The packed training text, [chunks, sequence_length] token ids, memory-mapped; no chunks before `prepare`."""
        return self._map("train")

    @property
    def validation(self) -> np.ndarray:
        """The held-out text, [validation_chunks, sequence_length] token ids, memory-mapped."""
        return self._map("validation")[: self.validation_chunks]

    @cached_property
    def folder(self) -> Path:
        """Where the packed files lie, or will: a readable name and 16 hex digits of what decides their bytes."""
        if self._files:  # not the absolute path: the same files are the same dataset wherever they are seen from
            stats = [(file.relative_to(self._root).as_posix(), file.stat()) for file in self._files]
            files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
            source: dict = {"files": files, "splits by name": self._is_folder}
            readable = self._files[0].name if len(self._files) == 1 else self._root.name
        else:
            source = {"dataset": self.dataset, "name": self.name, "revision": self.revision or "main"}
            readable = f"{self.dataset}-{self.name or ''}"
        what = {"format": FORMAT, "source": source, "validation_chunks": self.validation_chunks, **self._packing}
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return self.cache / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', readable).strip('-.')}-{key}"

    @cached_property
    def _packing(self) -> dict:
        """How documents become chunks: part of the key, and written to the sidecar."""
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no EOS token to put between documents: "
                "name one as eos_token in its tokenizer_config.json"
            )
        return {
            "text_column": self.text_column,
            "tokenizer": hashlib.sha256(self._backend.to_str().encode()).hexdigest(),
            "eos": self.tokenizer.eos_token_id,
            "sequence_length": self.sequence_length,
        }

    @cached_property
    def _backend(self):
        """A copy of the Rust tokenizer: a length limit set on the caller's must not cut documents."""
        if not (original := getattr(self.tokenizer, "backend_tokenizer", None)):
            raise InputError(f"tokenizer {self.tokenizer.name_or_path!r} is no fast one: it needs a tokenizer.json")
        backend = type(original).from_str(original.to_str())
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def _dtype(self) -> np.dtype:
        # not len(tokenizer) alone: ids may have gaps, and an id that does not fit must never wrap around
        ids = max(len(self.tokenizer), 1 + max(self.tokenizer.get_vocab().values()))
        return np.dtype("<u2" if ids <= 2**16 else "<u4")

    @property
    def _is_folder(self) -> bool:
        return Path(self.dataset).expanduser().is_dir()

    @property
    def _root(self) -> Path:
        """The folder that the names of local files are relative to."""
        path = os.path.abspath(os.path.expanduser(self.dataset))
        return Path(path if self._is_folder else os.path.commonpath([file.parent for file in self._files]))

    @cached_property
    def _files(self) -> list[Path]:
        """The local data files, sorted, all of one kind; none of them for a dataset on the hub."""
        path = os.path.abspath(os.path.expanduser(self.dataset))
        looks_local = self.dataset.startswith((".", "/", "~")) or glob.has_magic(self.dataset) or _kind(path)
        if not os.path.exists(path) and not looks_local:
            return []
        pattern = os.path.join(glob.escape(path), "**") if self._is_folder else path
        found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
        files = sorted(Path(file) for file in found if os.path.isfile(file))
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
        data = [file for file in files if _kind(file)]
        if not any(file.stat().st_size for file in data):
            raise InputError(f"data.dataset {self.dataset!r} is empty: every file in it has 0 bytes")
        return data

    def _splits(self, commit: str | None) -> tuple[dict, str | None]:
        """The streams to read, {"train": ..., and "validation" where offered and asked for}, and the hub's commit.

        Reading by commit, once it is known: a branch that moves meanwhile cannot mix two datasets in one file.
        """
        files = self._files  # outside the `try`: its own errors say more
        import datasets  # here, not on top: seconds that a finished cache does not need
        import huggingface_hub

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the errors that it raises
        huggingface_hub.logging.set_verbosity_error()
        try:
            if files:
                options = {"sample_by": "document"} if _kind(files[0]) == "text" else {}
                by_split = _splits_by_name(self._root, files) if self._is_folder else {"train": list(map(str, files))}
                splits = datasets.load_dataset(_kind(files[0]), data_files=by_split, streaming=True, **options)
            else:
                commit = commit or huggingface_hub.HfApi().dataset_info(self.dataset, revision=self.revision).sha
                splits = datasets.load_dataset(self.dataset, self.name, revision=commit, streaming=True)
        except Exception as error:
            on_hub = (
                f" on the hub with data.name {self.name!r}, data.revision {self.revision!r}: there is none, or the hub "
                "is out of reach; a local file or folder will do as well"
            )
            where = "" if files else on_hub
            raise InputError(f"data.dataset {self.dataset!r} cannot be opened{where} ({_line(error)})") from error
        if "train" not in splits:
            raise InputError(f"data.dataset {self.dataset!r} has no train split, only {', '.join(splits)}")
        wanted = FILES if self.validation_chunks else ["train"]
        return {split: splits[split] for split in wanted if split in splits}, commit

    def _texts(self, stream) -> Iterator[str]:
        """The documents of a stream in order, "" for null, with its errors in one line."""
        column = self.text_column
        try:
            for row in stream:
                if not isinstance(text := row.get(column, 0), str | None):
                    has = f"holds {type(text).__name__}" if column in row else f"is none of {', '.join(row)}"
                    raise InputError(f"data.text_column {column!r} of {self.dataset!r} {has}: name a column of text")
                yield text or ""
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"data.dataset {self.dataset!r} cannot be read ({_line(error)}); what is packed is kept, the same "
                "command goes on from it"
            ) from error

    def _batches(self, stream) -> Iterator[tuple[list[str], dict]]:
        """Batches of documents without the empty ones, each with the position in the dataset just after it.

        Row by row, because `datasets` counts a row as it hands it out, so the position is exact; its own batches read
        ahead, and its versions differ in how they count what is held back.
        """
        texts, rows, characters = [], 0, 0
        for text in self._texts(stream):
            rows, characters = rows + 1, characters + len(text)
            texts += [text] if text else []
            if rows == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield texts, stream.state_dict()
                texts, rows, characters = [], 0, 0
        if rows:
            yield texts, stream.state_dict()

    def _encoded(self, stream) -> Iterator[tuple[list, dict]]:
        """The same batches tokenised, one ahead: Python reads and writes while Rust works on all cores."""
        encode = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)  # fast: computes no offsets
        with ThreadPoolExecutor(1) as worker:
            ahead = None
            for texts, position in self._batches(stream):
                last, ahead = ahead, (worker.submit(encode, texts, add_special_tokens=False), position)
                if last:
                    yield last[0].result(), last[1]
            if ahead:
                yield ahead[0].result(), ahead[1]

    def _done(self, need: dict[str, int]) -> bool:
        sidecar = self._sidecar()
        if not sidecar:
            return False
        short = [name for name in FILES if sidecar["tokens"][name] < need[name]]
        return not short or (short == ["train"] and sidecar["exhausted"])

    def _pack(self, need: dict[str, int]) -> None:
        """Append to the files until they hold the tokens needed or the dataset ends. The caller holds the lock."""
        sidecar = self._sidecar() or self._first_sidecar()
        splits, sidecar["commit"] = self._splits(sidecar["commit"])
        tokens, position = sidecar["tokens"], sidecar["position"]
        fills = {split: [split] for split in FILES} if "validation" in splits else {"train": FILES}
        began = told = saved_at = time.monotonic()
        had = saved = sum(tokens.values())
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(self.folder / f"{name}.bin", "ab")) for name in FILES}
            for name, file in files.items():
                file.truncate(tokens[name] * self._dtype.itemsize)  # off with what was written after the last save
            for split, names in fills.items():
                if all(tokens[name] >= need[name] for name in names):
                    continue
                if position[split]:
                    splits[split].load_state_dict(position[split])
                for encodings, after in self._encoded(splits[split]):
                    for encoding in encodings:  # into the first file not full; the rest of a batch into the last
                        name = names[0] if tokens[names[0]] < need[names[0]] else names[-1]
                        ids = np.array([*encoding.ids, self.tokenizer.eos_token_id], self._dtype)
                        files[name].write(ids.data)
                        tokens[name] += len(ids)
                        sidecar["crc32"][name] = zlib.crc32(ids.data, sidecar["crc32"][name])
                    position[split] = after
                    if all(tokens[name] >= need[name] for name in names):
                        break
                    now, have = time.monotonic(), sum(tokens.values())
                    if have - saved >= SAVE_TOKENS or now - saved_at >= SAVE_SECONDS:
                        self._save(sidecar, files)
                        saved, saved_at = have, now
                    if now - told >= PROGRESS_SECONDS:
                        told, rate = now, (have - had) / (now - began)
                        left = sum(max(0, need[name] - tokens[name]) for name in FILES)
                        share = f"{have / 1e6:.1f}M of {(have + left) / 1e6:.1f}M tokens"
                        _say(f"{share}, {rate / 1e6:.1f}M tokens/s, {left / max(rate, 1):.0f} s left")
                else:
                    sidecar["exhausted"] = split == "train"
                if tokens["validation"] < need["validation"]:
                    raise InputError(
                        f"data.validation_tokens asks for {need['validation']} held-out tokens, the {split} split of "
                        f"data.dataset {self.dataset!r} holds {tokens['validation']}: lower it"
                    )
            self._save(sidecar, files)
        have, ended = sum(tokens.values()), ", all of the dataset" if sidecar["exhausted"] else ""
        rate = (have - had) / (time.monotonic() - began)
        _say(f"{have / 1e6:.1f}M tokens{ended} in {self.folder}, {rate / 1e6:.1f}M tokens/s")

    def _first_sidecar(self) -> dict:
        """The sidecar of nothing yet. Read back are commit, tokens, crc32, position and exhausted; the rest is for people."""
        return {
            **{"dataset": self.dataset, "name": self.name, "revision": self.revision, "commit": None},
            **self._packing,
            "dtype": self._dtype.str,
            "versions": {library: version(library) for library in ("datasets", "tokenizers")},
            "tokens": dict.fromkeys(FILES, 0),
            "crc32": dict.fromkeys(FILES, 0),  # of so many tokens
            "position": dict.fromkeys(FILES),
            "exhausted": False,
        }

    def _sidecar(self) -> dict | None:
        """What is on disk for sure, None before the first save; an InputError where the files hold less than that."""
        path, remedy = self.folder / "sidecar.json", f"delete {self.folder} and run again"
        try:
            sidecar = json.loads(path.read_bytes())
            held = {self.folder / f"{name}.bin": sidecar["tokens"][name] * self._dtype.itemsize for name in FILES}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is unreadable ({_line(error)}): {remedy}") from error
        for file, held_bytes in held.items():
            if (size := file.stat().st_size if file.exists() else 0) < held_bytes:
                raise InputError(f"{file} is cut short, {size} of {held_bytes} bytes: {remedy}")
        return sidecar

    def _save(self, sidecar: dict, files: dict) -> None:
        """First the ids, then the sidecar that vouches for them."""
        aside = self.folder / "sidecar.json.new"
        with open(aside, "w") as new:
            json.dump(sidecar, new, indent=1)
            for file in [*files.values(), new]:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, self.folder / "sidecar.json")

    def _map(self, name: str) -> np.ndarray:
        sidecar, file = self._sidecar(), self.folder / f"{name}.bin"
        tokens = sidecar["tokens"][name] if sidecar else 0
        if not sidecar or tokens < self.sequence_length:
            return np.empty((0, self.sequence_length), self._dtype)  # an empty file cannot be mapped
        ids = np.memmap(file, self._dtype, mode="r", shape=(tokens,))
        if self._intact.get(name) != tokens:  # read through once a process
            crc = 0
            for start in range(0, tokens, CRC_TOKENS):
                crc = zlib.crc32(ids[start : start + CRC_TOKENS].data, crc)
            if crc != sidecar["crc32"][name]:
                raise InputError(f"{file} is damaged (its checksum is off): delete {self.folder} and run again")
            self._intact[name] = tokens
        chunks = tokens // self.sequence_length
        return ids[: chunks * self.sequence_length].reshape(chunks, self.sequence_length)


def _kind(file: str | Path) -> str | None:
    """The `datasets` builder for a file; None for what holds no rows, such as README.md or config.json."""
    file = Path(file)
    suffix = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
    return None if file.name in NOT_DATA else KINDS.get(suffix)


def _splits_by_name(root: Path, files: list[Path]) -> dict[str, list[str]]:
    """The files of each split. `load_dataset(folder)` does this too, but takes LICENSE.md for data."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    found = DataFilesDict.from_patterns(get_data_patterns(str(root)), base_path=str(root))
    return {str(split): ours for split, theirs in found.items() if (ours := sorted(set(map(str, files)) & set(theirs)))}


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One packer at a time; the system frees the lock when its process dies."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"another process is packing {folder}, waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say(line: str) -> None:
    print(f"chunks: {line}", file=sys.stderr, flush=True)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
