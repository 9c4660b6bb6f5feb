"""Pack documents into token ids on disk and read them back as memory-mapped chunks.

Tokenising inside the training loop is ten times slower than reading packed ids and hard to resume exactly, so the text is
packed once:

    cache/<name>-<key>/train.bin        token ids of all documents, each with its special tokens; chunk i is ids [i*T, (i+1)*T)
                       validation.bin   the same for held-out documents, none of which is in train.bin
                       sidecar.json     how many of these ids are safely on disk, and the position in the dataset after them

The sidecar is replaced atomically once the ids are on disk. After a kill, the files are truncated to what the sidecar records
and packing continues from its position in the dataset: the bytes equal those of an uninterrupted run.
"""

import hashlib
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from distill_pl.data.sources import TextSource, counted
from distill_pl.errors import InputError, one_line
from distill_pl.tokenizer import around_documents, keeps_all_characters, text_encoder
from distill_pl.tokens import short

FORMAT = 4  # part of the key: raise it when the same text would be packed differently
FILES = ["validation", "train"]  # in the order in which they are filled; the dataset's splits have the same names
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 2_000_000  # tokenised at a time, whichever comes first; thousands were slower
SAVE_TOKENS, SAVE_SECONDS = 4_000_000, 3.0  # between two saves, whichever comes first; a kill loses at most this much work
PROGRESS_SECONDS = 5.0  # between two printed lines
BLOCK_TOKENS = 2**24  # tokens read at a time for a checksum


class _Batch(NamedTuple):
    """Consecutive rows of a stream."""

    documents: list[str]
    rows: int  # including those without text
    bad_rows: int  # unreadable rows that were skipped
    position: dict  # of the stream, after these rows


