"""Recall tasks: items are what they say, a perfect memory scores all of them, and long prompts are read in pieces."""

import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill_pl.cli import main
from distill_pl.errors import InputError
from distill_pl.measure import recall
from distill_pl.measure.recall import TASKS, Questions, fingerprint, make_items, make_source, said, score, summary
from distill_pl.student.factory import StudentFactory

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

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, prompts, max_new_tokens, **unused):
        rows = [self.tokenizer.encode(" " + self.answer(row.tolist()), add_special_tokens=False) for row in prompts]
        rows = [(row + [1] * max_new_tokens)[:max_new_tokens] for row in rows]
        return torch.cat([prompts, torch.tensor(rows)], 1)

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

    def __call__(self, prompts, use_cache):
        logits = torch.zeros(*prompts.shape, len(self.tokenizer))
        for row, tokens in enumerate(prompts.tolist()):
            for place in range(2, len(tokens)):
                seen = [i for i in range(2, place) if tokens[i - 1 : i + 1] == tokens[place - 1 : place + 1]]
                if seen:
                    logits[row, place, tokens[seen[0] + 1]] = 1
        return SimpleNamespace(logits=logits)


def test_items_have_their_length_and_come_from_the_seed(source, task):
    items = make_items(task, source, LENGTH, QUESTIONS)
    assert len(items) == 5 and all(item.prompt[0] == 0 for item in items)  # BOS
    lengths = {len(item.prompt) for item in items}
    assert lengths == {LENGTH} if task != "mqar" else max(lengths) <= LENGTH
    assert fingerprint({LENGTH: items}) == fingerprint({LENGTH: make_items(task, source, LENGTH, QUESTIONS)})
    assert fingerprint({LENGTH: items}) != fingerprint({LENGTH: make_items(task, source, LENGTH, QUESTIONS._replace(seed=1))})


def test_a_perfect_memory_scores_everything(source, known_words, task):
    items = make_items(task, source, LENGTH, QUESTIONS)
    scores = score(PerfectMemory(known_words), known_words, items, tokens_at_once=2 * LENGTH)
    assert scores == [1.0] * 5
    assert summary({LENGTH: scores})["by_length"] == {str(LENGTH): 1.0}


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


@pytest.mark.parametrize("mixer", ["softmax", "gla"])
def test_a_long_prompt_is_read_in_pieces_with_the_state_carried(teacher, mixer, monkeypatch):
    student = StudentFactory(mixer).build(teacher, 0).eval()
    prompts = torch.randint(1, teacher.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = list(recall.continuations(student, teacher.tokenizer, prompts, 8))
    monkeypatch.setattr(recall, "PREFILL", 16)
    assert list(recall.continuations(student, teacher.tokenizer, prompts, 8)) == whole
    if mixer == "softmax":
        assert list(recall.continuations(teacher.model, teacher.tokenizer, prompts, 8)) == whole


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
    assert "model  niah_multikey: 0% of 192, 0% of 256" in printed and "induction" in printed.splitlines()[-2]
    results = json.loads(next((tmp_path / "eval").glob("model*.json")).read_text())["results"]
    assert list(results) == ["text", *TASKS] and all(results[task]["n"] == 4 for task in TASKS)
    assert "perplexity by position: 1 " in printed and list(results["text"]["by_position"])[-1] == "128"
    main(command)
    assert capsys.readouterr().out.count("measured before") == len(TASKS)
    assert "lengths 'long'" in refused("evaluate", "model", "--tasks", "recall", "--lengths", "long")


def test_what_cannot_be_asked_is_refused(source, known_words):
    with pytest.raises(InputError, match="niah_single_2: it hides numbers in real text: give --text"):
        make_items("niah_single_2", make_source(known_words, ""), LENGTH, QUESTIONS)
    with pytest.raises(InputError, match="length 16 has no room for a question"):
        make_items("niah_single_1", source, 16, QUESTIONS)
    with pytest.raises(InputError, match="length 100000 needs 25000 words"):
        make_items("mqar", source, 100_000, QUESTIONS)
