"""`distill-pl evaluate` and `generate` on a finished run."""

import copy
import json
import math
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from helpers import refused
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import distill_pl.measure.evaluate
from distill_pl.data.chunks import waiting_lock
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.errors import InputError
from distill_pl.exports.native import as_native
from distill_pl.measure import paper, recall
from distill_pl.measure.evaluate import (
    check_positions,
    config_hash,
    encode_prompt,
    evaluate,
    generate,
    held_out_text,
    recovery,
    table,
)
from distill_pl.student.factory import StudentFactory
from distill_pl.teacher import Teacher
from distill_pl.tokenizer import special_tokens

pytestmark = pytest.mark.slow


def test_perplexity_of_both_models_on_the_held_out_text(run, teacher_folder, capsys):
    evaluate([str(run)])
    printed = capsys.readouterr().out
    results = {name: json.loads((run / "eval" / f"{name}.json").read_text())["results"] for name in ("teacher", "student")}
    teacher = Teacher(str(teacher_folder))
    chunks = ChunkDataModule(**yaml.safe_load((run / "config.yaml").read_text())["data"]).open(teacher.tokenizer).validation
    tokens = torch.from_numpy(chunks.astype("int64"))
    expected = math.exp(teacher.model(tokens, labels=tokens).loss.item())
    assert results["teacher"]["held-out"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert f"{expected:.4g}" in printed and f"{results['student']['held-out']['perplexity']:.4g}" in printed


def test_a_run_is_measured_beside_the_teacher_it_had(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    file = copy / "fingerprints.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teacher": "another"}))
    assert "is not the one that" in refused("evaluate", copy)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.yaml", "", r"config.yaml is damaged or not of distill-pl fit \(teacher is None\)"),
        ("config.yaml", "- a", r"config.yaml is damaged .* \(teacher is None\)"),
        ("config.yaml", "data: 3", r"config.yaml is damaged .* \(data is 3\)"),
        ("config.yaml", "student: {init: [qkv]}", r"config.yaml is damaged .* \(student.init is \['qkv'\]\)"),
        ("config.yaml", "data: {dataset: x}", r"config.yaml is damaged .* \(data.sequence_length is None\)"),
        ("config.yaml", "teacher: /moved", "run was distilled from '/moved', where no model is"),
        ("config.yaml", "teacher: a/folder/elsewhere", "run was distilled from 'a/folder/elsewhere', where no model is"),
        ("fingerprints.json", "{", "fingerprints.json is damaged"),
        ("fingerprints.json", "[]", "fingerprints.json is damaged"),
    ],
)
def test_damaged_files_of_a_run_are_one_line(run, tmp_path, monkeypatch, name, text, says):
    monkeypatch.chdir(tmp_path)
    file = Path(shutil.copytree(run, "run")) / name
    keeps = name == "config.yaml" and text.partition(":")[1]
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | yaml.safe_load(text)) if keeps else text)
    for command in ("evaluate run", "layers run --tasks=", *(["report run"] if "config" in says else [])):
        assert re.search(says, refused(*command.split()))


@pytest.mark.parametrize("text", ['{"results": ', "[]", '{"results": []}', '{"results": {"held-out": 3}}', '{"results": null}'])
def test_damaged_results_are_one_line(run, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(run, "run", ignore=shutil.ignore_patterns("eval")))
    (copy / "eval").mkdir()
    for name in ("student", "teacher"):
        (copy / "eval" / f"{name}.json").write_text(text)
    for command in ("evaluate run", "report run"):
        assert re.search(r"run/eval/(student|teacher).json is damaged: delete it", refused(*command.split()))


