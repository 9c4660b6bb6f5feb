"""Recall tasks: whether a model finds again what it has read. Items are made here, from a seed, and nothing is downloaded.

    niah_single_1    a number hidden in one repeated sentence; niah_single_2, in real text (RULER, Hsieh et al., 2024)
    niah_multikey    the same with three other numbers under other keys; niah_multivalue, with four numbers to be named
    mqar             which value followed each key, in a list of pairs (multi-query associative recall: Arora et al., 2024)
    induction        A B ... A: which word comes next
    copy             a list of words, to be said again

The answers of all but mqar are generated greedily and compared with the right ones exactly; mqar takes the likeliest token
after each key. Lengths are in tokens of the model's own tokenizer, so that models with one tokenizer get the same items.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_pl.errors import InputError
from distill_pl.tokenizer import special_tokens

FILLER = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]
NEEDLE = " One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "\n\nWhat is the special magic number for {key} mentioned in the text?\n"
    "The special magic number for {key} mentioned in the text is"
)
QUESTION_OF_SEVERAL = (
    "\n\nWhat are all the special magic numbers for {key} mentioned in the text?\n"
    "The special magic numbers for {key} mentioned in the text are"
)
DISTRACTORS, VALUES = 3, 4  # other keys in niah_multikey, numbers of the key in niah_multivalue
COPIED = 16  # words of copy
PREFILL = 4096  # tokens of a prompt read at once: bounds the memory of long prompts


class Item(NamedTuple):
    """Hold one question: `answers` are to be written after the prompt, or tokens `expected` in it."""

    prompt: list[int]
    answers: tuple[str, ...] = ()
    expected: tuple[tuple[int, int], ...] = ()  # positions in the prompt, and the token that follows each


class Source(NamedTuple):
    """Hold what items are made from."""

    tokenizer: Any
    before: list[int]  # what the tokenizer puts before every text
    words: list[int]  # that are one token
    sentences: list[list[int]]  # of real text

    def encode(self, text: str) -> list[int]:
        """Encode a part of a prompt, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)


def make_source(tokenizer: Any, text: str) -> Source:
    """Prepare a tokenizer and, for niah_single_2, niah_multikey and niah_multivalue, a text to hide numbers in."""
    words = sorted(id for token, id in tokenizer.get_vocab().items() if re.fullmatch("[Ġ▁][a-z]{3,}", token))
    sentences = [" " + sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]
    encoded = (tokenizer.encode(sentence, add_special_tokens=False) for sentence in sentences)
    return Source(tokenizer, special_tokens(tokenizer)[0], words, [ids for ids in encoded if ids])


def needles(source: Source, chance: random.Random, length: int, depth: float, *, keys: int, values: int, filler: bool) -> Item:
    """Hide `values` numbers under each of `keys` keys in a text and ask for those of one key.

    The first number asked for stands at `depth`, a share of the text from 0 to 1, and all others anywhere.
    """
    names = [f"{source.tokenizer.decode([a]).strip()}-{source.tokenizer.decode([b]).strip()}"
             for a, b in (chance.sample(source.words, 2) for _ in range(keys))]  # fmt: skip
    numbers = [[str(chance.randrange(10**6, 10**7)) for _ in range(values)] for _ in names]
    hidden = [source.encode(NEEDLE.format(key=key, value=number))
              for key, row in zip(names, numbers, strict=True) for number in row]  # fmt: skip
    question = source.encode((QUESTION if values == 1 else QUESTION_OF_SEVERAL).format(key=names[0]))
    room = length - len(source.before) - len(question) - sum(map(len, hidden))
    if room < 0:
        raise InputError(f"length {length} has no room for a question of this task: give at least {length - room}")
    sentences = [source.encode(" " + sentence) for sentence in FILLER] if filler else source.sentences
    parts = take(sentences, 0 if filler else chance.randrange(len(sentences)), room)
    places = [depth, *(chance.random() for _ in hidden[1:])]
    # from the last place to the first, so that no place moves
    for place, needle in sorted(zip(places, hidden, strict=True), key=lambda pair: pair[0], reverse=True):
        parts.insert(round(place * len(parts)) if place in (0, 1) else int(place * (len(parts) + 1)), needle)
    return Item([*source.before, *(id for part in parts for id in part), *question], tuple(numbers[0]))


def take(sentences: Sequence[list[int]], first: int, tokens: int) -> list[list[int]]:
    """Take sentences from `first` on, round and round, of `tokens` tokens in all; the last is cut."""
    taken: list[list[int]] = []
    while tokens > 0:
        sentence = sentences[first % len(sentences)][:tokens]
        taken.append(sentence)
        first, tokens = first + 1, tokens - len(sentence)
    return taken


def pairs(source: Source, chance: random.Random, length: int, depth: float) -> Item:
    """List as many pairs, `key: value,`, as fit twice into `length`: each once, then all again in another order."""
    before, colon, comma = source.before, source.encode(":"), source.encode(",")
    size = 2 + len(colon) + len(comma)
    count = (length - len(before)) // (2 * size)
    words = chance.sample(source.words, 2 * count)
    values = dict(zip(words[:count], words[count:], strict=True))
    queries = chance.sample(words[:count], count)
    listed = [id for key in (*values, *queries) for id in (key, *colon, values[key], *comma)]
    colons = [len(before) + size * (count + index) + len(colon) for index in range(count)]  # the end of each
    return Item([*before, *listed], expected=tuple((place, values[key]) for place, key in zip(colons, queries, strict=True)))


