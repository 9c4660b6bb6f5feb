"""Recall tasks: a perfect memory scores everything, a guesser the chance level, and early stops change nothing."""

import json
import random
import re
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from helpers import refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedTokenizerFast

from distill_pl.cli import main
from distill_pl.errors import InputError
from distill_pl.measure import recall
from distill_pl.measure.recall import (
    TASKS,
    Item,
    Questions,
    continuations,
    fingerprint,
    make_items,
    make_source,
    said,
    score,
    settled,
    summary,
)
from distill_pl.student.cache import CACHE
from distill_pl.student.factory import StudentFactory
from distill_pl.teacher import Teacher

LENGTH = 256
QUESTIONS = Questions([LENGTH], 5, None, 0)


@pytest.fixture(scope="module")
def known_words() -> PreTrainedTokenizerFast:
    """Train a tokenizer with hundreds of words that are one token, which begins every text with BOS."""
    chance = random.Random(0)
    words = ["".join(chance.choice("abcdefghij") for _ in range(4)) for _ in range(400)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(chance.choices(words, k=40)) + recall.QUESTION for _ in range(300)], trainer)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def source(known_words) -> recall.Source:
    return make_source(known_words, " ".join(f"This is sentence {number} of a text." for number in range(200)))


@pytest.fixture(params=TASKS)
def task(request) -> str:
    return request.param


class PerfectMemory:
    """Answer by searching the prompt, as a model with a perfect memory could."""

    device = "cpu"
    generation_config = SimpleNamespace(eos_token_id=1)

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *args, **options):
        return self.forward(*args, **options)

    def forward(self, tokens, use_cache, logits_to_keep, **cache):
        unsaid = cache.get(CACHE)
        if unsaid is None:  # tokens still to be said
            answers = ["" if len(logits_to_keep) > 1 else self.answer(row) for row in tokens.tolist()]
            unsaid = [self.tokenizer.encode(f" {text}", add_special_tokens=False) + [1] for text in answers]
        logits = torch.zeros(len(tokens), len(logits_to_keep), len(self.tokenizer))
        for row, words in enumerate(unsaid):
            if len(logits_to_keep) == 1:
                logits[row, 0, words.pop(0)] = 1
            else:
                for index, place in enumerate(logits_to_keep.tolist()):
                    logits[row, index, self.value(tokens[row, : place + 1].tolist())] = 1
        return SimpleNamespace(logits=logits, **{CACHE: unsaid})

    def answer(self, prompt: list[int]) -> str:
        text = self.tokenizer.decode(prompt)
        asked = re.findall(r"for (\S+) mentioned in the text", text)
        if asked:
            return ", ".join(re.findall(rf"numbers for {asked[-1]} is: (\d+)", text))
        for last in (prompt[-2:], prompt[-1:]):
            for end in range(len(last), len(prompt) - len(last)):
                if prompt[end - len(last) : end] == last:
                    return self.tokenizer.decode(prompt[end : end + recall.COPIED - 2]).strip()
        raise AssertionError("nothing was seen before")

    def value(self, read: list[int]) -> int:
        """Return what followed `key:` when it was read before."""
        return next(read[place + 1] for place in range(2, len(read)) if read[place - 1 : place + 1] == read[-2:])


