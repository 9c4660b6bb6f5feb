"""An exported student computes the same in programs that do not know this package, or is refused by name."""

import io
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import forkserver, refused
from packaging.version import Version
from students import save, trained
from transformers import AutoModelForCausalLM

from distill_pl.cli import main
from distill_pl.errors import InputError
from distill_pl.exports import command, fresh
from distill_pl.exports.native import GRANITE, as_native
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher


@torch.no_grad()
def difference(model, student: Student) -> float:
    """Return the largest difference of the logits of two models, as a share of the largest logit."""
    tokens = torch.arange(2 * 70).reshape(2, 70)
    expected = student(tokens, use_cache=False).logits
    return ((model(tokens, use_cache=False).logits - expected).abs().max() / expected.abs().max()).item()


OLD = Version(transformers.__version__) < Version(GRANITE)
grouped_norms = pytest.mark.skipif(OLD, reason="GraniteMoeHybrid of this version of transformers computes something else")

MAMBA2 = {
    "grouped": {"kv_heads": "grouped"}, "expanded": {}, "hybrid": {"softmax_layers": [1]},
    "paper": {"shape": "paper", "init": "fresh"},
}  # fmt: skip


@grouped_norms
@pytest.mark.parametrize("layout", MAMBA2)
@pytest.mark.parametrize("teacher_name", ["llama", "llama_wide_heads", "llama_untied", "llama_scaled_rope"])
def test_mamba2_is_granite(layout, teacher_name, variant):
    student = trained(variant(teacher_name), "mamba2", **MAMBA2[layout])
    model = as_native(student)
    assert type(model).__name__ == "GraniteMoeHybridForCausalLM"
    assert difference(model, student) < command.TOLERANCE


@grouped_norms
def test_scales_of_a_granite_teacher_are_kept(save_model):
    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.2}
    teacher = Teacher(str(save_model("granite", randomise=True, **scales)))
    student = trained(teacher, "mamba2", softmax_layers=[0])
    assert difference(as_native(student), student) < command.TOLERANCE


@grouped_norms
def test_the_comparison_sees_each_part_of_a_layer(teacher):
    student = trained(teacher, "mamba2")
    model = as_native(student)
    for name in ("in_proj.weight", "conv1d.weight", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight"):
        part = model.get_parameter(f"model.layers.1.mamba.{name}")
        before = part.detach().clone()
        with torch.no_grad():
            part[-1] *= 1.01
        assert difference(model, student) > command.TOLERANCE, name
        with torch.no_grad():
            part.copy_(before)


@grouped_norms
def test_generation_by_a_native_class_needs_no_layer_of_the_teachers_attention(teacher):
    student = trained(teacher, "mamba2")
    prompt = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # padded on the left
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(as_native(student).generate(prompt, **options), student.generate(prompt, **options))


NATIVE = {
    "mamba2": "GraniteMoeHybridForCausalLM", "gated_delta_net": "Qwen3_5ForCausalLM", "kda": "KimiLinearForCausalLM",
    "delta_net": "KimiLinearForCausalLM", "mlstm": "xLSTMForCausalLM",
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(save_model) -> Teacher:
    """Make a teacher whose heads are together 64 wide, the least for xLSTM's class, and whose head is tied."""
    return Teacher(str(save_model("llama", randomise=True, hidden_size=64, head_dim=16)))


def compare(arguments: list[str], pipe) -> None:
    """Send what `fresh.main` prints."""
    with redirect_stdout(io.StringIO()) as printed:
        fresh.main(*arguments)
    pipe.send(printed.getvalue())


@pytest.fixture
def forked(monkeypatch) -> None:
    """Compare in a child of the fork server: a fresh process imports transformers for seconds, as one other test lets it."""

    def run(arguments: list[str], **unused) -> SimpleNamespace:
        ours, theirs = forkserver.Pipe(duplex=False)
        child = forkserver.Process(target=compare, args=(arguments[2:], theirs))
        child.start()
        theirs.close()
        printed = ours.recv()
        child.join()
        return SimpleNamespace(returncode=child.exitcode, stdout=printed)

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(run=run))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [pytest.param(mixer, marks=[grouped_norms] * (mixer == "mamba2")) for mixer in NATIVE])
def test_a_native_class_agrees_in_another_process(mixer, wide, tmp_path, forked):
    student = trained(wide, mixer, kv_heads="grouped")
    command.save_file(fresh.expectation(student), tmp_path / "expected")
    as_native(student).save_pretrained(tmp_path / "new")
    assert command.check(tmp_path / "new", tmp_path / "expected", "transformers")["model"] == NATIVE[mixer]


