"""Each experiment file parses, is what its name says, spends what section 4 says, and builds its student."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import refused

from distill_pl.cli import DistillCLI, main
from distill_pl.measure import paper
from distill_pl.measure.paper import TABLE_1
from distill_pl.measure.params import smollm_360m
from distill_pl.measure.report import Run
from distill_pl.mixers import MIXERS
from distill_pl.run.experiments import STUDIES
from distill_pl.run.fit import plan
from distill_pl.run.folder import flat
from distill_pl.run.study import options_of, read
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student

FOLDER = Path(__file__).parent.parent / "experiments"
ALL = [file for file in sorted(FOLDER.glob("*.yaml")) if not file.stem.startswith(("quickstart", *STUDIES))]
STUDY = [file for file in ALL if not file.stem.startswith("best_")]
NAME = re.compile(rf"(scratch_)?({'|'.join(sorted(MIXERS, key=len, reverse=True))})((?:_\w+)?)")

D, H, KV_HEADS, K = 960, 15, 5, 64  # SmolLM-360M's
W = H * K
PARAMETERS = {  # of one layer's mixer; mixers beyond the paper need none here
    "softmax": 2 * D * W + 2 * D * KV_HEADS * K,
    "mlstm": 5 * D * W + 2 * (D + 1) * H + K,  # q, k, v, gate, o; input and forget gate; head norm
    "gla": 5 * D * W + 16 * D + (16 + 1) * W + K,  # q, k, v, gate, o; decay of rank 16; head norm
    "hgrn2": 4 * D * W + W + W,  # q, f, v, o; f's bias; norm
    "retnet": 5 * D * W + K,  # q, k, v, gate, o; head norm
    "mamba2": 5 * D * W + 3 * 4 * W + (D + 1) * H + 2 * H + K,  # C, B, x, z, out; convs of width 4; dt; A and D; head norm
    "metala": 5 * D * W + 2 * W + 4 * D + W,  # q, k, v, gate, o; biases of k and gate; conv of width 4; augmentation
    "delta_net": 4 * D * W + 3 * 4 * W + D * H + K,  # q, k, v, o; convs of width 4; beta; head norm
    "rebased": 4 * D * W + 2 * K,  # q, k, v, o; gamma and beta
    "hedgehog": 4 * D * W + 2 * H * (K + 1) * K,  # q, k, v, o; features of q and of k
    "swa": 2 * D * W + 2 * D * KV_HEADS * K,
    # q, k, v, gate, o; convs of width 4; beta and decay; dt_bias and A_log; head norm
    "gated_delta_net": 5 * D * W + 3 * 4 * W + 2 * D * H + 2 * H + K,
    # q, k, v, o; convs of width 4; decay and gate of rank K; beta; dt_bias and A_log; head norm
    "kda": 4 * D * W + 3 * 4 * W + 2 * (D + W) * K + D * H + W + H + K,
    # q, k, v, o; decay and a of rank K with biases, gate of rank 2 K; mu of 6 projections; k_k, k_a, r_k; group norm
    "rwkv7": 4 * D * W + 2 * (D + W) * K + 2 * W + 2 * (D + W) * K + 6 * D + 3 * W + 2 * W,
}


@pytest.fixture(scope="module")
def smollm() -> SimpleNamespace:
    return smollm_360m()


@functools.cache
def parse(*args):
    """Parse the arguments of `distill-pl fit` without running it."""
    parsed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillCLI, "_run_subcommand", lambda cli, name: parsed.append(cli.config[name]))
        DistillCLI(["fit", *args])
    return parsed[0]


@pytest.mark.slow
@pytest.mark.parametrize("file", STUDY, ids=lambda file: file.stem)
def test_experiment_is_what_its_name_says(file):
    config = parse("--config", str(file))
    scratch, mixer, words = NAME.fullmatch(file.stem).groups()
    name = words.split("_")
    assert config.student.mixer == mixer and config.out == f"runs/{file.stem}"
    assert Run(file, config.as_dict(), {}, True, None).experiment == file.stem
    assert mixer == "swa" or (config.student.window is None) == ("window" not in name)
    assert config.student.init == ("scratch" if scratch else "qkv" if "qkv" in name else "fresh")
    assert config.kd.alpha == (0 if scratch or "plain" in name else 1)
    assert config.matrix_mixing.norm == ("mse" if "mse" in name else "frobenius")
    aligned = {"mm": "matrix_mixing", "h2h": "hidden_align"}
    steps = {stage.name: stage.steps for stage in plan(config)}
    assert set(steps) == {stage for short, stage in aligned.items() if short in name} | {"kd"}
    tokens = 48 * 512
    assert all(steps[stage] == 80_000_000 // tokens for stage in steps if stage != "kd")
    assert 0 <= 10**9 - sum(steps.values()) * tokens < 3 * tokens
    assert len(file.read_text().splitlines()) <= 8


@pytest.mark.parametrize("file", [file for file in ALL if file not in STUDY], ids=lambda file: file.stem)
def test_a_best_recipe_is_that_of_the_study(file):
    config = parse("--config", str(file))
    keys = flat(next(group["set"] for group in read("study")["runs"] if group.get("name") == "best"))
    del keys["hidden_align.tokens"]  # 9M of 30M
    assert parse("--config", str(file), *options_of(keys)) == config
    name = Run(file, config.as_dict(), {}, True, None).experiment
    assert (f"{file.stem.removeprefix('best_')}_qkv_rope_outputs", f"runs/{file.stem}") == (name, config.out)
    assert [stage.steps * 48 * 512 for stage in plan(config)] == pytest.approx([300e6, 700e6], rel=1e-3)


def test_experiments_are_the_rows_of_the_papers_tables():
    assert tuple(MIXERS)[: len(TABLE_1)] == TABLE_1
    table_2 = {f"{mixer}{row}" for mixer in TABLE_1 for row in ("", "_mm")}
    rows = ("", "_mm", "_qkv", "_qkv_mm", "_mm_h2h", "_qkv_h2h", "_qkv_mm_h2h")
    table_3 = {f"{mixer}{row}" for mixer in ("gla", "mlstm") for row in rows}
    appendix_b = {"scratch_mamba2", "scratch_mlstm", "mlstm_plain", "mlstm_qkv_mm", "mlstm_qkv_mm_mse"}
    beyond = {file.stem for file in STUDY if file.read_text().startswith("# Beyond the paper: ")}
    of_the_paper = {file.stem for file in STUDY} - beyond
    assert of_the_paper == table_2 | table_3 | appendix_b
    assert (set(paper.TABLE_2), set(paper.TABLE_3), set(paper.APPENDIX_B)) == (table_2, table_3, appendix_b)


@pytest.mark.slow
def test_experiments_build_their_students_of_smollm_360m(smollm):
    students = {}  # experiments that differ in their start or stages have one student's shape
    for file in STUDY:
        factory = StudentFactory(**parse("--config", str(file)).student)
        config = factory.config(smollm)
        if config.to_json_string() not in students:
            with torch.device("meta"):
                students[config.to_json_string()] = Student(config)
        student = students[config.to_json_string()]
        assert len(student.mixers) == 32 and all(type(mixer) is MIXERS[factory.mixer] for mixer in student.mixers)
        of_mixers = [sum(p.numel() for p in mixer.parameters()) for mixer in student.mixers]
        shares = H if factory.window and factory.mixer != "swa" else 0
        assert set(of_mixers) == {PARAMETERS.get(factory.mixer, of_mixers[0]) + shares}
        mlp, norms, embeddings = 3 * D * 2560, 2 * D, 49152 * D  # the head is tied to them
        assert sum(p.numel() for p in student.parameters()) == embeddings + 32 * (of_mixers[0] + mlp + norms) + D
    assert PARAMETERS.keys() >= set(TABLE_1)


@pytest.mark.slow
@pytest.mark.slow
def test_parameters_are_within_a_million_of_appendix_a(monkeypatch, capsys):
    monkeypatch.setitem(MIXERS, "gla_2", MIXERS["gla"])  # beyond the paper
    main(["params"])
    _, llama, *students = capsys.readouterr().out.splitlines()[:-1]
    assert llama.split() == ["softmax", "350", "409.01", "+59.01", "361.82"]  # the first is the teacher's name, not a count
    assert [row.split()[0] for row in students] == list(MIXERS)[1:]
    gla = next(row.split() for row in students if row.startswith("gla "))
    assert students[-1].split() == ["gla_2", gla[2], gla[4]]
    for row in students[: len(TABLE_1) - 1]:
        _, paper, counted, difference, _ = row.split()
        assert abs(float(counted) - float(paper)) < 1
        assert float(difference) == pytest.approx(float(counted) - float(paper), abs=1e-6)


def test_the_numbers_are_smollm_360ms(smollm):
    assert sum(p.numel() for p in smollm.model.parameters()) == 361_821_120


@pytest.mark.parametrize("name", ["quickstart_teacher", "quickstart"])
def test_quickstart_parses(name):
    assert plan(parse("--config", str(FOLDER / f"{name}.yaml")))


def test_command_line_wins_over_experiment_wins_over_base():
    config = parse("--config", str(FOLDER / "gla_mm.yaml"), "--matrix_mixing.tokens", "1k", "--data.batch_size=7")
    assert (config.matrix_mixing.tokens, config.data.batch_size, config.student.init) == (1000, 7, "fresh")
    assert config.teacher == "HuggingFaceTB/SmolLM-360M" and config.data.name == "sample-10BT"


def test_experiments_are_found_by_name_and_listed(capsys):
    assert parse("--config", "gla_qkv_mm").student == parse("--config", str(FOLDER / "gla_qkv_mm.yaml")).student
    main(["experiments"])
    listed = dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[1:])
    assert sorted(listed) == [file.stem for file in ALL]
    assert listed["gla_qkv_mm"] == "Table 3: Llama-GLA + QKV + Matrix Mixing"
    line = refused("fit", "--config=glaqkv_mm")
    assert "config 'glaqkv_mm' is no file and no experiment's name: did you mean gla_qkv_mm?" in line


def test_an_installed_package_has_configurations_and_experiments():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    setuptools = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    own = [".".join(file.parent.relative_to(FOLDER.parent).parts) for file in FOLDER.parent.glob("distill_pl/**/__init__.py")]
    assert sorted(setuptools["packages"]) == sorted([*own, "distill_pl.configs", "distill_pl.experiments"])
    for package, folder in setuptools["package-dir"].items():
        assert all(list((FOLDER.parent / folder).glob(pattern)) for pattern in setuptools["package-data"][package])
