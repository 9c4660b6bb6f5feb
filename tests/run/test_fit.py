"""The whole of `distill-pl fit` on a tiny model: killed == uninterrupted, finished is a no-op, bad input is one line."""

import io
import multiprocessing
import os
import platform
import random
import re
import signal
import socket
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import distill_pl.run.folder
from distill_pl import Student
from distill_pl.cli import DistillCLI, main
from distill_pl.run.folder import sole_user
from distill_pl.stages import STAGES

processes = multiprocessing.get_context("forkserver")  # a process that has imported everything forks in milliseconds
processes.set_forkserver_preload(["distill_pl.cli"])
STEP = 4 * 32  # tokens of one step
LAST = ["1_matrix_mixing", "2_hidden_align", "3_kd"]


@pytest.fixture
def arguments(teacher_folder, corpus, tmp_path):
    """A run of 4 + 5 + 6 steps, with a checkpoint every second one."""
    return lambda out="run", **keys: [
        "fit",
        *(f"--{key}={value}" for key, value in ({
            "out": tmp_path / out, "teacher": teacher_folder, "data.dataset": corpus, "data.cache": tmp_path / "cache",
            "tokens": 15 * STEP, "matrix_mixing.tokens": 4 * STEP, "hidden_align.tokens": 5 * STEP,
            "data.sequence_length": 32, "data.batch_size": 4, "data.validation_tokens": 256, "trainer.accelerator": "cpu",
            "checkpoint_every": 2 * STEP, "validate_every": 3 * STEP, "trainer.log_every_n_steps": 1,
        } | keys).items()),
    ]  # fmt: skip


def run(args: list[str], die_at_replace: int | None = None, before: bool = False) -> None:
    """In a child process: `distill-pl` with `args`; dies as by SIGKILL before or after the n-th file is put in place."""
    torch.set_num_threads(1)
    replace, count = os.replace, 0

    def counting_replace(*names):
        nonlocal count
        count += 1
        if before and count == die_at_replace:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)
        if count == die_at_replace:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counting_replace
    main(args)


