"""A study's file says what is run; what is done is not run again, and what is wrong is refused before anything is."""

import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from helpers import STEP, fit_command, forkserver, refused

from distill_pl.cli import main
from distill_pl.measure import paper
from distill_pl.run import study
from distill_pl.run.study import environments, expand, read
from distill_pl.run.trainer import end_with_parent

RUNS = {"runs": [{"config": ["gla", "gla_qkv_mm_h2h"]}]}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "study.yaml"


def listed(file: Path, lines: dict, **own) -> dict:
    """Return the runs of a study by name."""
    file.write_text(yaml.safe_dump(lines))
    return {run.name: run for run in expand(str(file), read(str(file)), own, file.parent, None)}


def test_runs_are_all_combinations_seed_by_seed(file):
    over = {"kd": {"lr": ["1e-3", "2e-3"]}, "student.softmax_layers": [[], [1, 2]]}
    groups = [{"config": ["gla", "mlstm_qkv"], "over": over}]
    runs = listed(file, {"seeds": [0, 7], "common": {"kd": {"lr": 5, "alpha": 0.5}}, "runs": groups})
    assert len(runs) == len({run.config.out for run in runs.values()}) == 2 * 2 * 4
    assert [run.seed for run in runs.values()] == [0] * 8 + [7] * 8
    run = runs["mlstm_qkv_kd.lr=2e-3_student.softmax_layers=1_2_s7"]
    assert (run.config.student.mixer, run.config.seed, run.config.kd.lr, run.config.kd.alpha) == ("mlstm", 7, 2e-3, 0.5)
    assert run.config.student.softmax_layers == [1, 2] and run.row == run.name.removesuffix("_s7")


def test_values_to_try_may_be_groups_of_keys(file):
    over = {"hidden_align": [{"tokens": "100M"}, {"lr": "1e-3"}]}
    group = {"config": "gla_qkv_mm_h2h", "over": over, "set": {"hidden_align.clip": 2}}
    first, second = (run.config.hidden_align for run in listed(file, {"runs": [group]}).values())
    assert (first.tokens, second.tokens, second.lr) == (100e6, 80e6, 1e-3) and first.lr != 1e-3
    assert first.clip == second.clip == 2


def test_values_are_those_of_the_command_line_and_anchors_those_of_yaml(file):
    file.write_text(
        "seeds: [007]\nevaluate: {tasks: [mqar, copy], lengths: [64, 128]}\nruns:\n"
        "  - {config: gla, set: &own {kd: {lr: 1e-3}, data.name: 010}}\n  - {config: mlstm, set: {<<: *own, tokens: 1_000M}}\n",
        encoding="utf-8-sig", newline="\r\n",
    )  # fmt: skip
    lines = read(str(file))
    assert lines["evaluate"] == {"tasks": "mqar,copy", "lengths": "64,128"}
    runs = {run.name: run.config for run in expand(str(file), lines, {}, file.parent, None)}
    assert [*runs] == ["gla_s7", "mlstm_s7"] and {config.seed for config in runs.values()} == {7}
    assert {(config.kd.lr, config.data.name, config.tokens) for config in runs.values()} == {(1e-3, "010", 10**9)}


def test_stages_keep_their_share_of_the_tokens(file):
    runs = listed(file, RUNS | {"common": {"tokens": "30M"}})
    assert runs["gla_s0"].config.matrix_mixing.tokens == 0
    config = runs["gla_qkv_mm_h2h_s0"].config
    assert (config.matrix_mixing.tokens, config.hidden_align.tokens, config.kd.tokens) == (2_400_000, 2_400_000, None)
    assert "--hidden_align.tokens=2400k" in runs["gla_qkv_mm_h2h_s0"].args
    runs = listed(file, RUNS | {"common": {"tokens": "30M", "hidden_align.tokens": "1M"}}, tokens="50M")
    assert runs["gla_s0"].config.hidden_align.tokens == 1_000_000  # given for all runs
    assert runs["gla_qkv_mm_h2h_s0"].config.matrix_mixing.tokens == 4_000_000


