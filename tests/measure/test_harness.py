"""Scores of lm-eval's tasks on a tiny model, and what lm-eval does not document but the harness relies on."""

import copy
import inspect
import json
import math
import os
import random

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill_pl.errors import InputError
from distill_pl.measure import harness
from distill_pl.measure.evaluate import check_options
from distill_pl.measure.harness import (
    _batch_scorer,
    _from_file,
    _make_zero_shot,
    _no_metric_scripts,
    _stock_task,
    _task_manager,
    check_tasks,
    prompt_tokenizer,
    run_tasks,
)
from distill_pl.student.factory import StudentFactory
from distill_pl.teacher import Teacher

pytestmark = pytest.mark.slow

LETTERS = ["A", "B", "C"]
QUESTIONS = ["What melts?", "Which one flies high?", "Who lives in water?", "What bends least?"]
CHOICES = [["ice", "a stone", "iron"], ["pig", "a small bird", "cow"], ["fish", "an ox", "cats"], ["rod", "ink", "x"]]


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    byte_level = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<eos>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # initializer_range is large so that the choices' log-likelihoods lie far apart
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=256, initializer_range=0.3, **sizes))


def write(folder, task, rows):
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arc_rows(answers):
    return [
        {"id": question, "question": question, "choices": {"text": choices, "label": LETTERS}, "answerKey": answer}
        for question, choices, answer in zip(QUESTIONS, CHOICES, answers, strict=True)
    ]


@torch.no_grad()
def loglikelihood(model, tokenizer, context, continuation):
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return logprobs[start - 1 :].sum().item()


def model_answers(model, tokenizer):
    scores = [
        [loglikelihood(model, tokenizer, f"Question: {question}\nAnswer:", f" {choice}") for choice in choices]
        for question, choices in zip(QUESTIONS, CHOICES, strict=True)
    ]
    return [LETTERS[max(range(3), key=row.__getitem__)] for row in scores]


def other(letter):
    return LETTERS[(LETTERS.index(letter) + 1) % 3]