class Guesser(PerfectMemory):
    """Answer with any of the numbers, words or values that the prompt holds."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.rng = random.Random(0)

    def answer(self, prompt: list[int]) -> str:
        numbers = re.findall(r"is: (\d+)", self.tokenizer.decode(prompt))
        return self.rng.choice(numbers) if numbers else self.tokenizer.decode(self.rng.choice(list({*prompt[1:]}))).strip()

    def value(self, read: list[int]) -> int:
        return self.rng.choice(sorted({read[place + 1] for place in range(len(read) - 1) if read[place] == read[-1]}))


def test_items_have_their_length_and_come_from_the_seed(source, task):
    items = make_items(task, source, LENGTH, QUESTIONS)
    assert len(items) == 5 and all(item.prompt[0] == 0 for item in items)  # BOS
    assert {len(item.prompt) for item in items} == {LENGTH}
    assert fingerprint({LENGTH: items}) == fingerprint({LENGTH: make_items(task, source, LENGTH, QUESTIONS)})
    assert fingerprint({LENGTH: items}) != fingerprint({LENGTH: make_items(task, source, LENGTH, QUESTIONS._replace(seed=1))})


def test_a_perfect_memory_scores_everything(source, known_words, task):
    items = make_items(task, source, LENGTH, QUESTIONS)
    scores = score(PerfectMemory(known_words), known_words, items, tokens_at_once=2 * LENGTH)
    assert scores == [1.0] * 5
    found = summary({LENGTH: items}, {LENGTH: scores})
    assert found["acc"] == 1 and found["by_length"] == {str(LENGTH): 1.0} and found["chance"] == mean(x.chance for x in items)


@pytest.mark.parametrize(("task", "number"), [("niah_multikey", 300), ("mqar", 20), ("induction", 2000)])
def test_a_guesser_scores_the_chance_level(source, known_words, task, number):
    items = make_items(task, source, 192 if task == "niah_multikey" else 48, QUESTIONS._replace(number=number))
    expected, found = mean(item.chance for item in items), mean(score(Guesser(known_words), known_words, items, 2000))
    guesses = number * (len(items[0].expected) or 1)
    assert abs(found - expected) < 4 * (expected * (1 - expected) / guesses) ** 0.5 and 0.01 < found


def test_guessing_scores_next_to_nothing_where_an_answer_is_not_one_of_few(source):
    for task in ("niah_single_1", "niah_single_2", "niah_multivalue", "copy"):
        assert all(0 < item.chance < 2e-7 for item in make_items(task, source, LENGTH, QUESTIONS))


def test_pairs_are_as_many_as_there_are_words_and_lie_further_apart_in_longer_prompts(source):
    short, long, longer = (make_items("mqar", source, length, QUESTIONS)[0] for length in (LENGTH, 2500, 4000))
    assert len(short.expected) < len(long.expected) == len(longer.expected) == len(source.words) // 2
    first = longer.expected[0][0]
    seen = longer.prompt.index(longer.prompt[first - 1])
    assert longer.prompt[seen + 2] == longer.expected[0][1] and first - seen > 4000 - 4 * len(source.words)


def test_numbers_are_hidden_from_the_beginning_to_the_end(source, known_words):
    items = make_items("niah_single_1", source, LENGTH, QUESTIONS)
    places = [known_words.decode(item.prompt).index(item.answers[0]) for item in items]
    assert places == sorted(places)
    first, last = (known_words.decode(items[index].prompt) for index in (0, -1))
    assert first.index("The grass") > places[0] and last.index("What is the special") - places[-1] < 20


def test_answers_are_exact():
    assert said(["123"], " 123.") == said(["123"], ": 123 and 456") == 1
    assert said(["123"], " 1234") == said(["123"], " it is 123") == 0
    assert said(["12", "34"], " 34, 12") == 1 and said(["12", "34"], " 12, 56") == 0.5


def test_nothing_that_follows_changes_a_settled_score():
    rng = random.Random(0)
    for answers in (["12"], ["12", "21"], ["a b"]):
        for _ in range(3000):
            text = "".join(rng.choices("12ab :,\n\ufffdé", k=8))
            ends = [end for end in range(9) if settled(answers, text[:end])]
            assert ends == list(range(ends[0], 9)) if ends else True  # once settled, always settled
            assert all(said(answers, text[:end].rstrip("\ufffd")) == said(answers, text) for end in ends)
    assert settled(["12"], " 13") and settled(["12"], " 12.") and not settled(["12"], " 12") and not settled(["12"], " :")
    assert settled(["12", "21"], "21, 12 ") and not settled(["12", "21"], "21, 12")


UNKNOWN = ["no such text"]  # an answer of two, which is never settled


@pytest.mark.parametrize("mixer", ["softmax", "gla"])
def test_prompts_are_continued_as_by_generate_in_segments_too(teacher, mixer):
    student = StudentFactory(mixer).build(teacher, 0).eval()
    prompts = torch.randint(1, teacher.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    ids = student.generate(prompts, **options)[:, prompts.shape[1] :]
    expected = [teacher.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    models = [student] if mixer == "gla" else [student, teacher.model]
    for size in (150, 64):
        for model in models:
            assert continuations(model, teacher.tokenizer, prompts, [UNKNOWN * 2] * 2, 8, size) == expected
    without_cache = lambda ids, use_cache, logits_to_keep: SimpleNamespace(  # noqa: E731
        logits=student(ids, use_cache=False).logits
    )
    without_cache.device, without_cache.generation_config = "cpu", student.generation_config
    assert continuations(without_cache, teacher.tokenizer, prompts, [UNKNOWN * 2] * 2, 8, 2**15) == expected


def test_an_answer_ends_where_the_tokenizer_says_if_the_model_does_not(teacher, monkeypatch):
    prompts = torch.randint(1, teacher.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(teacher.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(teacher.model.lm_head, "forward", lambda x: torch.eye(teacher.config.vocab_size)[
        torch.full(x.shape[:-1], teacher.tokenizer.eos_token_id)])  # fmt: skip
    assert continuations(teacher.model, teacher.tokenizer, prompts, [UNKNOWN] * 2, 3, 40) == ["", ""]


@pytest.mark.parametrize("task", ["niah_single_1", "mqar"])
def test_a_model_that_hands_on_no_state_reads_prompts_whole(source, known_words, task):
    torch.manual_seed(0)
    sizes = {"n_positions": 2 * LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 1}
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=len(known_words), **sizes)).eval()
    read = []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape))
    items = make_items(task, source, LENGTH, QUESTIONS)
    assert len(score(model, known_words, items, tokens_at_once=2 * LENGTH)) == 5
    assert all(rows <= 2 and length >= LENGTH for rows, length in read)
    with pytest.raises(InputError, match="rows of 256 tokens: a openai-gpt carries no cache .* at most 255"):
        score(model, known_words, items, tokens_at_once=LENGTH - 1)


def test_rows_stop_together_once_their_scores_are_settled(teacher):
    prompts = torch.randint(1, teacher.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = continuations(teacher.model, teacher.tokenizer, prompts, [UNKNOWN * 2] * 2, 30, 40)
    stopped = continuations(teacher.model, teacher.tokenizer, prompts, [UNKNOWN] * 2, 30, 40)
    assert all(text.startswith(begun) and len(begun) < len(text) / 3 for text, begun in zip(whole, stopped, strict=True))


def test_the_copied_softmax_student_scores_what_its_teacher_scores(known_words, tmp_path):
    """Half of the answers are the teacher's own, so that it scores on these; generated ones, and tokens after places."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(known_words), initializer_range=0.2, eos_token_id=1, **sizes))
    model.save_pretrained(tmp_path)
    known_words.save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path))
    student = StudentFactory("softmax", init="qkv").build(teacher, 0).eval()
    prompts = torch.randint(3, len(known_words), (6, 40))
    with torch.no_grad():
        likeliest = model(prompts).logits.argmax(-1).tolist()
    words = [text.split()[0] for text in continuations(model, known_words, prompts, [UNKNOWN * 2] * 6, 8, 40)]
    written, chosen = [], []
    for index, (row, word, best) in enumerate(zip(prompts.tolist(), words, likeliest, strict=True)):
        written.append(Item(row, 0, (word if index % 2 else f"{word}x",)))
        chosen.append(Item(row, 0, expected=tuple((place, best[place] if place % 2 else 0) for place in range(10, 30))))
    for items in (written, chosen):
        scores = score(teacher.model, known_words, items, tokens_at_once=100)
        assert 0.2 < mean(scores) < 0.8 and score(student, known_words, items, tokens_at_once=100) == scores
        assert score(student, known_words, items, tokens_at_once=16) == scores  # each in three segments