@pytest.mark.slow
def test_the_papers_study_has_every_row_of_its_tables():
    lines = read("study")
    assert lines.pop("evaluate")["tasks"] == "study,recall" and lines["seeds"] == ["0", "1", "2"]
    runs = expand("study", lines, {}, Path("out"), 1)
    assert {run.row for run in runs} >= {*paper.TABLE_2, *paper.TABLE_3, *paper.APPENDIX_B}
    for run in (run for run in runs if "_best" not in run.row):  # the experiment itself at another scale
        assert {"tokens", "kd.lr"} <= run.changed.keys() and run.config.tokens == 30_000_000
        assert run.config.matrix_mixing.tokens == (2_400_000 if "_mm" in run.row else 0)
        assert run.config.hidden_align.tokens == (2_400_000 if "_h2h" in run.row else 0)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("a: [", "cannot be read as YAML"),
        ("", "give a mapping with keys of common, seeds, evaluate, runs"),
        ({"runs": []}, "has no runs: list groups of them"),
        (RUNS | {"seeds": []}, r"seeds \[\] leaves nothing of a group to run"),
        ({"runs": [{"config": "gla"}, {"config": []}]}, r"config \[\] leaves nothing of a group"),
        ({"runs": [{"config": "gla"}, {"config": "gla", "over": {"kd": {"lr": []}}}]}, r"kd.lr \[\] leaves nothing of a group"),
        (RUNS | {"comon": {}}, "unknown key comon: did you mean common?"),
        (RUNS | {"common": 3}, "common is '3': give a mapping"),
        ({"runs": [{"configs": "gla"}]}, "group 1 of runs: unknown key configs: did you mean config?"),
        ({"runs": [{"config": "glaa"}]}, "run glaa_s0: config 'glaa' is no file .* did you mean gla?"),
        ({"runs": [{"config": [["gla"]]}]}, "are not all names"),
        ({"runs": [{"config": "gla", "over": {"kd.lr": 3}}]}, "put those to be tried in"),
        ({"runs": [{"config": "gla", "set": {"student": {"mixer": "glaa"}}}]}, "run gla_s0: student.mixer 'glaa' is unknown"),
        ({"runs": [{"config": "gla"}, {"config": "gla"}]}, "two runs gla_s0: .* another `name`"),
        ({"runs": [{}]}, "a group without `config` a `name`"),
        (RUNS | {"common": {"out": "x"}}, "out is not for a run of a study"),
        (RUNS | {"common": {"kd": {"lrr": 1}}}, "run gla_s0: unknown key kd.lrr: did you mean kd.lr?"),
        (RUNS | {"common": {"tokens": "10k"}}, "run gla_s0: kd.tokens 10k is less than one batch"),
        (RUNS | {"seeds": ["a"]}, "'a' is no seed: give whole numbers from 0"),
        (RUNS | {"seeds": [-1]}, "'-1' is no seed"),
        (RUNS | {"seeds": ["007", 7]}, "two runs gla_s7: list each config, seed and value once"),
        (RUNS | {"evaluate": {"lengths": "9,x"}}, "evaluate: lengths '9,x' are not whole positive numbers"),
        (RUNS | {"evaluate": {"taskss": "x"}}, "evaluate: unknown key taskss: did you mean tasks?"),
        (RUNS | {"evaluate": {"models": "x"}}, "evaluate: unknown key models: see distill-pl evaluate"),
        ("runs: [{config: gla}]\nruns: [{config: mlstm}]", "key runs comes twice .* line 2"),
        ("runs: [{config: gla, set: &a {kd: *a}}]", "Circular reference"),
        ("runs: [{config: gla, set: {kd.lr: 1, kd: {lr: 2}}}]", "keys of kd come twice, with a dot and below it"),
        ("runs: [{config: gla, set: {kd.lr: 1}, over: {kd: {lr: [2]}}}]", "kd.lr is given twice in one group"),
        ("runs: [{config: gla, set: {kd.lr: 1}, over: {kd: [{ce: 0}, {lr: 2}]}}]", "kd.lr is given twice in one group"),
        (RUNS | {"common": {"dry_run": True}}, "dry_run is not for a run of a study"),
        (RUNS | {"common": {"print_config": ""}}, "print_config is not for a run of a study"),
        ({"runs": [{"config": "gla", "name": "x" * 200}]}, "too long a name for a file"),
        (RUNS | {"common": {"kd": {"ce": 0, "alpha": 0}}}, "run gla_s0: kd.ce 0 and kd.alpha 0 leave nothing to learn"),
        (RUNS | {"common": {"kd": {"decay": 0.2}}}, "kd.decay 0.2 applies only to kd.schedule stable_decay, not to linear"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(file, lines, says):
    file.write_text(lines if isinstance(lines, str) else yaml.safe_dump(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(file.parent)
        assert re.search(says, refused("study", file))
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("parallel", 0, "at least 1"), ("seeds", 0, "at least 1"), ("time_limit", 0, "more than 0"),
     ("index", 3, "index 3 is too large: give at least 1 and at most 2"), ("only", "x*", "leaves none of the runs"),
     ("tokens", "x", "Expected Tokens")],
)  # fmt: skip
def test_what_is_wrong_on_the_command_line_is_one_line(file, key, value, says):
    file.write_text(yaml.safe_dump(RUNS))
    assert says in refused("study", file, f"--{key}={value}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"common": {"teacher": "/nowhere"}}, "run gla_s0: model '/nowhere' cannot be loaded"),
        ({"common": {"data.dataset": "/nowhere.txt"}}, "run gla_s0: data.dataset '/nowhere.txt': no such file"),
        ({"evaluate": {"tasks": "copy"}}, "run gla_s0: tasks=copy: it needs 32 words that are single tokens"),
        ({"evaluate": {"text": "/nowhere.txt"}}, "run gla_s0: text: '/nowhere.txt': no such file"),
        ({"evaluate": {"text": "few.txt", "lengths": 16}}, "run gla_s0: text: it holds 8 tokens, fewer than"),
    ],
)
def test_what_every_run_needs_is_looked_at_before_any_begins(file, teacher_folder, corpus, monkeypatch, changes, says):
    monkeypatch.chdir(file.parent)
    Path("few.txt").write_text("few words")
    common = dict(arg[2:].split("=", 1) for arg in fit_command(".", teacher_folder, corpus, "cache")[2:])
    file.write_text(yaml.safe_dump(RUNS | changes | {"common": common | changes.get("common", {})}))
    assert says in refused("study", file, "--out=out", "--only=gla_s0")
    assert not Path("out").exists()


