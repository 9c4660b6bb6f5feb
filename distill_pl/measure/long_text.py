"""Perplexity of a model on any text, and by position: also far beyond the length that the model was trained at."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel

from distill_pl.console import perplexity
from distill_pl.errors import InputError
from distill_pl.tokenizer import around_documents, end_of_text, special_tokens, text_encoder

SEGMENT = 2048  # tokens of each row in one forward pass


def rows(documents: Iterable[str], tokenizer: Any, config: PreTrainedConfig, length: int, number: int) -> Tensor:
    """Pack documents as they are for training and cut the head into rows -> [at most `number`, length] token ids.

    Raises InputError where there is not even one row.
    """
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


@torch.no_grad()
def losses(model: PreTrainedModel, tokens: Tensor, rows_at_once: int) -> Tensor:
    """Compute the mean cross-entropy of the token at each position from those before it: tokens [N, T] -> [T - 1], nats.

    Rows are read in segments and the state is carried from one to the next: the memory of a student does not grow with T.
    Raises InputError for rows of several segments and a model without `past_key_values`.
    """
    several = tokens.shape[1] - 1 > SEGMENT
    total = torch.zeros(tokens.shape[1] - 1, dtype=torch.float64)
    for batch in tokens.split(rows_at_once):
        cache = None
        for start in range(0, batch.shape[1] - 1, SEGMENT):
            inputs = batch[:, start : min(start + SEGMENT, batch.shape[1] - 1)].to(model.device)
            labels = batch[:, start + 1 : start + 1 + inputs.shape[1]].to(model.device)
            output = model(inputs, past_key_values=cache, use_cache=True) if several else model(inputs, use_cache=False)
            if several and (cache := getattr(output, "past_key_values", None)) is None:
                raise InputError(
                    f"lengths {batch.shape[1]}: a {model.config.model_type} carries no past_key_values from segment to "
                    f"segment: give at most {SEGMENT + 1}"
                )
            loss = cross_entropy(output.logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
            total[start : start + inputs.shape[1]] += loss.double().sum(0).cpu()
    return total / len(tokens)


def summary(losses: Tensor) -> dict[str, Any]:
    """Summarise losses [T - 1] by position: perplexity over all, and by position from each power of two to the next."""
    edges = [2**power for power in range(int(math.log2(len(losses))) + 1)]
    buckets = {str(edge): losses[edge - 1 : 2 * edge - 1].mean().item() for edge in edges}
    return {
        "perplexity": perplexity(losses.mean().item()),
        "by_position": {edge: perplexity(loss) for edge, loss in buckets.items()},
    }
