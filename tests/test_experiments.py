"""Every experiment file parses, and spends what section 4 says."""

from pathlib import Path

import pytest

from distill_pl.chain import plan
from distill_pl.cli import DistillCLI

FOLDER = Path(__file__).parent.parent / "experiments"
STUDY = [file for file in sorted(FOLDER.glob("*.yaml")) if not file.stem.startswith("quickstart")]


def parse(monkeypatch, *args):
    seen = []
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda cli, name: seen.append(cli.config[name]))
    DistillCLI(["fit", *args])
    return seen[0]


@pytest.mark.parametrize("file", STUDY, ids=lambda file: file.stem)
def test_experiment_is_what_its_name_says(file, monkeypatch):
    config = parse(monkeypatch, "--config", str(file))
    name = file.stem.split("_")
    assert config.student.mixer == name[0] and config.out == f"runs/{file.stem}"
    assert config.student.init == ("qkv" if "qkv" in name else "fresh")
    aligned = {"mm": "matrix_mixing", "h2h": "hidden_align"}
    steps = {leg.name: leg.steps for leg in plan(config)}
    assert set(steps) == {stage for short, stage in aligned.items() if short in name} | {"kd"}
    tokens = 48 * 512
    assert all(steps[stage] == 80_000_000 // tokens for stage in steps if stage != "kd")
    assert 0 <= 10**9 - sum(steps.values()) * tokens < 3 * tokens
    assert len(file.read_text().splitlines()) <= 8


def test_the_rows_of_the_paper_that_there_are():
    assert {file.stem for file in STUDY} == {
        *("softmax", "softmax_mm", "gla", "gla_mm", "gla_qkv", "gla_qkv_mm", "gla_mm_h2h", "gla_qkv_h2h", "gla_qkv_mm_h2h")
    }


@pytest.mark.parametrize("name", ["quickstart_teacher", "quickstart"])
def test_quickstart_parses(name, monkeypatch):
    assert plan(parse(monkeypatch, "--config", str(FOLDER / f"{name}.yaml")))


def test_command_line_wins_over_experiment_wins_over_base(monkeypatch):
    config = parse(monkeypatch, "--config", str(FOLDER / "gla_mm.yaml"), "--matrix_mixing.tokens", "1k", "--data.batch_size=7")
    assert (config.matrix_mixing.tokens, config.data.batch_size, config.student.init) == (1000, 7, "fresh")
    assert config.teacher == "HuggingFaceTB/SmolLM-360M" and config.data.name == "sample-10BT"
