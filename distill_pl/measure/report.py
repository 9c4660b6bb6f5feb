"""`distill-pl report`: the paper's tables filled with one's own runs, and how these trained, as Markdown and pictures."""

import math
from pathlib import Path
from statistics import mean, mode, stdev
from typing import Any, NamedTuple

from distill_pl.console import markdown, perplexity, say
from distill_pl.errors import InputError
from distill_pl.measure import paper, recall
from distill_pl.measure.evaluate import measured_so_far
from distill_pl.measure.params import appendix_a
from distill_pl.mixers import MIXERS
from distill_pl.run.folder import differing, flat, read_config, read_metrics, write_aside
from distill_pl.tokens import Tokens

# what the rows of the paper's tables have in common
SHARED = ("teacher", "tokens", "data.dataset", "data.sequence_length", "data.validation_tokens")
SEEDS = ("seed", "data.shuffle")  # of the new weights, and of the order of the text
KEPT = (
    "Recall tasks: % of answers, over all lengths. Recall kept: the share of the teacher's margin over guessing. Likelihood "
    "kept: the share of the teacher's probability of a token of held-out text (geometric mean), which hides what is forgotten."
)


class Run(NamedTuple):
    """A run folder as the report reads it."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]  # what `evaluate` measured of the student, by task
    finished: bool
    held_out: float | None  # the student's cross-entropy on held-out text after the last finished stage, nats per token

    @property
    def experiment(self) -> str:
        """Name the run by what it changes, as the experiments of the paper's rows are named: gla_qkv, gla_qkv_rope_outputs."""
        student, kd = self.config["student"], self.config["kd"]
        if student["init"] == "scratch":
            return f"scratch_{student['mixer']}"
        mixed, aligned = (bool(Tokens(self.config[stage]["tokens"])) for stage in ("matrix_mixing", "hidden_align"))
        words = {
            "window": self.has_window,
            "hybrid": self.is_hybrid,
            student["init"]: student["init"] != "fresh",
            "rope": bool(student.get("rope")) and not MIXERS[student["mixer"]].rotates,
            "plain": kd["alpha"] == 0,
            "mm": mixed,
            "mse": mixed and self.config["matrix_mixing"]["norm"] == "mse",
            "h2h": aligned and self.config["hidden_align"].get("target", "block") == "block",
            "outputs": aligned and self.config["hidden_align"].get("target") == "mixer",
            "continued": bool(student.get("start_from")),
        }
        return "_".join([student["mixer"], *(word for word, applies in words.items() if applies)])

    @property
    def beyond_paper(self) -> bool:
        """Return whether the paper has no such student: of a mixer not in Table 1, beside window attention, or a hybrid."""
        return self.config["student"]["mixer"] not in paper.TABLE_1 or self.has_window or self.is_hybrid

    @property
    def has_window(self) -> bool:
        """Return whether window attention stands beside the student's mixer; runs of earlier versions do not say."""
        return self.config["student"]["mixer"] != "swa" and self.config["student"].get("window") is not None

    @property
    def is_hybrid(self) -> bool:
        """Return whether some of the student's layers keep softmax attention."""
        return self.config["student"]["mixer"] != "softmax" and bool(self.config["student"]["softmax_layers"])