class Chunks:
    """The packed text of one (dataset, revision, tokenizer, sequence length), in a folder whose name has a hash of these.

    Validation chunks are the head of the dataset's `validation` split or, if it has none, its first documents, after which
    training starts: the held-out text is the same for every token budget and is never trained on.

    Each document gets the special tokens that the tokenizer puts before and after a text (BOS, SEP), and EOS at the end unless
    EOS is one of these, so that one EOS separates two documents. Special tokens within a document are encoded as plain text.

    Args:
        source: the dataset; rows whose text is null or empty are skipped.
        tokenizer: a fast Hugging Face tokenizer with an EOS token.
        end: the id of EOS, by default the tokenizer's.
        sequence_length: tokens in a chunk.
        validation_chunks: how many chunks are held out.
        cache: the folder that holds the folders of all datasets.
    """

    def __init__(
        self,
        source: TextSource,
        *,
        tokenizer,
        end: int | None = None,
        sequence_length: int,
        validation_chunks: int,
        cache: str | Path,
    ):
        self.source, self.tokenizer, self.cache = source, tokenizer, Path(cache).expanduser()
        self.end = tokenizer.eos_token_id if end is None else end
        self.sequence_length, self.validation_chunks = sequence_length, validation_chunks
        self._splits = FILES if validation_chunks else ["train"]
        self._verified: dict[str, int] = {}  # by file, the number of tokens with a verified checksum

    def check(self) -> None:
        """Check, without writing, that `prepare` can start; read the first rows of every file, of a JSON array all.

        Raises:
            InputError: a dataset that does not exist, is empty or lacks the text column; a tokenizer without EOS, or one that
                puts different special tokens around different texts; packed files that are cut short, or an unreadable sidecar.
        """
        if self._sidecar():
            return  # the dataset may be out of reach: a compute node without internet trains on the cache
        for split, stream in self.source.open(self._splits)[0].items():
            if not any(True for _ in self.source.texts(stream)):
                raise InputError(f"data.dataset {self.source.dataset!r} is empty: its {split} split has no rows")

    def prepare(self, train_chunks: int) -> None:
        """Pack until `train` has at least `train_chunks` chunks or the dataset ends, appending to what is packed already.

        Any number of processes may call this at once: one packs, the others wait for it.

        Raises:
            InputError: an unusable dataset or tokenizer, damaged packed files, a dataset that is too small for the held-out
                chunks, or a cache that cannot be written.
        """
        chunks = {"validation": self.validation_chunks, "train": train_chunks}
        need = {name: count * self.sequence_length for name, count in chunks.items()}
        if self._done(need):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with waiting_lock(self.folder / ".lock", f"chunks: another process is packing {self.folder}, waiting for it"):
                if not self._done(need):
                    self._pack(need)
        except OSError as error:  # from writing only: TextSource turns errors of reading into InputErrors
            saved = os.path.isfile(self.folder / "sidecar.json")
            raise InputError(
                f"cannot write packed text to {self.folder} ({one_line(error)}): free space, allow writing or choose another "
                "data.cache" + ("; what is packed is kept, the same command continues from it" if saved else "")
            ) from error

    def describe(self) -> str:
        """Describe in one line, after `prepare`, what was read, what is held out, and what is left out and why."""
        sidecar = self._sidecar() or self._first_sidecar()
        rows, bad_rows, documents, tokens = (sum(sidecar[key].values()) for key in ("rows", "bad_rows", "documents", "tokens"))
        files, left_out = self.source.describe()
        share = "all" if sidecar["exhausted"] else "the first"
        held_out = counted(sidecar["documents"]["validation"], "document")
        own_split = sidecar["rows"]["validation"] > 0
        parts = [
            f"{share} {counted(rows, 'row')} of {files}: {counted(documents, 'document')}, {short(tokens)} tokens",
            f"held out: {held_out} of its validation split" if own_split else f"held out: the first {held_out}",
            f"skipped: {counted(bad_rows, 'unreadable row')}" if bad_rows else "",
            "" if keeps_all_characters(self._encoder) else "characters that the tokenizer does not know are dropped",
            f"left out: {left_out}" if left_out else "",
        ]
        return "; ".join(filter(None, parts))

    @property
    def train(self) -> np.ndarray:
        """Map the training chunks, [chunks, sequence_length] memory-mapped token ids; none before `prepare`.

        Raises InputError for damaged packed files.
        """
        return self._map("train")

    @property
    def validation(self) -> np.ndarray:
        """Map the held-out chunks, [validation_chunks, sequence_length] memory-mapped token ids; none before `prepare`.

        Raises InputError for damaged packed files.
        """
        return self._map("validation")[: self.validation_chunks]

    def fingerprint(self, train_chunks: int) -> str:
        """Hash the ids of the held-out chunks and of the first `train_chunks` training chunks, or of all if there are fewer.

        Returns 32 hex digits. Packing more text changes them only if there were fewer chunks than `train_chunks`. Raises
        InputError for damaged packed files.
        """
        digest = hashlib.blake2b(digest_size=16)
        for chunks in (self.validation, self.train[:train_chunks]):
            for block in _blocks(chunks.reshape(-1)):
                digest.update(block)
        return digest.hexdigest()

    @cached_property
    def folder(self) -> Path:
        """Return the folder of the packed files: a readable name, and a hash (16 hex digits) of all that determines them."""
        readable, identity = self.source.identity()
        what = {"format": FORMAT, "source": identity, "validation_chunks": self.validation_chunks, **self._packing}
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return self.cache / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', readable)[:100].strip('-.')}-{key}"

    @cached_property
    def _packing(self) -> dict:
        """List what determines how documents become chunks; it is part of the folder's key and written to the sidecar."""
        if self.end is None:
            raise InputError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no EOS token to put between documents: "
                "name one as eos_token in its tokenizer_config.json"
            )
        return {
            "text_column": self.source.text_column,
            "tokenizer": hashlib.sha256(self._encoder.to_str().encode()).hexdigest(),
            "before": self._around[0],
            "after": self._around[1],
            "sequence_length": self.sequence_length,
        }

    @cached_property
    def _encoder(self):
        return text_encoder(self.tokenizer)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        return around_documents(self.tokenizer, self.end)

    @cached_property
    def _dtype(self) -> np.dtype:
        # not len(tokenizer) alone: ids may have gaps, and an id that does not fit must never wrap around
        ids = max(len(self.tokenizer), 1 + max(self.tokenizer.get_vocab().values()))
        return np.dtype("<u2" if ids <= 2**16 else "<u4")

    def _batches(self, stream) -> Iterator[_Batch]:
        """Yield the rows of a stream in batches.

        Rows are read one by one, for an exact position: the library `datasets` counts each row as it yields it, but its own
        batches read ahead, and its versions differ in how they count rows read but not yet yielded.
        """

        def batch() -> _Batch:
            filled = [text for text in texts if text and not text.isspace()]
            return _Batch(filled, len(texts), texts.count(None), stream.state_dict())

        texts: list[str | None] = []
        characters = 0
        for text in self.source.texts(stream):
            texts.append(text)
            characters += len(text or "")
            if len(texts) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield batch()
                texts, characters = [], 0
        if texts:
            yield batch()

    def _encoded(self, stream) -> Iterator[tuple[list, _Batch]]:
        """Yield encodings and batch for each of `_batches`, tokenising the next meanwhile, in Rust on all cores."""
        encode = getattr(self._encoder, "encode_batch_fast", self._encoder.encode_batch)  # the fast one computes no offsets
        with ThreadPoolExecutor(1) as worker:
            ahead = None
            for batch in self._batches(stream):
                ready, ahead = ahead, (worker.submit(encode, batch.documents, add_special_tokens=False), batch)
                if ready:
                    yield self._result(ready[0]), ready[1]
            if ahead:
                yield self._result(ahead[0]), ahead[1]

    def _result(self, encoding: Future) -> list:
        """Wait for a batch's encodings. Raises InputError where the tokenizer cannot encode it."""
        try:
            return encoding.result()
        except Exception as error:  # the Rust library has no error of its own
            raise InputError(
                f"tokenizer {self.tokenizer.name_or_path!r} cannot encode the text ({one_line(error)}): give it an unk_token"
            ) from error

    def _done(self, need: dict[str, int]) -> bool:
        """Return whether each file has the tokens it needs, or train.bin all tokens of the dataset."""
        sidecar = self._sidecar()
        if not sidecar:
            return False
        lacking = [name for name in FILES if sidecar["tokens"][name] < need[name]]
        return not lacking or (lacking == ["train"] and sidecar["exhausted"])

    def _pack(self, need: dict[str, int]) -> None:
        """Append to the files until each has the tokens it needs or the dataset ends. The caller must hold the lock."""
        sidecar = self._sidecar() or self._first_sidecar()
        streams, sidecar["commit"] = self.source.open(self._splits, sidecar["commit"])
        tokens, position = sidecar["tokens"], sidecar["position"]
        before, after = self._around
        files_of_split = {split: [split] for split in FILES} if "validation" in streams else {"train": FILES}
        start_time = print_time = save_time = time.monotonic()
        start_tokens = saved_tokens = sum(tokens.values())
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(self.folder / f"{name}.bin", "ab")) for name in FILES}
            for name, file in files.items():
                file.truncate(tokens[name] * self._dtype.itemsize)  # drop what was written after the last save
            for split, names in files_of_split.items():
                if all(tokens[name] >= need[name] for name in names):
                    continue
                if position[split]:
                    streams[split].load_state_dict(position[split])
                for encodings, batch in self._encoded(streams[split]):
                    for encoding in encodings:  # into the first file that is not full; the rest of a batch into the last file
                        name = names[0] if tokens[names[0]] < need[names[0]] else names[-1]
                        ids = np.array([*before, *encoding.ids, *after], self._dtype)
                        files[name].write(ids.data)
                        tokens[name] += len(ids)
                        sidecar["documents"][name] += 1
                        sidecar["crc32"][name] = zlib.crc32(ids.data, sidecar["crc32"][name])
                    position[split] = batch.position
                    sidecar["rows"][split] += batch.rows
                    sidecar["bad_rows"][split] += batch.bad_rows
                    if all(tokens[name] >= need[name] for name in names):
                        break
                    now, total = time.monotonic(), sum(tokens.values())
                    if total - saved_tokens >= SAVE_TOKENS or now - save_time >= SAVE_SECONDS:
                        self._save(sidecar, files)
                        saved_tokens, save_time = total, now
                    if now - print_time >= PROGRESS_SECONDS:
                        print_time, rate = now, (total - start_tokens) / (now - start_time)
                        left = sum(max(0, need[name] - tokens[name]) for name in FILES)
                        share = f"{total / 1e6:.1f}M of {(total + left) / 1e6:.1f}M tokens"
                        _print_progress(f"{share}, {rate / 1e6:.1f}M tokens/s, {left / max(rate, 1):.0f} s left")
                else:
                    sidecar["exhausted"] = split == "train"
                self._check_found(sidecar, split, names, need["validation"])
            self._save(sidecar, files)
        total, ended = sum(tokens.values()), ", all of the dataset" if sidecar["exhausted"] else ""
        rate = (total - start_tokens) / (time.monotonic() - start_time)
        _print_progress(f"{total / 1e6:.1f}M tokens{ended} in {self.folder}, {rate / 1e6:.1f}M tokens/s")

    def _check_found(self, sidecar: dict, split: str, names: list[str], held_out: int) -> None:
        """Raise InputError if a split, read as far as needed, had no text, or less than the `held_out` tokens to hold out."""
        dataset, found = repr(self.source.dataset), sidecar["tokens"]["validation"]
        if not any(sidecar["documents"][name] for name in names):
            rows, bad = counted(sidecar["rows"][split], "row"), sidecar["bad_rows"][split]
            raise InputError(
                f"data.text_column {self.source.text_column!r} of {dataset} holds no text: the {rows} of its {split} split are "
                f"null or empty{f', or unreadable ({bad:,})' if bad else ''}: name a column of text"
            )
        if found < held_out:
            raise InputError(
                f"data.validation_tokens asks for {held_out} held-out tokens, the {split} split of data.dataset {dataset} "
                f"holds {found}: lower it, or give more text"
            )

    def _first_sidecar(self) -> dict:
        """Build the sidecar of empty files. Code reads `commit` and the fields from `rows` on; the others are for people."""
        source = self.source
        return {
            **{"dataset": source.dataset, "name": source.name, "revision": source.revision, "commit": None},
            **self._packing,
            "dtype": self._dtype.str,
            "versions": {library: version(library) for library in ("datasets", "tokenizers")},
            "rows": dict.fromkeys(FILES, 0),  # by split
            "bad_rows": dict.fromkeys(FILES, 0),  # of these, unreadable ones that were skipped
            "documents": dict.fromkeys(FILES, 0),
            "tokens": dict.fromkeys(FILES, 0),
            "crc32": dict.fromkeys(FILES, 0),  # of the first `tokens` ids
            "position": dict.fromkeys(FILES),
            "exhausted": False,
        }

    def _sidecar(self) -> dict | None:
        """Read the sidecar; None before the first save. Raises InputError if it is unreadable or the files hold less."""
        path, remedy = self.folder / "sidecar.json", f"delete {self.folder} and run again"
        try:
            sidecar = json.loads(path.read_bytes())
            recorded = {self.folder / f"{name}.bin": sidecar["tokens"][name] * self._dtype.itemsize for name in FILES}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(f"{path} is unreadable ({one_line(error)}): permit it, or choose another data.cache") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is unreadable ({one_line(error)}): {remedy}") from error
        for file, recorded_bytes in recorded.items():
            if (size := file.stat().st_size if file.exists() else 0) < recorded_bytes:
                raise InputError(f"{file} is cut short, {size} of {recorded_bytes} bytes: {remedy}")
        return sidecar

    def _save(self, sidecar: dict, files: dict) -> None:
        """Write the ids to disk, then replace the sidecar that records them."""
        aside = self.folder / "sidecar.json.new"
        with open(aside, "w") as new:
            json.dump(sidecar, new, indent=1)
            for file in [*files.values(), new]:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, self.folder / "sidecar.json")

    def _map(self, name: str) -> np.ndarray:
        """Memory-map a file as [chunks, sequence_length] ids. Raises InputError if its checksum is wrong."""
        sidecar, file = self._sidecar(), self.folder / f"{name}.bin"
        tokens = sidecar["tokens"][name] if sidecar else 0
        if not sidecar or tokens < self.sequence_length:
            return np.empty((0, self.sequence_length), self._dtype)  # an empty file cannot be mapped
        ids = np.memmap(file, self._dtype, mode="r", shape=(tokens,))
        if self._verified.get(name) != tokens:
            crc = 0
            for block in _blocks(ids):
                crc = zlib.crc32(block, crc)
            if crc != sidecar["crc32"][name]:
                raise InputError(f"{file} is damaged (its checksum is wrong): delete {self.folder} and run again")
            self._verified[name] = tokens
        chunks = tokens // self.sequence_length
        return ids[: chunks * self.sequence_length].reshape(chunks, self.sequence_length)


def _blocks(ids: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of memory-mapped ids [tokens] block by block, to bound the memory in use."""
    for start in range(0, len(ids), BLOCK_TOKENS):
        yield ids[start : start + BLOCK_TOKENS].data


@contextmanager
def waiting_lock(file: Path, says: str) -> Iterator[None]:
    """Hold the lock `file`; print `says` where another process has it, and wait. The system frees it when its process dies."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(says, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _print_progress(line: str) -> None:
    # not console.say: any rank may be the one that packs, and stdout is for results
    print(f"chunks: {line}", file=sys.stderr, flush=True)
