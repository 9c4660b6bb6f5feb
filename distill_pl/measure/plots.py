"""Pictures of what `bench` and `report` measured. Imported only when something is drawn, since matplotlib loads slowly."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from distill_pl.measure import paper, recall
from distill_pl.mixers import MIXERS
from distill_pl.run.folder import write_aside

DASHES = ("-", "--", ":", "-.")
MARKERS = "sD^v<>pdh*"
MOST_NAMES = 10  # students that have a name in a picture of many: as many as there are colours
DISTANCES = {"matrix_mixing": "|A teacher - A student|, Eq. 7", "hidden_align": "|h teacher - h student|, Eq. 8"}


class Training(NamedTuple):
    """The curves that one stage of one run wrote for TensorBoard."""

    stage: str
    run: Path
    mixer: str
    scalars: dict[str, tuple[list[int], list[float]]]  # tag -> steps (tokens since the run began), values

    @property
    def distances(self) -> list[list[float]]:
        """Return each layer's distance to the teacher over time, layer 0 first; empty for a stage that aligns no layers."""
        return [self.scalars[tag][1] for tag in sorted(self.scalars) if tag.startswith("align/")]


class Model(NamedTuple):
    """A model with what `evaluate` measured of it and of its teacher, by task; a teacher has neither mixer nor teacher."""

    name: str
    mixer: str | None
    results: dict[str, Any]
    teacher: dict[str, Any]


def line_styles(mixers: Sequence[str | None]) -> list[dict[str, Any]]:
    """Choose how each of several models is drawn: a colour for each mixer, for its models dash styles and, if more, markers.

    Teachers, of mixer None, are black and have round markers.
    """
    present = [mixer for mixer in MIXERS if mixer in mixers]
    styles: list[dict[str, Any]] = []
    for index, mixer in enumerate(mixers):
        row, dash = divmod(mixers[:index].count(mixer), len(DASHES))
        color = "black" if mixer is None else f"C{present.index(mixer)}"
        marker = "o" if mixer is None else [None, *MARKERS][row % (1 + len(MARKERS))]
        styles.append({"color": color, "linestyle": DASHES[dash], "marker": marker, "markersize": 3})
    return styles


def beside_legend(width: float, height: float, names: Sequence[str]) -> Figure:
    """Make a figure for panels of `width` x `height` inches, larger where a small legend of `names` beside them needs more."""
    room = max(2, 0.5 + 0.08 * max(map(len, names)))
    return Figure(figsize=(width + room, max(height, 0.22 * len(names))), layout="constrained")


