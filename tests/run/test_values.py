"""Every key's edge values either work or are refused in one line before any work."""

import math
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers import STEP, refused
from jsonargparse import Namespace

from distill_pl.cli import main
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.errors import InputError
from distill_pl.run.trainer import precision
from distill_pl.run.values import RANGES, is_among
from distill_pl.stages import STAGES
from distill_pl.student.factory import StudentFactory

KEYS = {"tokens": 15 * STEP}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"trainer.limit_val_batches": 0}, "trainer.limit_val_batches 0.* more than 0"),
        ({"trainer.limit_val_batches": 0.001}, "trainer.limit_val_batches 0.001 leaves none of the 2 batches.* 0.5"),
        ({"trainer.log_every_n_steps": 0}, "trainer.log_every_n_steps 0.* at least 1"),
        ({"trainer.num_nodes": 0}, "trainer.num_nodes 0.* at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every 0.* at least 1"),
        ({"validate_every": 0}, "validate_every 0.* at least 1"),
        ({"data.batch_size": 0}, "data.batch_size 0.* at least 1"),
        ({"data.micro_batch_size": -1}, "data.micro_batch_size -1.* at least 1"),
        ({"data.sequence_length": 0}, "data.sequence_length 0.* at least 2"),
        ({"tokens": 0}, "tokens 0.* at least 1 and at most"),
        ({"tokens": 10**30}, "tokens 1000.* at least 1 and at most"),
        ({"matrix_mixing.probes": 0}, "matrix_mixing.probes 0.* at least 1"),
        ({"matrix_mixing.decay": 1.5}, "matrix_mixing.decay 1.5.* at most 1"),
        ({"hidden_align.warmup": -0.1}, "hidden_align.warmup -0.1.* at most 1"),
        ({"kd.weight_decay": -1}, "kd.weight_decay -1.* at least 0"),
        ({"kd.lr": ".nan"}, "kd.lr nan.* more than 0"),
        ({"kd.lr": 1e40}, "kd.lr 1e\\+40.* more than 0"),
        ({"kd.temperature": 1e-3}, "kd.temperature 0.001 is too small: give at least 0.01 and at most 100"),
        ({"kd.temperature": 1e6}, "kd.temperature 1000000.0 is too large"),
        ({"student.mixer": "swa", "student.window": 129}, "student.window 129 is beyond the teacher's 128 positions"),
        ({"student.window": 8, "student.sinks": 10**6}, "student.sinks 1000000 is beyond the teacher's 128 positions"),
        ({"kd.clip": 0}, "kd.clip 0.* more than 0"),
        ({"trainer.precision": "16-mixed"}, "trainer.precision 16-mixed.* bf16-mixed"),
        ({"trainer.precision": "bf16-true"}, "trainer.precision bf16-true.* 32-true"),
        ({"matrix_mixing.probes": 10**9}, "matrix_mixing.probes 1000000000 is too large"),
        ({"trainer.devices": 10**30}, "trainer: .*int"),
        ({"student.rope": "often"}, r"student.rope: Expected bool, null. Got value: often"),
        ({"student.softmax_layers": "all"}, r"student.softmax_layers: Expected Sequence. Got value: all"),
        ({"kd.tokens": ""}, r"kd.tokens: Expected Tokens, null. Got value:"),
        ({"kd.lr.a": 3}, r"kd.lr: Expected float. Got value: {a: 3}"),
        ({"student": 3}, r"student: '3' is no file: give a YAML file, or its keys one by one"),
        ({"trainer.precision": 64}, "trainer.precision 64.* 32-true"),
        ({"trainer.precision": "64-true"}, "trainer.precision 64-true.* 32-true"),
        ({"trainer.strategy": "ddp_spawn"}, "trainer.strategy ddp_spawn is not supported: choose one of auto, "),
        ({"trainer.accelerator": "tpu"}, "trainer: .*torch_xla"),
        ({"student.retention": 1e-30}, "student.retention 1e-30 is too small: give at least 1e-06 and at most 0.999999"),
    ],
)
def test_values_out_of_range(arguments, tmp_path, keys, says):
    assert re.search(says, refused(*arguments(**keys)))
    assert not (tmp_path / "run").exists()


IN_PYTHON = {name: partial(stage, None, None) for name, stage in STAGES.items()}
IN_PYTHON |= {"student": StudentFactory, "data": partial(ChunkDataModule, "text")}


OF_GROUPS = {"student": StudentFactory, "data": ChunkDataModule, **STAGES}


@pytest.mark.parametrize("key", [*RANGES, *(f"{name}.{key}" for name, group in OF_GROUPS.items() for key in group.ranges)])
def test_a_range_is_checked_before_the_teacher_is_read_and_in_python(arguments, key):
    line = refused(*arguments(**{key: -(2**64), "teacher": "/nowhere"}))
    assert line.startswith(f"distill-pl: {key}")
    group, _, name = key.rpartition(".")
    if group not in IN_PYTHON or name.endswith("tokens"):
        return  # a key of `fit` alone

    def said(value) -> str:
        with pytest.raises(InputError, match=f"^{key} .* is .*: give ") as error:
            IN_PYTHON[group](**{name: value})
        return str(error.value).partition(" is ")[2]

    assert said(-(2**64)) == line.partition(" is ")[2]
    assert all(said(value).startswith("no ") for value in ("1", math.nan, [1]))