REFUSED = [
    ("llama", "mamba2", {"window": 8}, "student.window"),
    ("llama", "mamba2", {"rope": True}, "student.rope"),
    ("llama", "softmax", {"rope": False}, "no RoPE"),
    ("llama_bias", "mamba2", {}, "biases of q, k, v and o"),
    ("qwen3", "mamba2", {}, "norms of q and k"),
    ("qwen2", "mamba2", {}, "biases of q, k, v and o"),
    ("qwen3", "gated_delta_net", {}, "norms of q and k"),
    ("llama", "gated_delta_net", {"softmax_layers": [1]}, "student.softmax_layers"),
    ("llama", "kda", {"softmax_layers": [1]}, "student.softmax_layers"),
    ("llama", "mlstm", {}, "multiples of 64, not 32 and 32"),
    *[("llama", mixer, {}, "of transformers") for mixer in ("gla", "hgrn2", "retnet", "metala", "rebased", "hedgehog", "swa")],
    ("llama", "rwkv7", {}, "is version 4"),
]


@pytest.mark.parametrize("teacher_name, mixer, options, reason", REFUSED)
def test_what_has_no_place_is_refused_by_name(teacher_name, mixer, options, reason, variant):
    with pytest.raises(InputError, match=f"this {mixer} student of a {teacher_name.split('_')[0]}: .*{reason}.*: choose"):
        as_native(StudentFactory(mixer, **options).build(variant(teacher_name), 0))


@pytest.mark.parametrize("changes, reason", [
    ({"model_type": "olmo2"}, "norms of q and k"),
    ({"model_type": "gemma"}, "not gelu"),
    ({"model_type": "llama", "mlp_bias": True}, "differ from GraniteMoeHybrid's in mlp.down_proj.bias"),
    ({"model_type": "llama", "head_dim": 12}, "not 48 and 32"),
])  # fmt: skip
def test_other_layers_are_refused_by_name(changes, reason, save_model):
    teacher = Teacher(str(save_model(**changes)))
    with pytest.raises(InputError, match=reason):
        as_native(StudentFactory("mamba2").build(teacher, 0))


@pytest.mark.skipif(not OLD, reason="this version of transformers has the norm")
def test_granite_of_an_old_transformers_is_refused(teacher):
    with pytest.raises(InputError, match="normalises all heads together, 5.23 each"):
        as_native(trained(teacher, "mamba2"))


def test_a_student_of_softmax_is_its_teachers_class(teacher):
    student = trained(teacher, "gla", softmax_layers=[0, 1])
    assert type(as_native(student)) is type(teacher.model) and difference(as_native(student), student) < command.TOLERANCE