def test_each_run_has_its_teachers_results_and_perplexity_of_its_own_text(run, tmp_path, capsys):
    copies = [Path(shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("eval"))) for name in ("a", "b", "c")]
    config = yaml.safe_load((run / "config.yaml").read_text())
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"This is document {number}, and it is long enough." for number in range(50)))
    config["data"] |= {"dataset": str(text), "cache": str(tmp_path)}
    (copies[1] / "config.yaml").write_text(yaml.safe_dump(config))
    ChunkDataModule(**config["data"]).open(Teacher(config["teacher"]).tokenizer).prepare(1)
    with pytest.raises(InputError, match=f"{text}' is no longer the one that {copies[1]} held out a part of: put"):
        evaluate([str(copies[1])])
    os.utime(text, (1, 1))  # a copy without its date, which is packed anew
    recorded = json.loads((run / "fingerprints.json").read_text())
    del recorded["held_out"]  # as in runs of earlier versions
    (copies[1] / "fingerprints.json").write_text(json.dumps(recorded))
    evaluate([*map(str, copies)], text=str(text), lengths="16", limit=2)
    for name in ("teacher", "student"):
        a, b, c = (json.loads((copy / "eval" / f"{name}.limit2.json").read_text())["results"] for copy in copies)
        assert a["held-out"] == c["held-out"] and a["held-out"]["perplexity"] != b["held-out"]["perplexity"]
        assert a["text"] == b["text"] == c["text"]
    printed = capsys.readouterr().out
    shown = [row.split("  ")[0] for row in printed.splitlines()[-6:]]
    assert shown[1:] == [config["teacher"], str(copies[0]), f"{config['teacher']} (text of {copies[1]})", *map(str, copies[1:])]
    assert "perplexity by position in 2 rows of 16 tokens: 1 " in printed
    evaluate([str(copies[0])], limit=2)  # shows what was asked for, not the text of the call before
    assert capsys.readouterr().out.splitlines()[1].split() == ["perplexity"]


def test_held_out_texts_are_alike_if_all_that_says_what_is_read_is(tmp_path, monkeypatch):
    monkeypatch.setattr("distill_pl.measure.evaluate.read_config", lambda run: {"data": run})
    monkeypatch.setattr("distill_pl.measure.evaluate.read_fingerprints", lambda run: {"held_out": run.get("hash", "0")})
    data = {"dataset": "a/b", "validation_tokens": "1k", "sequence_length": 32, "name": None, "seed": 1, "shuffle": 3}
    other = [{"dataset": "c"}, {"validation_tokens": "2k"}, {"sequence_length": 16}, {"name": "x"}, {"revision": "y"},
             {"text_column": "z"}, {"skip_bad_rows": True}, {"hash": "1"}]  # fmt: skip
    texts = [held_out_text(data | changes) for changes in ({}, *other)]
    assert len(set(texts)) == 1 + len(other) and held_out_text(data | {"shuffle": 4, "batch_size": 9}) == texts[0]


def test_tasks_from_files_for_a_run_and_for_a_plain_model(run, teacher_folder, tmp_path, monkeypatch, capsys):
    rows = [{"goal": "to dry", "sol1": "use a towel.", "sol2": "use a lake.", "label": 0}] * 3
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluate([str(run)], tasks="piqa", data=str(tmp_path), limit=2)
    assert json.loads((run / "eval" / "student.limit2.json").read_text())["results"]["piqa"]["n"] == 2
    monkeypatch.chdir(tmp_path)
    evaluate([str(teacher_folder)], tasks="piqa", data=str(tmp_path))
    report = json.loads(next((tmp_path / "eval").glob(f"*{teacher_folder.name}.json")).read_text())
    assert report["results"]["piqa"]["n"] == 3 and "held-out" not in report["results"]
    copy = Path(shutil.copytree(teacher_folder, tmp_path / "model"))
    for place, name in {copy: ".", tmp_path / "eval": "../model", tmp_path: "./model"}.items():
        monkeypatch.chdir(place)
        evaluate([name], tasks="piqa", data=str(tmp_path))
        (file,) = Path("eval").glob("*model.json")
        assert not file.name.startswith(".")