def report(models: list[str], out: str = "report") -> None:
    """Fill the paper's tables with runs, showing which are missing or unfinished, beside the paper's figures.

    Writes report.md to `out`, with losses.png (the training curves of every stage), matrix_mixing.png and hidden_align.png
    (heat maps of each layer's distance to the teacher's). Runs that differ only in their seed share a row: mean and 95%
    confidence interval. Runs of another teacher, text or budget than most are rows of their own, not the paper's. Where
    `evaluate` has measured recall or a text, also recall.png (accuracy against the length of the prompt) and positions.png
    (perplexity by position).

    Args:
        models: run folders of `distill-pl fit`, or folders of such folders.
        out: folder to write to; a report in it is replaced.

    Raises:
        InputError: a folder without runs, or a damaged file of a run.
    """
    if not models:
        raise InputError("report: no run is given: give run folders of distill-pl fit")
    found = {run.folder.resolve(): run for model in models for run in find_runs(Path(model))}  # each run once
    runs = of_same_questions(list(found.values()))
    rows = grouped(runs)
    others = [name for name in rows if name not in {*paper.TABLE_2, *paper.TABLE_3, *paper.APPENDIX_B}]
    beyond = [name for name in others if rows[name][0].beyond_paper]
    rows["teacher"] = teacher_row(runs)
    published = {"teacher": paper.TEACHER}
    tables: dict[str, dict[str, Any]] = {
        "Table 2: with and without matrix mixing": published | paper.TABLE_2,
        "Table 3: QKV copying and hidden alignment": published | paper.TABLE_3,
        "Appendix B: plain training; Frobenius norm or MSE": published | paper.APPENDIX_B,
        "Not in the paper": dict.fromkeys(name for name in others if name not in beyond),
        "Beyond the paper": dict.fromkeys(beyond),
    }
    text = ["# Report", "", overview(runs), ""]
    for title, experiments in tables.items():
        if experiments:
            text += [f"## {title}", "", table(experiments, rows), ""]
        if title.startswith("Table 2"):
            text += [agreement(paper.TABLE_2, rows), ""]
    text += memory(runs, Path(out))
    text += ["## Appendix A: million parameters of SmolLM-360M's students", "", markdown(appendix_a()), ""]
    text += ["## Training", "", *pictures(runs, Path(out))]
    file = Path(out) / "report.md"
    write_aside(file, lambda aside: aside.write_text("\n".join(text) + "\n"))
    say(f"wrote {file}: {overview(runs)}")


def find_runs(folder: Path) -> list[Run]:
    """Read the run folders at or directly under `folder`. Raises InputError if there are none."""
    folder = folder.absolute()  # `.` has no name
    paths = [path.parent for path in [folder / "config.yaml", *sorted(folder.glob("*/config.yaml"))] if path.is_file()]
    if not paths:
        raise InputError(f"{folder} holds no run: give run folders of distill-pl fit, or the folder they are in")
    runs = []
    for path in paths:
        results = measured_so_far(path / "eval", "student")
        runs.append(Run(path, read_config(path), results, (path / "student").is_dir(), held_out(path).get("student_ce")))
    return runs


def of_same_questions(runs: list[Run]) -> list[Run]:
    """Leave out each result of the paper's tasks that is of other questions than the first run's, and say so.

    The same of recall tasks whose prompts are of other number or lengths; their words depend on the tokenizer.
    """
    asked: dict[str, tuple] = {}
    alike = []
    for run in runs:
        questions_of = {task: (row.get("source"), row.get("n")) for task, row in run.results.items() if task in paper.TASKS}
        questions_of |= {task: (row["n"], *row["by_length"]) for task, row in run.results.items() if task in recall.TASKS}
        others = [task for task, questions in questions_of.items() if asked.setdefault(task, questions) != questions]
        if others:
            say(f"{run.folder} answered other questions of {', '.join(others)} than runs before it, and is not counted there")
        alike.append(run._replace(results={task: row for task, row in run.results.items() if task not in others}))
    return alike


def held_out(run: Path) -> dict[str, float]:
    """Read the held-out losses after the last finished stage of a run, in nats per token; empty where they are not known."""
    weights = [folder / "student.safetensors" for folder in sorted(run.glob("[0-9]_*"))]
    if not (run / "student").is_dir():  # of a finished run, only the last stage counts, whose weights may have been deleted
        weights = [file for file in weights if file.is_file()]
    return read_metrics(weights[-1]) if weights and weights[-1].is_file() else {}