def test_a_budget_of_null_is_none(arguments):
    assert "kd.tokens 100" in refused(*arguments(**{"matrix_mixing.tokens": "null", "tokens": 100}))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("evaluate /nowhere --tasks piqa --limit 0", "limit 0 .* at least 1"),
        ("evaluate /nowhere --tasks piqa --batch_size 0", "batch_size 0 .* at least 1"),
        ("evaluate /nowhere --tasks piqa --batch_size 1000000000000", "batch_size 1000000000000 .* at most 1000000"),
        ("layers /nowhere --batch_size 10000000", "batch_size 10000000 is too large"),
        ("bench gla --batch_size 10000000", "batch_size 10000000 is too large"),
        ("evaluate /nowhere --tasks piqa --seed -1", "seed -1 .* at least 0"),
        ("generate /nowhere --max_new_tokens 0", "max_new_tokens 0 .* at least 1"),
        ("generate /nowhere --temperature -1", "temperature -1.0 .* at least 0"),
        ("generate /nowhere --temperature .nan", "temperature nan .* at least 0"),
        ("generate /nowhere --beams 0", "beams 0 .* at least 1"),
        ("generate /nowhere --beams 99999999999", "beams 99999999999 is too large"),
        (f"generate /nowhere --seed {10**400}", "seed 1000.* is too large"),
        (f"generate /nowhere --temperature {10**400}", "too large to convert to float"),
        ("generate /nowhere --seed 4294967296", "seed 4294967296 .* at most"),
        ("evaluate /nowhere --out x", "unknown key out: see distill-pl evaluate --help"),
        ("evaluate /nowhere --limt 1", "unknown key limt: did you mean limit"),
        ("fit --out=x --data.batch-size=2", "unknown key data.batch-size: did you mean data.batch_size"),
        ("bench gla --repeats 0", "repeats 0 .* at least 1"),
        (f"bench gla --lengths 16,{10**30}", "length 1000.* is too large"),
        (f"bench gla --prefill_chunk {10**30}", "prefill_chunk 1000.* is too large"),
        ("bench gla --seed -1", "seed -1 .* at least 0"),
    ],
)
def test_options_out_of_range(command, says):
    assert re.search(says, refused(*command.split()))


@pytest.mark.parametrize("command", [
    "fit --out=", "fit --out=x --teacher=", "evaluate x --text=", "study study --results=", "layers", "export x --out=",
])  # fmt: skip
def test_an_empty_path_is_not_taken_for_the_folder_one_is_in(command):
    name, *flags = command.split()
    key = flags[-1][2:-1] if flags else "run"
    assert f"{key} is empty: give a path" in refused(name, *(flags or [""]))


def test_a_path_that_cannot_be_saved_in_a_configuration_is_named():
    assert r"data.dataset 'caf\udce9.txt' is not UTF-8: rename it" in refused("fit", "--out=x", "--data.dataset=caf\udce9.txt")


@pytest.mark.parametrize("key", ["out", "data.cache"])
@pytest.mark.parametrize("place", [".", "run", "a/run"])
def test_a_run_writes_nothing_into_the_folder_of_its_text(arguments, corpus, key, place):
    before = sorted(corpus.rglob("*"))
    assert re.search(f"{key} .* is inside data.dataset .*: choose another {key}", refused(*arguments(**{key: corpus / place})))
    assert sorted(corpus.rglob("*")) == before
    assert "is inside" not in refused(*arguments(**{key: corpus / ".hidden" / place, "teacher": "/nowhere"}))


@pytest.mark.parametrize(("dataset", "place", "among"), [
    ("data/**/*.txt", "data/run", True), ("data/*/*.txt", "data/run", True), ("data/*.txt", "data", True),
    ("data/*.txt", "data/run", False), ("data/s*/*.txt", "data/run", False), ("data/**", ".", False), ("*.txt", "run", False),
    ("data/**/*.txt", "data/a/.run", False), ("data/*/*.txt", "data/.run", False), ("x.txt", ".", False),
    ("a[1]", "a[1]/x", True), ("a[1]", "a1/x", False),
])  # fmt: skip
def test_what_a_glob_reaches(tmp_path, monkeypatch, dataset, place, among):
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "a[1]"):
        (tmp_path / folder).mkdir()
    assert is_among(dataset, str(tmp_path / place)) == among


