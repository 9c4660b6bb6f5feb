"""`distill-pl report` on a real run, and on copies of it with other configurations and results."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import t
from torch.utils.tensorboard import SummaryWriter

from distill_pl.console import perplexity
from distill_pl.errors import InputError
from distill_pl.measure import paper, plots
from distill_pl.measure.plots import DISTANCES, Model, Training, draw_positions, draw_recall, draw_training
from distill_pl.measure.report import baseline, held_out, report, scalars, trained_tokens
from distill_pl.mixers import MIXERS
from distill_pl.stages import STAGES


@pytest.fixture(autouse=True)
def short_appendix_a(monkeypatch) -> None:
    """Spare the counts of Appendix A, which take seconds; tests/test_experiments.py tests them."""
    monkeypatch.setattr("distill_pl.measure.report.appendix_a", lambda: [["million parameters"], ["appendix a"]])


@pytest.fixture
def like(run, tmp_path):
    """Return `like(name, changes, accuracies)`, which copies the run to tmp_path/runs with other keys and results (percent)."""

    def copy(name: str, changes: dict, accuracies: tuple | None = None):
        folder = tmp_path / "runs" / name
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("eval"))
        config = yaml.safe_load((run / "config.yaml").read_text())
        for key, value in changes.items():
            part = config
            for step in key.split(".")[:-1]:
                part = part[step]
            part[key.split(".")[-1]] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if accuracies:
            columns = zip(paper.COLUMNS.values(), accuracies, strict=False)
            results = {task: {"acc": x / 100, "acc_stderr": 0.01} for tasks, x in columns for task in tasks}
            (folder / "eval").mkdir()
            (folder / "eval" / "student.json").write_text(json.dumps({"results": results}))
        return folder

    return copy


def rows(out, title: str = "") -> dict[str, list[str]]:
    """Read the first row of each experiment in a report, or in its tables from the one headed `title` on."""
    first: dict[str, list[str]] = {}
    text = (out / "report.md").read_text()
    for line in text[text.index(f"## {title}") :].splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            first.setdefault(cells[0], cells[1:])
    return first


def test_a_copy_counts_once_and_perplexity_is_that_of_the_last_stage(like, tmp_path, monkeypatch, no_pictures, capsys):
    first, _ = like("a", {}), like("b", {})
    (first / "eval").mkdir()
    (first / "eval" / "teacher.json").write_text(json.dumps({"results": {"held-out": {"perplexity": 9.0}}}))
    report([str(tmp_path / "runs")], str(tmp_path))
    assert rows(tmp_path)["gla_qkv_mm_h2h"][0] == "1" and "runs/b has the configuration of" in capsys.readouterr().out
    other = like("c", {"seed": 1})
    (other / "eval").mkdir()
    results = {task: {"acc": 0.5, "acc_stderr": 0.01} for task in ("arc_easy", "piqa")}
    (other / "eval" / "teacher.json").write_text(json.dumps({"results": results}))
    (other / "3_kd" / "student.safetensors").unlink()
    report([str(first), str(other)], str(tmp_path))
    assert rows(tmp_path)["gla_qkv_mm_h2h"][:2] == ["2", f"{perplexity(held_out(first)['student_ce']):.2f}"]
    assert "50.00" in rows(tmp_path)["teacher"]


def test_a_run_has_the_tokens_that_its_stages_train_on():
    config = {"tokens": "1B", "kd": {"tokens": None}, "matrix_mixing": {"tokens": "80M"}, "hidden_align": {"tokens": 0}}
    assert trained_tokens(config) == "1B" and trained_tokens(config | {"kd": {"tokens": "500k"}}) == "80500k"


@pytest.mark.slow
def test_a_run_in_its_row_and_in_pictures(like, tmp_path, capsys):
    run = like("run", {})
    report([str(run)], str(tmp_path))
    row = rows(tmp_path)
    losses = held_out(run)
    assert row["gla_qkv_mm_h2h"][:2] == ["1", f"{perplexity(losses['student_ce']):.2f}"]
    assert row["teacher"][:2] == ["1", f"{perplexity(losses['teacher_ce']):.2f}"] and row["teacher"][-1] == "55.04"
    assert row["gla"][0] == "missing" and row["hgrn2_mm"][-1] == "46.95 (-0.53)"
    assert row["hedgehog"][0] == "missing" and "1 run of 1024 tokens" in capsys.readouterr().out
    assert "appendix a" in row and "Beyond the paper" not in (tmp_path / "report.md").read_text()
    shown = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("![")]
    assert shown == ["![losses](losses.png)", "![matrix mixing](matrix_mixing.png)", "![hidden align](hidden_align.png)"]
    for name in ("losses", "matrix_mixing", "hidden_align"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_seeds_share_a_row(like, tmp_path):
    fresh = {"student.init": "fresh", "hidden_align.tokens": 0, "matrix_mixing.tokens": 0}
    values = [40.0, 41.0, 45.0]
    for seed, value in enumerate(values):
        like(f"mixed{seed}", fresh | {"matrix_mixing.tokens": 512, "seed": seed}, (value,) * 6)
    like("plain", fresh, (39.0,) * 6)
    report([str(tmp_path / "runs")], str(tmp_path))
    half = t.ppf(0.975, 2) * (sum((x - mean(values)) ** 2 for x in values) / 2 / 3) ** 0.5
    row = rows(tmp_path)["gla_mm"]
    assert row[0] == "3" and row[-2] == f"42.00 ± {half:.2f} (+3.00)" and row[-1] == "47.78 (-0.07)"


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    monkeypatch.setattr("distill_pl.measure.report.pictures", lambda runs, folder: [])


def test_runs_of_one_row_differ_in_their_seed_alone(like, tmp_path, no_pictures):
    like("a", {"seed": 1, "trainer.devices": 2})
    like("b", {"seed": 2, "kd.lr": 0.5})
    like("c", {"seed": 3, "kd.lr": 0.5})
    like("d", {"student.init": "calibrated"})  # of an earlier version
    like("e", {"student.rope": True, "hidden_align.target": "mixer"})
    report([str(tmp_path / "runs")], str(tmp_path))
    row = rows(tmp_path)
    assert row["gla_qkv_mm_h2h"][0] == "1" and row["gla_qkv_mm_h2h (kd.lr 0.5)"][0] == "2"
    assert [row[name][0] for name in ("gla_qkv_rope_mm_outputs", "gla_calibrated_mm_h2h")] == ["1", "1"]
    assert row["gla_mm_h2h"][0] == "missing"
    assert "## Not in the paper" in (tmp_path / "report.md").read_text()


def test_answers_to_other_questions_are_no_part_of_a_mean(like, tmp_path, no_pictures, capsys):
    for seed, accuracy in enumerate((60.0, 20.0, 62.0)):
        folder = like(f"gla_s{seed}", {"seed": seed, "data.shuffle": seed}, (accuracy,) * len(paper.COLUMNS))
        file = folder / "eval" / "student.json"
        results = json.loads(file.read_text())["results"]
        results["piqa"] |= {"source": "a" if seed != 1 else "b", "n": 7}
        file.write_text(json.dumps({"results": results}))
    report([str(tmp_path / "runs")], out=str(tmp_path / "report"))
    cells = next(row for name, row in rows(tmp_path / "report").items() if "61.00" in " ".join(row))
    assert "47.33" in " ".join(cells)  # all three, of other columns
    assert "gla_s1 answered other questions of piqa than runs before it" in capsys.readouterr().out


def test_ranking_against_the_papers(like, tmp_path, no_pictures):
    fresh = {"student.init": "fresh", "hidden_align.tokens": 0, "matrix_mixing.tokens": 0}
    for mixer in ("softmax", "gla", "hedgehog", "metala"):
        like(mixer, fresh | {"student.mixer": mixer}, paper.TABLE_2[mixer])
    report([str(tmp_path / "runs")], str(tmp_path))
    assert "these 4 rows against the paper's averages: Kendall's tau 1.00" in (tmp_path / "report.md").read_text()


def test_runs_on_another_text_or_budget_are_no_rows_of_the_paper(like, tmp_path, no_pictures):
    fresh = {"student.init": "fresh", "hidden_align.tokens": 0, "matrix_mixing.tokens": 0}
    like("a", fresh | {"tokens": "1k"})
    for mixer in ("gla", "hgrn2", "retnet"):
        like(mixer, fresh | {"student.mixer": mixer})
    like("mm", fresh | {"matrix_mixing.tokens": 512, "data.dataset": "other"})
    report([str(tmp_path / "runs")], str(tmp_path))
    row = rows(tmp_path, "Not in the paper")
    assert {"gla (tokens 1k)", "gla_mm (data.dataset other)"} <= row.keys()
    assert rows(tmp_path)["gla"][0] == "1" and rows(tmp_path)["gla_mm"][0] == "missing"
    with pytest.raises(InputError, match="no run is given"):
        report([], str(tmp_path))


def test_mixers_beyond_the_paper_have_a_table_of_their_own(like, tmp_path, monkeypatch, no_pictures):
    """A mixer is compared with itself, also where its name begins or ends like that of another."""
    for name in ("gated_delta_net", "gla_2"):
        monkeypatch.setitem(MIXERS, name, MIXERS["gla"])
    fresh = {"student.init": "fresh", "hidden_align.tokens": 0, "matrix_mixing.tokens": 0}
    mixed = fresh | {"matrix_mixing.tokens": 512}
    for mixer, plain in [("gla", 30.0), ("gla_2", 40.0), ("delta_net", 50.0), ("gated_delta_net", 60.0)]:
        like(mixer, fresh | {"student.mixer": mixer}, (plain,) * 6)
        like(f"{mixer}_mm", mixed | {"student.mixer": mixer}, (plain + 1,) * 6)
    like("other", fresh | {"student.mixer": "retnet", "student.init": "qkv"}, (70.0,) * 6)
    like("window", fresh | {"student.mixer": "gla", "student.window": 8}, (80.0,) * 6)
    report([str(tmp_path / "runs")], str(tmp_path))
    beyond = rows(tmp_path, "Beyond the paper")
    assert list(beyond)[:6] == ["experiment", "gated_delta_net", "gated_delta_net_mm", "gla_2", "gla_2_mm", "gla_window"]
    assert beyond["gla_window"][-2:] == ["80.00 (+50.00)", ""]
    assert beyond["gated_delta_net_mm"][-2:] == ["61.00 (+1.00)", ""] and beyond["gla_2_mm"][-2:] == ["41.00 (+1.00)", ""]
    assert list(rows(tmp_path, "Not in the paper"))[:3] == ["experiment", "retnet_qkv", "gated_delta_net"]
    assert rows(tmp_path)["delta_net_mm"][-2:] == ["51.00 (+1.00)", "42.93 (-0.87)"]
    assert rows(tmp_path)["scratch_mlstm"][-1] == "33.39" and baseline("scratch_mlstm") is None


def test_recall_and_perplexity_by_position(like, tmp_path, no_pictures):
    def measured(share: float, perplexity: float) -> dict:
        row = {"acc": share, "acc_stderr": 0.01, "chance": 0.1, "n": 50, "source": "x"}
        row["by_length"] = {"512": share, "4096": share}
        text = {"perplexity": 9.0, "by_position": {"1": 30.0, "2": 20.0, "4": perplexity}}
        return {"held-out": {"perplexity": perplexity}, "text": text, "mqar": row, "copy": row}

    for name, share in [("a", 0.5), ("b", 0.3)]:
        (folder := like(name, {}) / "eval").mkdir()
        (folder / "student.limit50.json").write_text(json.dumps({"results": measured(share, 20.0)}))
        (folder / "teacher.limit50.json").write_text(json.dumps({"results": measured(0.9, 18.0)}))
    like("not_evaluated", {})
    report([str(tmp_path / "runs")], str(tmp_path))
    found = rows(tmp_path, "Recall and long texts")
    assert found["model"] == ["likelihood kept", "recall kept", "mqar", "copy"]
    assert found["a"] == ["90%", "50%", "50.0", "50.0"] and found["b"][1] == "25%" and "not_evaluated" not in found
    (teacher,) = [row for name, row in found.items() if name.startswith("teacher ")]
    assert teacher == ["", "", "90.0", "90.0"]
    for name in ("recall", "positions"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_counts_once_and_the_teachers_perplexity_is_of_one_text(like, tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    like("a", {})
    (tmp_path / "link").symlink_to("runs/a")
    report(["runs/a", "./runs/a/", "runs", str(tmp_path / "link")], "out")
    assert rows(tmp_path / "out")["gla_qkv_mm_h2h"][0] == "1" and float(rows(tmp_path / "out")["teacher"][1]) > 1
    like("b", {"seed": 3})
    losses = {"a": 3.0, "b": 3.1}
    monkeypatch.setattr("distill_pl.measure.report.held_out", lambda run: {"teacher_ce": losses[run.name], "student_ce": 3.2})
    report(["runs"], "out")
    assert rows(tmp_path / "out")["teacher"][1] == ""


def test_pictures_of_few_points_and_of_many_runs_show_them_all(tmp_path, monkeypatch):
    figures = {}

    def keep(figure, file, **options):
        figures[file.name.removesuffix(".png.new")] = figure
        file.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    name = "gla_qkv_mm_h2h_hidden_align.target=mixer_student.init=qkv_s{}"
    scalars = {"train/loss": ([128], [2.0]), "align/layer_00": ([128], [2.0])}
    draw_training([Training("hidden_align", Path(name.format(seed)), "gla", scalars) for seed in range(4)], tmp_path)
    results = {"mqar": {"acc": 0.5, "by_length": {"512": 0.5}, "chance": 0.1}, "text": {"by_position": {"1": 5.0}}}
    models = [Model(name.format(seed), "gla", results, {}) for seed in range(24)]
    draw_recall(models, tmp_path / "recall.png")
    draw_positions(models, tmp_path / "positions.png")
    for picture in ("losses", "recall", "positions"):
        figure = figures[picture]
        assert all(len(line.get_xdata()) > 1 or line.get_marker() == "o" for line in figure.axes[0].lines)
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        assert figure.bbox.y0 <= legend.get_window_extent().y0 and legend.get_window_extent().y1 <= figure.bbox.y1, picture
        assert figure.axes[0].bbox.width > 200
        assert len(figure.axes[0].lines) >= len(models if picture != "losses" else range(4))
    named = [text.get_text() for text in figures["recall"].legends[0].get_texts()]
    assert named == [*(name.format(seed) for seed in range(10)), "14 others"]
    weak = Model("weak", "kda", {"mqar": results["mqar"] | {"acc": 0.1}}, {})  # the best of its mixer has a name
    draw_recall([weak, *models], tmp_path / "recall.png")
    named = [text.get_text() for text in figures["recall"].legends[0].get_texts()]
    assert named == [*(name.format(seed) for seed in range(9)), "weak", "15 others"]
    for largest in (3.1, 10, 100, 1e5):  # on a logarithmic axis
        draw_training([Training("kd", Path("a"), "gla", {"train/loss": ([1, 2], [largest, 3.0])})], tmp_path)
        FigureCanvasAgg(figures["losses"]).draw()
        (axes,) = figures["losses"].axes
        shown = [label.get_window_extent() for label in axes.get_yticklabels(which="both") if label.get_text()]
        inside = sorted(box.y0 for box in shown if axes.bbox.y0 - 5 < box.y0 < axes.bbox.y1)
        assert len(inside) > 1 and min(b - a for a, b in pairwise(inside)) > shown[0].height
    FigureCanvasAgg(maps := figures["hidden_align"]).draw()
    assert all(axes.title.get_window_extent().width < 1.1 * axes.bbox.width for axes in maps.axes if axes.get_title())


def test_curves_are_whole_although_the_clock_was_set_back(tmp_path, monkeypatch):
    for first, clock in [(1, 2e9), (3, 1e9)]:  # a run, and its resumption from step 2
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        with SummaryWriter(tmp_path) as writer:
            for step in range(first, first + 4):
                writer.add_scalar("train/loss", step, step)
    steps, values = scalars(tmp_path)["train/loss"]
    assert steps == values == tuple(range(1, 7))


def test_lines_of_one_mixer_all_look_different():
    styles = plots.line_styles(["gla"] * 12 + ["kda", None])
    assert len({tuple(style.values()) for style in styles}) == 14


def test_stages_are_those_of_a_run():
    assert tuple(STAGES) == paper.STAGES and set(DISTANCES) < set(STAGES)


def test_unfinished_and_absent_runs(like, tmp_path, monkeypatch, capsys, no_pictures):
    folder = like("stopped", {})
    shutil.rmtree(folder / "student")
    monkeypatch.chdir(folder)
    report(["."], str(tmp_path))
    assert rows(tmp_path)["gla_qkv_mm_h2h"][:2] == ["unfinished", ""] and "unfinished: stopped" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"holds no run: give run folders of distill-pl fit"):
        report([str(tmp_path / "nowhere")], str(tmp_path))