def test_the_card_holds_what_all_calls_have_measured(run, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    evaluate([str(copy)])
    file = copy / "eval" / "student.json"
    report = json.loads(file.read_text())
    accuracies = {task: {"acc": 0.5, "acc_stderr": 0.01, "source": "hub"} for task in paper.TASKS}
    file.write_text(json.dumps(report | {"results": report["results"] | accuracies}))

    def recalled(limit: int, share: float, **changes) -> None:
        row = {"acc": share, "chance": 0.25, "n": 2 * limit, "by_length": {"512": 1.0, "4096": share}}
        results = {"results": {"mqar": row, "piqa": {"acc": 0.0}}}
        (copy / "eval" / f"student.limit{limit}.json").write_text(json.dumps(report | results | changes))

    recalled(200, 0.9, weights="of before")
    recalled(100, 0.2)
    recalled(3, 0.0)
    evaluate([str(copy)])
    card = (copy / "student" / "README.md").read_text()
    assert "| recall, % of prompts of so many tokens | 512 | 4096 | by guessing |" in card
    assert "| mqar | 100 | 20 | 25.0 |" in card and "| piqa | 50.00 ± 1.00 |" in card


@pytest.mark.parametrize("keys", [{}, {"beams": 2}, {"temperature": 1.0, "seed": 3}])
def test_generate_continues_the_prompt(run, monkeypatch, capsys, keys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "distill_pl.decoding", None)  # on a CPU the fast decoder need not even be importable
    generate(str(run), prompt="Story 1.", max_new_tokens=8, **keys)
    first = capsys.readouterr().out
    assert first.startswith("Story 1.") and len(first) > len("Story 1.\n")
    generate(str(run), prompt="Story 1.", max_new_tokens=8, **keys)
    assert capsys.readouterr().out == first


def test_refusals(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot be loaded"):
        generate("/nowhere")
    with pytest.raises(InputError, match="no folder here, .*: give a run folder, or --tasks or --text"):
        evaluate(["/nowhere"])
    monkeypatch.setattr("distill_pl.measure.evaluate.load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match="no token long"):
        generate(str(run), prompt="")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(InputError, match="not finished"):
        evaluate([str(tmp_path)])


TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
NO_LANGUAGE_MODELS = {
    "an encoder-decoder": (AutoModelForSeq2SeqLM, "t5", T5, "is an encoder-decoder .t5."),
    "an encoder": (AutoModelForMaskedLM, "bert", TINY, "its logits depend on later tokens .bert."),
    "no head": (AutoModel, "llama", TINY | {"tie_word_embeddings": False}, r"lacks 1 of its weights .lm_head.weight"),
    "another tokenizer": (AutoModel, "llama", TINY | {"vocab_size": 290}, "ids up to 299, its embedding 290 rows"),
}


@pytest.mark.parametrize("kind", NO_LANGUAGE_MODELS)
def test_only_whole_language_models_are_measured(tokenizer, tmp_path, kind):
    auto_class, model_type, sizes, message = NO_LANGUAGE_MODELS[kind]
    sizes = {"vocab_size": len(tokenizer), "tie_word_embeddings": True} | sizes
    auto_class.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for command in (lambda path: evaluate([path], tasks="piqa"), generate):
        with pytest.raises(InputError, match=message) as refusal:
            command(str(tmp_path))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("model_type", "sizes"), [
    ("gpt2", {"max_position_embeddings": 32}), ("gptj", {"max_position_embeddings": 32, "rotary_dim": 4}),
    ("mamba", {"state_size": 4}),
])  # fmt: skip
def test_other_architectures_are_continued_within_their_positions(save_model, capsys, model_type, sizes):
    folder = str(save_model(model_type, **sizes))
    if model_type != "mamba":
        with pytest.raises(InputError, match="a table of 32 positions, .*: shorten prompt or lower max_new_tokens"):
            generate(folder, "Story 1.", max_new_tokens=32)
        with pytest.raises(InputError, match="has a table of 32 positions, 128 are asked for: give shorter lengths"):
            evaluate([folder], tasks="mqar", lengths="64")
    config = json.loads((Path(folder) / "generation_config.json").read_text())
    (Path(folder) / "generation_config.json").write_text(json.dumps(config | {"stop_strings": ["no such word"]}))
    generate(folder, "Story 1.", max_new_tokens=16)
    assert capsys.readouterr().out.startswith("Story 1.")


def test_a_student_as_another_class_has_no_table_of_positions(variant):
    student = StudentFactory("kda").build(variant("llama"), seed=0)
    check_positions("m", as_native(student).config, 10**6)


def test_a_prompt_begins_as_texts_do_and_has_no_end(tokenizer):
    framed = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
        tokenizer.backend_tokenizer.to_str()), eos_token=tokenizer.eos_token)  # fmt: skip
    end = tokenizer.eos_token_id
    framed.backend_tokenizer.post_processor = TemplateProcessing(
        single=[tokenizer.eos_token, "$A", tokenizer.eos_token], special_tokens=[(tokenizer.eos_token, end)]
    )
    assert special_tokens(framed) == ([end], [end])
    plain = tokenizer.encode("Story 1.")
    assert encode_prompt(framed, "Story 1.") == encode_prompt(framed, f"{tokenizer.eos_token}Story 1.") == [end, *plain]
    assert encode_prompt(framed, "") == [end] and encode_prompt(tokenizer, "Story 1.") == plain


