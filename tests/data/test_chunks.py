"""Packed text equals a naive reference for every file format and however often packing was killed."""

import errno
import gzip
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import filelock
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import distill_pl.data.chunks as chunks_module
import distill_pl.data.files as files_module
from distill_pl.data.chunks import Chunks
from distill_pl.data.sources import TextSource
from distill_pl.errors import InputError
from distill_pl.tokenizer import text_encoder

LENGTH = 32
WORDS = "the quick brown fox jumps over a lazy dog while rain falls on warm grass and nobody minds".split()


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Make documents of very different lengths, each with a number that no other has."""
    rng = random.Random(seed)
    return [f"No{seed}.{i}: " + " ".join(rng.choices(WORDS, k=rng.choice([1, 5, 20, 90]))) for i in range(count)]


DOCUMENTS = make_documents(300)
ROWS = [text for i, text in enumerate(DOCUMENTS) for text in ([None, "", text] if i % 37 == 5 else [text])]


@pytest.fixture(autouse=True)
def many_small_batches(monkeypatch):
    monkeypatch.setattr(chunks_module, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(chunks_module, "SAVE_TOKENS", 1)  # after every batch


def write(path: Path, rows: list, kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        table = pa.table({"id": list(range(len(rows))), "text": pa.array(rows, pa.string())})
        pq.write_table(table, path, row_group_size=23)
    else:
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (gzip.open if kind == "gz" else open)(path, "wt").write(lines)
    return path


def write_dataset(folder: Path, kind: str) -> str:
    """Write ROWS as one kind of dataset and return the name by which a user gives it."""
    if kind == "txt":
        for i, text in enumerate(DOCUMENTS[:60]):
            (folder / f"{i:03}.txt").parent.mkdir(exist_ok=True)
            (folder / f"{i:03}.txt").write_text(text)
        return str(folder)
    suffix = {"gz": "jsonl.gz", "jsonl file": "jsonl", "jsonl glob": "jsonl"}.get(kind, kind)
    if kind == "jsonl file":
        return str(write(folder / "all.jsonl", ROWS, kind))
    for i, first in enumerate(range(0, len(ROWS), 110)):
        write(folder / f"part-{i}.{suffix}", ROWS[first : first + 110], kind)
    (folder / "README.md").write_text("not data")
    (folder / "LICENSE.md").write_text("not data")
    return f"{folder}/*.jsonl" if kind == "jsonl glob" else str(folder)


KINDS = ["parquet", "jsonl", "jsonl file", "jsonl glob", "gz", "txt"]


def make(dataset, tokenizer, cache, sequence_length=LENGTH, validation_chunks=4, **source) -> Chunks:
    return Chunks(
        TextSource(str(dataset), **source),
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        validation_chunks=validation_chunks,
        cache=cache,
    )


def ids_on_disk(chunks: Chunks) -> dict[str, list[int]]:
    return {name: np.fromfile(chunks.folder / f"{name}.bin", "<u2").tolist() for name in ("validation", "train")}


def sidecar(chunks: Chunks) -> dict:
    return json.loads((chunks.folder / "sidecar.json").read_text())


def bytes_on_disk(chunks: Chunks) -> dict[str, bytes]:
    return {name: (chunks.folder / f"{name}.bin").read_bytes() for name in ("validation", "train")}


def packed(documents: list[str], tokenizer) -> list[int]:
    """Tokenise one document at a time: the naive reference."""
    return [id for text in documents for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def documents_of(ids: list[int], tokenizer) -> list[str]:
    return tokenizer.decode(ids).split(tokenizer.eos_token)[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_packs_like_the_naive_reference(kind, tokenizer, tmp_path):
    chunks = make(write_dataset(tmp_path / "data", kind), tokenizer, tmp_path / "cache")
    chunks.check()
    assert not (tmp_path / "cache").exists()
    chunks.prepare(10**6)
    held = ids_on_disk(chunks)
    assert held["validation"] + held["train"] == packed(DOCUMENTS[:60] if kind == "txt" else DOCUMENTS, tokenizer)
    assert held["validation"][-1] == held["train"][-1] == tokenizer.eos_token_id  # the cut is between documents
    assert chunks.train.shape == (len(held["train"]) // LENGTH, LENGTH) and chunks.validation.shape == (4, LENGTH)
    assert chunks.train.ravel().tolist() == held["train"][: chunks.train.size]
    assert chunks.validation.ravel().tolist() == held["validation"][: 4 * LENGTH]
    assert isinstance(chunks.train, np.memmap) and chunks.train.dtype == np.dtype("<u2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_resumed_after_failing_at_every_save(kind, tokenizer, tmp_path, monkeypatch):
    """Fail before and after the replacement of the sidecar, and resume from every batch border."""
    dataset = write_dataset(tmp_path / "data", kind) + f"/*.{kind}"  # a folder's split names take most of the time to find
    whole, broken = (make(dataset, tokenizer, tmp_path / name) for name in ("whole", "broken"))
    whole.prepare(10**6)

    replace, calls = os.replace, 0

    def replace_or_fail(*paths):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("before")
        replace(*paths)
        if calls % 3 == 1:
            raise RuntimeError("after")

    monkeypatch.setattr(os, "replace", replace_or_fail)
    for failures in range(1000):  # noqa: B007
        try:
            broken.prepare(10**6)
            break
        except RuntimeError:
            pass
    assert failures > (5 if kind == "txt" else 25)
    assert bytes_on_disk(broken) == bytes_on_disk(whole) and sidecar(broken) == sidecar(whole)


# Forks children after all imports and kills them with SIGKILL at their n-th call of the functions in `may_die`.
KILLER = """
import json, os, random, signal, sys, time, types
import datasets, numpy, transformers

