"""Perplexity of a model on any text, and by position: also far beyond the length that the model was trained at."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel

from distill_pl.console import perplexity
from distill_pl.errors import InputError
from distill_pl.student.cache import CACHE
from distill_pl.tokenizer import around_documents, end_of_text, special_tokens, text_encoder

SEGMENT = 2048  # tokens of each row in one forward pass


def rows(documents: Iterable[str], tokenizer: Any, config: PreTrainedConfig, length: int, number: int) -> Tensor:
    """Pack documents as they are for training and cut the head into rows -> [at most `number`, length] token ids.

    Raises InputError where there is not even one row, or a row of one token, in which nothing is predicted.
    """
    if length < 2:
        raise InputError(f"text: rows of {length} token have none to predict: give lengths of at least 2")
    encoder, end = text_encoder(tokenizer), end_of_text(tokenizer, config)
    before, after = special_tokens(tokenizer) if end is None else around_documents(tokenizer, end)
    ids: list[int] = []
    for document in documents:
        if len(ids) >= number * length:
            break
        if document:
            ids += [*before, *encoder.encode(document, add_special_tokens=False).ids, *after]
    count = min(number, len(ids) // length)
    if count == 0:
        raise InputError(f"text: it holds {len(ids)} tokens, fewer than the largest of lengths, {length}: give smaller lengths")
    return torch.tensor(ids[: count * length]).view(count, length)


def read(model: PreTrainedModel, tokens: Tensor, size: int, cache: Any = None, places: Tensor | None = None) -> Iterator[Any]:
    """Read tokens [B, T] in segments of `size` tokens, the state carried from one to the next -> the output of each.

    cache: the model's cache after earlier tokens, which is updated. places: ascending positions in T, [P]; an output has
    logits [B, P of its segment, vocab] of these, [B, 1, vocab] where it has none, and by default [B, T of its segment, vocab].
    Raises InputError for several segments and a model without a cache.
    """
    several = tokens.shape[1] > size
    for start in range(0, tokens.shape[1], size):
        segment = tokens[:, start : start + size].to(model.device)
        options: dict[str, Any] = {"use_cache": True} | ({} if cache is None else {CACHE: cache})
        if places is not None:
            kept = (places[(places >= start) & (places < start + size)] - start).to(model.device)
            options["logits_to_keep"] = kept if len(kept) else 1
        output = model(segment, **options)
        if places is not None and output.logits.shape[1] not in (1, len(kept)):  # of a model that knows no logits_to_keep
            output.logits = output.logits[:, kept]
        cache = getattr(output, CACHE, None)
        if several and cache is None:
            raise InputError(
                f"rows of {tokens.shape[1]} tokens: a {model.config.model_type} carries no cache from segment to "
                f"segment: give lengths of at most {size}"
            )
        yield output


@torch.no_grad()
def losses(model: PreTrainedModel, tokens: Tensor, rows_at_once: int) -> Tensor:
    """Compute the mean cross-entropy of the token at each position from those before it: tokens [N, T] -> [T - 1], nats.

    Rows are read in segments and the state is carried from one to the next: the memory of a student does not grow with T.
    Raises InputError for rows of several segments and a model without a cache.
    """
    total = torch.zeros(tokens.shape[1] - 1, dtype=torch.float64)
    for batch in tokens.split(rows_at_once):
        labels = batch[:, 1:].to(model.device).split(SEGMENT, 1)
        outputs = read(model, batch[:, :-1], SEGMENT)
        found = [
            cross_entropy(output.logits.float().flatten(0, 1), label.flatten(), reduction="none").view_as(label).double().sum(0)
            for output, label in zip(outputs, labels, strict=True)
        ]
        total += torch.cat(found).cpu()
    return total / len(tokens)


def summary(losses: Tensor) -> dict[str, Any]:
    """Summarise losses [T - 1] by position: perplexity over all, and by position from each power of two to the next."""
    edges = [2**power for power in range(int(math.log2(len(losses))) + 1)]
    buckets = {str(edge): losses[edge - 1 : 2 * edge - 1].mean().item() for edge in edges}
    return {
        "perplexity": perplexity(losses.mean().item()),
        "by_position": {edge: perplexity(loss) for edge, loss in buckets.items()},
    }
