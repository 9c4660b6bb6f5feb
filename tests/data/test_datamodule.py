"""The number of chunks consumed alone determines which chunks each rank reads next."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from distill_pl.data.chunks import Chunks
from distill_pl.data.datamodule import ChunkDataModule, SpanSampler, order
from distill_pl.errors import InputError


def consumed(first, steps, batch_size, done, ranks, accumulation=1):
    """Return the chunk indices in the order of the steps, all ranks' slices of a step side by side."""
    batches = [list(SpanSampler(first, steps, batch_size, done, rank, ranks, accumulation)) for rank in range(ranks)]
    slices = [[sum(own[i : i + accumulation], []) for i in range(0, len(own), accumulation)] for own in batches]
    return [index for step in zip(*slices, strict=True) for part in step for index in part]


def test_every_chunk_once_in_one_order_whatever_the_ranks_and_restarts():
    whole = list(range(10, 10 + 6 * 12))
    for ranks in (1, 2, 3, 4, 6, 12):
        assert consumed(10, 6, 12, 0, ranks) == whole
    assert consumed(10, 6, 12, 0, 4)[: 2 * 12] + consumed(10, 6, 12, 2, 3) == whole
    assert consumed(10, 6, 12, 0, 4, accumulation=3)[: 2 * 12] + consumed(10, 6, 12, 2, 1, accumulation=4) == whole
    assert len(SpanSampler(10, 6, 12, 4, 0, 1)) == 6  # Lightning counts from the start of the stage


@pytest.fixture
def make(corpus, tokenizer, tmp_path):
    """Return `make(chunks=None, **keys)`, which opens a ChunkDataModule of the corpus and packs that many chunks."""

    def make(chunks=None, dataset=corpus, **keys):
        sizes = {"sequence_length": 16, "batch_size": 4, "validation_tokens": 160}
        module = ChunkDataModule(dataset, cache=str(tmp_path), **sizes | keys)
        module.open(tokenizer)
        if chunks:
            module.prepare(chunks)
        return module

    return make


@pytest.fixture
def data(make):
    return make(repeat=True, shuffle=False)


def loaders(data, step=0, rank=0, ranks=1, accumulation=None):
    accumulation = accumulation or data.accumulation(ranks)
    data.trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=ranks, accumulate_grad_batches=accumulation)
    return data.train_dataloader(), data.val_dataloader()


def test_packed_text_may_be_deleted_while_a_run_reads_it(data, tmp_path):
    data.prepare(40)
    before = [torch.cat(list(loader)) for loader in loaders(data)]
    shutil.rmtree(tmp_path)
    assert all(torch.equal(torch.cat(list(loader)), batches) for loader, batches in zip(loaders(data), before, strict=True))
    assert before[0].shape == (40, 16)  # without `assign`, all that was packed


def test_a_module_that_packed_nothing_says_what_to_call(corpus):
    module = ChunkDataModule(corpus)
    for loader in ("train_dataloader", "val_dataloader"):
        module.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1, accumulate_grad_batches=1)
        with pytest.raises(InputError, match="call its methods open and prepare"):
            getattr(module, loader)()


def test_batches_are_rows_of_the_chunk_file(data):
    data.prepare(40)
    data.assign(first=8, steps=5)
    train, _ = loaders(data, step=2)
    expected = torch.from_numpy(data.chunks.train[16:28].astype("int64"))
    assert torch.equal(torch.cat(list(train)), expected) and next(iter(train)).shape == (4, 16)


def test_held_out_chunks_are_cut_by_rank_and_complete(data):
    data.prepare(40)
    whole = torch.from_numpy(data.chunks.validation.astype("int64"))
    assert torch.equal(torch.cat(list(loaders(data)[1])), whole) and len(whole) == 10
    by_rank = [torch.cat(list(loaders(data, rank=rank, ranks=2)[1])) for rank in range(2)]
    assert torch.equal(torch.stack(by_rank, 1).flatten(0, 1), whole)


def test_repeat_goes_over_the_text_again(data, make):
    data.prepare(10**6)
    count = len(data.chunks.train)
    data.assign(first=count - 2, steps=1)
    batch = next(iter(loaders(data)[0]))
    expected = [*data.chunks.train[-2:], *data.chunks.train[:2]]
    assert batch.tolist() == [row.tolist() for row in expected]
    once = make()
    with pytest.raises(InputError, match="data.repeat"):
        once.prepare(count + 1)
    once.prepare(count)