package, dataset, tokenizer, cache = sys.argv[1:]
sys.modules["distill_pl"] = types.ModuleType("distill_pl")  # instead of its __init__, which imports torch for seconds
sys.modules["distill_pl"].__path__ = [package]
import distill_pl.data.chunks as chunks_module
import distill_pl.data.files as files_module

tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer)
chunks_module.BATCH_DOCUMENTS, chunks_module.SAVE_TOKENS = 7, 600

def child(cache, train_chunks, steps=None):
    if pid := os.fork():
        return pid
    def may_die(function):
        def wrapper(*args, **kwargs):
            nonlocal steps
            steps -= 1
            if steps == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapper
    if steps:
        os.fsync, os.replace, numpy.array = may_die(os.fsync), may_die(os.replace), may_die(numpy.array)
        json.dump, time.monotonic = may_die(json.dump), may_die(time.monotonic)
    source = chunks_module.TextSource(dataset)
    chunks = chunks_module.Chunks(source, tokenizer=tokenizer, cache=cache, sequence_length=32, validation_chunks=4)
    chunks.prepare(train_chunks)
    os._exit(0)

def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

rng, kills = random.Random(1), 0
while exit_code(child(cache + "/killed", 10**6, rng.randrange(1, 150))) == -signal.SIGKILL:
    kills += 1
