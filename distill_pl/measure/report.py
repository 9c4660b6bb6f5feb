"""`distill-pl report`: the paper's tables filled with one's own runs, and how these trained, as Markdown and pictures."""

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from distill_pl.console import markdown, perplexity, say
from distill_pl.errors import InputError
from distill_pl.measure import study
from distill_pl.measure.params import appendix_a
from distill_pl.mixers import MIXERS
from distill_pl.run.folder import differing, read_config, read_metrics, write_aside
from distill_pl.stages import STAGES
from distill_pl.tokens import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")
DISTANCES = {"matrix_mixing": "|A teacher - A student|, Eq. 7", "hidden_align": "|h teacher - h student|, Eq. 8"}


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

    Writes report.md into `out`, with losses.png (every stage's curves), matrix_mixing.png and hidden_align.png (heat maps of
    each layer's distance to the teacher's).
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
        differ = [key for key in differing(first.config, run.config) if key != "seed"]
        if differ:
            raise InputError(
                f"{run.folder} and {first.folder} are both {run.experiment}, but differ in {', '.join(differ)}: "
                "report them apart"
            )
        rows[run.experiment].append(run)
    return rows


def overview(runs: list[Run]) -> str:
    """How many runs there are, and of what kind."""
    unfinished = [run.folder.name for run in runs if not run.finished]
    teachers = sorted({run.config["teacher"] for run in runs})
    tokens = sorted({str(run.config["tokens"]) for run in runs})
    text = f"{len(runs)} run{'s' * (len(runs) > 1)} of {', '.join(tokens)} tokens, teacher {', '.join(teachers)}"
    return text + (f"; unfinished: {', '.join(unfinished)} (the same distill-pl fit goes on)" if unfinished else "")


def measured(runs: list[Run]) -> dict[str, list[float]]:
    """By column of the tables, a value of each finished run: accuracies in percent, perplexity of the held-out text."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if not run.finished:
            continue
        if run.held_out is not None:
            found.setdefault("perplexity", []).append(perplexity(run.held_out))
        for column, (accuracy, _) in study.columns(run.results).items():
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
        changes = {"perplexity": "", "Avg.": ""}
        if name != base:
            before = measured(rows.get(base, []))
            for column in changes:
                if column in before and column in ours:
                    changes[column] = f" ({mean(ours[column]) - mean(before[column]):+.2f})"
            if theirs and base in published:
                theirs += f" ({values[-1] - published[base][-1]:+.2f})"
        cells = [cell(ours.get(column, [])) + changes.get(column, "") for column in header[2:-1]]
        lines.append([name, status, *cells, theirs])
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


def scalars(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """What a stage wrote for TensorBoard: by tag its steps (tokens) and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: tuple(zip(*((e.step, e.value) for e in events.Scalars(tag)), strict=True)) for tag in events.Tags()["scalars"]}


def pictures(runs: list[Run], folder: Path) -> list[str]:
    """Draw losses.png, and for each stage that aligns its layers' distances, into `folder` -> Markdown that shows them."""
    written = []  # (stage, run, what it logged)
    for stage in STAGES:
        for run in runs:
            for path in run.folder.glob(f"*_{stage}"):
                found = scalars(path)
                if "train/loss" in found:
                    written.append((stage, run, found))
    if not written:
        return ["No run has trained yet."]
    drawn = {"losses.png": losses(written)}
    for stage in dict.fromkeys(stage for stage, _, _ in written):
        aligned = [(run, found) for at, run, found in written if at == stage and layers_of(found)]
        if aligned:
            drawn[f"{stage}.png"] = heat_maps(stage, aligned)
    for name, figure in drawn.items():
        write_aside(folder / name, lambda aside, figure=figure: figure.savefig(aside, format="png", dpi=120))  # type: ignore[misc]
    return [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in drawn]


def losses(written: list[tuple[str, Run, dict]]) -> "Figure":
    """Training loss against tokens: a panel for each stage, a colour for each mixer, a dash for each of its experiments."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    stages = list(dict.fromkeys(stage for stage, _, _ in written))
    mixers = {run.folder: run.config["student"]["mixer"] for _, run, _ in written}
    runs = sorted(mixers)
    figure = Figure(figsize=(5 * len(stages) + 2, max(4, 0.22 * len(runs))), layout="constrained")
    shown = {}  # run -> its line, in whichever panel
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        for at, run, found in written:
            if at == stage:
                mixer = run.config["student"]["mixer"]
                dash = [folder for folder in runs if mixers[folder] == mixer].index(run.folder)
                style = {"color": f"C{list(MIXERS).index(mixer)}", "linestyle": DASHES[dash % len(DASHES)], "linewidth": 1}
                (shown[run.folder],) = axes.plot(*found["train/loss"], label=run.folder.name, **style)
        axes.set(title=stage, xlabel="tokens since the run began", ylabel="training loss", yscale="log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_format(ScalarFormatter())
    figure.legend(handles=[shown[folder] for folder in runs], loc="outside right center", fontsize="small")
    return figure


def layers_of(found: dict) -> list[str]:
    """The tags of a stage's layers, in order."""
    return sorted(tag for tag in found if tag.startswith("align/"))


def heat_maps(stage: str, aligned: list[tuple[Run, dict]]) -> "Figure":
    """Layer against tokens, a panel for each run: how far each layer is from the teacher's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    columns = min(5, len(aligned))
    lines = -(-len(aligned) // columns)
    depth = max(len(layers_of(found)) for _, found in aligned)
    figure = Figure(figsize=(2.6 * columns + 1.5, lines * (1.2 + 0.1 * max(12, depth))), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    values = [[found[tag][1] for tag in layers_of(found)] for _, found in aligned]
    top = max(max(map(max, layers)) for layers in values)
    for axes in panels:
        axes.set_axis_off()
    for axes, (run, found), layers in zip(panels, aligned, values, strict=False):
        steps = found[layers_of(found)[0]][0]
        edges = [steps[0] - (steps[-1] - steps[0]) / max(1, len(steps) - 1), *steps]
        mesh = axes.pcolormesh(edges, [i - 0.5 for i in range(len(layers) + 1)], layers, vmin=0, vmax=top)
        axes.set_axis_on()
        axes.set_title(run.folder.name, fontsize="medium")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(depth - 0.5, -0.5)
    figure.colorbar(mesh, ax=panels, label=DISTANCES[stage])
    figure.supxlabel("tokens since the run began", fontsize="medium")
    figure.supylabel("layer", fontsize="medium")
    return figure
