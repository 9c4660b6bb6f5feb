"""The folder that a run exports works with transformers alone, without this package's commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from jsonargparse import dict_to_namespace
from shared_fixtures import QUICK
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from distill_pl.errors import InputError
from distill_pl.measure import paper
from distill_pl.mixers import MIXERS
from distill_pl.run.card import add_results, licence_of, model_card, read_card
from distill_pl.run.folder import StageRun
from distill_pl.student.factory import StudentFactory
from distill_pl.teacher import Teacher

PROMPTS = ["Story 1. A fox sees", "Her aunt", "At dawn the old clock forgets the river. The miller"]


@pytest.fixture(scope="module")
def folder(fitted) -> Path:
    """Return the exported folder of a short run."""
    return fitted(**{"tokens": 512, "matrix_mixing.tokens": 128}) / "student"


def test_what_is_in_it(folder, teacher_folder):
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".py", ".pt"))]
    student, teacher = (json.loads((f / "generation_config.json").read_text()) for f in (folder, teacher_folder))
    assert student == teacher


@pytest.mark.slow
def test_a_fresh_process_loads_it(folder):
    code = f"""
import distill_pl
from transformers import pipeline
print(pipeline("text-generation", model={str(folder)!r})({PROMPTS[0]!r}, max_new_tokens=5)[0]["generated_text"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(PROMPTS[0]), done.stderr[-2000:]


def test_a_pipeline_of_padded_rows_is_one_of_single_rows(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    generate = pipeline("text-generation", model=AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert generate(PROMPTS, batch_size=3, **options) == [generate([prompt], **options)[0] for prompt in PROMPTS]


def test_device_map(folder):
    pytest.importorskip("accelerate")
    tokens = torch.arange(12)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder).cpu()(tokens).logits
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert torch.allclose(
        model(tokens.to(model.device)).logits.cpu(), expected, atol=1e-2 if model.device.type == "cuda" else 0
    )


@pytest.fixture(scope="module")
def one_layer(save_model) -> Teacher:
    """Make a teacher of one layer: compiling takes time in proportion to layers, which are alike."""
    return Teacher(str(save_model("llama", num_hidden_layers=1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(QUICK & MIXERS.keys()))  # test_layers traces the layers of all
def test_compiled_forward_is_the_forward(one_layer, name):
    torch.compiler.reset()  # else the models of earlier tests count as recompilations of this one
    model = StudentFactory(name).build(one_layer, 0).eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, use_cache=False).logits
    assert torch.allclose(compiled, expected, atol=1e-5)


def test_card_says_what_it_is_and_what_it_scored(folder, teacher_folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and "gla" in card.data.tags
    assert f"`{teacher_folder}`" in card.text and "import distill_pl" in card.text and "Not evaluated yet" in card.text
    assert "| matrix_mixing | 128 | 0.0002 |" in card.text and "| kd | 384 | 0.0003 |" in card.text
    assert "{" not in card.text.replace("kd: {", "")  # no placeholder of the template is left
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nA note of its owner.\n")
    card = ModelCard.load(folder / "README.md")
    card.data.model_name, mine = "mine", {"task_type": "text-generation", "metric_type": "acc", "metric_value": 0.7}
    card.data.eval_results = [EvalResult(dataset_type="mmlu", dataset_name="MMLU", **mine)]
    card.save(folder / "README.md")
    results = {task: {"acc": 0.5, "acc_stderr": 0.01} for task in paper.TASKS}
    for _ in range(2):  # the second call replaces the results of the first
        add_results(folder, results)
    card = ModelCard.load(folder / "README.md")
    assert card.text.count("| piqa | 50.00 ± 1.00 |") == 1 and "Not evaluated yet" not in card.text
    assert card.text.rstrip().endswith("A note of its owner.")
    assert {r.dataset_type: r.metric_value for r in card.data.eval_results} == {"mmlu": 0.7, **dict.fromkeys(paper.TASKS, 0.5)}
    assert card.data.model_name == "mine"
    add_results(folder, {})  # as after a change of the weights
    card = ModelCard.load(folder / "README.md")
    assert "Not evaluated yet" in card.text and [result.dataset_type for result in card.data.eval_results] == ["mmlu"]
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(InputError, match="mend its front matter, or delete the file"):
        read_card(folder)


@pytest.mark.parametrize("keys, says", [
    ({"student.softmax_layers": [0, 1]}, "distilled from .* with softmax in each of its 2 layers"),
    ({"student.softmax_layers": [1]}, "distilled from .* with gla in 1 of its 2 layers and softmax attention in layer 1"),
    ({"kd.alpha": 0, "student.init": "scratch"}, "trained, without distillation, in the shape of .*The weights do not derive"),
])  # fmt: skip
def test_a_card_of_a_hybrid_and_of_plain_training(folder, keys, says):
    config = dict_to_namespace(yaml.safe_load((folder.parent / "config.yaml").read_text()))
    for key, value in {"data.dataset": "texts/*.jsonl", **keys}.items():
        config[key] = value
    card = model_card(config, [StageRun("kd", folder / "none", 0, 8)], AutoModelForCausalLM.from_pretrained(folder))
    assert re.search(says, card.text, re.DOTALL) and card.data.datasets is None
    assert ("knowledge-distillation" in card.data.tags) == ("kd.alpha" not in keys)


def test_licence_is_the_teachers(tmp_path):
    assert licence_of(str(tmp_path))[0] is None and "names none" in licence_of(str(tmp_path))[1]
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert licence_of(str(tmp_path))[0] == "apache-2.0"
