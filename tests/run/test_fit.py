"""`distill-pl fit` on a tiny model: a killed run ends as an uninterrupted one, bad input is refused in one line."""

import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers import STAGE_FOLDERS, STEP, die_at_replace, forkserver, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import distill_pl.run.folder
from distill_pl import Student
from distill_pl.cli import DistillCLI, main
from distill_pl.console import RANK_VARIABLES, perplexity, say
from distill_pl.errors import InputError
from distill_pl.mixers import MIXERS
from distill_pl.run.folder import read_metrics, sole_user
from distill_pl.stages import STAGES, KDStage

KEYS = {  # 4 + 5 + 6 steps, with a checkpoint every second one
    "tokens": 15 * STEP, "matrix_mixing.tokens": 4 * STEP, "hidden_align.tokens": 5 * STEP, "checkpoint_every": 2 * STEP,
    "validate_every": 3 * STEP, "trainer.log_every_n_steps": 1,
}  # fmt: skip
KD_ONLY = {"matrix_mixing.tokens": 0, "hidden_align.tokens": 0}
FIRST_WEIGHTS, SECOND_CHECKPOINT = "1_matrix_mixing/student.safetensors", "2_hidden_align/last.ckpt"


def run(args: list[str], number: int = 0, before: bool = False) -> None:
    """Run `distill-pl` with `args` in this child process, which kills itself after or before the `number`-th os.replace."""
    torch.set_num_threads(1)
    die_at_replace(number, before)
    main(args)


def finish(args: list[str], kill=lambda child: None, **dying) -> int:
    """Start the same command again until it ends by itself, and return how often it was killed."""
    for kills in range(100):
        child = forkserver.Process(target=run, args=(args,), kwargs=dying)
        child.start()
        kill(child)
        child.join()
        if child.exitcode == 0:
            return kills
        assert child.exitcode == -signal.SIGKILL
    raise AssertionError("no progress")


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Load all weights of a finished run, by file."""
    return {str(file.relative_to(out)): load_file(file) for file in out.rglob("*.safetensors")}


def assert_same(out: Path, other: Path) -> None:
    of_out, of_other = weights(out), weights(other)
    files = sorted([*(f"{stage}/student.safetensors" for stage in STAGE_FOLDERS), "student/model.safetensors"])
    assert sorted(of_out) == sorted(of_other) == files
    for file, tensors in of_out.items():
        assert tensors.keys() == of_other[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, of_other[file][name]), f"{file}: {name}"


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> Path:
    """Run a `command` to its end and return the run's folder, which tests must not change."""
    out = tmp_path_factory.mktemp("finished") / "run"
    fit_here(command(out))
    return out


@pytest.fixture(scope="module")
def second_stage(command, finished, tmp_path_factory) -> Path:
    """Kill a run in its second stage and return its folder: it holds the first stage's weights and a checkpoint.

    `finished` has packed the text, so that the files counted are those of the run.
    """
    out = tmp_path_factory.mktemp("second_stage") / "run"
    child = forkserver.Process(target=run, args=(command(out), 6))
    child.start()
    child.join()
    assert [(out / file).is_file() for file in (FIRST_WEIGHTS, SECOND_CHECKPOINT)] == [True, True]
    return out


@pytest.fixture
def begun(second_stage, tmp_path) -> Path:
    """Copy `second_stage` to the test's own folder."""
    return Path(shutil.copytree(second_stage, tmp_path / "run"))