def test_bad_input_is_one_line_and_nothing_is_overwritten(teacher, teacher_folder, tokenizer, tmp_path):
    student = save(trained(teacher, "gla"), tmp_path / "student", tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    before = sorted(tmp_path.rglob("*"))
    assert "out: give --out FOLDER" in refused("export", student)
    assert "full' exists already" in refused("export", student, "--to=remote", "--out", tmp_path / "full")
    assert "is no finished run and no model folder" in refused("export", tmp_path / "none", "--out", tmp_path / "new")
    assert "LlamaForCausalLM of transformers already" in refused("export", teacher_folder, "--out", tmp_path / "new")
    assert "run is not finished" in refused("export", tmp_path / "run", "--out", tmp_path / "new")
    assert "to: Expected a Literal" in refused("export", student, "--to=gguf", "--out", tmp_path / "new")
    assert "note.txt is no folder or not" in refused("export", student, "--out", tmp_path / "full" / "note.txt" / "new")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_student_with_holes_is_not_exported(teacher, tokenizer, tmp_path, name):
    student = save(trained(teacher, "gla"), tmp_path / "student", tokenizer)
    (student / name).write_text("{") if name == "config.json" else (student / name).unlink()
    line = refused("export", student, "--to=remote", "--out", tmp_path / "new")
    assert ("cannot be loaded" if name == "config.json" else f"student lacks {name}: restore it") in line
    assert not (tmp_path / "new").exists()


@grouped_norms
@pytest.mark.slow
def test_the_command_writes_a_folder_and_nothing_else(teacher, tokenizer, tmp_path, capsys):
    student = trained(teacher, "mamba2", softmax_layers=[0])
    student.generation_config.update(do_sample=True, temperature=0.5, eos_token_id=[0, 7])
    folder = save(student, tmp_path / "student", tokenizer)
    (tmp_path / "config.yaml").touch()  # as in the folder of a run
    out = folder / "new"  # inside, where copying the folder must not meet it
    main(["export", str(tmp_path), "--to", "transformers", "--out", str(out)])
    assert "is a GraniteMoeHybridForCausalLM" in capsys.readouterr().out
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == names and {file.name for file in folder.iterdir()} == names | {"new"}
    same = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert all((out / name).read_text() == (folder / name).read_text() for name in same)


@grouped_norms
@pytest.mark.slow
def test_what_differs_is_refused(teacher, tmp_path, forked):
    student = trained(teacher, "mamba2")
    expected = fresh.expectation(student)
    with torch.no_grad():
        student.mixers[1].D[0] *= 1.01
    as_native(student).save_pretrained(tmp_path / "new")
    command.save_file(expected, tmp_path / "expected")
    with pytest.raises(InputError, match="logits differ by .* there is no exact counterpart"):
        command.check(tmp_path / "new", tmp_path / "expected", "transformers")


@pytest.mark.slow
def test_a_card_says_how_to_load_the_folder(fitted, tmp_path):
    student = fitted(**{"tokens": 512, "matrix_mixing.tokens": 128}) / "student"
    model = AutoModelForCausalLM.from_pretrained(student)
    cards = {}
    for to in ("transformers", "remote"):
        command.write(model, student, tmp_path / to, to)
        cards[to] = (tmp_path / to / "README.md").read_text()
    assert not any("import distill_pl" in card for card in cards.values())
    assert "trust_remote_code=True" in cards["remote"] and "trust_remote_code" not in cards["transformers"]


@pytest.mark.slow
def test_remote_needs_no_import_of_this_package_and_can_be_saved_again(teacher, tokenizer, tmp_path):
    student = trained(teacher, "gla")
    command.write(student, save(student, tmp_path / "student", tokenizer), tmp_path / "new", "remote")
    AutoModelForCausalLM.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "by_the_package")
    assert "auto_map" not in (tmp_path / "by_the_package" / "config.json").read_text()  # there is no module for it to name
    code = f"""
import os
os.environ["HF_MODULES_CACHE"] = {str(tmp_path / "modules")!r}
from transformers import AutoModelForCausalLM, pipeline
folder, again = {str(tmp_path / "new")!r}, {str(tmp_path / "again")!r}
generate = pipeline("text-generation", model=folder, trust_remote_code=True)
generate.model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert all((x == y).all() for x, y in zip(model.parameters(), generate.model.parameters(), strict=True))
print(generate("Story", max_new_tokens=5)[0]["generated_text"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Story"), done.stderr[-2000:]
    # `pipeline` loads the configuration first and the model second
    assert "auto_map" in (tmp_path / "again" / "config.json").read_text()
    assert (tmp_path / "again" / "modeling_distill_pl.py").is_file()
