"""A study's summary: a claim is confirmed or contradicted only where the whole interval over seeds says so."""

import json
import math
import shutil
from pathlib import Path

import pytest
from helpers import refused
from matplotlib.figure import Figure

from distill_pl.errors import InputError
from distill_pl.measure import paper
from distill_pl.run.summary import CLAIMS, PUBLISHED, SPANS, Claim, half_width, interval, judge, over_seeds, ranking, summary


def write(folder: Path, row: str, losses: list[float], accuracies: tuple = (), tokens: str = "30M") -> None:
    """Write results of a row, one for each seed, as `distill-pl study` does."""
    columns = zip(paper.COLUMNS.values(), accuracies, strict=False)
    tasks = {task: {"acc": accuracy / 100, "acc_stderr": 0.01} for column, accuracy in columns for task in column}
    for seed, loss in enumerate(losses):
        result = {
            "row": row, "seed": seed, "held_out": {"student": math.exp(loss), "kl": 0.25, "teacher": 20.0},
            "config": {"teacher": "T", "data.dataset": "D", "tokens": tokens}, "evaluated": {"student": tasks, "teacher": {}},
            "device": "CPU", "versions": {"torch": "2.0"},
        }  # fmt: skip
        (folder / f"{row}_s{seed}.json").write_text(json.dumps(result))


def line(text: str, start: str) -> list[str]:
    """Return the cells of the line of a Markdown table that begins so."""
    return next(line for line in text.splitlines() if line.startswith(f"| {start}")).strip("| ").split(" | ")


@pytest.mark.parametrize(
    ("span", "differences", "says"),
    [
        ("better", [0.03, 0.031, 0.032], "+0.031 ± 0.002, confirmed"),
        ("better", [-0.03, -0.031, -0.032], "-0.031 ± 0.002, contradicted"),
        ("better", [0.01, 0.03, 0.08], "+0.040 ± 0.090, undecided"),
        ("better", [0.03], "+0.030, one seed"),
        ("better", [], "not run"),
        ("better", [0.0, 0.0], "+0.000, undecided"),
        ("worse", [0.0, 0.0], "+0.000, undecided"),
        ("similar", [0.0, 0.0], "+0.000, confirmed"),
        ("worse", [-0.03, -0.031, -0.032], "confirmed"),
        ("similar", [0.001, -0.001, 0.002], "confirmed"),
        ("similar", [0.03, 0.031, 0.032], "contradicted"),
        ("little or worse", [0.01, 0.011, 0.012], "confirmed"),
        ("little or worse", [0.03, 0.031, 0.032], "contradicted"),
    ],
)
def test_verdicts(span, differences, says):
    values = {"a": dict(enumerate(1 + difference for difference in differences)), "b": {0: 1.0, 1: 1.0, 2: 1.0, 7: 9.0}}
    assert judge(Claim("", "", span, [("a", "b")]), "nats", values.get).endswith(says)


def test_a_claim_about_several_needs_all_of_them_and_shows_the_one_against_it():
    values = {"a": {0: 5.0, 1: 5.0}, "b": {0: 4.0, 1: 4.1}, "c": {0: 5.5, 1: 5.52}, "d": {0: 0.0, 1: 0.1}, "e": {}}
    pairs = [("a", "b"), ("a", "d")]
    assert "confirmed" in judge(Claim("", "", "better", pairs), "nats", values.get)
    assert "(against c), contradicted" in judge(Claim("", "", "better", [*pairs, ("a", "c")]), "nats", values.get)
    assert judge(Claim("", "", "better", [*pairs, ("a", "e")]), "nats", values.get).endswith("undecided, 2 of 3 pairs run")
    values["f"] = {0: 0.0, 1: 11.0}  # further against the claim than c at the low end of its interval, but undecided
    assert "(against c), contradicted" in judge(Claim("", "", "better", [("a", "f"), ("a", "c")]), "nats", values.get)
    gains = Claim("", "", "better", [("a - b", "c - d")])
    assert judge(gains, "nats", values.get).startswith("-4.510 ± ")


def test_intervals_are_those_of_students_t():
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert [interval(values, 1) for values in ([1.0, 2.0, 3.0], [2.0], [2.0, 2.0], [])] == ["2.0 ± 2.5", "2.0", "2.0", ""]