@pytest.mark.slow
def test_killed_equals_uninterrupted(finished, arguments, tmp_path):
    first = forkserver.Process(target=int)
    first.start()
    first.join()  # starts the fork server, which imports for seconds: not part of the time that a run takes
    began = time.monotonic()
    assert finish(arguments("whole")) == 0
    took = time.monotonic() - began
    assert_same(tmp_path / "whole", finished)
    # right after, and right before, a file is put in place are the moments at which the folder's meaning changes; a run puts 9
    # in place: its fingerprints, its configuration, a checkpoint in each of the first stages and two in the last, and the
    # weights of three stages
    keys = {"checkpoint_every": 3 * STEP}
    assert finish(arguments("after", **keys), number=1) >= 9
    assert_same(tmp_path / "after", finished)
    assert finish(arguments("before", **keys), number=2, before=True) >= 8
    assert_same(tmp_path / "before", finished)
    chance = random.Random(0)
    moments = [chance.uniform(0.2, 1) * took for _ in range(3)]

    def kill(child):
        if moments:
            child.join(timeout=moments.pop())
            child.kill()

    kills = finish(arguments("random", **{"data.cache": tmp_path / "cache"}), kill)
    print(f"killed {kills} times at random")
    assert_same(tmp_path / "random", finished)
    assert not list(tmp_path.rglob("*.new")) and not list((tmp_path / "random").rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("hook", "step", "validated"), [
    ("training_step", 3, 3), ("validation_step", 6, 3), ("validation_step", 6, 4),
], ids=["in a step", "in the last validation", "in a validation after training"])  # fmt: skip
def test_stopped_says_how_to_go_on(arguments, tmp_path, stop, hook, step, validated, monkeypatch):
    plain_step = getattr(STAGES["kd"], hook)
    keys = KD_ONLY | {"tokens": 6 * STEP, "validate_every": validated * STEP}

    def interrupted(self, batch, batch_idx):
        if self.global_step == step:
            os.kill(os.getpid(), stop)
        return plain_step(self, batch, batch_idx)

    monkeypatch.setattr(STAGES["kd"], hook, interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT
    with pytest.raises(SystemExit, match="kd was stopped at step [346]: run the same command again to go on from its last"):
        fit_here(arguments(**keys))
    signal.signal(signal.SIGINT, handler)
    monkeypatch.undo()
    fit_here(arguments(**keys))
    assert (tmp_path / "run" / "student").is_dir()


def fit_here(args: list[str]) -> None:
    DistillCLI(args)


def test_finished_run(finished, command, capsys):
    """A finished run is left alone; it holds a student that transformers loads and runs, events, and its configuration."""
    capsys.readouterr()
    stamps = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    fit_here(command(finished))
    assert "nothing to do" in capsys.readouterr().out
    assert stamps == {file: file.stat().st_mtime_ns for file in finished.rglob("*")}

    student = AutoModelForCausalLM.from_pretrained(finished / "student")
    assert isinstance(student, Student) and student.config.mixer == "gla"
    inputs = AutoTokenizer.from_pretrained(finished / "student")("The cat", return_tensors="pt", return_token_type_ids=False)
    assert student.generate(**inputs, max_new_tokens=5, pad_token_id=0).shape[1] == inputs["input_ids"].shape[1] + 5
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["matrix_mixing"]["tokens"] == str(4 * STEP) and config["kd"]["tokens"] is None
    for number, (folder, parts) in enumerate(
        zip(STAGE_FOLDERS, [["align/layer_00", "align/layer_01"]] * 2 + [["train/ce", "train/kl"]], strict=True)
    ):
        events = EventAccumulator(str(finished / folder))
        events.Reload()
        first, steps = [(0, 4), (4, 5), (9, 6)][number]
        for tag in [*parts, "train/loss", "train/lr", "train/grad_norm"]:
            assert [event.step for event in events.Scalars(tag)] == [(first + s) * STEP for s in range(1, steps + 1)]
        for tag in ["validation/loss", "validation/student_perplexity", "validation/teacher_perplexity"]:
            assert {events.Scalars(tag)[0].step, events.Scalars(tag)[-1].step} == {first * STEP, (first + steps) * STEP}


def test_stages_hand_over(finished):
    """Hidden alignment changes only mixers, and distillation changes every weight."""
    after = [load_file(finished / folder / "student.safetensors") for folder in STAGE_FOLDERS]
    changed = {name for name in after[0] if not torch.equal(after[0][name], after[1][name])}
    assert changed and all(".self_attn." in name for name in changed)
    changed = {name for name in after[1] if not torch.equal(after[1][name], after[2][name])}
    assert changed == after[2].keys()


def test_softmax_exports_its_teachers_class_and_starts_as_its_teacher(arguments, tmp_path, capsys):
    fit_here(arguments(**{"student.mixer": "softmax"}, **KD_ONLY, tokens=STEP))
    out = capsys.readouterr().out
    first = re.search(r"step 0/1 held-out: .* perplexity (\S+) \(teacher (\S+)\)", out)
    assert first, out
    assert first[1] == first[2]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")) is LlamaForCausalLM


def test_plain_training_has_no_teacher_to_compare_with(arguments, tmp_path, capsys):
    keys = {"student.mixer": "softmax", "student.init": "scratch", "kd.alpha": 0}
    fit_here(arguments(**keys, **KD_ONLY, tokens=2 * STEP))
    printed = capsys.readouterr().out
    assert "nothing copied" in printed and "(teacher" not in printed and "held-out perplexity" in printed


def test_help_lists_every_mixer(monkeypatch, capsys):
    monkeypatch.setitem(MIXERS, "toy_mixer", MIXERS["gla"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--help"])
    assert exit.value.code == 0
    text = re.search(r"--student.mixer MIXER\s+(.+?) \(type: str", capsys.readouterr().out, re.DOTALL)[1]
    assert " ".join(text.split()).endswith(f"one of {', '.join(MIXERS)}.") and "toy_mixer" in text


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"student.mixer": "mamba9"}, r"student.mixer 'mamba9'.*softmax, mlstm, gla"),
        ({"student.init": "calibrated"}, "student.init: Expected .*'qkv', 'fresh', 'scratch'.*calibrated"),
        ({"kd.lrr": 1}, "kd.lrr.*kd.lr"),
        ({"kd.lr": "fast"}, "kd.lr.*float.*fast"),
        ({"kd.lr": -1}, "kd.lr -1"),
        ({"tokens": "8e7"}, "tokens.*'8e7'.*80M"),
        ({"teacher": "/nowhere"}, "teacher '/nowhere'"),
        ({"data.dataset": "/nowhere"}, "data.dataset '/nowhere'"),
        ({"data.text_column": "body"}, "data.text_column 'body'.*text"),
        ({"data.sequence_length": 256, "data.batch_size": 1}, "data.sequence_length 256.*128 positions"),
        ({"hidden_align.tokens": 100}, "hidden_align.tokens 100.*128"),
        ({"tokens": 9 * STEP}, "kd.tokens 0"),
        ({"tokens": 8 * STEP}, r"tokens 1024.*matrix_mixing.tokens 512 \+ hidden_align.tokens 640"),
        ({"data.batch_size": 3, "trainer.devices": 2}, "data.batch_size 3.*2 ranks"),
        ({"data.validation_tokens": 8}, "data.validation_tokens 8"),
        ({"tokens": "10M"}, "data.dataset.*tokens.*data.repeat"),
        ({"trainer.devices": 0}, "trainer.*devices"),
        ({"student.backend": "fla"}, "student.backend fla.*GPU"),
        ({"data.micro_batch_size": 3}, "data.micro_batch_size 3.*4 chunks"),
        ({"data.batch_size": 9, "trainer.devices": 9}, "data.validation_tokens is 8 chunks.*9 ranks"),
        ({"trainer.strategy": "fsdp", "matrix_mixing.estimator": "exact"}, "matrix_mixing.estimator exact.*fsdp"),
    ],
)
def test_bad_input(arguments, tmp_path, keys, says):
    assert re.search(says, refused(*arguments(**keys)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_out_of_another_run(finished, command, arguments, tmp_path):
    line = refused(*command(finished, **{"kd.lr": 1e-3, "student.retention": 0.9}))
    assert "kd.lr 0.0003 -> 0.001" in line and "student.retention 0.982 -> 0.9" in line
    fit_here(command(finished, **{"trainer.log_every_n_steps": 7, "validate_every": "1k"}))  # keys that change no weight
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml.new").write_text("out")  # as if killed while it was written
    fit_here(arguments("begun"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("dear")
    assert "is no run folder" in refused(*arguments("full"))
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(*arguments("file"))


@pytest.mark.slow
def test_damaged_files_are_named(begun, arguments, chunk_cache, tmp_path):
    keys = {"data.cache": shutil.copytree(chunk_cache, tmp_path / "cache")}
    chunks = next((tmp_path / "cache").rglob("train.bin"))
    places = random.Random(0)
    for path in (begun / SECOND_CHECKPOINT, begun / FIRST_WEIGHTS, chunks):
        saved = path.read_bytes()
        for damage in ("cut", "flip"):
            byte = places.randrange(len(saved) // 2, len(saved) - 2048)  # in no header, nor in the last, partial chunk
            path.write_bytes(saved[:byte] + (b"" if damage == "cut" else bytes([saved[byte] ^ 16]) + saved[byte + 1 :]))
            assert str(path) in refused(*arguments(**keys)), damage
        path.write_bytes(saved)
    fit_here(arguments(**keys))


def test_weights_that_lack_a_tensor_are_damaged(begun, arguments):
    weights = load_file(begun / FIRST_WEIGHTS)
    with safe_open(begun / FIRST_WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    del weights["model.norm.weight"]
    save_file(weights, begun / FIRST_WEIGHTS, metadata)
    assert re.search(f"{FIRST_WEIGHTS} is damaged .*model.norm.weight", refused(*arguments()))


def test_weights_of_other_sizes_are_named(begun, arguments):
    checkpoint = torch.load(begun / SECOND_CHECKPOINT, weights_only=True)
    checkpoint["state_dict"]["student.model.norm.weight"] = torch.ones(1)
    torch.save(checkpoint, begun / SECOND_CHECKPOINT)
    assert f"{SECOND_CHECKPOINT} is of a student of other sizes" in refused(*arguments())


@pytest.fixture
def model(teacher_folder, tmp_path) -> Path:
    """Copy the teacher to a folder that a test may change."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))


@pytest.fixture
def text(corpus, tmp_path) -> Path:
    """Copy the text to a folder that a test may change."""
    return Path(shutil.copytree(corpus, tmp_path / "text"))


@pytest.fixture
def of_one(begun, model, text, arguments) -> Callable[..., list[str]]:
    """Return `of_one(**keys)`, a command that goes on with the run `begun` as if it had always had `model` and `text`."""
    config = (begun / "config.yaml").read_text()
    for key, path in {"teacher": model, "dataset": text}.items():
        config = re.sub(rf"{key}: .*", f"{key}: {path}", config, count=1)
    (begun / "config.yaml").write_text(config)
    return lambda **keys: arguments(**{"teacher": model, "data.dataset": text} | keys)


def change_weights(model: Path) -> None:
    changed = AutoModelForCausalLM.from_pretrained(model)
    changed.model.norm.weight.data[3] += 0.1
    changed.save_pretrained(model)


def change_tokenizer(model: Path) -> None:
    file = model / "tokenizer.json"
    rules = json.loads(file.read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    file.write_text(json.dumps(rules))


@pytest.mark.parametrize(("change", "what"), [(change_weights, "teacher"), (change_tokenizer, "tokenizer")])
def test_a_run_has_one_teacher(of_one, model, change, what):
    change(model)
    assert f"begun with another {what} than teacher {str(model)!r} has now: put the former back" in refused(*of_one())


def test_a_run_has_one_text(of_one, text):
    file = text / "train.jsonl"
    file.write_text(file.read_text().replace("Story 7", "Story 8"))
    assert f"begun with another text than data.dataset {str(text)!r} has now" in refused(*of_one())


@pytest.mark.slow
def test_a_run_goes_on_with_copies_of_its_teacher_and_text(of_one, text, begun, finished):
    (text / "train.jsonl").touch()
    fit_here(of_one())
    assert_same(begun, finished)


def test_a_run_without_fingerprints_is_refused(begun, arguments):
    (begun / "fingerprints.json").unlink()
    assert "fingerprints.json, which says what teacher and text" in refused(*arguments())


@pytest.mark.slow
def test_weights_of_finished_stages_may_be_deleted(begun, finished, arguments, capsys):
    (begun / FIRST_WEIGHTS).unlink()
    fit_here(arguments())
    assert "matrix_mixing  " not in capsys.readouterr().out
    shutil.copy(finished / FIRST_WEIGHTS, begun / FIRST_WEIGHTS)
    assert_same(begun, finished)


def test_a_stage_whose_weights_are_needed_and_gone_is_not_trained_again_unasked(begun, arguments):
    (begun / FIRST_WEIGHTS).unlink()
    (begun / SECOND_CHECKPOINT).unlink()
    line = refused(*arguments())
    assert f"{begun / FIRST_WEIGHTS} is gone, from which {begun / '2_hidden_align'} was begun: restore it, or delete" in line


def test_files_missing_from_an_exported_student_are_written_again(finished, arguments, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "student" / "README.md").write_text("mine")
    for name in ("model.safetensors", "tokenizer.json"):
        (run / "student" / name).unlink()
    fit_here(arguments())
    printed = capsys.readouterr().out
    assert "model.safetensors was missing and is written again" in printed and "kd  " not in printed
    assert_same(run, finished)
    assert (run / "student" / "README.md").read_text() == "mine" and (run / "student" / "tokenizer.json").is_file()

    (run / "student" / "config.json").unlink()
    (run / "3_kd" / "student.safetensors").unlink()
    assert re.search("student lacks config.json, and .*3_kd/student.safetensors.* is gone too", refused(*arguments()))


def set_generation(model: Path, **keys) -> None:
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_teacher_that_samples_nothing_may_have_a_temperature(model, arguments, tmp_path):
    set_generation(model, do_sample=False, temperature=0.9, top_p=0.6, cache_implementation="hybrid", eos_token_id=7)
    fit_here(arguments(**{"teacher": model}, **KD_ONLY, tokens=STEP))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    student.generation_config.validate(strict=True)
    assert student.generation_config.eos_token_id == [7, 0] and student.generation_config.cache_implementation is None


@pytest.mark.parametrize(("error", "says"), [
    (ValueError("no such\nvocabulary"), "exported at the end of the run (ValueError: no such vocabulary)"),
    (Exception("No space left on device"), "cannot write /"),  # where temporary files go
])  # fmt: skip
def test_what_cannot_be_exported_is_refused_at_the_start(arguments, tmp_path, monkeypatch, error, says):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    assert says in refused(*arguments())
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_is_refused_at_the_start(arguments, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("distill_pl.run.folder.disk_usage", lambda _: usage._replace(free=300_000))
    assert re.search(r"0.0003 GB free, and checkpoints and weights take up to 0.00\d+ GB more", refused(*arguments()))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(begun, arguments, tmp_path, capsys):
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    fit_here([*arguments(), "--dry_run"])
    printed = capsys.readouterr().out
    assert re.search(
        r"matrix_mixing +4 +512 .* done\nhidden_align +5 +640 .* to be resumed at step 2\nkd +6 .* to be run", printed
    )
    assert "GiB a rank" in printed and "GB are free" in printed
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


def test_loggers_and_profiler_write_beside_tensorboard(arguments, tmp_path, monkeypatch, capsys):
    fit_here(arguments(**KD_ONLY, tokens=2 * STEP, **{"trainer.logger": "[csv]", "trainer.profiler": "simple"}))
    stage = tmp_path / "run" / "3_kd"
    assert f"kd  the profile is in {stage}" in capsys.readouterr().out
    lines = (stage / "csv" / "from_step_0" / "metrics.csv").read_text().splitlines()
    assert "train/loss" in lines[0] and "validation/student_perplexity" in lines[0] and len(lines) > 3
    assert "run_training_batch" in next(stage.glob("fit-profile*.txt")).read_text()
    assert list(stage.glob("events.*"))


SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "localhost", "SLURM_PROCID": "0"}
SLURM |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}


@pytest.mark.parametrize(
    "variables, keys, says",
    [
        ({}, {"trainer.num_nodes": 2}, "trainer.num_nodes 2, but no launcher"),
        (SLURM, {"trainer.devices": 2}, "trainer.devices 2 means 2, .* launched 1: "),
        (SLURM | {"SLURM_NTASKS": "2"}, {}, "--ntasks=2"),
        (SLURM | {"SLURM_NNODES": "2"}, {"trainer.devices": 1}, "num_nodes=1.*--nodes=2"),
        (TORCHRUN, {"trainer.devices": 1}, "trainer.devices 1 means 1, .* launched 2: "),
        *(({name: "1"}, {}, f"{name} is 1, but this run has one process: unset {name}") for name in ("RANK", "LOCAL_RANK")),
    ],
)
def test_processes_that_were_launched_are_those_of_the_run(arguments, monkeypatch, variables, keys, says):
    for name in list(os.environ):
        if name.startswith(("SLURM", "TORCHELASTIC", "MASTER", "WORLD_SIZE", *RANK_VARIABLES)):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert re.search(says, refused(*arguments(**keys)))


def test_a_folder_is_the_same_however_it_is_written(finished, command, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    for name in (f"{corpus}/", corpus.name, f"./{corpus.name}"):
        capsys.readouterr()
        fit_here(command(finished, **{"data.dataset": name}))
        assert "nothing to do" in capsys.readouterr().out
    assert "another configuration (data.dataset" in refused(*command(finished, **{"data.dataset": tmp_path}))


def test_a_run_goes_on_from_another(finished, arguments, tmp_path, capsys):
    keys = {"student.start_from": finished, "data.sequence_length": 16, **KD_ONLY, "tokens": 2 * STEP}
    capsys.readouterr()
    fit_here(arguments(**keys))
    assert f"going on from {finished}" in capsys.readouterr().out
    fit_here(arguments("same", **{"student.start_from": finished}, **KD_ONLY, tokens=STEP))
    began = re.search(r"step 0/1 held-out: .* perplexity (\S+)", capsys.readouterr().out)[1]
    ended = perplexity(read_metrics(finished / "3_kd" / "student.safetensors")["student_ce"])
    assert float(began) == pytest.approx(ended, rel=1e-3)


def test_a_run_does_not_go_on_from_one_of_another_teacher(finished, arguments, save_model):
    other = {"teacher": save_model("llama", seed=5), **KD_ONLY, "tokens": STEP}
    for start in (finished, finished / "student"):
        line = refused(*arguments(**{"student.start_from": start} | other))
        assert f"is not the one that {finished} was distilled from" in line


def test_two_halves_read_the_text_in_the_order_of_one_run(arguments, corpus, capsys, monkeypatch, tmp_path):
    read: dict[str, list] = {}

    def losses_given(stage, tokens, *drawn):
        if stage.training:
            read.setdefault(name, []).append(tokens.clone())
        return original(stage, tokens, *drawn)

    original = KDStage.losses_given
    monkeypatch.setattr(KDStage, "losses_given", losses_given)
    one, two = ({"student.start_from": tmp_path / name} for name in ("one", "two"))
    for name, keys in {
        "whole": {"tokens": 4 * STEP, "data.shuffle": False},
        "one": {"tokens": 2 * STEP, "data.shuffle": False},
        "two": {"tokens": STEP, "data.shuffle": False} | one,
        "three": {"tokens": STEP, "data.shuffle": False, "data.dataset": f"{corpus}/", "data.name": "ignored"} | two,
        "shuffled": {"tokens": STEP} | two,  # another order, which begins at its head
    }.items():
        fit_here(arguments(name, **KD_ONLY, **keys))
    assert torch.equal(torch.cat([*read["one"], *read["two"], *read["three"]]), torch.cat(read["whole"]))
    assert capsys.readouterr().out.count("read before") == 2
    (tmp_path / "one" / "fingerprints.json").write_text("{}")
    assert "one/student, to begin with the head of the text" in refused(
        *arguments("four", **KD_ONLY, tokens=STEP, **{"data.shuffle": False} | one)
    )


@pytest.mark.slow
def test_second_run_on_the_same_folder_is_refused(begun, arguments, tmp_path):
    with sole_user(begun, rank=0):
        assert re.search(rf"out .*run' is in use by process {os.getpid()} on ", refused(*arguments()))
        with sole_user(begun, rank=1):  # a rank of the same run
            pass
    fit_here(arguments())


@pytest.mark.slow
def test_a_run_that_another_process_finishes_meanwhile_is_not_trained_again(begun, finished, arguments, monkeypatch):
    monkeypatch.setattr("distill_pl.run.fit.describe", lambda *args: shutil.copytree(finished, begun, dirs_exist_ok=True))
    assert "was trained by another process in the meantime: give the same command again" in refused(*arguments())
    assert_same(begun, finished)


def test_a_folder_that_another_run_began_meanwhile_is_refused(begun, arguments, tmp_path, monkeypatch):
    out = tmp_path / "raced"
    monkeypatch.setattr("distill_pl.run.fit.describe", lambda *args: shutil.copytree(begun, out))
    assert "belongs to another configuration (kd.lr" in refused(*arguments(out=out, **{"kd.lr": 0.5}))


def test_an_output_that_cannot_be_written_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.stdout", open("/dev/full", "w"))
    with pytest.raises(InputError, match="the output cannot be printed .No space left on device.: see to where it goes"):
        say("a line")


@pytest.mark.slow
def test_clock_and_hostname_may_change(begun, finished, arguments, monkeypatch):
    now, ticks = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: now() - 1e7)
    monkeypatch.setattr(time, "monotonic", lambda: ticks() - 1e7)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    fit_here(arguments())
    assert_same(begun, finished)


def test_full_disk_keeps_the_last_checkpoint(arguments, tmp_path, monkeypatch):
    real, saves = torch.save, []

    def full(what, path, *args, **kwargs):
        saves.append(path)
        if len(saves) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    line = refused(*arguments())
    checkpoint = tmp_path / "run" / "1_matrix_mixing" / "last.ckpt"
    assert str(checkpoint) in line and "No space left" in line
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert not list(tmp_path.rglob("*.new"))


@pytest.mark.parametrize(
    ("writer", "error", "named"),
    [
        ("lightning.pytorch.loggers.TensorBoardLogger.log_metrics", OSError(28, "No space left on device"), "3_kd"),
        ("transformers.PreTrainedTokenizerFast.save_pretrained", Exception("No space left on device"), "student"),
    ],
)
def test_full_disk_is_one_line_whatever_is_written(arguments, tmp_path, monkeypatch, writer, error, named):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("distill_pl.run.fit.check_export", lambda *_: None)
    monkeypatch.setattr(writer, full)
    line = refused(*arguments(**KD_ONLY, tokens=STEP))
    assert f"cannot write {tmp_path / 'run' / named} (" in line and "No space left" in line
    monkeypatch.undo()
    fit_here(arguments(**KD_ONLY, tokens=STEP))


@pytest.mark.slow
def test_full_gpu_names_the_key_to_lower(begun, arguments, tmp_path, monkeypatch):
    plain_step = STAGES["kd"].training_step

    def full(self, batch, batch_idx):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.46 GiB.\nSee documentation")
        return plain_step(self, batch, batch_idx)

    monkeypatch.setattr(STAGES["kd"], "training_step", full)
    assert "kd: the GPU's memory is full" in (line := refused(*arguments())) and "data.micro_batch_size below 4" in line
    fit_here(arguments("run", **{"data.micro_batch_size": 2}))


@pytest.fixture
def process_group() -> Iterator[None]:
    """Destroy the process group that a run under FSDP leaves when it fails, which other tests in this process would meet."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
@pytest.mark.parametrize("stage", STAGE_FOLDERS)
def test_not_finite_names_stage_step_and_layer(arguments, tmp_path, monkeypatch, stage, strategy):
    name = stage[2:]
    plain_step = STAGES[name].training_step

    def poisoned(self, batch, batch_idx):
        if self.global_step == 2:
            with torch.no_grad():
                self.student.model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
        return plain_step(self, batch, batch_idx)

    monkeypatch.setattr(STAGES[name], "training_step", poisoned)
    command = arguments(**(KD_ONLY if name == "kd" else {}), **{"trainer.strategy": strategy})
    assert re.search(rf"{name}: not finite at step 3, .*layer 1", refused(*command, code=1))
    checkpoint = torch.load(tmp_path / "run" / stage / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 and all(x.isfinite().all() for x in checkpoint["state_dict"].values())


def test_lost_weights_are_noticed(arguments, monkeypatch):
    """A stage whose student is not the one that the stage before left is refused at its first validation."""
    load = distill_pl.run.folder.load_student

    def forgetful(student, stage):
        load(student, stage)
        torch.nn.init.normal_(student.model.embed_tokens.weight)

    monkeypatch.setattr("distill_pl.run.fit.load_student", forgetful)
    assert re.search("hidden_align: the student starts at .* expected", refused(*arguments()))