def test_places_that_take_no_results_are_refused_before_work(run, teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("distill_pl.measure.evaluate.load", lambda path: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write eval.*\.json"):
        evaluate([str(teacher_folder)], tasks="piqa")
    (tmp_path / "eval").unlink()
    (tmp_path / "eval").mkdir()
    report = tmp_path / "eval" / f"{str(teacher_folder).strip('/').replace('/', '--')}.json"
    report.write_text('{"results": ')
    with pytest.raises(InputError, match=f"{report.name} is damaged: delete it"):
        evaluate([str(teacher_folder)], tasks="piqa")
    create = tempfile.TemporaryFile

    def refuse_in_student(dir: Path):  # root may write to any folder
        if dir.name == "student":
            raise PermissionError(13, "Permission denied", str(dir))
        return create(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse_in_student)
    with pytest.raises(InputError, match=r"cannot write .*student.README\.md"):
        evaluate([str(run)])


def test_what_was_measured_is_not_measured_again(run, tmp_path, monkeypatch, capsys):
    rows = [{"goal": "to dry", "sol1": "use a towel.", "sol2": "use a lake.", "label": 0}] * 3
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = {"tasks": "piqa", "data": str(tmp_path), "limit": 3}
    evaluate([str(run)], **asked)
    file = run / "eval" / "student.limit3.json"
    first, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert "measured before" not in printed
    monkeypatch.setattr("distill_pl.measure.evaluate.held_out_perplexity", lambda *args: pytest.fail("again"))
    run_tasks = distill_pl.measure.evaluate.run_tasks
    monkeypatch.setattr("distill_pl.measure.evaluate.run_tasks", lambda *args, **kwargs: pytest.fail("again"))
    evaluate([str(run), str(run)], **asked)
    again = capsys.readouterr().out
    assert again.count("measured before") == 4 and again.splitlines()[-3:] == printed.splitlines()[-3:]
    assert json.loads(file.read_text()) == first
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))  # other questions
    monkeypatch.setattr("distill_pl.measure.evaluate.run_tasks", run_tasks)
    evaluate([str(run)], **asked)
    assert json.loads(file.read_text())["results"]["piqa"]["n"] == 2


def test_what_was_measured_stays_beside_results_of_other_seeds_dtypes_and_versions(run, tmp_path, monkeypatch, capsys):
    rows = [{"goal": "to dry", "sol1": "use a towel.", "sol2": "use a lake.", "label": 0}] * 2
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = {"tasks": "piqa", "data": str(tmp_path), "limit": 2}
    evaluate([str(run)], **asked)
    file, load = run / "eval" / "student.limit2.json", distill_pl.measure.evaluate.load
    first = json.loads(file.read_text())

    def load_as_on_a_gpu(path: str):
        model, tokenizer = load(path)
        return model.bfloat16(), tokenizer

    monkeypatch.setattr("distill_pl.measure.evaluate.load", load_as_on_a_gpu)
    evaluate([str(run)], limit=2, seed=1)
    kept = json.loads(file.read_text())
    assert kept["weights"] == first["weights"] and kept["results"]["piqa"] == first["results"]["piqa"]
    assert kept["results"]["held-out"]["settings"].items() >= {"dtype": "torch.bfloat16", "seed": 1}.items()
    monkeypatch.setattr("distill_pl.measure.evaluate.load", load)
    capsys.readouterr()
    evaluate([str(run)], **asked)
    assert capsys.readouterr().out.count("piqa: measured before") == 2
    assert json.loads(file.read_text())["weights"] == first["weights"]


def test_two_evaluations_of_one_run_follow_each_other(run, tmp_path, capfd):
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval")))
    (copy / "eval").mkdir()
    with ThreadPoolExecutor() as pool, waiting_lock(copy / "eval" / ".teacher.json.lock", ""):
        waits = pool.submit(evaluate, [str(copy)])
        while not (said := capfd.readouterr().err):
            assert not waits.done()
    waits.result()
    assert "another evaluate is writing" in said and (copy / "eval" / "student.json").is_file()


def scores(accuracy: dict[str, float]) -> dict:
    return {task: {"acc": accuracy[c], "acc_stderr": 0.01} for c, tasks in paper.COLUMNS.items() for task in tasks}