def test_evaluate_measures_recall_once(known_words, tmp_path, monkeypatch, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(known_words), **sizes)).save_pretrained(tmp_path / "model")
    known_words.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("This is a text. It has two sentences. " * 20)
    monkeypatch.chdir(tmp_path)
    command = "evaluate model --tasks recall --lengths 192,256 --limit 2 --text text.txt".split()
    main(command)
    printed = capsys.readouterr().out
    assert "model  niah_multikey: 0% of 192, 0% of 256" in printed and "induction" in printed.splitlines()[-3]
    assert "niah_multikey 25.00%, niah_multivalue 0.00%, mqar " in printed.splitlines()[-1]
    results = json.loads(next((tmp_path / "eval").glob("model*.json")).read_text())["results"]
    assert list(results) == ["text", *TASKS] and all(results[task]["n"] == 4 for task in TASKS)
    assert "perplexity by position in 1 row of 256 tokens: 1 " in printed and list(results["text"]["by_position"])[-1] == "128"
    main(command)
    assert capsys.readouterr().out.count("measured before") == len(TASKS)
    assert "lengths 'long'" in refused("evaluate", "model", "--tasks", "recall", "--lengths", "long")


def test_what_cannot_be_asked_is_refused(source, known_words):
    with pytest.raises(InputError, match="niah_single_2: it hides numbers in real text: give --text"):
        make_items("niah_single_2", make_source(known_words, ""), LENGTH, QUESTIONS)
    with pytest.raises(InputError, match="copy: it needs 32 words that are single tokens, and the tokenizer of .* has 5"):
        make_items("copy", source._replace(words=source.words[:5]), LENGTH, QUESTIONS)


@pytest.mark.parametrize("task", TASKS)
def test_a_length_without_room_is_refused_and_the_one_that_is_named_has_room(source, task):
    with pytest.raises(InputError, match=f"tasks={task}: length 2 has no room for its question: give lengths of at") as refusal:
        make_items(task, source, 2, QUESTIONS)
    length = int(str(refusal.value).split()[-1])
    assert {len(item.prompt) for item in make_items(task, source, length, QUESTIONS)} == {length}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--tasks mqar,copy --lengths 17,999999", "tasks=copy: length 17 has no room"),
        ("--tasks mqar --text nowhere.txt", "text: 'nowhere.txt': no such file"),
        ("--text text.txt", "text: it holds 4 tokens, fewer than the largest of lengths, 4096"),
        ("--text text.txt --lengths 1", "text: rows of 1 token have none to predict"),
        ("--tasks recal", "did you mean recall"),
    ],
)
def test_questions_are_refused_before_anything_is_measured(tmp_path, monkeypatch, known_words, options, says):
    monkeypatch.chdir(tmp_path)
    known_words.save_pretrained("model")  # without weights
    LlamaConfig(vocab_size=len(known_words)).save_pretrained("model")
    Path("text.txt").write_text("a b")
    assert says in refused("evaluate", "model", *options.split())
    assert not Path("eval").exists()
