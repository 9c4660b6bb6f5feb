"""The number of chunks consumed alone determines which chunks each rank reads next."""

from types import SimpleNamespace

import pytest
import torch

from distill_pl.data.datamodule import ChunkDataModule, SpanSampler
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
def data(corpus, tokenizer, tmp_path):
    module = ChunkDataModule(
        str(corpus), sequence_length=16, batch_size=4, validation_tokens=160, cache=str(tmp_path), repeat=True
    )
    module.open(tokenizer)
    return module


def loaders(data, step=0, rank=0, ranks=1):
    data.trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=ranks)
    return data.train_dataloader(), data.val_dataloader()


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


def test_repeat_goes_over_the_text_again(data, corpus, tokenizer, tmp_path):
    data.prepare(10**6)
    count = len(data.chunks.train)
    data.assign(first=count - 2, steps=1)
    batch = next(iter(loaders(data)[0]))
    expected = [*data.chunks.train[-2:], *data.chunks.train[:2]]
    assert batch.tolist() == [row.tolist() for row in expected]
    once = ChunkDataModule(str(corpus), sequence_length=16, batch_size=4, validation_tokens=160, cache=str(tmp_path))
    once.open(tokenizer)
    with pytest.raises(InputError, match="data.repeat"):
        once.prepare(count + 1)
    once.prepare(count)