def test_average_is_the_papers():
    for row in [paper.TEACHER, *paper.TABLE_2.values(), *paper.TABLE_3.values(), *paper.APPENDIX_B.values()]:
        computed = paper.columns(scores({column: value / 100 for column, value in zip(paper.COLUMNS, row, strict=False)}))
        if row[-1] is not None:
            assert 100 * computed["Avg."][0] == pytest.approx(row[-1], abs=0.025)  # printed rounded, once by 0.02 off
    assert computed["Lamb."][1] == pytest.approx(0.01 / math.sqrt(2)) and computed["PIQA"][1] == 0.01
    assert computed["Avg."][1] == pytest.approx(0.01 * math.sqrt(5.5) / 6)
    assert "Avg." not in paper.columns({"piqa": {"acc": 0.5, "acc_stderr": 0.0}})


def test_recovery_counts_from_chance():
    teacher = scores({column: chance + 0.3 for column, chance in paper.CHANCE.items()})
    assert recovery(scores(paper.CHANCE), teacher) == pytest.approx(0)
    assert recovery(teacher, teacher) == pytest.approx(1)
    assert recovery(scores({column: chance + 0.15 for column, chance in paper.CHANCE.items()}), teacher) == pytest.approx(0.5)
    assert recovery({}, teacher) is None


def test_recall_kept_counts_from_chance_and_stands_beside_likelihood():
    def row(accuracy, chance=0.2, source="x", error=0.01):
        return {"acc": accuracy, "acc_stderr": error, "chance": chance, "source": source}

    teacher = {"mqar": row(0.8), "copy": row(0.6, 0.0), "induction": row(0.21), "held-out": {"perplexity": 18.0}}
    student = {"mqar": row(0.5), "copy": row(0.0, 0.0), "induction": row(0.9), "held-out": {"perplexity": 20.0}}
    assert recall.kept(student, teacher) == pytest.approx({"likelihood kept": 0.9, "recall kept": 0.25})
    assert recall.kept(teacher, teacher) == {"likelihood kept": 1, "recall kept": 1}
    assert recall.kept({"mqar": row(0.8, source="y")}, teacher) == recall.kept({}, teacher) == {}
    of_other_text = teacher | {"held-out": {"perplexity": 18.0, "source": "another text"}}
    assert recall.kept(student, of_other_text) == pytest.approx({"recall kept": 0.25})
    printed = table({"run": student, "a": teacher}, teachers={"run": "a"}).splitlines()
    assert printed[0].endswith("likelihood kept  recall kept") and printed[1].split()[-2:] == ["90%", "25%"]
    assert printed[-1] == "guessing: mqar 20.00%, copy 0.00%, induction 20.00%"
    of_others = table({"a": {"mqar": row(0.5)}, "b": {"mqar": row(0.5, 0.1)}}, teachers={})  # with another tokenizer
    assert of_others.splitlines()[-1] == "guessing: mqar 10.00% or 20.00%"


def test_table_aligns():
    rows = {"a": {"piqa": {"acc": 0.5, "acc_stderr": 0.1}}, "run": {"held-out": {"perplexity": 7.0}}}
    lines = ["     PIQA           perplexity", "a    50.00 ± 10.00  -", "run  -              7"]
    assert table(rows, teachers={"run": "a"}).splitlines() == lines
    written = {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1, "exact_match,flexible-extract": 0.5}
    followed = {"n": 4, "prompt_level_strict_acc": 0.75, "prompt_level_strict_acc_stderr": 0.1}
    lines = ["   gsm8k                       ifeval", "a  strict-match 25.00 ± 10.00  prompt_level_strict_acc 75.00 ± 10.00"]
    assert table({"a": {"gsm8k": written, "ifeval": followed}}, {}).splitlines() == lines


def test_another_config_or_tokenizer_is_another_model(teacher):
    hashes = [config_hash(teacher.model, teacher.tokenizer) for _ in range(2)]
    changed = copy.deepcopy(teacher.model)
    changed.config.rms_norm_eps = 1.0
    words = copy.deepcopy(teacher.tokenizer)
    words.add_tokens(["another"])
    hashes += [config_hash(changed, teacher.tokenizer), config_hash(teacher.model, words)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_a_single_value_has_no_standard_error():
    assert math.isnan(recall.standard_error([1.0])) and recall.standard_error([0.0, 1.0]) == pytest.approx(0.5)