def test_accuracy_equals_a_hand_computation_and_follows_the_file(model, tokenizer, tmp_path):
    answers = model_answers(model.eval(), tokenizer)
    file = write(tmp_path, "arc_easy", arc_rows([*answers[:3], other(answers[3])]))
    scores = run_tasks(model, tokenizer, ["arc_easy"], data=tmp_path, batch_size=3)["arc_easy"]
    assert (scores["acc"], scores["n"], scores["version"]) == (0.75, 4, 1.0)
    assert scores["acc_stderr"] == pytest.approx(0.25)
    assert {"acc_norm", "acc_norm_stderr"} < scores.keys()
    assert tokenizer.pad_token is None

    # same size and time stamp as before, so that only the content tells
    before = file.stat()
    write(tmp_path, "arc_easy", arc_rows([other(answer) for answer in answers]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert run_tasks(model, tokenizer, ["arc_easy"], data=str(tmp_path))["arc_easy"]["acc"] == 0


@pytest.mark.parametrize("ends", [["<bos>"], ["<bos>", "<eos>"]], ids="-".join)
def test_texts_begin_with_bos_as_in_lm_eval_and_never_end(model, tokenizer, ends):
    """Whatever a tokenizer puts after texts, likelihoods are lm-eval's own of BOS, context and continuation."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def framed(*pieces):
        copied = copy.deepcopy(tokenizer)
        copied.add_special_tokens({"bos_token": "<bos>"})
        ids = [(name, copied.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
        copied.backend_tokenizer.post_processor = TemplateProcessing(single=[*pieces], special_tokens=ids)
        return copied

    model = copy.deepcopy(model).eval()
    model.resize_token_embeddings(258)
    first, *last = ends
    ours = prompt_tokenizer(framed(first, "$A", *last))
    assert ours.encode("What") == [ours.bos_token_id, *tokenizer.encode("What")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in [("What melts?", " ice"), ("<bos>It", " is"), ("", "ice")]]
    stock = HFLM(model, backend="causal", tokenizer=framed("<bos>", "$A"), add_bos_token=True)
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    assert HFLM(model, backend="causal", tokenizer=ours).loglikelihood(requests, disable_tqdm=True) == expected
    by_hand = loglikelihood(model, ours, "What melts?", " ice")
    assert expected[0][0] == pytest.approx(by_hand, rel=1e-5)


def test_batch_scorer_scores_continuations_as_stock_lm_eval_does(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    rng = random.Random(0)
    draw = lambda count: [rng.randrange(257) for _ in range(count)]  # noqa: E731
    requests = [(("", ""), draw(context), draw(own)) for context, own in [(1, 1), (9, 4), (3, 1), (250, 40), (9, 2), (20, 256)]]
    contexts = torch.tensor([draw(5), draw(5)])
    written = model.eval().generate(contexts, max_new_tokens=3, do_sample=False, pad_token_id=0)[:, 5:].tolist()
    requests += [(("", ""), *pair) for pair in zip(contexts.tolist(), written, strict=True)]
    found, expected = (
        kind(model, backend="causal", tokenizer=prompt_tokenizer(tokenizer), batch_size=3)._loglikelihood_tokens(requests)
        for kind in (_batch_scorer(), HFLM)
    )
    ours = _batch_scorer()(model, backend="causal", tokenizer=prompt_tokenizer(tokenizer), batch_size=3)
    with pytest.raises(InputError, match="a task continues by 257 tokens, the model reads 256: leave it out"):
        ours._loglikelihood_tokens([(("", ""), draw(1), draw(257))])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in found) and not all(greedy for _, greedy in found)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)


def test_limit_holds_for_every_task(model, tokenizer, tmp_path):
    write(tmp_path, "arc_easy", arc_rows("ABCA"))
    write(tmp_path, "piqa", [{"goal": f"cut {n}", "sol1": "saw it", "sol2": "hum", "label": n % 2} for n in range(4)])
    pair = {"option1": "Ann", "option2": "Eve"}
    write(tmp_path, "winogrande", [{"sentence": f"{n} times _ won.", **pair, "answer": "2"} for n in range(4)])
    write(tmp_path, "lambada_openai", [{"text": f"there were {n} more of the birds"} for n in range(4)])
    scene = {"activity_label": "Cooking", "ctx_a": "He stirs.", "ctx_b": "he", "endings": ["eats.", "flies.", "a", "b"]}
    write(tmp_path, "hellaswag", [{**scene, "label": str(n)} for n in range(4)])
    tasks = ["hellaswag", "arc_easy", "piqa", "winogrande", "lambada_openai"]
    scores = run_tasks(model, tokenizer, tasks, data=tmp_path, limit=2)
    assert list(scores) == tasks
    for row in scores.values():
        assert row["n"] == 2
        assert 0 <= row["acc"] <= 1 and math.isfinite(row["acc_stderr"])
    assert scores["lambada_openai"]["perplexity"] > 1 and scores["lambada_openai"]["perplexity_stderr"] >= 0
    assert math.isnan(run_tasks(model, tokenizer, ["piqa"], data=tmp_path, limit=1)["piqa"]["acc_stderr"])


GSM8K = [{"question": f"How much is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in (4, 617, 3, 5)]
TRIVIA = [{"question": question.rstrip("?"), "answer": {"aliases": ["Ice", "ice cream"]}} for question in QUESTIONS]
IFEVAL = [{"key": n, "prompt": prompt, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
          for n, prompt in enumerate(["Sing without a comma.", "Dance without a comma."])]  # fmt: skip


@pytest.fixture
def long_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=2048, initializer_range=0.3, **sizes)).eval()


@pytest.fixture
def ifeval_possible(monkeypatch, tmp_path):
    """Put an empty folder in the place of nltk's data, which only instructions about sentences read."""
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])


def test_what_a_model_writes_is_scored_as_the_task_says(long_model, tokenizer, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    texts = {"gsm8k": ["It is 8.\n#### 8", "So 1,234", "#### 7", "none"], "triviaqa": ["ICE", " ice cream ", "iced", ""]}
    write(tmp_path, "gsm8k", GSM8K)
    write(tmp_path, "triviaqa", TRIVIA)
    for task, answers in texts.items():
        monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, answers=answers: answers[: len(requests)])
        scores = run_tasks(long_model, tokenizer, [task], data=tmp_path)[task]
        if task == "gsm8k":
            assert scores["exact_match,strict-match"] == 0.25 and scores["exact_match,flexible-extract"] == 0.5
        else:
            assert scores["exact_match,remove_whitespace"] == 0.5 and scores["n"] == 4


def greedy(model, tokenizer, prompt: str, until: list[str], new_tokens: int) -> str:
    ids = torch.tensor([tokenizer.encode(prompt)])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    return min((text.split(stop)[0] for stop in until), key=len)