def test_flags_count_more_than_files_wherever_they_stand(arguments, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("student: {mixer: retnet}\nkd: {lr: 1e-5}\nout: elsewhere")
    (tmp_path / "b.yaml").write_text("kd: {lr: 2e-5}")
    files = ["--config", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml")]
    with pytest.raises(SystemExit):
        main([*arguments(**{"student.mixer": "kda"}), *files, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["student"]["mixer"], config["kd"]["lr"]) == ("kda", 2e-5) and config["out"] != "elsewhere"


def test_a_link_to_nothing_is_refused_before_any_work(arguments, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a link to nothing" in refused(*arguments(out=tmp_path / "link", teacher="/nowhere"))


def test_a_missing_package_is_named_before_any_work(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(*arguments(**{"trainer.logger": "[wandb]", "teacher": "/nowhere"}))


def test_a_list_of_models_has_no_empty_path():
    assert "models is empty" in refused("report", "runs", "")


@pytest.mark.parametrize(("text", "says"), [
    (b"kd: {lr: 1}\ntokens: 1M\nkd: {alpha: 2}\n", "key kd comes twice, line 3"),
    (b"kd:\n  lr: 1\n  alpha: 2\n  lr: 1\n", "key lr comes twice, line 4"),
    (b"kd.lr: 1\ntokens: 1M\nkd: {alpha: 2}\n", "keys of kd come twice, with a dot and below it, line 3"),
    ("# caf\xe9\n".encode("latin-1"), "not encoded as UTF-8"),
    ("tokens: 1M\n".encode("utf-16"), "not encoded as UTF-8"),
    (b"kd:\n\tlr: 1\n", "line 2, column 1"),
    (b"kd: &a [*a]\n", "an anchor within itself"),
    (b"", "a configuration file has no keys with values"),
    (b"student:\n", "a configuration file has no keys with values, but 'student:'"),
    (b"student:\nseed: 1\n", "student has no keys with values"),
    (b"kd: [1]\nseed: 1\n", "kd has no keys with values"),
    (b"tokens:\nseed: 1\n", "tokens: Not of type Tokens: None is not an amount of tokens"),
    (b"kd: {lr: null}\n", "kd.lr: Expected float. Got value: None"),
    (b"student: {softmax_layers: null}\n", "student.softmax_layers: Expected Sequence. Got value: None"),
    (b"data: {cache: null}\n", "data.cache: Expected str. Got value: None"),
])  # fmt: skip
def test_a_configuration_that_says_two_things_or_nothing_is_refused(tmp_path, text, says):
    (tmp_path / "keys.yaml").write_bytes(text)
    assert says in refused("fit", f"--config={tmp_path}/keys.yaml", f"--out={tmp_path}/run")


def test_what_merely_looks_like_yaml_is_text(tmp_path):
    assert "student.mixer 'a: 1, a: 2' is unknown" in refused("fit", f"--out={tmp_path}/run", "--student.mixer=a: 1, a: 2")


@pytest.mark.parametrize("command", ["evaluate", "generate", "report"])
def test_a_path_that_no_file_system_takes_is_one_line(command):
    assert re.search("File name too long: check that path", refused(command, "x" * 300, code=1))


def test_memory_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setattr("distill_pl.cli.params", lambda: torch.empty(2**50))
    assert re.search("out of memory .*can't allocate memory", refused("params", code=1))


def test_ctrl_c_is_one_line(monkeypatch):
    monkeypatch.setattr("distill_pl.cli.params", lambda: signal.raise_signal(signal.SIGINT))
    assert "interrupted: what has been written is kept" in refused("params", code=128 + signal.SIGINT)


INTERRUPTED_IMPORT = """
import signal, sys
sys.argv[0] = {name!r}
class Interrupt:
    def find_spec(self, name, *args):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
import distill_pl.cli
"""


@pytest.mark.parametrize("name", ["/usr/bin/distill-pl", "other.py"])
def test_ctrl_c_while_the_command_imports_prints_nothing(name):
    code = INTERRUPTED_IMPORT.format(name=name)
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert ("KeyboardInterrupt" in ended.stderr) == (name == "other.py")  # a library leaves the handling of signals alone


def test_the_command_handles_ctrl_c_once_it_begins(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        test_ctrl_c_is_one_line(monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("computes_in_bf16", "chosen"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_of_gpus_that_only_emulate_bf16_is_fp32(monkeypatch, computes_in_bf16, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    supported = lambda including_emulation=True: including_emulation or computes_in_bf16  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision(Namespace(trainer=Namespace(accelerator="auto", precision=None))) == chosen


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Make a home directory with a folder `models`, and work elsewhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_paths_of_fit_may_begin_with_home(command, home, teacher_folder, corpus):
    for name, target in {"teacher": teacher_folder, "text": corpus}.items():
        (home / name).symlink_to(target)
    keys = {"matrix_mixing.tokens": 0, "hidden_align.tokens": 0, "tokens": 2 * STEP, "data.cache": "~/cache"}
    flags = command("~/runs/a run", **keys, **{"data.dataset": "~/text"})
    (home / "keys.yaml").write_text("teacher: ~/teacher\n")
    main([flags[0], "--config=~/keys.yaml", *(flag for flag in flags[1:] if not flag.startswith("--teacher="))])
    run = home / "runs" / "a run"
    assert (run / "student").is_dir() and (home / "cache").is_dir()
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert [recorded["out"], recorded["teacher"]] == [str(run), str(home / "teacher")]
    assert not list(Path().iterdir())
    main(["evaluate", "~/runs/a run"])
    assert (run / "eval" / "student.json").is_file() and not list(Path().iterdir())
    main(["generate", "~/runs/a run", "--max_new_tokens=2"])
