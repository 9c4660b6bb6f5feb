"""Packed chunks for the stages: which chunks a step takes follows from one number, the chunks consumed so far."""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill_pl.data.chunks import Chunks
from distill_pl.errors import InputError
from distill_pl.tokens import Tokens, short


class ChunkDataModule(L.LightningDataModule):
    """The text, from the hub or from files.

    It is packed once into chunks of `sequence_length` tokens and read by memory map. A stage owns a span of consecutive
    chunks; of each step's `batch_size` chunks every rank takes its slice. So any number of ranks, also after a restart with
    another number, sees every chunk once and in the same order.

    Args:
        dataset: hub id, or a local file, folder or glob of parquet, jsonl or txt.
        name: configuration of a hub dataset (not used for local files).
        revision: branch, tag or commit of a hub dataset; default: main.
        text_column: the column that holds the text.
        sequence_length: tokens in a chunk.
        batch_size: chunks in an optimiser step, over all ranks.
        micro_batch_size: chunks that a rank takes at a time; gradients add up to those of the whole batch. Default: its
            whole share, batch_size / ranks.
        validation_tokens: held out, never trained on: the head of the dataset's validation split or, if it has none, of
            the dataset itself.
        repeat: go over the text again where a budget is larger than the dataset, instead of refusing.
        cache: folder for the packed chunks, shared by all runs.
    """

    def __init__(
        self,
        dataset: str,
        name: str | None = None,
        revision: str | None = None,
        text_column: str = "text",
        sequence_length: int = 512,
        batch_size: int = 48,
        micro_batch_size: int | None = None,
        validation_tokens: Tokens = Tokens("256k"),  # noqa: B008 (an int)
        repeat: bool = False,
        cache: str = "~/.cache/distill_pl",
    ):
        super().__init__()
        validation_tokens = Tokens(validation_tokens)  # 256k where it comes from a run's config.yaml
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size, "micro_batch_size": micro_batch_size}
        for key, value in sizes.items():
            if value is not None and value < (2 if key == "sequence_length" else 1):
                raise InputError(f"data.{key} {value} is too small")
        if validation_tokens < sequence_length:
            raise InputError(f"data.validation_tokens {validation_tokens} is less than one chunk of {sequence_length} tokens")
        self.dataset, self.name, self.revision, self.text_column = dataset, name, revision, text_column
        self.sequence_length, self.batch_size, self.micro_batch_size = sequence_length, batch_size, micro_batch_size
        self.repeat = repeat
        self.validation_chunks = validation_tokens // sequence_length
        self.cache = Path(cache).expanduser()
        self.first, self.steps = 0, 0

    def open(self, tokenizer) -> Chunks:
        """The chunk file of this dataset in this tokenizer, not yet prepared. Raises InputError where there is no such text."""
        self.chunks = Chunks(
            dataset=self.dataset,
            name=self.name,
            revision=self.revision,
            text_column=self.text_column,
            tokenizer=tokenizer,
            sequence_length=self.sequence_length,
            validation_chunks=self.validation_chunks,
            cache=self.cache,
        )
        self.chunks.check()
        return self.chunks

    def prepare(self, chunks: int) -> None:
        """Pack at least `chunks` training chunks. Every process may call it: one packs, the others wait.

        Not Lightning's `prepare_data`: that runs inside the process group, whose time-out an hour of packing would hit.
        """
        self.chunks.prepare(chunks)
        there = len(self.chunks.train)
        if there == 0 or (there < chunks and not self.repeat):
            length = self.sequence_length
            raise InputError(
                f"data.dataset {self.dataset!r} holds {short(there * length)} training tokens, the budget needs "
                f"{short(chunks * length)}: lower tokens, or set data.repeat true to go over the text again"
            )

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of a rank in an optimiser step. Raises InputError where the batch does not divide into them."""
        if self.batch_size % ranks:
            raise InputError(f"data.batch_size {self.batch_size} is not divisible by the {ranks} ranks: change either")
        if self.validation_chunks < ranks:
            raise InputError(
                f"data.validation_tokens is {self.validation_chunks} chunks of {self.sequence_length}, fewer than the {ranks} "
                "ranks: raise it"
            )
        share = self.batch_size // ranks
        micro = self.micro_batch_size or share
        if share % micro:
            raise InputError(
                f"data.micro_batch_size {micro} does not divide a rank's {share} chunks (data.batch_size {self.batch_size} / "
                f"{ranks} ranks): choose a divisor"
            )
        return share // micro

    def chunks_at_once(self, ranks: int) -> int:
        """Of a rank's micro-batch."""
        return self.batch_size // ranks // self.accumulation(ranks)

    def assign(self, first: int, steps: int) -> None:
        """The next stage takes `steps` batches from chunk `first` on."""
        self.first, self.steps = first, steps

    def train_dataloader(self) -> DataLoader:
        """Micro-batches [micro_batch_size, T] from where the trainer stands."""
        trainer = self.trainer
        parts = self.accumulation(trainer.world_size)
        sampler = SpanSampler(
            self.first, self.steps, self.batch_size, trainer.global_step, trainer.global_rank, trainer.world_size, parts
        )
        return _loader(self.chunks.train, sampler)

    def val_dataloader(self) -> DataLoader:
        """The held-out chunks, cut by rank: as many batches for each, since sharded ranks compute together."""
        ranks = self.trainer.world_size
        per_rank = self.chunks_at_once(ranks)
        mine = np.arange(self.trainer.global_rank, self.validation_chunks, ranks)
        count = -(-(self.validation_chunks // ranks) // per_rank)
        batches = np.split(mine, range(per_rank, count * per_rank, per_rank))  # all of a size but the last
        return _loader(self.chunks.validation, [batch.tolist() for batch in batches])


class SpanSampler(Sampler[list[int]]):
    """Chunk indices of one rank's batches in a span, `parts` micro-batches for each of its `steps`. Its length is the whole
    span's, also when `done` steps are skipped: Lightning counts batches from the start of the stage.
    """

    def __init__(self, first: int, steps: int, batch_size: int, done: int, rank: int, ranks: int, parts: int = 1):
        self.first, self.steps, self.batch_size, self.done = first, steps, batch_size, done
        self.rank, self.ranks, self.parts = rank, ranks, parts

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.ranks
        micro = share // self.parts
        for step in range(self.done, self.steps):
            start = self.first + step * self.batch_size + self.rank * share
            for at in range(start, start + share, micro):
                yield list(range(at, at + micro))


class _ChunkDataset(Dataset[Tensor]):
    """Rows of a chunk file; past its end it begins again (data.repeat)."""

    def __init__(self, chunks: np.ndarray):
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitems__(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(self.chunks[np.array(indices) % len(self.chunks)].astype(np.int64))


def _loader(chunks: np.ndarray, batches) -> DataLoader:
    # no workers: a memory map is read a thousand times faster than any model trains
    pinned = torch.cuda.is_available()  # or the CPU waits for the GPU at every batch
    return DataLoader(_ChunkDataset(chunks), batch_sampler=batches, collate_fn=lambda batch: batch, pin_memory=pinned)