def induction(source: Source, chance: random.Random, length: int, depth: float) -> Item:
    """Write random words with A B at `depth` and A at the end; B comes next."""
    before = source.before
    first, second, *others = chance.sample(source.words, min(len(source.words), 1024))
    rest = [chance.choice(others) for _ in range(length - len(before) - 3)]
    place = round(depth * len(rest))
    return Item([*before, *rest[:place], first, second, *rest[place:], first], (source.tokenizer.decode([second]).strip(),))


def copy(source: Source, chance: random.Random, length: int, depth: float) -> Item:
    """Write random words with a list of COPIED words at `depth`, and its first words again at the end."""
    before = source.before
    words = chance.sample(source.words, COPIED + min(len(source.words) - COPIED, 1024))
    copied, others = words[:COPIED], words[COPIED:]
    rest = [chance.choice(others) for _ in range(length - len(before) - COPIED - 2)]
    place = round(depth * len(rest))
    prompt = [*before, *rest[:place], *copied, *rest[place:], *copied[:2]]
    return Item(prompt, (source.tokenizer.decode(copied[2:]).strip(),))


class Questions(NamedTuple):
    """Say which questions are asked."""

    lengths: list[int]  # of prompts, in tokens
    number: int  # of each length
    text: str | None  # dataset to hide numbers in
    seed: int


class Task(NamedTuple):
    """Say how items of a task are made, and whether they need real text."""

    make: Callable[..., Item]
    options: dict[str, Any]
    needs_text: bool = False


TASKS = {
    "niah_single_1": Task(needles, {"keys": 1, "values": 1, "filler": True}),
    "niah_single_2": Task(needles, {"keys": 1, "values": 1, "filler": False}, needs_text=True),
    "niah_multikey": Task(needles, {"keys": 1 + DISTRACTORS, "values": 1, "filler": False}, needs_text=True),
    "niah_multivalue": Task(needles, {"keys": 1, "values": VALUES, "filler": False}, needs_text=True),
    "mqar": Task(pairs, {}),
    "induction": Task(induction, {}),
    "copy": Task(copy, {}),
}


def make_items(task: str, source: Source, length: int, questions: Questions) -> list[Item]:
    """Make items of `length` tokens, from the questions' seed alone, with depths from 0 to 1 in equal steps.

    Raises InputError where the tokenizer has too few whole words, or the text is too short to be cut from.
    """
    if TASKS[task].needs_text and not source.sentences:
        raise InputError(f"tasks={task}: it hides numbers in real text: give --text FILE, or a run folder")
    needed = length // 4 if task == "mqar" else 2 * COPIED
    if len(source.words) < needed:
        raise InputError(
            f"tasks={task}: length {length} needs {needed} words that are single tokens, and the tokenizer has "
            f"{len(source.words)}: give smaller lengths"
        )
    chance = random.Random(f"{questions.seed} {task} {length}")  # of text, the seed is the same on every machine
    depths = [index / max(1, questions.number - 1) for index in range(questions.number)]
    return [TASKS[task].make(source, chance, length, depth, **TASKS[task].options) for depth in depths]


def fingerprint(items: dict[int, list[Item]]) -> str:
    """Hash items, so that results say which questions they answer."""
    return sha256(repr(items).encode()).hexdigest()


@torch.no_grad()
def score(model: PreTrainedModel, tokenizer: Any, items: list[Item], tokens_at_once: int) -> list[float]:
    """Score items of one length -> for each the share of its answers that the model gives. Leaves the model as it was.

    tokens_at_once: of all prompts of a batch together.
    """
    scores: list[float] = []
    rows = max(1, tokens_at_once // len(items[0].prompt))
    for batch in (items[start : start + rows] for start in range(0, len(items), rows)):
        prompts = torch.tensor([item.prompt for item in batch], device=model.device)
        if batch[0].expected:
            likeliest = model(prompts, use_cache=False).logits.argmax(-1).tolist()
            scores += [mean(row[place] == token for place, token in item.expected)
                       for item, row in zip(batch, likeliest, strict=True)]  # fmt: skip
            continue
        longest = max(len(tokenizer.encode(" " + ", ".join(item.answers), add_special_tokens=False)) for item in batch)
        for item, text in zip(batch, continuations(model, tokenizer, prompts, longest + 4), strict=True):
            scores.append(said(item.answers, text))
    return scores


def continuations(model: PreTrainedModel, tokenizer: Any, prompts: Tensor, new_tokens: int) -> Iterator[str]:
    """Continue prompts [B, T] of one length greedily by `new_tokens` tokens or up to the end of the text."""
    chunked = {"prefill_chunk_size": PREFILL} if prompts.shape[1] > PREFILL else {}
    ids = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False,
        pad_token_id=tokenizer.eos_token_id, **chunked,
    )  # fmt: skip
    yield from (tokenizer.decode(row, skip_special_tokens=True) for row in ids[:, prompts.shape[1] :])


def said(answers: Sequence[str], text: str) -> float:
    """Return the share of answers in a continuation: a single one must be how it begins, of several numbers each counts."""
    if len(answers) > 1:
        numbers = re.findall(r"\d+", text)
        return mean(answer in numbers for answer in answers)
    answer = answers[0]
    return float(re.match(rf"[\s:\"']*{re.escape(answer)}(?!\w)", text) is not None)


def summary(scores: dict[int, list[float]]) -> dict[str, Any]:
    """Summarise scores by length: accuracy and its standard error over all items, and accuracy by length."""
    every = [value for values in scores.values() for value in values]
    accuracy = mean(every)
    return {
        "acc": accuracy,
        "acc_stderr": math.sqrt(accuracy * (1 - accuracy) / len(every)),
        "n": len(every),
        "by_length": {str(length): mean(values) for length, values in scores.items()},
    }