def teacher_row(runs: list[Run]) -> list[Run]:
    """Return the teacher's results as a run, if all runs have the same teacher and one of them measured it; else no run.

    Its perplexity is given where all runs have the same held-out text.
    """
    if len({run.config["teacher"] for run in runs}) > 1:
        return []
    results: dict[str, Any] = {}
    for run in reversed(runs):
        results |= measured_so_far(run.folder / "eval", "teacher")
    losses = [loss for run in runs if (loss := held_out(run.folder).get("teacher_ce")) is not None]
    of_one_text = losses and max(losses) - min(losses) < 0.01  # more than the rounding of other machines
    return [Run(runs[0].folder, runs[0].config, results, True, losses[0] if of_one_text else None)] if results or losses else []


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Group runs by experiment that differ only in seeds: of the new weights and of the order of the text.

    Finished runs of one configuration and seed count once. Of several groups of one experiment, the first has its name, and
    others are named by what they change, as in `gla_qkv (kd.lr 0.001)`: they belong to no row of the paper's. Neither do runs
    that differ from most others in a key of SHARED.
    """
    rows: dict[str, list[Run]] = {}
    usual = mode(tuple(map(flat(run.config).get, SHARED)) for run in runs)

    def row(run: Run, keys: list[str]) -> str:
        """Name a run's row by its experiment and by what it changes."""
        values = flat(run.config)
        return run.experiment + (f" ({', '.join(f'{key} {values.get(key)}' for key in keys)})" if keys else "")

    counted: list[Run] = []
    for run in runs:
        same = next((other for other in counted if not set(differing(other.config, run.config)) - {"out"}), None)
        if run.finished and same is not None:
            say(f"{run.folder} has the configuration of {same.folder}, seed included, and is not counted")
            continue
        if run.finished:
            counted.append(run)
        unusual = [key for key, value in zip(SHARED, usual, strict=True) if flat(run.config).get(key) != value]
        first = rows.setdefault(row(run, unusual), [run])[0]
        if run is not first:
            keys = [key for key in differing(first.config, run.config) if key not in SEEDS]
            rows.setdefault(row(run, [*unusual, *keys]), []).append(run)
    return rows


def overview(runs: list[Run]) -> str:
    """Say how many runs there are, of how many tokens, of which teacher, and which are unfinished."""
    unfinished = [run.folder.name for run in runs if not run.finished]
    teachers = sorted({run.config["teacher"] for run in runs})
    tokens = sorted({trained_tokens(run.config) for run in runs})
    text = f"{len(runs)} run{'s' * (len(runs) > 1)} of {', '.join(tokens)} tokens, teacher {', '.join(teachers)}"
    return text + (f"; unfinished: {', '.join(unfinished)} (the same distill-pl fit resumes them)" if unfinished else "")


def trained_tokens(config: dict[str, Any]) -> str:
    """Return the tokens of a run, of which `tokens` is only the upper bound where `kd.tokens` is given."""
    if config["kd"]["tokens"] is None:
        return str(config["tokens"])
    return str(Tokens(sum(Tokens(config[stage]["tokens"] or 0) for stage in paper.STAGES)))


def measured(runs: list[Run]) -> dict[str, list[float]]:
    """Collect a value of each finished run by column: accuracies in percent, perplexity of the held-out text."""
    values: dict[str, list[float]] = {}
    for run in runs:
        if not run.finished:
            continue
        if run.held_out is not None:
            values.setdefault("perplexity", []).append(perplexity(run.held_out))
        for column, (accuracy, _) in paper.columns(run.results).items():
            values.setdefault(column, []).append(100 * accuracy)
    return values


def half_width(values: list[float]) -> float:
    """Return half of the 95% interval of a mean by Student's t; 0 for a single value, of which it is not known."""
    from scipy.stats import t

    return t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def interval(values: list[float], digits: int = 2, sign: str = "") -> str:
    """Format the mean of values and half of its 95% interval, of a single value or equal ones that value, of none nothing."""
    if len(set(values)) < 2:
        return "".join(f"{value:{sign}.{digits}f}" for value in values[:1])
    return f"{mean(values):{sign}.{digits}f} ± {half_width(values):.{digits}f}"


def baseline(experiment: str) -> str | None:
    """Return the experiment to compare with: the same mixer, new attention and KD alone; None for training from scratch.

    None also for a group of runs that changes what the baseline's runs share.
    """
    if "(" in experiment:
        return None
    mixers = [mixer for mixer in MIXERS if f"{experiment}_".startswith(f"{mixer}_")]
    return max(mixers, key=len, default=None)