def finish(args: list[str], kill=lambda child: None, **dying) -> int:
    """Start the same command again and again until it ends by itself -> how often it was killed."""
    for kills in range(100):
        child = processes.Process(target=run, args=(args,), kwargs=dying)
        child.start()
        kill(child)
        child.join()
        if child.exitcode == 0:
            return kills
        assert child.exitcode == -signal.SIGKILL
    raise AssertionError("no progress")


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All weights that a finished run holds."""
    return {str(file.relative_to(out)): load_file(file) for file in out.rglob("*.safetensors")}


def assert_same(out: Path, other: Path) -> None:
    ours, theirs = weights(out), weights(other)
    assert (
        sorted(ours)
        == sorted(theirs)
        == sorted([*(f"{name}/student.safetensors" for name in LAST), "student/model.safetensors"])
    )
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[file][name]), f"{file}: {name}"


def test_killed_equals_uninterrupted(arguments, tmp_path):
    assert finish(arguments("whole")) == 0
    whole = tmp_path / "whole"
    # killed right after, or right before, each file is put in place: the moments at which the folder changes its meaning
    assert finish(arguments("after"), die_at_replace=1) >= 10
    assert_same(tmp_path / "after", whole)
    assert finish(arguments("before"), die_at_replace=2, before=True) >= 8
    assert_same(tmp_path / "before", whole)
    # and at any moment
    moment = random.Random(0)

    def kill(child):
        child.join(timeout=moment.uniform(0.3, 2.5))
        child.kill()

    kills = finish(arguments("random"), kill)
    print(f"killed {kills} times at random")
    assert_same(tmp_path / "random", whole)
    assert not list(tmp_path.rglob("*.new")) and not list((tmp_path / "random").rglob("*.ckpt"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_says_how_to_go_on(arguments, tmp_path, stop, monkeypatch):
    plain_step = STAGES["kd"].training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 3:
            os.kill(os.getpid(), stop)
        return plain_step(self, batch, batch_idx)

    monkeypatch.setattr(STAGES["kd"], "training_step", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, CI's say, ignores it
    with pytest.raises(SystemExit, match="kd was stopped at step [34]: run the same command again to go on from its last"):
        fit_here(arguments())
    signal.signal(signal.SIGINT, handler)
    monkeypatch.undo()
    fit_here(arguments())
    assert (tmp_path / "run" / "student").is_dir()


@pytest.fixture
def finished(arguments, tmp_path):
    fit_here(arguments())
    return tmp_path / "run"


def fit_here(args: list[str]) -> None:
    DistillCLI(args)


def test_finished_run(finished, arguments, capsys):
    """What a run leaves: a student that stock transformers loads and runs, events, a config that reads back, no checkpoint."""
    capsys.readouterr()
    stamps = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    fit_here(arguments())
    assert "nothing to do" in capsys.readouterr().out
    assert stamps == {file: file.stat().st_mtime_ns for file in finished.rglob("*")}

    student = AutoModelForCausalLM.from_pretrained(finished / "student")
    assert isinstance(student, Student) and student.config.mixer == "gla"
    inputs = AutoTokenizer.from_pretrained(finished / "student")("The cat", return_tensors="pt", return_token_type_ids=False)
    assert student.generate(**inputs, max_new_tokens=5, pad_token_id=0).shape[1] == inputs["input_ids"].shape[1] + 5
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["matrix_mixing"]["tokens"] == str(4 * STEP) and config["kd"]["tokens"] is None
    for number, (folder, parts) in enumerate(
        zip(LAST, [["align/layer_00", "align/layer_01"]] * 2 + [["train/ce", "train/kl"]], strict=True)
    ):
        events = EventAccumulator(str(finished / folder))
        events.Reload()
        first, steps = [(0, 4), (4, 5), (9, 6)][number]
        for tag in [*parts, "train/loss", "train/lr", "train/grad_norm"]:
            assert [event.step for event in events.Scalars(tag)] == [(first + s) * STEP for s in range(1, steps + 1)]
        for tag in ["validation/loss", "validation/student_perplexity", "validation/teacher_perplexity"]:
            assert {events.Scalars(tag)[0].step, events.Scalars(tag)[-1].step} == {first * STEP, (first + steps) * STEP}


def test_stages_hand_over(finished):
    """Matrix mixing moves only what A depends on; hidden alignment only the mixers; distillation everything."""
    after = [load_file(finished / folder / "student.safetensors") for folder in LAST]
    changed = {name for name in after[0] if not torch.equal(after[0][name], after[1][name])}
    assert changed and all(".self_attn." in name for name in changed)
    changed = {name for name in after[1] if not torch.equal(after[1][name], after[2][name])}
    assert changed == after[2].keys()


def test_softmax_exports_its_teachers_class_and_starts_as_its_teacher(arguments, tmp_path, capsys):
    fit_here(arguments(**{"student.mixer": "softmax", "matrix_mixing.tokens": 0, "hidden_align.tokens": 0, "tokens": STEP}))
    out = capsys.readouterr().out
    first = re.search(r"step 0/1 held-out: .* perplexity (\S+) \(teacher (\S+)\)", out)
    assert first, out
    assert first[1] == first[2]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")) is LlamaForCausalLM


def test_plain_training_has_no_teacher_to_compare_with(arguments, tmp_path, capsys):
    keys = {
        "student.mixer": "softmax",
        "student.init": "scratch",
        "kd.alpha": 0,
        "matrix_mixing.tokens": 0,
        "hidden_align.tokens": 0,
    }
    fit_here(arguments(**keys, tokens=2 * STEP))
    printed = capsys.readouterr().out
    assert "nothing copied" in printed and "(teacher" not in printed and "held-out perplexity" in printed


def refused(args: list[str]) -> str:
    """The one line that `distill-pl` ends with, exit code 2."""
    with redirect_stderr(io.StringIO()) as error, pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code == 2
    lines = [line for line in error.getvalue().strip().splitlines() if not line.startswith("chunks: ")]  # its progress
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"student.mixer": "mamba9"}, r"student.mixer 'mamba9'.*softmax, mlstm, gla"),
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
    assert re.search(says, refused(arguments(**keys)))
    assert not (tmp_path / "run").exists()


def test_out_of_another_run(finished, arguments, tmp_path):
    line = refused(arguments(**{"kd.lr": 1e-3, "student.retention": 0.9}))
    assert "kd.lr 0.0003 -> 0.001" in line and "student.retention 0.982 -> 0.9" in line
    fit_here(arguments(**{"trainer.log_every_n_steps": 7, "validate_every": "1k"}))  # these cannot matter
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml.new").write_text("out")  # killed there, or another rank is writing it
    fit_here(arguments("begun"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("dear")
    assert "is no run folder" in refused(arguments("full"))
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(arguments("file"))


@pytest.fixture
def begun(arguments, tmp_path):
    """A run that died in its second stage: weights of the first, a checkpoint, chunks."""
    child = processes.Process(target=run, args=(arguments(),), kwargs={"die_at_replace": 7})
    child.start()
    child.join()
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("file", ["2_hidden_align/last.ckpt", "1_matrix_mixing/student.safetensors", "train.bin"])
def test_damaged_files_are_named(begun, arguments, tmp_path, file, damage):
    path = next((tmp_path / "cache").rglob(file)) if file.endswith(".bin") else begun / file
    saved = path.read_bytes()
    places = random.Random(0)
    for _ in range(1 if damage == "cut" else 4):
        at = places.randrange(len(saved) // 2, len(saved) - 2048)  # beyond headers, before the tail of a last partial chunk
        path.write_bytes(saved[:at] + (b"" if damage == "cut" else bytes([saved[at] ^ 16]) + saved[at + 1 :]))
        assert str(path) in refused(arguments())
    path.write_bytes(saved)
    fit_here(arguments())


def test_second_run_on_the_same_folder_is_refused(begun, arguments, tmp_path):
    with sole_user(begun, rank=0):
        assert re.search(rf"out .*run' is in use by process {os.getpid()} on ", refused(arguments()))
        with sole_user(begun, rank=1):  # the ranks of one run share it
            pass
    fit_here(arguments())


def test_clock_and_hostname_may_change(begun, arguments, tmp_path, monkeypatch):
    fit_here(arguments("whole"))
    now, ticks = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: now() - 1e7)
    monkeypatch.setattr(time, "monotonic", lambda: ticks() - 1e7)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    fit_here(arguments())
    assert_same(begun, tmp_path / "whole")


def test_full_disk_keeps_the_last_checkpoint(arguments, tmp_path, monkeypatch):
    real, saves = torch.save, []

    def full(what, path, *args, **kwargs):
        saves.append(path)
        if len(saves) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    line = refused(arguments())
    checkpoint = tmp_path / "run" / "1_matrix_mixing" / "last.ckpt"
    assert str(checkpoint) in line and "No space left" in line
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert not list(tmp_path.rglob("*.new"))


def test_full_gpu_names_the_key_to_lower(begun, arguments, tmp_path, monkeypatch):
    plain_step = STAGES["kd"].training_step

    def full(self, batch, batch_idx):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.46 GiB.\nSee documentation")
        return plain_step(self, batch, batch_idx)

    monkeypatch.setattr(STAGES["kd"], "training_step", full)
    assert "kd: the GPU's memory is full" in (line := refused(arguments())) and "data.micro_batch_size below 4" in line
    fit_here(arguments("run", **{"data.micro_batch_size": 2}))


@pytest.mark.parametrize("stage", LAST)
def test_not_finite_names_stage_step_and_layer(arguments, tmp_path, monkeypatch, stage, capsys):
    """From the third step on, layer 1 divides by zero."""
    name = stage[2:]
    plain_step = STAGES[name].training_step

    def poisoned(self, batch, batch_idx):
        if self.global_step == 2:
            with torch.no_grad():
                self.student.model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
        return plain_step(self, batch, batch_idx)

    monkeypatch.setattr(STAGES[name], "training_step", poisoned)
    with redirect_stderr(io.StringIO()) as error, pytest.raises(SystemExit) as exit:
        main(arguments())
    assert exit.value.code == 1
    assert re.search(rf"{name}: not finite at step 3, .*layer 1", error.getvalue())
    checkpoint = torch.load(tmp_path / "run" / stage / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 and all(x.isfinite().all() for x in checkpoint["state_dict"].values())


def test_lost_weights_are_noticed(arguments, monkeypatch):
    """The next stage would start from something other than the last one left."""
    load = distill_pl.run.folder.load_student

    def forgetful(student, leg):
        load(student, leg)
        torch.nn.init.normal_(student.model.embed_tokens.weight)

    monkeypatch.setattr("distill_pl.run.fit.load_student", forgetful)
    assert re.search("hidden_align: the student starts at .* expected", refused(arguments()))