@pytest.mark.parametrize("mixer", ["softmax", "gla"])
def test_models_write_in_batches_what_they_write_alone(long_model, tokenizer, tmp_path, mixer):
    """In a batch, prompts of other lengths stand beside a prompt, which is then padded on the left."""
    for part in (long_model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    student = StudentFactory(mixer).build(Teacher(str(tmp_path / "teacher")), seed=0).eval()
    texts = [greedy(student, tokenizer, f"Question: {row['question']}?\nAnswer:", ["\n", ".", ","], 256) for row in TRIVIA]
    assert len(set(texts)) == 4
    rows = [row | {"answer": {"aliases": [text, "x"]}} for row, text in zip(TRIVIA, texts, strict=True)]
    rows[2]["answer"] = {"aliases": [texts[2] + "y"]}
    write(tmp_path, "triviaqa", rows)
    scores = run_tasks(student, tokenizer, ["triviaqa"], data=tmp_path, batch_size=3)["triviaqa"]
    assert scores["exact_match,remove_whitespace"] == 0.75


def test_instructions_are_followed_or_not(long_model, tokenizer, tmp_path, ifeval_possible):
    write(tmp_path, "ifeval", IFEVAL)
    texts = [greedy(long_model, tokenizer, row["prompt"], ["<eos>"], 1280) for row in IFEVAL]
    scores = run_tasks(long_model, tokenizer, ["ifeval"], data=tmp_path, batch_size=2)["ifeval"]
    assert scores["prompt_level_strict_acc"] == sum("," not in text for text in texts) / 2


def test_what_a_written_task_needs_is_asked_for_before_work(model, tokenizer, tmp_path, monkeypatch):
    write(tmp_path, "ifeval", IFEVAL)
    write(tmp_path, "gsm8k", GSM8K)
    absent = {"langdetect"}
    monkeypatch.setattr(harness, "find_spec", lambda package: None if package in absent else object())
    with pytest.raises(InputError, match="tasks=ifeval: it needs packages that are not installed: pip install langdetect$"):
        check_tasks(["ifeval"], tmp_path)
    absent.clear()
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    with pytest.raises(InputError, match="nltk's data punkt_tab, which is not there: python -m nltk.downloader punkt_tab"):
        check_tasks(["ifeval"], tmp_path)
    with pytest.raises(InputError, match="tasks=gsm8k: models may write 256 tokens, and this one has 256 positions"):
        run_tasks(model, tokenizer, ["gsm8k"], data=tmp_path)


def test_bad_names_and_files_are_refused(tmp_path):
    write(tmp_path, "piqa", [{"goal": "cut"}])
    write(tmp_path, "arc_easy", [])
    check_tasks(["piqa"], tmp_path)
    check_tasks(["lambada", "mmlu"], None)
    refused = [
        ([], None, "at least one"),
        (["arc_esy"], None, "tasks=arc_esy.*arc_easy"),
        (["piqa"], tmp_path / "absent", "no such folder"),
        (["piqa", "winogrande"], tmp_path, "winogrande.jsonl is missing or empty.* rows for piqa$"),
        (["arc_easy"], tmp_path, "arc_easy.jsonl is missing or empty"),
        (["lambada"], tmp_path, "tasks=lambada.*name single tasks"),
    ]
    for tasks, data, message in refused:
        with pytest.raises(InputError, match=message):
            check_tasks(tasks, data)


def test_rows_that_cannot_be_loaded_end_in_one_line(model, tokenizer, tmp_path, monkeypatch):
    write(tmp_path, "piqa", [{"prompt": "cut", "label": 0}])
    with pytest.raises(InputError, match=r"tasks=piqa.*give piqa.jsonl in data=.* the columns") as caught:
        run_tasks(model, tokenizer, ["piqa"], data=tmp_path)
    assert "\n" not in str(caught.value)

    (tmp_path / "piqa.jsonl").write_text('{"goal": "cut"}\n{"goal": \n')
    with pytest.raises(InputError, match=r"tasks=piqa.*ArrowInvalid: JSON parse error"):
        run_tasks(model, tokenizer, ["piqa"], data=tmp_path)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"tasks=piqa.*Couldn't reach the Hub at all.*--data FOLDER"):
        run_tasks(model, tokenizer, ["piqa"])


# One test for each function that reaches into lm-eval: it fails by that function's name when lm-eval changes.