@pytest.mark.parametrize("key", ["out", "results"])
def test_a_place_that_takes_no_files_is_refused_before_any_run_begins(file, teacher_folder, corpus, capsys, key):
    common = dict(arg[2:].split("=", 1) for arg in fit_command(".", teacher_folder, corpus, file.parent / "cache")[2:])
    file.write_text(yaml.safe_dump(RUNS | {"common": common}))
    arguments = {"out": file.parent / "out"} | {key: file}  # a file is no place for files
    assert f"cannot write {file}" in refused("study", file, *(f"--{name}={value}" for name, value in arguments.items()))
    assert "begins" not in capsys.readouterr().out


def test_the_plan_is_printed_and_nothing_is_run(file, capsys):
    file.write_text(yaml.safe_dump(RUNS | {"seeds": [0, 1, 2]}))
    main(["study", str(file), "--seeds=2", "--only=gla_qkv*", "--tokens=50M", f"--out={file.parent}/out", "--show=plan"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [["[1/2]", "gla_qkv_mm_h2h_s0"], ["[2/2]", "gla_qkv_mm_h2h_s1"]]
    assert "matrix_mixing 3.98M + hidden_align 3.98M + kd 42M" in rows[0]
    main(["study", str(file), "--index=5", f"--out={file.parent}/out", "--show=plan"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("[5/6] gla_s2 ")
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(("gpus", "parallel", "shares"), [("0,1,2,3", 2, ["0,2", "1,3"]), ("5,7", 4, ["5", "7", "5", "7"]),
                                                        ("0,1", 1, ["0,1"])])  # fmt: skip
def test_gpus_are_shared_out(monkeypatch, gpus, parallel, shares):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(parallel)] == shares


def start_and_wait(pipe) -> None:
    """Start a process that would outlive this one, as a study starts its runs, and send its number."""
    libc = ctypes.CDLL(None)
    with subprocess.Popen(["sleep", "60"], preexec_fn=lambda: end_with_parent(libc), start_new_session=True) as child:
        pipe.send(child.pid)


def test_two_studies_at_once_carry_out_no_run_twice(file, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(study, "command", lambda args, *rest: iter(commands.append(args) or ()))
    result = {"held_out": {"student": 2.5}}
    monkeypatch.setattr(study, "summarise", lambda run, options: result | {"config": run.changed, "evaluate": options})
    runs, out = listed(file, RUNS), file.parent
    (out / "logs").mkdir()
    with FileLock(out / "logs" / "gla_s0.lock"):  # as another study does while it carries out this run
        assert study.execute(runs, out, out / "results", None, parallel=2, deadline=math.inf) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^gla_s0 .* left to another study", printed, re.M) and "1 finished, 0 failed, 1 left" in printed
    assert len(commands) == 1 and [file.stem for file in (out / "results").iterdir()] == ["gla_qkv_mm_h2h_s0"]
    assert study.execute(runs, out, out / "results", None, parallel=2, deadline=math.inf) == 0
    assert "2 finished, 0 failed, 0 left" in capsys.readouterr().out
    assert len(commands) == 2  # the run that is done since was not carried out again


@pytest.mark.parametrize(("says", "times"), [("kd: the GPU's memory is full", 2), ("no text (see /memory/gla_s0.log)", 1)])
def test_a_run_without_memory_beside_others_begins_again(file, monkeypatch, capsys, says, times):
    commands = []

    def command(args, *_):
        commands.append(args)
        yield None
        if not any("gla_qkv_mm_h2h" in str(arg) for arg in args):
            raise study.Failed(says)

    monkeypatch.setattr(study, "command", command)
    monkeypatch.setattr(study, "summarise", lambda *args: {"held_out": {"student": 2.5}})
    assert study.execute(listed(file, RUNS), file.parent, file.parent, None, parallel=2, deadline=math.inf) == 1
    printed = capsys.readouterr().out
    assert len(commands) == 1 + times and len(re.findall("^gla_s0 .* begins$", printed, re.M)) == times
    assert len(re.findall(r"^gla_s0 .*failed and will begin again: kd", printed, re.M)) == times - 1
    assert "1 finished, 1 failed, 0 left" in printed


def test_a_run_without_memory_begins_again_when_all_others_have_ended(file, monkeypatch, capsys):
    alive = []

    def command(args, *_):
        alive.append(args)
        for _ in range(3):
            yield None
            if any(arg.endswith("gla_s0") for arg in args) and len(alive) > 1:
                alive.remove(args)
                raise study.Failed("the GPU's memory is full")
        alive.remove(args)

    monkeypatch.setattr(study, "command", command)
    monkeypatch.setattr(study, "summarise", lambda *args: {"held_out": {"student": 2.5}})
    runs = listed(file, {"runs": [{"config": ["gla", "gla_qkv", "mlstm"]}]})
    assert study.execute(runs, file.parent, file.parent, None, parallel=3, deadline=math.inf) == 0
    assert "3 finished, 0 failed, 0 left" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_runs_end_with_a_study_that_is_killed():
    ours, theirs = forkserver.Pipe()
    parent = forkserver.Process(target=start_and_wait, args=(theirs,))
    parent.start()
    run = Path("/proc") / str(ours.recv()) / "stat"
    assert run.read_text().split()[2] in "SR"
    parent.kill()
    deadline = time.monotonic() + 10
    while run.is_file() and run.read_text().split()[2] != "Z":  # a zombie where nothing adopts it
        assert time.monotonic() < deadline
        time.sleep(0.01)


def print_into(pipe, arguments: list[str]) -> None:
    """Run `distill-pl` with `arguments`, printing into a pipe."""
    with open(pipe.fileno(), "w", buffering=1, closefd=False) as output, redirect_stdout(output):
        main(arguments)


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_a_failed_run_does_not_stop_it(file, teacher_folder, corpus, capsys):
    out, command = file.parent / "out", fit_command(".", teacher_folder, corpus, file.parent / "cache")
    common = dict(arg[2:].split("=", 1) for arg in command[2:]) | {"tokens": 60 * STEP}
    groups = [{"config": "gla_qkv_mm_h2h", "set": {"matrix_mixing.tokens": 4 * STEP, "hidden_align.tokens": 4 * STEP}},
              {"config": "gla", "name": "bad", "set": {"student.softmax_layers": [9]}}]  # fmt: skip
    file.write_text(yaml.safe_dump({"common": common, "runs": groups, "evaluate": {"limit": 2}}))
    arguments = ["study", str(file), f"--out={out}", "--parallel=2"]
    ours, theirs = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=print_into, args=(theirs, arguments))
    process.start()
    theirs.close()
    printed = []
    with open(ours.fileno(), closefd=False) as lines:
        for line in lines:
            printed.append(line)
            if "failed:" in line:  # by now the other has begun too
                process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert "[2/2] gla_bad_s0" in printed[3] and "softmax_layers [9] do not exist" in printed[3]
    assert printed[-2] == "interrupted: stopping gla_qkv_mm_h2h_s0\n"
    assert printed[-1].startswith("0 finished, 1 failed, 1 left; the same command goes on")
    assert not list((out / "results").iterdir())

    main([*arguments, "--only=gla_qkv*"])
    assert "held-out" in capsys.readouterr().out
    kept = out / "results" / "gla_qkv_mm_h2h_s0.json"
    result = json.loads(kept.read_text())
    assert kept.stat().st_size < 10_000
    assert result["stages"] == {"matrix_mixing": 4 * STEP, "hidden_align": 4 * STEP, "kd": 52 * STEP}
    assert list(result["curve"].values())[-1] == result["held_out"]["student"] < list(result["curve"].values())[0]
    for model, row in result["evaluated"].items():
        assert row["held-out"]["perplexity"] == pytest.approx(result["held_out"][model], rel=1e-3)
    assert set(result["state_bytes"]) == {"student", "teacher"} and result["state_bytes"]["student"] > 0
    assert 0 < result["held_out"]["kl"] < 2 and result["config"]["tokens"] == "7680"

    file.write_text(yaml.safe_dump({"common": common, "runs": groups, "evaluate": {"limit": 3}}))
    main(["study", str(file), f"--out={out}", "--only=gla_qkv*", "--show=plan"])
    assert re.search(r"0 done; 0 tokens are left(.*\n)*.* trained\n", capsys.readouterr().out)
    same = {"limit": 2, "batch_size": 5, "data": str(file.parent)}  # no other questions, as there are no tasks
    file.write_text(yaml.safe_dump({"common": common, "runs": groups, "evaluate": same}))
    for missing in (out / "gla_qkv_mm_h2h_s0").rglob("*.safetensors"):
        missing.unlink()  # nothing of a run that is done is needed
    main(["study", str(file), f"--out={out}", "--only=gla_qkv*"])
    assert "1 run, 1 done" in capsys.readouterr().out
    line = refused("study", file, f"--out={out}", "--only=gla_qkv*", "--tokens=9k")
    assert "of another configuration (tokens 7680 -> 9k): undo that" in line
    kept.write_text('{"acc": 1}')
    assert "no result of distill-pl study" in refused("study", file, f"--out={out}", "--only=gla_qkv*")
    kept.write_text("{")
    assert "damaged" in refused("study", file, f"--out={out}", "--only=gla_qkv*")