def table(published: dict[str, Any], rows: dict[str, list[Run]]) -> str:
    """Lay out experiments in the order of `published`, whose values are the paper's accuracies or None.

    (+x) is the difference to the experiment's baseline.
    """
    header = ["experiment", "runs", "perplexity", *paper.COLUMNS, "Avg.", "paper's Avg."]
    lines = [header]
    for name, accuracies in published.items():
        runs, base = rows.get(name, []), baseline(name)
        status = str(sum(run.finished for run in runs)) if runs else "missing"
        if runs and not any(run.finished for run in runs):
            status = "unfinished"
        values = measured(runs)
        cells = {column: interval(values.get(column, [])) for column in header[2:-1]}
        published_average = f"{accuracies[-1]:.2f}" if accuracies and accuracies[-1] is not None else ""
        if base is not None and base != name:
            base_values = measured(rows.get(base, []))
            for column in ("perplexity", "Avg."):
                if column in base_values and column in values:
                    cells[column] += f" ({mean(values[column]) - mean(base_values[column]):+.2f})"
            if published_average and base in published:
                published_average += f" ({accuracies[-1] - published[base][-1]:+.2f})"
        lines.append([name, status, *cells.values(), published_average])
    return markdown(lines)


def agreement(published: dict[str, Any], rows: dict[str, list[Run]]) -> str:
    """Compare the measured ranking of Table 2's rows with the paper's by Kendall's tau, in a sentence."""
    from scipy.stats import kendalltau

    for column, sign, name in [("Avg.", 1, "average accuracy"), ("perplexity", -1, "held-out perplexity")]:
        values = {key: measured(rows.get(key, [])).get(column) for key in published}
        scores = {key: sign * mean(value) for key, value in values.items() if value}
        if len(scores) >= 3:
            tau = kendalltau(list(scores.values()), [published[key][-1] for key in scores])
            result = f"Kendall's tau {tau.statistic:.2f}, p = {tau.pvalue:.2g}"
            return f"Ranked by {name}, these {len(scores)} rows against the paper's averages: {result}."
    return "Too few rows are evaluated to compare their ranking with the paper's (Kendall's tau needs three)."


def memory(runs: list[Run], folder: Path) -> list[str]:
    """Show recall and perplexity by position of runs and their teachers -> Markdown lines; draws the pictures into `folder`."""
    from distill_pl.measure.plots import Model, draw_positions, draw_recall

    teachers: dict[str, dict[str, Any]] = {}
    students = []
    for run in runs:
        found = measured_so_far(run.folder / "eval", "teacher")
        teachers.setdefault(run.config["teacher"], {}).update(found)
        students.append(Model(run.folder.name, run.config["student"]["mixer"], run.results, found))
    models = [*(Model(f"teacher {Path(path).name}", None, found, {}) for path, found in teachers.items()), *students]
    tasks = [task for task in recall.TASKS if any(task in model.results for model in models)]
    read_text = any("text" in model.results for model in models)
    text = ["## Recall and long texts", ""] if tasks or read_text else []
    if tasks:
        rows = [["model", "likelihood kept", "recall kept", *tasks]]
        for model in models:
            shares = recall.kept(model.results, model.teacher)
            cells = [f"{shares[name]:.0%}" if name in shares else "" for name in rows[0][1:3]]
            cells += [f"{100 * model.results[task]['acc']:.1f}" if task in model.results else "" for task in tasks]
            if any(cells):
                rows.append([model.name, *cells])
        draw_recall(models, folder / "recall.png")
        text += [markdown(rows), "", KEPT, "", "![recall](recall.png)", ""]
    if read_text:
        draw_positions(models, folder / "positions.png")
        text += ["![perplexity by position](positions.png)", ""]
    return text


def scalars(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Read what a stage wrote for TensorBoard -> by tag, its steps (tokens) and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("*tfevents*")):  # of each start of the run; all in one, a clock set back would hide points
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
    return {tag: tuple(zip(*sorted(points.items()), strict=True)) for tag, points in found.items()}  # type: ignore[misc]


def pictures(runs: list[Run], folder: Path) -> list[str]:
    """Draw how the runs trained into `folder` -> Markdown lines that show the pictures."""
    from distill_pl.measure.plots import Training, draw_training

    trainings = []
    for stage in paper.STAGES:
        for run in runs:
            for path in run.folder.glob(f"*_{stage}"):
                trainings.append(Training(stage, run.folder, run.config["student"]["mixer"], scalars(path)))
    trainings = [training for training in trainings if "train/loss" in training.scalars]
    if not trainings:
        return ["No run has trained yet."]
    return [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in draw_training(trainings, folder)]