together = [child(cache + "/together", train_chunks) for train_chunks in (40, 70, 40)]
print(json.dumps([kills, [exit_code(pid) for pid in together]]))
"""


@pytest.mark.slow
def test_killed_again_and_again_and_many_at_once(tokenizer, tmp_path):
    dataset = write_dataset(tmp_path / "data", "parquet") + "/*.parquet"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    package = Path(chunks_module.__file__).parents[1]
    command = [sys.executable, "-c", KILLER, str(package), dataset, str(tmp_path / "tokenizer"), str(tmp_path)]
    environment = {**os.environ, "USE_TORCH": "0"}  # or every child of `datasets` imports torch
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    kills, together = json.loads(ran.stdout)
    assert kills >= 4 and together == [0, 0, 0]
    for name, train_chunks in (("killed", 10**6), ("together", 70)):
        whole = make(dataset, tokenizer, tmp_path / "whole" / name)
        whole.prepare(train_chunks)
        assert bytes_on_disk(make(dataset, tokenizer, tmp_path / name)) == bytes_on_disk(whole)


def test_a_waiting_process_says_so(tokenizer, tmp_path, monkeypatch):
    chunks = make(write_dataset(tmp_path / "data", "jsonl"), tokenizer, tmp_path / "cache")
    chunks.folder.mkdir(parents=True)
    lines, printed = [], threading.Event()
    monkeypatch.setattr(chunks_module, "print", lambda line, **to: (lines.append(line), printed.set()), raising=False)
    waiting = threading.Thread(target=chunks.prepare, args=(3,))
    with filelock.FileLock(chunks.folder / ".lock"):
        waiting.start()
        assert printed.wait(60) and "waiting for it" in lines[0] and len(chunks.train) == 0
    waiting.join(60)
    assert len(chunks.train) >= 3


def test_extension_appends(tokenizer, tmp_path):
    dataset = write_dataset(tmp_path / "data", "parquet")
    grown, at_once = (make(dataset, tokenizer, tmp_path / name) for name in ("grown", "at once"))
    before = b""
    for train_chunks in (0, 3, 40, 70):
        grown.prepare(train_chunks)
        now = bytes_on_disk(grown)["train"]
        assert len(grown.train) >= train_chunks and now.startswith(before)
        before = now
    at_once.prepare(70)
    assert bytes_on_disk(grown) == bytes_on_disk(at_once)
    assert len(grown.train) < 100  # packing stopped when it had enough


def test_the_fingerprint_is_of_the_text_that_is_used(tokenizer, tmp_path, monkeypatch):
    def pack(name, texts, train_chunks, used):
        chunks = make(write(tmp_path / name / "a.jsonl", texts, "jsonl"), tokenizer, tmp_path / name)
        chunks.prepare(train_chunks)
        return chunks.fingerprint(used)

    longer = [*DOCUMENTS, "one more"]
    held_out_differs, trained_differs = ["Yes" + DOCUMENTS[0][2:], *DOCUMENTS[1:]], [*DOCUMENTS[:15], "other", *DOCUMENTS[16:]]
    whole = pack("whole", DOCUMENTS, 10**6, 10)
    assert pack("part", DOCUMENTS, 10, 10) == pack("longer", longer, 10**6, 10) == whole
    monkeypatch.setattr(chunks_module, "BLOCK_TOKENS", 7)
    assert pack("whole", DOCUMENTS, 10**6, 10) == whole
    others = [pack("held out", held_out_differs, 30, 10), pack("trained", trained_differs, 60, 60),
              pack("part", DOCUMENTS, 60, 60), pack("part", DOCUMENTS, 60, 11)]  # fmt: skip
    assert len({whole, *others}) == 5


def test_nothing_is_done_twice(tokenizer, tmp_path, monkeypatch, capsys):
    chunks = make(write_dataset(tmp_path / "data", "jsonl"), tokenizer, tmp_path / "cache")
    chunks.prepare(10**6)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "all of the dataset" in said and str(chunks.folder) in said
    times = {path: path.stat().st_mtime_ns for path in chunks.folder.iterdir()}
    monkeypatch.setattr(datasets, "load_dataset", None)  # neither network nor data is needed again
    chunks.check()
    chunks.prepare(10**6)  # exhausted
    chunks.prepare(2)  # more than enough
    assert {path: path.stat().st_mtime_ns for path in chunks.folder.iterdir()} == times
    assert capsys.readouterr() == ("", "")


def test_progress_line(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chunks_module, "PROGRESS_SECONDS", 0.0)
    make(write_dataset(tmp_path / "data", "jsonl"), tokenizer, tmp_path / "cache").prepare(50)
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("chunks: 0.0M of 0.0M tokens, ") and first.endswith(" s left")


def test_held_out_documents_are_never_trained_on(tokenizer, tmp_path):
    chunks = make(write_dataset(tmp_path / "data", "parquet"), tokenizer, tmp_path / "cache")
    chunks.prepare(10**6)
    held_out, trained = (documents_of(ids, tokenizer) for ids in ids_on_disk(chunks).values())
    assert held_out and not set(held_out) & set(trained) and held_out + trained == DOCUMENTS


def test_validation_split_is_used_where_there_is_one(tokenizer, tmp_path):
    write(tmp_path / "data" / "train-0.parquet", DOCUMENTS, "parquet")
    others = make_documents(50, seed=1)
    write(tmp_path / "data" / "validation.parquet", others, "parquet")
    chunks = make(tmp_path / "data", tokenizer, tmp_path / "cache")
    chunks.prepare(10**6)
    held = ids_on_disk(chunks)
    assert held["train"] == packed(DOCUMENTS, tokenizer)
    reference = packed(others, tokenizer)
    assert held["validation"] == reference[: len(held["validation"])] and chunks.validation.shape == (4, LENGTH)
    glob = make(tmp_path / "data" / "*.parquet", tokenizer, tmp_path / "cache")  # a glob is all training text
    glob.prepare(10**6)
    assert glob.folder != chunks.folder and sum(map(len, ids_on_disk(glob).values())) > sum(map(len, held.values()))


def test_a_length_limit_on_the_tokenizer_cuts_no_document(tokenizer, tmp_path):
    dataset = write_dataset(tmp_path / "data", "jsonl file")
    before = make(dataset, tokenizer, tmp_path / "cache")
    folder = before.folder
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    try:
        chunks = make(dataset, tokenizer, tmp_path / "cache")
        chunks.prepare(10**6)
        assert chunks.folder == folder
    finally:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    assert sum(ids_on_disk(chunks).values(), []) == packed(DOCUMENTS, tokenizer)


@pytest.mark.parametrize(
    "template, before, after",
    [
        ("B $A", ["B"], ["E"]),
        ("B $A E", ["B"], ["E"]),
        ("$A S", [], ["S", "E"]),
        ("B $A E S", ["B"], ["E", "S"]),
        ("E $A", ["E"], []),  # as OPT, whose BOS is EOS
    ],
)
def test_a_document_begins_and_ends_as_the_tokenizer_has_it(template, before, after, tokenizer, tmp_path):
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    own.add_special_tokens({"bos_token": "B", "eos_token": "E", "sep_token": "S"})
    ids = {token: own.convert_tokens_to_ids(token) for token in "BES"}
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))
    texts = ["a fox", "B E S <|endoftext|> are special", "rain"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chunks = make(tmp_path / "a.jsonl", own, tmp_path / "cache", validation_chunks=0, sequence_length=2)
    chunks.prepare(10**6)
    encoder = text_encoder(own)
    plain = [encoder.encode(text, add_special_tokens=False).ids for text in texts]
    expected = [id for text in plain for id in [*(ids[token] for token in before), *text, *(ids[token] for token in after)]]
    assert ids_on_disk(chunks)["train"] == expected
    assert expected[: len(own("a fox").input_ids)] == own("a fox").input_ids  # a prompt begins as a document does


def test_large_vocabularies_take_four_bytes(tmp_path):
    vocabulary = {"<eos>": 0, "No": 1, ":": 69_999, **{f"w{i}": i for i in range(2, 200)}}  # with a gap
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="No"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    chunks = make(write_dataset(tmp_path / "data", "jsonl"), tokenizer, tmp_path / "cache", validation_chunks=0)
    chunks.prepare(5)
    assert chunks.train.dtype == np.dtype("<u4") and chunks.train.max() == 69_999
    assert chunks.validation.shape == (0, LENGTH)


def test_the_key_is_what_went_in(tokenizer, tmp_path):
    data = tmp_path / "data"
    dataset = write_dataset(data, "jsonl")
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="!")

    def folder(dataset=dataset, tokenizer=tokenizer, **changes):
        return make(dataset, tokenizer, tmp_path, **changes).folder

    first = folder()
    assert first.name.startswith("data-") and first.parent == tmp_path
    folders = [
        first,
        folder(tokenizer=other),
        folder(sequence_length=LENGTH * 2),
        folder(validation_chunks=5),
        folder(text_column="content"),
        folder("hub/data"),
        folder("hub/data", name="sample"),
        folder("hub/data", revision="v1"),
    ]
    assert len(set(folders)) == len(folders)
    assert folder("hub/data", revision="main") == folder("hub/data")
    assert folder(os.path.relpath(data)) == folder(f"{data}/../data/") == folder(name="ignored") == first
    (tmp_path / "elsewhere").mkdir()
    data = data.rename(tmp_path / "elsewhere" / "data")
    assert folder(data) == first
    os.utime(data / "part-0.jsonl", ns=(1, 1))
    assert folder(data) != first


def test_a_hub_dataset_is_read_on_at_the_commit_it_was_begun_at(tokenizer, tmp_path, monkeypatch):
    local = write_dataset(tmp_path / "data", "jsonl")
    head, asked, load = "commit-1", [], datasets.load_dataset

    def info(self, dataset, revision):
        return huggingface_hub.hf_api.DatasetInfo(id=dataset, sha=head, private=False, downloads=0, likes=0, tags=[])

    def load_dataset(path, name, revision, streaming):
        asked.append((path, name, revision))
        return load("json", data_files=f"{local}/*.jsonl", streaming=streaming)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chunks = make("org/set", tokenizer, tmp_path / "cache", name="sample")
    chunks.check()
    chunks.prepare(5)
    head = "commit-2"
    chunks.prepare(50)
    assert asked == [("org/set", "sample", "commit-1")] * 3
    assert sidecar(chunks)["commit"] == "commit-1"


def test_an_unreachable_hub_is_one_line(tokenizer, tmp_path, monkeypatch):
    def info(*_, **__):
        raise ConnectionError("[Errno -2] Name or\nservice not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    with pytest.raises(InputError, match=r"data.dataset 'org/set' .*'sample'.* local file or folder .*not known"):
        make("org/set", tokenizer, tmp_path, name="sample").check()


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no such file or folder.*hub$"),
        ({"README.md": "hello"}, "must be parquet, jsonl, json or txt, and holds .md"),
        ({"a.txt": "hello", "b.jsonl": '{"text": "a"}\n'}, "mixes json and text files"),
        ({"a.jsonl": '{"body": "a", "id": 1}\n'}, "data.text_column 'text' .* body, id"),
        ({"a.jsonl": '{"text": 3}\n'}, "data.text_column 'text' .* holds int"),
        ({"a.jsonl": ""}, "is empty"),
        ({"a.parquet": "this is none"}, "cannot be opened .*ArrowInvalid.*: replace that file"),
        ({"validation.jsonl": '{"text": "a"}\n'}, "no train split, only validation"),
    ],
)
def test_check_refuses_in_one_line(files, message, tokenizer, tmp_path, capfd):
    folder = tmp_path / "data"
    for name, text in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    chunks = make(folder, tokenizer, tmp_path / "cache")
    with pytest.raises(InputError, match=message) as caught:
        chunks.check()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    with pytest.raises(InputError):
        make(folder, tokenizer, tmp_path / "cache").prepare(1)
    assert capfd.readouterr() == ("", "")


def test_an_empty_parquet_is_refused(tokenizer, tmp_path):
    path = tmp_path / "empty.parquet"
    pq.ParquetWriter(path, pa.schema({"text": pa.string()})).close()
    with pytest.raises(InputError, match="empty: its train split has no rows"):
        make(path, tokenizer, tmp_path / "cache").check()


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no EOS token"):
        make(write_dataset(tmp_path / "data", "jsonl"), without, tmp_path / "cache").check()


@pytest.mark.parametrize("kind", ["parquet", "split"])
def test_too_little_text_to_hold_out(kind, tokenizer, tmp_path):
    dataset = write_dataset(tmp_path / "data", "parquet")
    if kind == "split":
        write(tmp_path / "data" / "train.parquet", DOCUMENTS, "parquet")
        write(tmp_path / "data" / "validation.parquet", DOCUMENTS[:3], "parquet")
    chunks = make(dataset, tokenizer, tmp_path / "cache", validation_chunks=10_000)
    for _ in range(2):  # the second time from what the first left
        with pytest.raises(
            InputError, match=r"data.validation_tokens asks for 320000 .* holds \d+: lower it, or give more text"
        ):
            chunks.prepare(1)


def test_damage_is_found_before_any_work(tokenizer, tmp_path):
    chunks = make(write_dataset(tmp_path / "data", "jsonl"), tokenizer, tmp_path / "cache")
    chunks.prepare(20)
    good = (chunks.folder / "train.bin").read_bytes()
    (chunks.folder / "train.bin").write_bytes(good[:-2])
    for act in (chunks.check, lambda: chunks.prepare(1), lambda: chunks.train):
        with pytest.raises(InputError, match=f"train.bin is cut short, .*delete {chunks.folder} and run again"):
            act()
    (chunks.folder / "train.bin").write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(InputError, match=f"train.bin is damaged .*delete {chunks.folder} and run again"):
        chunks.train  # noqa: B018
    (chunks.folder / "train.bin").write_bytes(good)
    chunks.check()
    (chunks.folder / "sidecar.json").write_text("{")
    with pytest.raises(InputError, match=f"sidecar.json is unreadable .*delete {chunks.folder} and run again"):
        chunks.check()


def test_a_cache_that_may_not_be_read_is_one_line(tokenizer, tmp_path, monkeypatch):
    chunks = make(write_dataset(tmp_path / "data", "jsonl"), tokenizer, tmp_path / "cache")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"sidecar.json is unreadable .*: permit it, or choose another data.cache"):
        chunks.check()


def test_a_long_name_of_a_file_is_cut_in_the_cache(tokenizer, tmp_path):
    file = tmp_path / f"{'x' * 244}.jsonl"
    file.write_text('{"text": "a b c"}\n' * 200)
    chunks = make(file, tokenizer, tmp_path / "cache")
    chunks.prepare(2)
    assert len(chunks.folder.name) < 130


@pytest.mark.parametrize("kind", [models.WordLevel, models.BPE])
def test_characters_that_a_tokenizer_does_not_know(tmp_path, monkeypatch, kind):
    rust = Tokenizer(kind({"a": 0, "</s>": 1}, **({"merges": []} if kind is models.BPE else {})))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "data.jsonl").write_text('{"text": "a a a a"}\n' * 100 + '{"text": "a \u2603"}\n' * 100)
    chunks = make(tmp_path / "data.jsonl", PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>"), tmp_path / "cache")
    monkeypatch.setattr(chunks_module, "around_documents", lambda tokenizer, end: ([], [end]))  # which probes other letters
    if kind is models.BPE:
        chunks.prepare(100)
        assert "characters that the tokenizer does not know are dropped" in chunks.describe()
    else:
        with pytest.raises(InputError, match="cannot encode the text .*: give it an unk_token"):
            chunks.prepare(100)


def test_a_full_disk_is_one_line_and_resumable(tokenizer, tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "data", "parquet")
    chunks, whole = (make(dataset, tokenizer, tmp_path / name) for name in ("full", "whole"))
    fsync, calls = os.fsync, 0

    def fill_up(descriptor):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_up)
    with pytest.raises(InputError, match="cannot write packed text to .*No space left on device.*data.cache"):
        chunks.prepare(60)
    chunks.prepare(60)
    whole.prepare(60)
    assert bytes_on_disk(chunks) == bytes_on_disk(whole)


def test_a_cache_that_cannot_be_is_one_line(tokenizer, tmp_path):
    (tmp_path / "file").write_text("a file where the cache should be")  # also refused to root, unlike a mode
    with pytest.raises(InputError, match="cannot write packed text to .*data.cache$"):
        make(write_dataset(tmp_path / "data", "jsonl"), tokenizer, tmp_path / "file").prepare(1)


def test_a_dataset_that_breaks_on_the_way_keeps_what_was_packed(tokenizer, tmp_path):
    write(tmp_path / "data" / "a.jsonl.gz", DOCUMENTS, "gz")
    whole = (tmp_path / "data" / "a.jsonl.gz").read_bytes()
    (tmp_path / "data" / "b.jsonl.gz").write_bytes(whole[:-100])
    chunks = make(tmp_path / "data", tokenizer, tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(InputError, match=r"cannot be read after row \d+ \(b.jsonl.gz: EOFError.*replace that file"):
            chunks.prepare(10**6)
        assert len(chunks.train) > 50
        assert documents_of(sum(ids_on_disk(chunks).values(), []), tokenizer)[: len(DOCUMENTS)] == DOCUMENTS


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "first, second",
    [({"url": None}, {"url": "x"}), ({}, {"id": 1}), ({"id": 1}, {"id": "one"}), ({"meta": {"a": 1}}, {"meta": [1]})],
)
def test_files_may_differ_in_all_but_the_text_column(kind, first, second, tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    for name, texts, others in (("a", DOCUMENTS[:20], first), ("b", DOCUMENTS[20:40], second)):
        rows = [{"text": text, **others} for text in texts]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{name}.parquet")
        else:
            (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chunks = make(tmp_path / "data", tokenizer, tmp_path / "cache")
    chunks.prepare(10**6)
    assert sum(ids_on_disk(chunks).values(), []) == packed(DOCUMENTS[:40], tokenizer)


@pytest.mark.parametrize("files", [1, 3])
def test_a_txt_of_any_length_is_held_out_in_part(files, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "DOCUMENT_CHARACTERS", 200)
    (tmp_path / "data").mkdir()
    for i in range(files):
        (tmp_path / "data" / f"{i}.txt").write_text("\n".join(DOCUMENTS[i * 50 : (i + 1) * 50]))
    chunks = make(tmp_path / "data", tokenizer, tmp_path / "cache")
    chunks.prepare(10**6)
    held_out, trained = (documents_of(ids, tokenizer) for ids in ids_on_disk(chunks).values())
    assert "".join(held_out + trained) == "".join("\n".join(DOCUMENTS[i * 50 : (i + 1) * 50]) for i in range(files))
    assert len(chunks.validation) == 4 and len(trained) > 2 * len(held_out) > 0


def test_describe_says_what_was_found(tokenizer, tmp_path):
    write(tmp_path / "data" / "train.jsonl", ["one", None, "", "two words", "three"], "jsonl")
    with open(tmp_path / "data" / "train.jsonl", "a") as file:
        file.write('{"text": 3}\n{"te\n')
    write(tmp_path / "data" / "test.jsonl", ["tested"], "jsonl")
    plain = make(tmp_path / "data", tokenizer, tmp_path / "cache", sequence_length=2, validation_chunks=2)
    chunks = make(tmp_path / "data", tokenizer, tmp_path / "cache", sequence_length=2, validation_chunks=2, skip_bad_rows=True)
    assert chunks.folder != plain.folder
    for _ in range(2):
        with pytest.raises(InputError, match="holds int in line 6 of train.jsonl.*data.skip_bad_rows true"):
            plain.prepare(10**6)
    chunks.prepare(10**6)
    tokens = len(packed(["one", "two words", "three"], tokenizer))
    assert chunks.describe() == (
        f"all 7 rows of 1 file: 3 documents, {tokens} tokens; held out: the first 2 documents; skipped: 2 unreadable rows; "
        "left out: test.jsonl (the test split)"
    )
    write(tmp_path / "data" / "validation.jsonl", ["held out"], "jsonl")
    chunks = make(tmp_path / "data", tokenizer, tmp_path / "cache", sequence_length=2, validation_chunks=2, skip_bad_rows=True)
    chunks.prepare(1)
    assert (
        "8 rows of 2 files: 4 documents" in chunks.describe()
        and "held out: 1 document of its validation split" in chunks.describe()
    )


@pytest.mark.parametrize("rows, bad", [([None, "", " \n"], ""), ([3, None, ["a"]], r", or unreadable \(2\)")])
def test_a_column_without_text_is_named(rows, bad, tokenizer, tmp_path):
    chunks = make(write(tmp_path / "a.jsonl", rows, "jsonl"), tokenizer, tmp_path / "cache", skip_bad_rows=True)
    for _ in range(2):
        chunks.check()
        with pytest.raises(
            InputError, match=f"data.text_column 'text' .* holds no text: the 3 rows of .* null or empty{bad}: name"
        ):
            chunks.prepare(1)


def test_files_whose_text_is_null_may_stand_among_others(tokenizer, tmp_path):
    write(tmp_path / "data" / "a.jsonl", [None] * 150, "jsonl")
    write(tmp_path / "data" / "b.jsonl", DOCUMENTS, "jsonl")
    chunks = make(tmp_path / "data", tokenizer, tmp_path / "cache")
    chunks.prepare(10**6)
    assert sum(ids_on_disk(chunks).values(), []) == packed(DOCUMENTS, tokenizer)
