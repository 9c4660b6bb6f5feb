"""`distill-pl report`: the paper's tables filled with one's own runs, and how these trained, as Markdown and pictures."""

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from distill_pl import study
from distill_pl.callbacks import perplexity, say
from distill_pl.errors import InputError
from distill_pl.evaluate import columns
from distill_pl.params import appendix_a
from distill_pl.run_folder import read_config, read_metrics, write_aside
from distill_pl.stages import STAGES
from distill_pl.tokens import Tokens

APART = {"out", "seed", "data.cache", "student.backend", "checkpoint_every", "validate_every", "trainer"}  # may differ in a row


class Run(NamedTuple):
    """A run folder as the report sees it."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]  # of the student, by task
    finished: bool
    held_out: float | None  # the student's cross-entropy on the held-out text when it was finished, nats a token

    @property
    def experiment(self) -> str:
        """The row of the paper's tables that the run is: a file name in experiments/, without .yaml."""
        student, kd = self.config["student"], self.config["kd"]
        if student["init"] == "scratch":
            return f"scratch_{student['mixer']}"
        mixed, aligned = (bool(Tokens(self.config[stage]["tokens"])) for stage in ("matrix_mixing", "hidden_align"))
        parts = {
            "qkv": student["init"] == "qkv",
            "plain": kd["alpha"] == 0,
            "mm": mixed,
            "mse": mixed and self.config["matrix_mixing"]["norm"] == "mse",
            "h2h": aligned,
        }
        return "_".join([student["mixer"], *(part for part, there in parts.items() if there)])


def report(models: list[str], out: str = "report") -> None:
    """Fill the paper's tables with runs: what is measured, missing or unfinished, beside the paper's figures.

    Writes report.md into `out`, with losses.png (every stage's curve) and, for each run that aligned, a heat map of its layers.
    Runs that differ only in their seed share a row: mean and 95% interval.

    Args:
        models: run folders of `distill-pl fit`, or folders of such folders.
        out: folder to write to; a report that is there is replaced.
    """
    runs = [run for model in models for run in find(Path(model))]
    rows = grouped(runs) | {"teacher": teachers(runs)}
    folder = Path(out)
    text = ["# Report", "", overview(runs), ""]
    titled: list[tuple[str, dict[str, Any]]] = [
        ("Table 2: with and without matrix mixing", study.TABLE_2),
        ("Table 3: QKV copying and hidden alignment", study.TABLE_3),
        ("Appendix B: plain training; Frobenius norm or MSE", study.APPENDIX_B),
    ]
    for title, published in titled:
        text += [f"## {title}", "", table({"teacher": study.TEACHER} | published, rows), ""]
        if title.startswith("Table 2"):
            text += [agreement(published, rows), ""]
    others = {name: None for name in rows if name not in {"teacher", *study.TABLE_2, *study.TABLE_3, *study.APPENDIX_B}}
    if others:
        text += ["## Not in the paper", "", table(others, rows), ""]
    text += ["## Appendix A: million parameters of SmolLM-360M's students", "", markdown(appendix_a()), ""]
    text += ["## Training", "", *pictures(runs, folder)]
    write_aside(folder / "report.md", lambda aside: aside.write_text("\n".join(text) + "\n"))
    say(f"in {folder / 'report.md'}: {overview(runs)}")


def find(folder: Path) -> list[Run]:
    """The run folders at or directly under `folder`. Raises InputError if there are none."""
    found = [path.parent for path in [folder / "config.yaml", *sorted(folder.glob("*/config.yaml"))] if path.is_file()]
    if not found:
        raise InputError(f"{folder} holds no run: give run folders of distill-pl fit, or the folder they are in")
    runs = []
    for path in found:
        file = path / "eval" / "student.json"
        results = json.loads(file.read_text())["results"] if file.is_file() else {}
        runs.append(Run(path, read_config(path), results, (path / "student").is_dir(), held_out(path).get("student_ce")))
    return runs


def held_out(run: Path) -> dict[str, float]:
    """What the last finished stage of a run folder ended with, in nats a token; empty if none is finished."""
    last = sorted(run.glob("*_*/student.safetensors"))[-1:]
    return read_metrics(last[0]) if last else {}


def teachers(runs: list[Run]) -> list[Run]:
    """The runs' teacher as a row of its own, where all have the same and one of them measured it."""
    if len({run.config["teacher"] for run in runs}) > 1:
        return []
    files = [file for run in runs if (file := run.folder / "eval" / "teacher.json").is_file()]
    results = json.loads(files[0].read_text())["results"] if files else {}
    losses = [loss for run in runs if (loss := held_out(run.folder).get("teacher_ce")) is not None]
    return [Run(runs[0].folder, runs[0].config, results, True, losses[0] if losses else None)] if files or losses else []


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by experiment. Raises InputError where two of one experiment differ in more than their seed."""
    rows: dict[str, list[Run]] = {}
    for run in runs:
        first = rows.setdefault(run.experiment, [run])[0]
        if run is first:
            continue
        mine, theirs = (flat(r.config) for r in (run, first))
        differ = [key for key in sorted(mine | theirs) if mine.get(key) != theirs.get(key)]
        if differ:
            raise InputError(
                f"{run.folder} and {first.folder} are both {run.experiment}, but differ in {', '.join(differ)}: "
                "report them apart"
            )
        rows[run.experiment].append(run)
    return rows


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
    """A configuration by dotted key, without what does not change the experiment."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix + key
        if name not in APART:
            found |= flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return found