def test_what_was_read_before_is_skipped(make):
    data = make(shuffle=3, repeat=True)
    data.prepare(20, skipped=12)
    whole = data.chunks.train.tolist()
    assert sorted(read(data, 0, 5)) == sorted(whole[12:32])
    assert data.describe().endswith("; read before: 192 tokens")
    for left in (-(10**6), 7):  # too little, so that the text begins again
        data.prepare(8, skipped=len(data.chunks.train) - left)
        assert sorted(read(data, 0, 2)) == sorted(whole[:8])
    with pytest.raises(InputError, match="holds 32 training tokens after the .* tokens that were read before"):
        make().prepare(8, skipped=len(data.chunks.train) - 2)


def read(data, first, steps, done=0, ranks=1) -> list[list[int]]:
    """Return the chunks of a stage from step `done` on in the order of the steps, all ranks' slices of a step side by side."""
    data.assign(first, steps)
    by_rank = [torch.cat(list(loaders(data, done, rank, ranks)[0])).split(data.batch_size // ranks) for rank in range(ranks)]
    return torch.cat([part for step in zip(*by_rank, strict=True) for part in step]).tolist()


def test_shuffled_chunks_come_once_each_whatever_the_ranks_and_restarts(make):
    data = make(40, shuffle=3)
    chunks = data.chunks.train[:40].tolist()
    whole = read(data, 0, 10)
    assert whole != chunks and sorted(whole) == sorted(chunks)
    assert read(data, 0, 10, ranks=2) == read(make(40, shuffle=3, micro_batch_size=1), 0, 10) == whole
    assert read(data, 0, 4) + read(data, 16, 6, done=2, ranks=4) == whole[:16] + whole[24:]  # two stages, one resumed
    assert read(make(40, shuffle=4), 0, 10) != whole
    data.chunks.prepare(100)  # another run needs more of the same text
    assert read(data, 0, 10) == whole


def test_repeat_shuffles_in_another_order_each_time(make):
    data = make(10**6, shuffle=0, repeat=True)
    count = len(data.chunks.train) // 4 * 4
    data.train_chunks = count
    times = [read(data, time * count, count // 4) for time in range(3)]
    assert all(sorted(time) == sorted(data.chunks.train[:count].tolist()) for time in times)
    assert times[0] != times[1] != times[2] != times[0]
    assert read(data, count - 2, 1) == times[0][-2:] + times[1][:2]


def test_the_order_never_changes():
    """Runs that were begun under another version of numpy go on."""
    assert order(10, seed=7, round=1).tolist() == [9, 8, 5, 6, 2, 3, 7, 0, 1, 4]


def test_local_files_are_shuffled_and_hub_datasets_are_not(make, monkeypatch):
    monkeypatch.setattr(Chunks, "check", lambda self: None)
    assert [make(shuffle=shuffle).seed for shuffle in (None, False, True, 5)] == [0, None, 0, 5]
    assert [make(dataset="org/set", shuffle=shuffle).seed for shuffle in (None, False, True, 5)] == [None, None, 0, 5]


def test_a_text_that_is_held_out_whole_is_refused(make, tmp_path):
    (tmp_path / "a.txt").write_text("a fox " * 100)
    with pytest.raises(InputError, match="data.dataset .* is too small: without the held-out text .* more documents"):
        make(10, dataset=str(tmp_path / "a.txt"), repeat=True)


def test_a_trainer_that_would_split_the_steps_otherwise_is_refused(make):
    data = make(16, micro_batch_size=1)
    assert len(loaders(data, ranks=2)[0]) == 4 * 2
    for accumulation in (1, 4):
        with pytest.raises(InputError, match="micro_batch_size 1 makes 2 .* accumulate_grad_batches=2"):
            loaders(data, ranks=2, accumulation=accumulation)


def test_more_chunks_than_were_prepared_are_not_read_again_unasked(make):
    data, again = make(16), make(16, repeat=True)
    for module in (data, again):
        module.assign(8, 3)
    assert len(list(loaders(again)[0])) == 3
    with pytest.raises(InputError, match="20 chunks were assigned, and 16 prepared: call prepare"):
        loaders(data)
