"""Code in models, checkpoints, texts and configurations is never run, and no name leads out of the folders given."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import fit_command, refused
from measure.conftest import small_task_index  # noqa: F401 (lets lm-eval index few tasks)
from transformers import AutoModelForCausalLM

from distill_pl.cli import main
from distill_pl.errors import InputError
from distill_pl.measure import evaluate as evaluation
from distill_pl.measure.harness import run_tasks
from distill_pl.teacher import Teacher

pytestmark = pytest.mark.slow


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """Return the path of a file that all code of these tests' inputs makes when run, and fail if it exists after the test.

    The current folder is a new one beside it.
    """
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # these variables must not permit code either
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # a question whether to run code would be answered yes
    yield tmp_path / "sprung"
    assert not (tmp_path / "sprung").exists()


class Evil:
    """An object that makes the folder `trap` when it is unpickled."""

    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


def poison(file: Path, trap: Path, form: str) -> None:
    """Write a pickle that makes the folder `trap` when read: form `bare`, or `torch` for a file of torch.save."""
    file.write_bytes(pickle.dumps({"global_step": Evil(trap)}))
    if form == "torch":
        torch.save({"global_step": Evil(trap)}, file)


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.fixture
def fit(teacher_folder, corpus, tmp_path):
    """Return `fit(**keys)`, the command line of a run of two steps in tmp_path/run."""
    short = {"tokens": 256, "data.validation_tokens": 64}
    return lambda **keys: fit_command(tmp_path / "run", teacher_folder, corpus, tmp_path / "cache", **(short | keys))


def test_the_trap_springs(tmp_path):
    """The poisoned files do make the trap when read without care, on which the other tests rest."""
    for form in ("bare", "torch"):
        trap = tmp_path / form
        poison(tmp_path / "file", trap, form)
        with (tmp_path / "file").open("rb") as file:
            torch.load(file, weights_only=False) if form == "torch" else pickle.load(file)
        assert trap.exists()


def test_checkpoint_with_code(fit, trap, tmp_path):
    main(fit())
    for file in (tmp_path / "run" / "student").iterdir():
        file.unlink()
    (tmp_path / "run" / "student").rmdir()
    (tmp_path / "run" / "3_kd" / "student.safetensors").unlink()
    checkpoint = tmp_path / "run" / "3_kd" / "last.ckpt"
    for form in ("bare", "torch"):
        poison(checkpoint, trap, form)
        line = refused(*fit())
        assert str(checkpoint) in line and "delete it" in line


@pytest.mark.parametrize("form", ["bare", "torch"])
def test_weights_with_code(teacher_folder, fit, trap, tmp_path, form):
    folder = copy(teacher_folder, tmp_path / "teacher")
    (folder / "model.safetensors").unlink()
    for command in [fit(teacher=folder), ["generate", folder], ["bench", folder, "--lengths=4"]]:
        poison(folder / "pytorch_model.bin", trap, form)
        line = refused(*command)
        assert str(folder / "pytorch_model.bin") in line and "safetensors" in line and "weights_only" not in line
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")  # plain tensors are read
    assert torch.equal(Teacher(str(folder)).head.weight, model.lm_head.weight)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_folder_with_code(teacher_folder, fit, trap, tmp_path, file, known):
    """transformers' own classes are used for an architecture it knows; a folder of any other is refused."""
    folder = copy(teacher_folder, tmp_path / "teacher")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    config = json.loads((folder / file).read_text())
    classes = ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    config["auto_map"] = {"AutoTokenizer": ["evil.T", "evil.T"], **dict.fromkeys(classes, "evil.C")}
    config |= {} if known else {"model_type": "evil", "tokenizer_class": "Evil"}
    (folder / file).write_text(json.dumps(config))
    if known:
        Teacher(str(folder))
        evaluation.load(str(folder))
        return
    if file == "config.json":
        for command in [fit(teacher=folder), ["generate", folder], ["bench", folder]]:
            assert str(folder) in refused(*command)
    else:
        assert str(folder) in refused(*fit(teacher=folder))


def test_student_whose_teacher_has_code(teacher, trap, tmp_path):
    """A student's config.json contains its teacher's, which may have an auto_map."""
    from distill_pl.student.factory import StudentFactory

    folder = tmp_path / "student"
    StudentFactory().build(teacher, 0).save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config["teacher"] |= {"auto_map": {"AutoModel": "evil.C", "AutoConfig": "evil.C"}, "_name_or_path": str(folder)}
    (folder / "config.json").write_text(json.dumps(config))
    evaluation.load(str(folder))


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.txt", "train.pkl", "train.pt", "train.py"])
def test_text_with_code(fit, trap, tmp_path, name):
    folder = tmp_path / "text"
    folder.mkdir()
    poison(folder / name, trap, "bare")
    if name.endswith(".py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    assert "data.dataset" in refused(*fit(**{"data.dataset": folder}))


def test_yaml_with_code(fit, trap, tmp_path):
    evil = f"!!python/object/apply:os.mkdir [{str(trap)!r}]"
    config = tmp_path / "config.yaml"
    config.write_text(f"teacher: {evil}\n")
    refused("fit", f"--config={config}", "--out=run", "--teacher=x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"out: {evil}\n")
    for command in [fit(), ["evaluate", tmp_path / "run"], ["report", tmp_path / "run"]]:
        assert str(tmp_path / "run") in refused(*command)


@pytest.mark.slow  # imports lm-eval
def test_metric_with_code(teacher, trap, tmp_path):
    """Some tasks of lm-eval load their metric as a script by a name, which a folder in the current folder may have too."""
    (tmp_path / "here" / "code_eval").mkdir()
    (tmp_path / "here" / "code_eval" / "code_eval.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    (tmp_path / "humaneval.jsonl").write_text('{"prompt": "def f():", "test": "", "entry_point": "f", "task_id": 0}\n')
    with pytest.raises(InputError, match="humaneval|code_eval"):
        run_tasks(teacher.model, teacher.tokenizer, ["humaneval"], data=tmp_path)


@pytest.mark.slow  # imports lm-eval
def test_names_stay_inside(teacher_folder, corpus, fit, tmp_path, monkeypatch):
    """Names of models, tasks, data sets and chat templates make no files outside the folders that the user gave."""
    here = tmp_path / "a" / "b" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    model = copy(teacher_folder, tmp_path / "a" / "x")
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(evaluation, "run_tasks", lambda *args, **kwargs: {"piqa": {"acc": 1.0, "acc_stderr": 0.1, "n": 1}})
    for name in ("../../x", "./../../x", f"{model}/", "../../../a/x"):
        main(["evaluate", name, "--tasks=piqa"])
    made = set(tmp_path.rglob("*")) - before
    assert made and all(file.is_relative_to(here / "eval") and file.parent in (here, here / "eval") for file in made)

    for task in ("../../x", "/etc/passwd", "..", str(model)):
        assert "no such task" in refused("evaluate", "../../x", f"--tasks={task}")

    text = tmp_path / "a" / "...jsonl"
    text.write_bytes((corpus / "train.jsonl").read_bytes())
    main(fit(**{"data.dataset": text}))
    allowed = [here / "eval", tmp_path / "run", tmp_path / "cache", text]
    assert all(any(file.is_relative_to(home) for home in allowed) for file in set(tmp_path.rglob("*")) - before)

    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": ""}, {"name": "../../../../gone", "template": "x"}]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert "gone" in refused(*fit(teacher=model, out=tmp_path / "run2"))