def label_logarithmic(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers: powers of ten, and as many between them as have room."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # decades up to which some, and all, have a label


def draw_line(axes: Any, places: Sequence[float], values: Sequence[float], **style: Any) -> Any:
    """Draw a line and return it; a single point gets a marker, without which nothing of it would be seen."""
    (line,) = axes.plot(places, values, **style | ({"marker": "o"} if len(places) == 1 else {}))
    return line


def draw_bench(file: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Draw Figure 2 from the rows of bench.json: time per token, memory and prefill against length, a line for each model.

    Softmax models are black and dashed. Without a GPU the size of the state stands in for the peak of memory.
    """
    ticks = sorted({row["length"] for row in rows})
    rows = [row for row in rows if "out_of_memory" not in row]
    gpu = any(row["decode_peak_bytes"] is not None for row in rows)
    memory, unit = ("decode_peak_bytes", 2**30) if gpu else ("state_bytes", 2**20)
    figure = Figure(figsize=(15, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    students = 0
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        lengths, times = ([row[key] for row in of_model] for key in ("length", "decode_ms"))
        spread = [[abs(row["decode_ms"] - row[f"decode_ms_{end}"]) for row in of_model] for end in ("min", "max")]
        style: dict[str, Any] = {"color": "black", "linestyle": "--", "marker": "o"}
        if not of_model[0]["softmax"]:  # a marker for each model, because states of equal size lie on each other
            style = {"color": f"C{students % 10}", "marker": MARKERS[students % 10]}
            students += 1
        left.errorbar(lengths, times, spread, label=model, capsize=2, fillstyle="none", **style)
        middle.plot(lengths, [row[memory] / unit for row in of_model], fillstyle="none", **style)
        right.plot(lengths, [row["first_token_ms"] for row in of_model], fillstyle="none", **style)
    left.set(title="Time per token", ylabel="ms per decoded token, median and range", ylim=(0, None))
    middle.set(title="Peak memory of decoding" if gpu else "Size of the state", yscale="log")
    middle.set_ylabel("GiB beyond the weights" if gpu else "MiB after the prompt")
    right.set(title="Time to the first token", yscale="log", ylabel="ms")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks), rotation=45 if len(ticks) > 6 else 0)
        axes.xaxis.set_minor_locator(NullLocator())  # those of y have labels where it spans less than a decade
        axes.set_xlabel("length of the prompt, tokens")
        axes.grid(alpha=0.3)
    if rows:
        figure.legend(loc="outside right center")
    figure.suptitle(f"{settings['device']}, {settings['dtype']}, batch size {settings['batch_size']}", fontsize="medium")
    figure.savefig(file, format="png", dpi=150)


def draw_training(trainings: list[Training], folder: Path) -> list[str]:
    """Draw losses.png and, for each stage that aligns layers, a heat map of distances into `folder` -> the files' names."""
    figures = {"losses.png": losses(trainings)}
    for stage in DISTANCES:
        aligned = [training for training in trainings if training.stage == stage and training.distances]
        if aligned:
            figures[f"{stage}.png"] = heat_maps(stage, aligned)
    for name, figure in figures.items():
        write_aside(folder / name, lambda aside, figure=figure: figure.savefig(aside, format="png", dpi=120))  # type: ignore[misc]
    return list(figures)


def losses(trainings: list[Training]) -> Figure:
    """Plot training loss against tokens: a panel for each stage, a colour for each mixer, a dash style for each of its runs."""
    stages = [stage for stage in paper.STAGES if any(training.stage == stage for training in trainings)]
    mixers = {training.run: training.mixer for training in trainings}
    runs = sorted(mixers)
    styles = dict(zip(runs, line_styles([mixers[run] for run in runs]), strict=True))
    figure = beside_legend(5 * len(stages), 4, [run.name for run in runs])
    panels = dict(zip(stages, figure.subplots(1, len(stages), squeeze=False)[0], strict=True))
    lines = {}  # run -> its line in whichever panel, for the legend
    for stage, run, _, scalars in trainings:
        lines[run] = draw_line(panels[stage], *scalars["train/loss"], label=run.name, linewidth=1, **styles[run])
    for stage, axes in panels.items():
        axes.set(title=stage, xlabel="tokens since the run began", ylabel="training loss", yscale="log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        label_logarithmic(axes.yaxis)
    figure.legend(handles=[lines[run] for run in runs], loc="outside right center", fontsize="small")
    return figure


def draw_recall(models: list[Model], file: Path) -> None:
    """Draw accuracy against the length of the prompt: a panel for each recall task and for their mean, a line for each model.

    Of more than ten students, ten have colours and names, the others grey lines: first the best student of each mixer, then
    the best of the rest, by their means. The chance level is dotted; models without a recall task are left out.
    """
    models = [model for model in models if any(task in model.results for task in recall.TASKS)]
    tasks = [task for task in recall.TASKS if any(task in model.results for model in models)]
    names = [*tasks, "mean"] if len(tasks) > 1 else tasks
    teachers = [model for model in models if model.mixer is None]
    ordered = sorted((model for model in models if model.mixer), key=lambda model: -mean_accuracy(model))
    best = {model.mixer: model for model in reversed(ordered)}
    chosen = sorted(ordered, key=lambda model: model is not best[model.mixer])[:MOST_NAMES]
    named = [*teachers, *(model for model in ordered if model in chosen)]
    others = [model for model in ordered if model not in chosen]
    styles = line_styles([model.mixer for model in named]) + [{"color": "lightgrey", "zorder": 1}] * len(others)
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    labels = [model.name for model in named] + [f"{len(others)} others"] * len(others)
    figure = beside_legend(2.8 * columns, 2.6 * lines + 0.4, labels[: len(named) + 1])
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles = []
    lengths: set[int] = set()
    for model, label, style in zip(named + others, labels, styles, strict=True):
        shares = {task: accuracies(model.results[task]) for task in tasks if task in model.results}
        if len(shares) == len(tasks):  # a mean over fewer tasks would be another mean
            common = set.intersection(*map(set, shares.values()))
            shares["mean"] = {length: mean(row[length] for row in shares.values()) for length in sorted(common)}
        for name, axes in zip(names, panels, strict=False):
            points = shares.get(name, {})
            line = draw_line(axes, list(points), list(points.values()), label=label, linewidth=1.2, **style)
            lengths |= points.keys()
        handles.append(line)
    for name, axes in zip(names, panels, strict=False):
        axes.set_title(name, fontsize="medium")
        axes.set_ylim(-4, 104)
        guessing = [model.results[name]["chance"] for model in models if name in model.results]
        if guessing:
            axes.axhline(100 * guessing[0], color="grey", linestyle=":", linewidth=0.8, zorder=0)
        length_axis(axes, sorted(lengths))
    figure.legend(handles=handles[: len(named) + 1], loc="outside right center", fontsize="small")
    figure.supxlabel("length of the prompt, tokens", fontsize="medium")
    figure.supylabel("recalled, %; dotted: guessing", fontsize="medium")
    write_aside(file, lambda aside: figure.savefig(aside, format="png", dpi=120))


def mean_accuracy(model: Model) -> float:
    """Return the mean of a model's accuracies over its recall tasks."""
    return mean(model.results[task]["acc"] for task in recall.TASKS if task in model.results)


def accuracies(row: dict[str, Any]) -> dict[int, float]:
    """Read a recall task's accuracies in percent by length."""
    return {int(length): 100 * accuracy for length, accuracy in row["by_length"].items()}


def draw_positions(models: list[Model], file: Path) -> None:
    """Draw perplexity by position in a long text, a line for each model that read one."""
    models = [model for model in models if "text" in model.results]
    figure = beside_legend(6, 4, [model.name for model in models])
    axes = figure.subplots()
    for model, style in zip(models, line_styles([model.mixer for model in models]), strict=True):
        points = {int(position): value for position, value in model.results["text"]["by_position"].items()}
        draw_line(axes, list(points), list(points.values()), label=model.name, linewidth=1.2, **style)
    axes.set(xlabel="position in the text, tokens: from each power of two to the next", ylabel="perplexity", yscale="log")
    length_axis(axes, sorted({int(position) for model in models for position in model.results["text"]["by_position"]}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right center", fontsize="small")
    write_aside(file, lambda aside: figure.savefig(aside, format="png", dpi=120))


def draw_layers(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw what `distill-pl layers` measured: bars of KL and recall with each layer put back, lines for the student as it is.

    rows: `layer`, None for the student as it is, `kl` in nats a token and, if measured, `recall`, a fraction.
    """
    (student, *others), measures = rows, {"kl": "KL, nats a token", "recall": "recall, %"}
    shown = [key for key in measures if key in student]
    figure = Figure(figsize=(max(6, 0.28 * len(others)), 2.4 * len(shown) + 0.4), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True).ravel()
    for key, axes in zip(shown, panels, strict=True):
        unit = 100 if key == "recall" else 1
        axes.bar([row["layer"] for row in others], [unit * row[key] for row in others], color="C0")
        axes.axhline(unit * student[key], color="black", linewidth=1, label="the student as it is")
        axes.set_ylabel(measures[key])
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize="small", loc="lower right")
    panels[-1].set_xlabel("layer put back to the teacher's softmax attention")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    write_aside(file, lambda aside: figure.savefig(aside, format="png", dpi=120))


def length_axis(axes: Any, lengths: list[int]) -> None:
    """Make the x-axis logarithmic with ticks at `lengths`, of many at every second or so, written as in 4k for 4096."""
    axes.set_xscale("log", base=2)
    ticks = lengths[:: -(-len(lengths) // 8)]
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks], fontsize="small")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def heat_maps(stage: str, aligned: list[Training]) -> Figure:
    """Plot each layer's distance to the teacher over tokens, a panel for each run, all on one scale of colours."""
    columns = min(5, len(aligned))
    lines = -(-len(aligned) // columns)
    depth = max(len(training.distances) for training in aligned)
    figure = Figure(figsize=(2.6 * columns + 1.5, lines * (1.2 + 0.1 * max(12, depth))), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    highest = max(max(map(max, training.distances)) for training in aligned)
    for axes in panels:
        axes.set_axis_off()
    for axes, training in zip(panels, aligned, strict=False):
        steps = training.scalars["train/loss"][0]
        edges = [steps[0] - (steps[-1] - steps[0]) / max(1, len(steps) - 1), *steps]
        layers = training.distances
        mesh = axes.pcolormesh(edges, [layer - 0.5 for layer in range(len(layers) + 1)], layers, vmin=0, vmax=highest)
        axes.set_axis_on()
        axes.set_title(textwrap.fill(training.run.name, 26), fontsize="medium")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(depth - 0.5, -0.5)
    figure.colorbar(mesh, ax=panels, label=DISTANCES[stage])
    figure.supxlabel("tokens since the run began", fontsize="medium")
    figure.supylabel("layer", fontsize="medium")
    return figure