def test_claims_are_about_rows_of_the_paper_and_spans_that_exist():
    for claim in CLAIMS:
        assert claim.span in SPANS and claim.pairs
        assert {name for pair in claim.pairs for side in pair for name in side.split(" - ")} <= PUBLISHED.keys()
    most = next(claim for claim in CLAIMS if claim.text == "matrix mixing helps MetaLA most")
    assert len(most.pairs) == 9


def test_the_summary_has_tables_ranking_and_claims(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **rest: (figures.append(figure), save(figure, file, **rest)))
    for name, accuracies in paper.TABLE_3.items():
        loss = 4 - accuracies[-1] / 100  # ranked as in the paper
        write(tmp_path, name, [loss, loss + 0.001, loss - 0.001], accuracies)
    write(tmp_path, "kda_qkv", [3.4, 3.5])
    text = summary(tmp_path)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    _, *rankings = ([label.get_text() for label in axes.get_yticklabels()] for axes in figures[0].axes)
    assert rankings[0] == rankings[1] == sorted(paper.TABLE_3, key=lambda name: paper.TABLE_3[name][-1])
    assert "\n44 runs (teacher T; dataset D; tokens 30M) on CPU, torch 2.0." in text
    assert "All runs: `data.dataset D`, `teacher T`, `tokens 30M`." in text
    perplexity = math.exp(4 - 0.4785)
    row = line(text, "gla | 3")
    assert row[2].startswith(f"{perplexity:.2f} ± ") and row[3] == "0.250" and row[-1] == "47.85"
    assert line(text, "teacher")[2] == "20.00" and line(text, "kda_qkv")[1] == "2"
    assert "ranking of these 14: 1.00 by perplexity" in text and "1.00 by Avg." in text
    assert "### Table 2" in text and "| hedgehog" not in text
    claim = line(text, "5.2 | QKV copying helps GLA ")
    assert claim[2:] == ["+0.81", "+0.008, confirmed", "+0.82, confirmed"]  # of columns that are rounded
    assert "matrix mixing helps MetaLA" not in text  # of which nothing was run


@pytest.mark.parametrize("key, value", [("teacher", "U"), ("data.dataset", "E"), ("data.sequence_length", 64), ("kd.lr", 1)])
def test_no_teacher_stands_beside_students_of_several(tmp_path, key, value):
    write(tmp_path, "gla", [3.4, 3.5])
    file = tmp_path / "gla_s1.json"
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"row": "gla_other", "config": result["config"] | {key: value}}))
    row = line(summary(tmp_path), "teacher")
    assert ("20.00" in row) == (key == "kd.lr") and "55.04" in row
    write(tmp_path, "gla_qkv", [3.3])
    assert ("QKV copying helps GLA" in summary(tmp_path)) == (key == "kd.lr")


@pytest.mark.parametrize("changes, says", [
    ({"seed": 0}, "gla_s1.json is a second result of gla with seed 0: move one"),
    ({"config": {"teacher": "T", "data.dataset": "D", "tokens": "30M", "kd.lr": 1}}, "has another kd.lr than other seeds"),
    ({"held_out": {"student": math.nan}}, "gla_s1.json is damaged or no result .*not finite"),
    ({"held_out": {"student": math.inf}}, "gla_s1.json is damaged or no result .*not finite"),
])  # fmt: skip
def test_results_that_cannot_stand_in_one_row_are_named(tmp_path, changes, says):
    write(tmp_path, "gla", [3.4, 3.5])
    file = tmp_path / "gla_s1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=says):
        summary(tmp_path)


def test_recall_is_the_mean_over_seeds_of_what_all_measured():
    lengths = [{"256": 1.0, "512": 1.0}, {"256": 0.5}]
    seeds = [{"mqar": {"acc": by_length["256"], "chance": 0.1, "by_length": by_length}} for by_length in lengths]
    seeds[0]["copy"] = seeds[0]["mqar"]
    assert over_seeds(seeds) == {"mqar": {"acc": 0.75, "chance": 0.1, "by_length": {"256": 0.75}}}


