"""Recall tasks: whether a model finds again what it has read. Items are made here, from a seed, and nothing is downloaded.

    niah_single_1    a number hidden in one repeated sentence; niah_single_2, in real text (RULER, Hsieh et al., 2024)
    niah_multikey    the same with three other numbers under other keys; niah_multivalue, with four numbers to be named
    mqar             which value followed each key, in a list of pairs (multi-query associative recall: Arora et al., 2024)
    induction        A B ... A: which word comes next
    copy             a list of words, to be repeated

The answers of all but mqar are generated greedily and compared with the right ones exactly; mqar takes the likeliest token
after each key. Lengths are in tokens of the model's own tokenizer, so that models with one tokenizer get the same items.

Each item has a chance level, the score to be expected of a guesser that knows how an answer looks but not which one is right,
and draws each answer from equally likely candidates:

    niah_multikey              the hidden numbers, whatever their key: 1 in 4
    mqar                       the listed values: 1 in the number of pairs
    induction                  the words of the prompt: 1 in their number
    niah_single_*, multivalue  all numbers of seven digits: 1 in 9 million, for each number asked for
    copy                       the words of the prompt, for each of 14 in turn: 0 to all purposes
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import takewhile
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_pl.errors import InputError
from distill_pl.measure.long_text import read
from distill_pl.student.cache import CACHE
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
LEAD = r"[\s:\"']*"  # what may stand before an answer
NUMBERS = range(10**6, 10**7)


class Item(NamedTuple):
    """Hold one question: `answers` are to be written after the prompt, or tokens `expected` in it."""

    prompt: list[int]
    chance: float  # the score to be expected of guessing
    answers: tuple[str, ...] = ()
    expected: tuple[tuple[int, int], ...] = ()  # positions in the prompt, and the token that follows each


class NoRoom(Exception):
    """Signal that a prompt has no room for its question; args[0] is the number of tokens that it would need."""


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
    encoded = tokenizer(sentences, add_special_tokens=False).input_ids if sentences else []
    return Source(tokenizer, special_tokens(tokenizer)[0], words, [ids for ids in encoded if ids])


def needles(source: Source, rng: random.Random, length: int, depth: float, *, keys: int, values: int, filler: bool) -> Item:
    """Hide `values` numbers under each of `keys` keys in a text and ask for those of one key.

    The first number asked for stands at `depth`, a share of the text from 0 to 1, and all others anywhere.
    """
    names = [f"{source.tokenizer.decode([a]).strip()}-{source.tokenizer.decode([b]).strip()}"
             for a, b in (rng.sample(source.words, 2) for _ in range(keys))]  # fmt: skip
    numbers = [[str(rng.choice(NUMBERS)) for _ in range(values)] for _ in names]
    hidden = [source.encode(NEEDLE.format(key=key, value=number))
              for key, row in zip(names, numbers, strict=True) for number in row]  # fmt: skip
    question = source.encode((QUESTION if values == 1 else QUESTION_OF_SEVERAL).format(key=names[0]))
    room = length - len(source.before) - len(question) - sum(map(len, hidden))
    if room < 0:
        raise NoRoom(length - room)
    sentences = [source.encode(" " + sentence) for sentence in FILLER] if filler else source.sentences
    parts = take(sentences, 0 if filler else rng.randrange(len(sentences)), room)
    places = [depth, *(rng.random() for _ in hidden[1:])]
    # from the last place to the first, so that no place moves
    for place, needle in sorted(zip(places, hidden, strict=True), key=lambda pair: pair[0], reverse=True):
        parts.insert(round(place * len(parts)) if place in (0, 1) else int(place * (len(parts) + 1)), needle)
    guessing = 1 / keys if keys > 1 else 1 / len(NUMBERS)
    return Item([*source.before, *(id for part in parts for id in part), *question], guessing, tuple(numbers[0]))


def take(sentences: Sequence[list[int]], first: int, tokens: int) -> list[list[int]]:
    """Take sentences from `first` on, round and round, of `tokens` tokens in all; the last is cut."""
    taken: list[list[int]] = []
    while tokens > 0:
        sentence = sentences[first % len(sentences)][:tokens]
        taken.append(sentence)
        first, tokens = first + 1, tokens - len(sentence)
    return taken


def pairs(source: Source, rng: random.Random, length: int, depth: float) -> Item:
    """List pairs, `key: value,`, then, after filler, all of them again in another order.

    There are as many as fit twice into `length` and as the words of the vocabulary suffice for.
    """
    before, colon, comma = source.before, source.encode(":"), source.encode(",")
    size = 2 + len(colon) + len(comma)
    count = min((length - len(before)) // (2 * size), len(source.words) // 2)
    if count < 1:
        raise NoRoom(len(before) + 2 * size)
    words = rng.sample(source.words, 2 * count)
    values = dict(zip(words[:count], words[count:], strict=True))
    queries = rng.sample(words[:count], count)
    listed, asked = ([id for key in keys for id in (key, *colon, values[key], *comma)] for keys in (values, queries))
    room = length - len(before) - 2 * count * size
    filler = [id for part in take([source.encode(" " + sentence) for sentence in FILLER], 0, room) for id in part]
    first = length - count * size + len(colon)  # position of the end of the first colon
    expected = tuple((first + size * index, values[key]) for index, key in enumerate(queries))
    return Item([*before, *listed, *filler, *asked], 1 / count, expected=expected)


def repeated(source: Source, rng: random.Random, length: int, depth: float, *, listed: int, given: int, drawn: int) -> Item:
    """Write random words with a list of `listed` words at `depth`, and its first `given` words again at the end.

    drawn: how many words of the vocabulary may occur, at most.
    """
    before = source.before
    words = rng.sample(source.words, min(len(source.words), drawn))
    copied, others = words[:listed], words[listed:]
    room = length - len(before) - listed - given
    if room < 0:
        raise NoRoom(length - room)
    rest = [rng.choice(others) for _ in range(room)]
    place = round(depth * len(rest))
    prompt = [*before, *rest[:place], *copied, *rest[place:], *copied[:given]]
    guessing = 1 / len({*copied, *rest}) ** (listed - given)
    return Item(prompt, guessing, (source.tokenizer.decode(copied[given:]).strip(),))


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
    "induction": Task(repeated, {"listed": 2, "given": 1, "drawn": 1024}),
    "copy": Task(repeated, {"listed": COPIED, "given": 2, "drawn": COPIED + 1024}),
}


def make_items(task: str, source: Source, length: int, questions: Questions) -> list[Item]:
    """Make items of `length` tokens, from the questions' seed alone, with depths from 0 to 1 in equal steps.

    Raises InputError where the tokenizer has too few whole words, there is no text, or `length` has no room for the question.
    """
    if TASKS[task].needs_text and not source.sentences:
        raise InputError(f"tasks={task}: it hides numbers in real text: give --text FILE, or a run folder")
    if len(source.words) < 2 * COPIED:
        raise InputError(
            f"tasks={task}: it needs {2 * COPIED} words that are single tokens, and the tokenizer of "
            f"{source.tokenizer.name_or_path} has {len(source.words)}: leave it out"
        )
    rng = random.Random(f"{questions.seed} {task} {length}")  # of text, the seed is the same on every machine
    depths = [index / max(1, questions.number - 1) for index in range(questions.number)]
    items, needed = [], 0
    for depth in depths:
        try:
            items.append(TASKS[task].make(source, rng, length, depth, **TASKS[task].options))
        except NoRoom as error:
            needed = max(needed, error.args[0])
    if needed:  # at another length, other words are drawn, which may take a few tokens more
        enough = 64 * (needed // 64 + 1)
        raise InputError(f"tasks={task}: length {length} has no room for its question: give lengths of at least {enough}")
    return items


def fingerprint(items: dict[int, list[Item]]) -> str:
    """Hash items, so that results say which questions they answer."""
    return sha256(repr(items).encode()).hexdigest()


@torch.no_grad()
def score(model: PreTrainedModel, tokenizer: Any, items: list[Item], tokens_at_once: int) -> list[float]:
    """Score items of one length -> for each the share of its answers that the model gives. Leaves the model as it was.

    tokens_at_once: of all prompts in one forward pass; a longer prompt is read in segments. Raises InputError for prompts of
    several segments and a model that carries no cache from one to the next.
    """
    scores: list[float] = []
    rows = max(1, tokens_at_once // len(items[0].prompt))
    for batch in (items[start : start + rows] for start in range(0, len(items), rows)):
        prompts = torch.tensor([item.prompt for item in batch], device=model.device)
        if batch[0].expected:
            places = torch.tensor([place for place, _ in batch[0].expected])  # the same in all items of a length
            expected = torch.tensor([[token for _, token in item.expected] for item in batch])
            scores += (likeliest(model, prompts, places, tokens_at_once) == expected).double().mean(1).tolist()
            continue
        longest = max(len(tokenizer.encode(" " + ", ".join(item.answers), add_special_tokens=False)) for item in batch)
        answers = [item.answers for item in batch]
        scores += map(said, answers, continuations(model, tokenizer, prompts, answers, longest + 4, tokens_at_once))
    return scores


def likeliest(model: PreTrainedModel, prompts: Tensor, places: Tensor, size: int) -> Tensor:
    """Find the likeliest token after each of the ascending positions `places` [P] of prompts [B, T] -> [B, P], on the CPU.

    size: tokens of each prompt in one forward pass.
    """
    segments = places.split(torch.bincount(places // size, minlength=math.ceil(prompts.shape[1] / size)).tolist())
    outputs = read(model, prompts, size, places=places)
    found = [output.logits[:, : len(kept)].argmax(-1).cpu() for output, kept in zip(outputs, segments, strict=True)]
    return torch.cat(found, 1)


def continuations(model: PreTrainedModel, tokenizer: Any, prompts: Tensor, answers: Sequence[Sequence[str]],
                  new_tokens: int, size: int) -> list[str]:  # fmt: skip
    """Continue prompts [B, T] of one length greedily, by at most `new_tokens` tokens or up to the end of the text.

    All rows stop as soon as nothing that follows can change their scores, given the right `answers` of each. size: tokens of
    each prompt in one forward pass.
    """
    ends = model.generation_config.eos_token_id
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    unread, new, cache = prompts, prompts[:, :0], None
    for _ in range(new_tokens):
        last = torch.tensor([unread.shape[1] - 1])
        for output in read(model, unread, size, cache, last):
            cache = getattr(output, CACHE, None)
        token = output.logits[:, -1:].argmax(-1)
        new = torch.cat([new, token], 1)
        rows = [list(takewhile(lambda token: token not in ends, row)) for row in new.tolist()]
        texts = [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in rows]
        ended = (len(row) < new.shape[1] for row in rows)
        if all(end or settled(*pair) for end, *pair in zip(ended, answers, texts, strict=True)):
            break
        unread = torch.cat([prompts, new], 1) if cache is None else token  # without a cache, all is read again
    return texts


def settled(answers: Sequence[str], text: str) -> bool:
    """Return whether `said` scores a continuation that begins with `text` the same, however it goes on."""
    text = text.rstrip("\ufffd")  # which stands for a character that has not all its bytes yet
    if len(answers) > 1:
        numbers = re.findall(r"\d+(?=\D)", text)  # that have ended
        return all(answer in numbers for answer in answers)
    return not answers[0].startswith(re.sub(rf"^{LEAD}", "", text))


def said(answers: Sequence[str], text: str) -> float:
    """Return the share of answers in a continuation: a single one must be how it begins, of several numbers each counts."""
    if len(answers) > 1:
        numbers = re.findall(r"\d+", text)
        return mean(answer in numbers for answer in answers)
    answer = answers[0]
    return float(re.match(rf"{LEAD}{re.escape(answer)}(?!\w)", text) is not None)


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean of values; nan of a single one, which says nothing of others."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def summary(items: dict[int, list[Item]], scores: dict[int, list[float]]) -> dict[str, Any]:
    """Summarise scores by length: accuracy, its standard error and the chance level over all items, and accuracy by length."""
    every = [value for values in scores.values() for value in values]
    return {
        "acc": mean(every),
        "acc_stderr": standard_error(every),
        "chance": mean(item.chance for row in items.values() for item in row),
        "n": len(every),
        "by_length": {str(length): mean(values) for length, values in scores.items()},
    }


def kept(student: dict[str, dict], teacher: dict[str, dict]) -> dict[str, float]:
    """Compute what a student keeps of its teacher, from the results of both by task -> shares by name.

    `recall kept` is the share of the teacher's mean margin over guessing, on tasks where both answered the same questions and
    the teacher does better than guessing by two standard errors; without such tasks nothing is returned. `likelihood kept`, the
    ratio of perplexities on the same held-out text, stands beside it: it stays high in a student that has forgotten most.
    """
    rows = [(student[task], teacher[task]) for task in TASKS if task in student and task in teacher]
    rows = [(own, other) for own, other in rows if own["source"] == other["source"]
            and other["acc"] - 2 * other["acc_stderr"] > other["chance"]]  # fmt: skip
    if not rows:
        return {}
    margins = [sum(row["acc"] - row["chance"] for row in column) for column in zip(*rows, strict=True)]
    shares = {"recall kept": margins[0] / margins[1]}
    own, other = student.get("held-out"), teacher.get("held-out")
    if own and other and own.get("source") == other.get("source"):
        shares = {"likelihood kept": other["perplexity"] / own["perplexity"]} | shares
    return shares
