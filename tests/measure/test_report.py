"""`distill-pl report` on a real run, and on copies of it that pretend to be others."""

import json
import shutil
from statistics import mean

import pytest
import yaml
from scipy.stats import t

from distill_pl.console import perplexity
from distill_pl.errors import InputError
from distill_pl.measure import study
from distill_pl.measure.report import held_out, report


@pytest.fixture(scope="module")
def run(fitted):
    """Of all three stages: gla_qkv_mm_h2h."""
    return fitted(**{"tokens": 1024, "matrix_mixing.tokens": 512, "hidden_align.tokens": 256, "trainer.log_every_n_steps": 1})


@pytest.fixture
def like(run, tmp_path):
    """`like(name, changes, accuracies)` -> a copy of the run under tmp_path/runs, changed, with results in percent."""

    def copy(name: str, changes: dict, accuracies: tuple | None = None):
        folder = tmp_path / "runs" / name
        shutil.copytree(run, folder)
        config = yaml.safe_load((run / "config.yaml").read_text())
        for key, value in changes.items():
            part = config
            for step in key.split(".")[:-1]:
                part = part[step]
            part[key.split(".")[-1]] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if accuracies:
            columns = zip(study.COLUMNS.values(), accuracies, strict=False)
            results = {task: {"acc": x / 100, "acc_stderr": 0.01} for tasks, x in columns for task in tasks}
            (folder / "eval").mkdir()
            (folder / "eval" / "student.json").write_text(json.dumps({"results": results}))
        return folder

    return copy


def rows(out) -> dict[str, list[str]]:
    """The first row of each experiment in a report."""
    found: dict[str, list[str]] = {}
    for line in (out / "report.md").read_text().splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(cells[0], cells[1:])
    return found


def test_a_run_in_its_row_and_in_pictures(run, tmp_path, capsys):
    report([str(run)], str(tmp_path))
    found = rows(tmp_path)
    losses = held_out(run)
    assert found["gla_qkv_mm_h2h"][:2] == ["1", f"{perplexity(losses['student_ce']):.2f}"]
    assert found["teacher"][:2] == ["1", f"{perplexity(losses['teacher_ce']):.2f}"] and found["teacher"][-1] == "55.04"
    assert found["gla"][0] == "missing" and found["hgrn2_mm"][-1] == "46.95 (-0.53)"
    assert found["hedgehog"][0] == "missing" and "1 run of 1024 tokens" in capsys.readouterr().out
    shown = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("![")]
    assert shown == ["![losses](losses.png)", "![matrix mixing](matrix_mixing.png)", "![hidden align](hidden_align.png)"]
    for name in ("losses", "matrix_mixing", "hidden_align"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_share_a_row(like, tmp_path):
    fresh = {"student.init": "fresh", "hidden_align.tokens": 0, "matrix_mixing.tokens": 0}
    values = [40.0, 41.0, 45.0]
    for seed, value in enumerate(values):
        like(f"mixed{seed}", fresh | {"matrix_mixing.tokens": 512, "seed": seed}, (value,) * 6)
    like("plain", fresh, (39.0,) * 6)
    report([str(tmp_path / "runs")], str(tmp_path))
    half = t.ppf(0.975, 2) * (sum((x - mean(values)) ** 2 for x in values) / 2 / 3) ** 0.5
    found = rows(tmp_path)["gla_mm"]
    assert found[0] == "3" and found[-2] == f"42.00 ± {half:.2f} (+3.00)" and found[-1] == "47.78 (-0.07)"


def test_runs_of_one_row_differ_in_their_seed_alone(like, tmp_path):
    like("a", {"seed": 1, "trainer.devices": 2})
    like("b", {"seed": 2, "kd.lr": 0.5})
    with pytest.raises(InputError, match=r"both gla_qkv_mm_h2h, but differ in kd\.lr: report them apart"):
        report([str(tmp_path / "runs")], str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()


def test_ranking_against_the_papers(like, tmp_path):
    fresh = {"student.init": "fresh", "hidden_align.tokens": 0, "matrix_mixing.tokens": 0}
    for mixer in ("softmax", "gla", "hedgehog", "metala"):
        like(mixer, fresh | {"student.mixer": mixer}, study.TABLE_2[mixer])
    report([str(tmp_path / "runs")], str(tmp_path))
    assert "these 4 rows against the paper's averages: Kendall's tau 1.00" in (tmp_path / "report.md").read_text()


def test_unfinished_and_absent_runs(like, tmp_path, capsys):
    folder = like("stopped", {})
    shutil.rmtree(folder / "student")
    report([str(folder)], str(tmp_path))
    assert rows(tmp_path)["gla_qkv_mm_h2h"][:2] == ["unfinished", ""] and "unfinished: stopped" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"holds no run: give run folders of distill-pl fit"):
        report([str(tmp_path / "nowhere")], str(tmp_path))