def test_stock_task_knows_single_tasks_from_groups_tags_and_code():
    piqa = _stock_task("piqa")
    assert piqa["task"] == "piqa" and piqa["dataset_path"] and piqa["validation_split"]
    manager = harness._task_manager()
    made_in_code = [name for name, entry in manager.task_index.items() if entry.kind.name == "PY_TASK"]
    custom = [name for name, entry in manager.task_index.items() if "custom_dataset" in (entry.cfg or {})]
    assert made_in_code and custom
    for name in ("mmlu", "lambada", made_in_code[0], custom[0]):
        assert name in manager.all_tasks and _stock_task(name) is None
    assert inspect.signature(type(manager)).parameters["include_defaults"].default is True  # the index outside of these tests


def test_from_file_overrides_a_stock_tasks_rows(tmp_path):
    file = write(tmp_path, "piqa", [{"goal": f"cut {n}", "sol1": "saw it", "sol2": "hum", "label": n % 2} for n in range(3)])
    (task,) = harness._task_manager().load(_from_file("piqa", file, str(tmp_path / "cache")))["tasks"].values()
    assert task.config.dataset_path == "json" and [row["goal"] for row in task.eval_docs] == ["cut 0", "cut 1", "cut 2"]
    assert task.config.output_type == _stock_task("piqa")["output_type"]


def test_make_zero_shot_sets_a_task_and_refuses_code(tmp_path):
    file = write(tmp_path, "piqa", [{"goal": "cut", "sol1": "saw it", "sol2": "hum", "label": 0}])
    spec = _from_file("piqa", file, str(tmp_path / "cache"))
    (task,) = harness._task_manager().load(spec)["tasks"].values()
    task.set_config("num_fewshot", 5)
    _make_zero_shot("piqa", task, seed=0)
    assert task.config.num_fewshot == 0
    assert task.fewshot_rnd.random() == random.Random(0).random()
    spec["task"][0]["unsafe_code"] = True
    (task,) = harness._task_manager().load(spec)["tasks"].values()
    with pytest.raises(InputError, match="tasks=piqa: it runs what the model writes as code"):
        _make_zero_shot("piqa", task, seed=0)


PIQA = {"goal": "cut", "sol1": "saw it", "sol2": "hum", "label": 0}


@pytest.mark.parametrize("task, row, changes, says", [
    ("piqa", PIQA, {"label": 2}, r"row 2 does not fit \(it has choices .* and answer 2\): give piqa.jsonl"),
    ("piqa", PIQA, {"label": None}, "row 2 does not fit .*it has choices"),
    ("piqa", PIQA, {"sol2": None}, r"row 2 .*it has choices \['saw it', None\] and answer 0"),
    ("arc_easy", arc_rows("ABCA")[0], {"answerKey": "Z"}, "row 2 does not fit"),
    ("winogrande", {"sentence": "A _ is.", "option1": "b", "option2": "c", "answer": "1"}, {"answer": "3"}, "row 2 .*KeyError"),
    ("gsm8k", GSM8K[0], {"answer": None}, "row 2 does not fit .*a column is empty"),
    ("lambada_openai", {"text": "a bird"}, {"text": None}, "row 2 does not fit .*UndefinedError"),
    ("lambada_openai", {"text": "a bird"}, {"text": ""}, "row 2 does not fit .*a column is empty"),
])  # fmt: skip
def test_check_rows_names_the_row_whose_answer_is_no_choice(model, tokenizer, tmp_path, task, row, changes, says):
    write(tmp_path, task, [row, row | changes])
    with pytest.raises(InputError, match=says):  # before any other task is measured
        check_options(task, str(tmp_path))
    if task == "gsm8k":
        return  # the model has no room for its answers
    with pytest.raises(InputError, match=says):
        run_tasks(model, tokenizer, [task], data=tmp_path)
    assert run_tasks(model, tokenizer, [task], data=tmp_path, limit=1)[task]["n"] == 1


def test_task_manager_makes_lm_eval_compile_a_template_once(monkeypatch):
    from lm_eval import utils

    monkeypatch.setattr("lm_eval.tasks.TaskManager", object)  # which indexes for ten seconds
    monkeypatch.setattr(utils.env, "from_string", utils.env.from_string)
    _task_manager.__wrapped__()
    assert [utils.apply_template("{{ a }} of 3", {"a": a}) for a in (1, 2)] == ["1 of 3", "2 of 3"]
    before = utils.env.from_string.cache_info()
    utils.apply_template("{{ a }} of 3", {"a": 3})
    assert utils.env.from_string.cache_info()[:2] == (before.hits + 1, before.misses)


def test_no_metric_scripts_refuses_evaluate_load():
    import evaluate

    load = evaluate.load
    with pytest.raises(InputError, match="script of metric 'code_eval'"), _no_metric_scripts():
        evaluate.load("code_eval")
    assert evaluate.load is load
