"""Batches of packed chunks for every rank and step, determined by the number of chunks consumed so far and nothing else."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedConfig

from distill_pl.data.chunks import Chunks
from distill_pl.data.sources import TextSource
from distill_pl.errors import AT_LEAST_1, SEED, InputError, Range, check_arguments
from distill_pl.tokenizer import end_of_text
from distill_pl.tokens import Tokens, short


def seed_of_order(shuffle: int | bool | None, is_local: bool) -> int | None:
    """Return the seed by which training chunks are shuffled, None for the dataset's order, from `data.shuffle`."""
    shuffle = is_local if shuffle is None else shuffle
    return None if shuffle is False else 0 if shuffle is True else shuffle


class ChunkDataModule(L.LightningDataModule):
    """The training and validation text.

    The text is tokenised once, packed into chunks of `sequence_length` tokens and read by memory map, in the order of the
    dataset or shuffled. Each stage trains on consecutive chunks of that order, and each rank takes its slice of the
    `batch_size` chunks of a step: any number of ranks, even if it changes at a restart, consumes every chunk once and in the
    same order.

    Args:
        dataset: Hugging Face hub id; or a local parquet, json, jsonl or txt file (a txt file is cut into documents at lines
            `<|endoftext|>` and, if long, at blank lines), a folder of such files (train, validation or test in their names
            assigns them to splits) or a glob (every file is training text). Files may be compressed: .gz, .bz2, .xz or .zst.
        name: configuration of a hub dataset, such as sample-10BT; ignored for local files.
        revision: branch, tag or commit of a hub dataset, by default main; ignored for local files.
        text_column: column that holds the documents; rows where it is null or empty are skipped.
        sequence_length: tokens in a chunk.
        batch_size: chunks in an optimiser step, over all ranks.
        micro_batch_size: chunks in one forward and backward pass of a rank, which sums the gradients over its share of the
            batch. By default the whole share, batch_size / ranks.
        validation_tokens: tokens held out for validation, such as 256k: the head of the dataset's validation split or, if
            it has none, its first documents. They are never trained on.
        repeat: read the text again when a run needs more tokens than the dataset has, instead of refusing it.
        shuffle: seed of the order of the training chunks, or false for the dataset's order. Each chunk comes once in a pass
            over the text; with `repeat`, each pass has another order. By default seed 0 for local files, whose rows are often
            sorted, and false for hub datasets, which are often shuffled already.
        skip_bad_rows: skip and count rows that hold no readable text (broken JSON, bytes that are no UTF-8, numbers) instead
            of refusing them.
        cache: folder for the packed chunks, shared by all runs.

    Raises:
        InputError: a value out of range.
    """

    ranges: ClassVar[dict[str, Range]] = {
        "sequence_length": Range(2), "batch_size": AT_LEAST_1, "micro_batch_size": AT_LEAST_1, "shuffle": SEED,
    }  # fmt: skip

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
        shuffle: int | bool | None = None,
        skip_bad_rows: bool = False,
        cache: str = "~/.cache/distill_pl",
    ):
        super().__init__()
        validation_tokens = Tokens(validation_tokens)  # a str such as 256k when read from a run's config.yaml
        check_arguments("data", ChunkDataModule.__init__, locals(), self.ranges)
        if validation_tokens < sequence_length:
            raise InputError(f"data.validation_tokens {validation_tokens} is below one chunk: give at least {sequence_length}")
        self.dataset, self.name, self.revision, self.text_column = dataset, name, revision, text_column
        self.sequence_length, self.batch_size, self.micro_batch_size = sequence_length, batch_size, micro_batch_size
        self.repeat, self.shuffle, self.skip_bad_rows = repeat, shuffle, skip_bad_rows
        self.validation_chunks = validation_tokens // sequence_length
        self.cache = Path(cache).expanduser()
        self.first, self.steps, self.skipped, self.train_chunks = 0, 0, 0, 0
        self.train = self.validation = np.empty((0, sequence_length))  # memory maps after `prepare`
        self.seed: int | None = None

    def open(self, tokenizer, config: PreTrainedConfig | None = None) -> Chunks:
        """Look up the packed text of this dataset and tokenizer, and check it without packing anything.

        config: configuration of the model, whose eos_token_id ends texts if it is a special token of the tokenizer.

        Raises:
            InputError: an unusable dataset or tokenizer, or damaged packed files.
        """
        source = TextSource(self.dataset, self.name, self.revision, self.text_column, self.skip_bad_rows)
        self.seed = seed_of_order(self.shuffle, source.is_local)
        self.chunks = Chunks(
            source,
            tokenizer=tokenizer,
            end=end_of_text(tokenizer, config) if config else None,
            sequence_length=self.sequence_length,
            validation_chunks=self.validation_chunks,
            cache=self.cache,
        )
        self.chunks.check()
        return self.chunks

    def prepare(self, chunks: int, skipped: int = 0) -> None:
        """Pack at least `skipped + chunks` training chunks. Every process may call this: one packs, the others wait.

        skipped: number of chunks at the head of the text that an earlier run has read and that are not read again.

        Lightning's `prepare_data` is not used because it runs inside the process group, whose timeout is shorter than an hour
        of packing.

        Raises:
            InputError: packing fails, or the dataset has too few chunks and `repeat` is not set.
        """
        self.chunks.prepare(skipped + chunks)
        available, length = len(self.chunks.train), self.sequence_length
        if available == 0:
            raise InputError(
                f"data.dataset {self.dataset!r} is too small: without the held-out text (data.validation_tokens) it has less "
                f"than a chunk of {length} tokens to train on: lower data.validation_tokens, or give more documents"
            )
        if available < skipped + chunks and not self.repeat:
            left = f" after the {short(skipped * length)} tokens that were read before" if skipped else ""
            raise InputError(
                f"data.dataset {self.dataset!r} holds {short(max(0, available - skipped) * length)} training tokens{left}, the "
                f"budget needs {short(chunks * length)}: lower tokens, or set data.repeat true to go over the text again"
            )
        self.skipped = skipped if skipped + chunks <= available else 0
        self.train_chunks = min(chunks, available - self.skipped)
        self.train, self.validation = self.chunks.train[self.skipped :], self.chunks.validation  # they outlive their files
        self.assign(0, chunks // self.batch_size)

    def describe(self) -> str:
        """Describe in one line, after `prepare`, what was read, what is held out, skipped, and left out and why."""
        skipped = f"; read before: {short(self.skipped * self.sequence_length)} tokens" if self.skipped else ""
        return self.chunks.describe() + skipped

    def fingerprint(self) -> str:
        """Hash the held-out chunks and the training chunks up to the last that the run uses, as 32 hex digits."""
        return self.chunks.fingerprint(self.skipped + self.train_chunks)

    def accumulation(self, ranks: int) -> int:
        """Return the micro-batches per rank and optimiser step. Raises InputError if the batch cannot be divided so."""
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
        """Return the number of chunks in a micro-batch of one of `ranks` ranks."""
        return self.batch_size // ranks // self.accumulation(ranks)

    def validation_batches(self, ranks: int) -> int:
        """Return the number of batches of held-out chunks of one of `ranks` ranks."""
        return -(-(self.validation_chunks // ranks) // self.chunks_at_once(ranks))

    def assign(self, first: int, steps: int) -> None:
        """Set the chunks of the next stage: `steps` batches from chunk `first` on; before, all that `prepare` was asked for."""
        self.first, self.steps = first, steps

    def train_dataloader(self) -> DataLoader:
        """Build the loader of this rank's micro-batches [micro_batch_size, T] from the trainer's current step on.

        Raises InputError where a step of the trainer has another number of micro-batches, or `assign` was given more chunks
        than `prepare`, which would be read again.
        """
        trainer = self.trainer
        ranks = trainer.world_size
        if trainer.accumulate_grad_batches != (accumulation := self.accumulation(ranks)):
            raise InputError(
                f"data.micro_batch_size {self.micro_batch_size} makes {accumulation} micro-batches a step: give the Trainer "
                f"accumulate_grad_batches={accumulation}"
            )
        end = self.first + self.steps * self.batch_size
        if 0 < self.train_chunks < end and not self.repeat:
            raise InputError(f"{end} chunks were assigned, and {self.train_chunks} prepared: call prepare({end})")
        sampler = SpanSampler(
            self.first, self.steps, self.batch_size, trainer.global_step, trainer.global_rank, ranks, accumulation
        )
        return _loader(_ChunkDataset(self.train[: self.train_chunks], self.seed), sampler)

    def val_dataloader(self) -> DataLoader:
        """Build the loader of this rank's held-out chunks, in batches [micro_batch_size, T]; the last may differ.

        Every rank gets the same number of batches, because sharded ranks compute each batch together.
        """
        ranks = self.trainer.world_size
        micro = self.chunks_at_once(ranks)
        indices = np.arange(self.trainer.global_rank, self.validation_chunks, ranks)
        batches = np.split(indices, range(micro, self.validation_batches(ranks) * micro, micro))
        return _loader(_ChunkDataset(self.validation), [batch.tolist() for batch in batches])


class SpanSampler(Sampler[list[int]]):
    """Yield one rank's micro-batches as lists of chunk numbers, for `steps` batches from chunk `first` on.

    The first `done` steps are skipped but counted in the length, because Lightning counts batches from the stage's start.
    """

    def __init__(self, first: int, steps: int, batch_size: int, done: int, rank: int, ranks: int, accumulation: int = 1):
        self.first, self.steps, self.batch_size, self.done = first, steps, batch_size, done
        self.rank, self.ranks, self.accumulation = rank, ranks, accumulation

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.ranks
        micro = share // self.accumulation
        for step in range(self.done, self.steps):
            share_start = self.first + step * self.batch_size + self.rank * share
            for start in range(share_start, share_start + share, micro):
                yield list(range(start, start + micro))


class _ChunkDataset(Dataset[Tensor]):
    """The chunks of a run, repeated endlessly; in each round, number n is chunk n or, if shuffled, chunk `order(...)[n]`."""

    def __init__(self, chunks: np.ndarray, seed: int | None = None):
        if len(chunks) == 0:
            raise InputError("the ChunkDataModule has no chunks: call its methods open and prepare before fit")
        self.chunks, self.seed = chunks, seed

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitems__(self, numbers: list[int]) -> Tensor:
        rounds, places = np.divmod(numbers, len(self.chunks))
        if self.seed is not None:
            orders = {round: order(len(self.chunks), self.seed, round) for round in rounds.tolist()}
            places = np.array([orders[round][place] for round, place in zip(rounds.tolist(), places, strict=True)])
        return torch.from_numpy(self.chunks[places].astype(np.int64))


@lru_cache(maxsize=2)  # a step may extend over two rounds
def order(count: int, seed: int, round: int) -> np.ndarray:
    """Return the permutation [count] of chunks in a round over the text, the first of which is 0.

    It is the same in every process and with every version of numpy, which guarantees RandomState's streams.
    """
    return np.random.RandomState([seed, round]).permutation(count)


def _loader(dataset: Dataset, batches) -> DataLoader:
    # no workers: reading a memory map is a thousand times faster than training
    pinned = torch.cuda.is_available()  # without pinned memory the CPU waits for the GPU at every batch
    return DataLoader(dataset, batch_sampler=batches, collate_fn=lambda batch: batch, pin_memory=pinned)