def overview(runs: list[Run]) -> str:
    """How many runs there are, and of what kind."""
    unfinished = [run.folder.name for run in runs if not run.finished]
    teachers = sorted({run.config["teacher"] for run in runs})
    tokens = sorted({str(run.config["tokens"]) for run in runs})
    text = f"{len(runs)} runs of {', '.join(tokens)} tokens, teacher {', '.join(teachers)}"
    return text + (f"; unfinished: {', '.join(unfinished)}" if unfinished else "")


def measured(runs: list[Run]) -> dict[str, list[float]]:
    """By column of the tables, a value of each finished run: accuracies in percent, perplexity of the held-out text."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if not run.finished:
            continue
        if run.held_out is not None:
            found.setdefault("perplexity", []).append(perplexity(run.held_out))
        for column, (accuracy, _) in columns(run.results).items():
            found.setdefault(column, []).append(100 * accuracy)
    return found


def cell(values: list[float]) -> str:
    """A value, or of several seeds their mean and the half-width of its 95% interval."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.2f} ± {half:.2f}"


def table(published: dict[str, Any], rows: dict[str, list[Run]]) -> str:
    """Our runs in the paper's order; (+x) is what matrix mixing changes, or in Table 3 the experiment against its base."""
    header = ["experiment", "runs", "perplexity", *study.COLUMNS, "Avg.", "paper's Avg."]
    lines = [header]
    for name, values in published.items():
        runs = rows.get(name, [])
        ours = measured(runs)
        status = str(sum(run.finished for run in runs)) if runs else "missing"
        if runs and not any(run.finished for run in runs):
            status = "unfinished"
        base = name.split("_")[0] if not name.startswith(("scratch", "delta_net")) else name.removesuffix("_mm")
        theirs = f"{values[-1]:.2f}" if values and values[-1] is not None else ""
        average = cell(ours.get("Avg.", []))
        if name != base:
            before = measured(rows.get(base, [])).get("Avg.", [])
            if before and ours.get("Avg."):
                average += f" ({mean(ours['Avg.']) - mean(before):+.2f})"
            if theirs and base in published:
                theirs += f" ({values[-1] - published[base][-1]:+.2f})"
        cells = [cell(ours.get(column, [])) for column in ("perplexity", *study.COLUMNS)]
        lines.append([name, status, *cells, average, theirs])
    return markdown(lines)


def agreement(published: dict[str, Any], rows: dict[str, list[Run]]) -> str:
    """Kendall's tau between our ranking of Table 2's rows and the paper's."""
    from scipy.stats import kendalltau

    for column, sign, name in [("Avg.", 1, "average accuracy"), ("perplexity", -1, "held-out perplexity")]:
        ours = {key: sign * mean(found[column]) for key in published if column in (found := measured(rows.get(key, [])))}
        if len(ours) >= 3:
            tau = kendalltau(list(ours.values()), [published[key][-1] for key in ours])
            result = f"Kendall's tau {tau.statistic:.2f}, p = {tau.pvalue:.2g}"
            return f"Ranked by {name}, these {len(ours)} rows against the paper's averages: {result}."
    return "Too few rows are evaluated to compare their ranking with the paper's (Kendall's tau needs three)."


def markdown(rows: list[list[str]]) -> str:
    """A header and rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def scalars(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """What a stage wrote for TensorBoard: by tag its steps (tokens) and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: tuple(zip(*((e.step, e.value) for e in events.Scalars(tag)), strict=True)) for tag in events.Tags()["scalars"]}


def pictures(runs: list[Run], folder: Path) -> list[str]:
    """Draw losses.png and the heat maps into `folder` -> lines of Markdown that show them."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    written = {}  # (run, stage) -> scalars
    for run in runs:
        for stage in STAGES:
            for path in run.folder.glob(f"*_{stage}"):
                found = scalars(path)
                if "train/loss" in found:
                    written[run.folder.name, stage] = found
    stages = [stage for stage in STAGES if any(stage == key[1] for key in written)]
    if not stages:
        return ["No run has trained yet."]

    def save(figure: Figure, name: str) -> str:
        write_aside(folder / name, lambda aside: figure.savefig(aside, format="png", dpi=150))
        return f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"

    figure = Figure(figsize=(5 * len(stages), 4), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        for (name, at), found in written.items():
            if at == stage:
                axes.plot(*found["train/loss"], label=name, linewidth=1)
        axes.set(title=stage, xlabel="tokens since the run began", ylabel="training loss")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(fontsize="small")
    shown = [save(figure, "losses.png")]
    for (name, stage), found in written.items():
        layers = sorted(tag for tag in found if tag.startswith("align/"))
        if not layers:
            continue
        steps = found[layers[0]][0]
        figure = Figure(figsize=(6, 1.5 + 0.15 * max(10, len(layers))), layout="constrained")
        axes = figure.subplots()
        edges = [steps[0] - (steps[-1] - steps[0]) / max(1, len(steps) - 1), *steps]
        values = [found[tag][1] for tag in layers]
        mesh = axes.pcolormesh(edges, [i - 0.5 for i in range(len(layers) + 1)], values, norm=LogNorm())
        figure.colorbar(mesh, label="distance to the teacher's")
        axes.set(title=f"{name}: {stage}", xlabel="tokens since the run began", ylabel="layer")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.invert_yaxis()
        shown.append(save(figure, f"{stage}_{name}.png"))
    return shown