def test_recall_is_shown_by_length_and_guessing_is_named(tmp_path):
    write(tmp_path, "kda_qkv", [3.4])
    file = tmp_path / "kda_qkv_s0.json"
    result = json.loads(file.read_text())
    for model, shares in {"student": [0.5, 0.25], "teacher": [1.0, 0.5]}.items():
        for task in ("mqar", "copy"):
            row = {"acc": sum(shares) / 2, "acc_stderr": 0.0, "chance": 0.1}
            result["evaluated"][model][task] = row | {"by_length": dict(zip(["512", "2048"], shares, strict=True))}
    result["evaluated"]["teacher"] |= {"piqa": {"acc": 0.52, "acc_stderr": 0.015}, "arc_easy": {"acc": 0.3, "acc_stderr": 0.01}}
    file.write_text(json.dumps(result | {"state_bytes": {"student": 2_000_000, "teacher": None}}))
    text = summary(tmp_path)
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "The teacher does no better than guessing on PIQA." in text
    recall = text[text.index("### Recall") :]
    assert line(recall, "student") == ["student", "seeds", "MB of state", "recall", "recall 512", "recall 2048"]
    assert line(recall, "teacher")[2:] == ["", "75.0", "100.0", "50.0"]
    assert line(recall, "kda_qkv") == ["kda_qkv", "1", "2.0", "37.5", "50.0", "25.0"]
    assert "claims" not in text and "Not shown" not in text
    forgetful = {task: row | {"acc": 0.0, "by_length": {"512": 0.0, "2048": 0.0}}
                 for task, row in result["evaluated"]["student"].items() if "by_length" in row}  # fmt: skip
    result |= {"name": "gla_s0", "row": "gla", "evaluated": result["evaluated"] | {"student": forgetful}}
    (tmp_path / "gla_s0.json").write_text(json.dumps(result))
    recall = summary(tmp_path).partition("### Recall")[2]
    assert "Not shown: 1 student of less than 0.05%." in recall and "| gla |" not in recall and "| kda_qkv |" in recall


def test_bad_results_are_one_line(tmp_path):
    assert "has no result yet" in refused("study", "study", "--show=summary", f"--results={tmp_path}")
    (tmp_path / "x.json").write_text("{}")
    assert "x.json is damaged or no result of distill-pl study" in refused(
        "study", "study", "--show=summary", f"--results={tmp_path}"
    )


@pytest.mark.parametrize("name", ["study", "recipes"])
def test_what_the_repository_says_of_its_results_is_their_summary(name, tmp_path):
    """To make it anew: distill-pl study study --results benchmarks/NAME --show summary > benchmarks/NAME/README.md."""
    folder = Path(__file__).parents[2] / "benchmarks" / name
    shutil.copytree(folder, tmp_path / name)  # into which a picture is drawn
    assert (folder / "README.md").read_text() == summary(tmp_path / name) + "\n"


HOLES = ["row", "seed", "held_out", "config", "config.tokens", "evaluated", "evaluated.student", "device", "versions.torch"]


@pytest.mark.parametrize("key", HOLES)
def test_a_result_with_a_hole_is_named_and_not_summarised(tmp_path, key):
    write(tmp_path, "gla", [3.0])
    file = tmp_path / "gla_s0.json"
    result = json.loads(file.read_text())
    *outer, inner = key.split(".")
    del (result[outer[0]] if outer else result)[inner]
    file.write_text(json.dumps(result))
    line = refused("study", "study", "--show=summary", f"--results={tmp_path}")
    assert f"gla_s0.json is damaged or no result of distill-pl study (KeyError: '{inner}')" in line


def test_recall_by_length_is_of_the_lengths_that_all_tasks_have(tmp_path):
    write(tmp_path, "gla", [3.0])
    file = tmp_path / "gla_s0.json"
    result = json.loads(file.read_text())
    lengths = {"mqar": {"64": 0.75, "128": 0.25}, "copy": {"128": 0.15, "256": 0.05}}
    rows = {task: {"acc": 0.1, "chance": 0.0, "by_length": row} for task, row in lengths.items()}
    file.write_text(json.dumps(result | {"evaluated": {"student": rows, "teacher": rows}}))
    text = summary(tmp_path)
    assert "| seeds | recall | recall 128 |" in text and "| gla | 1 | 10.0 | 20.0 |" in text


def test_rankings_of_single_seeds_give_an_interval():
    names = sorted(("gla", "gla_mm", "gla_qkv"), key=lambda name: PUBLISHED[name][-1])  # the paper's last comes first
    rows = {name: {0: {"perplexity": 30 - place}, 1: {"perplexity": 30 + 2 * place}} for place, name in enumerate(names)}
    assert ranking(names, rows).endswith(": -1.00 by perplexity (p = 0.33, by seed 0.00 ± 12.71).")  # t of 2 values: 1 and -1
    of_one = {name: {1: runs[1]} for name, runs in rows.items()}
    assert ranking(names, of_one).endswith(": -1.00 by perplexity (p = 0.33).")
