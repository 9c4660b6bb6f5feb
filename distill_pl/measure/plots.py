"""Pictures of what `bench` and `report` measured. Imported only when something is drawn, since matplotlib loads slowly."""

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from distill_pl.measure import study
from distill_pl.mixers import MIXERS
from distill_pl.run.folder import write_aside

DASHES = ("-", "--", ":", "-.")
MARKERS = "sD^v<>pdh*"
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


def draw_bench(file: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Draw Figure 2 from the rows of bench.json: time per token and memory against length, a line for each model.

    Softmax models are black and dashed. Without a GPU the size of the state stands in for the peak of memory.
    """
    ticks = sorted({row["length"] for row in rows})
    rows = [row for row in rows if "out_of_memory" not in row]
    gpu = any(row["decode_peak_bytes"] is not None for row in rows)
    memory, unit = ("decode_peak_bytes", 2**30) if gpu else ("state_bytes", 2**20)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
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
        right.plot(lengths, [row[memory] / unit for row in of_model], fillstyle="none", **style)
    left.set(title="Time per token", ylabel="ms per decoded token, median and range", ylim=(0, None))
    right.set(title="Peak memory of decoding" if gpu else "Size of the state", yscale="log")
    right.set_ylabel("GiB beyond the weights" if gpu else "MiB after the prompt")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks), rotation=45 if len(ticks) > 6 else 0)
        axes.minorticks_off()
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
    stages = [stage for stage in study.STAGES if any(training.stage == stage for training in trainings)]
    mixers = {training.run: training.mixer for training in trainings}
    runs = sorted(mixers)
    figure = Figure(figsize=(5 * len(stages) + 2, max(4, 0.22 * len(runs))), layout="constrained")
    panels = dict(zip(stages, figure.subplots(1, len(stages), squeeze=False)[0], strict=True))
    lines = {}  # run -> its line in whichever panel, for the legend
    for stage, run, mixer, scalars in trainings:
        dash = [other for other in runs if mixers[other] == mixer].index(run)
        style = {"color": f"C{list(MIXERS).index(mixer)}", "linestyle": DASHES[dash % len(DASHES)], "linewidth": 1}
        (lines[run],) = panels[stage].plot(*scalars["train/loss"], label=run.name, **style)
    for stage, axes in panels.items():
        axes.set(title=stage, xlabel="tokens since the run began", ylabel="training loss", yscale="log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(ScalarFormatter())
    figure.legend(handles=[lines[run] for run in runs], loc="outside right center", fontsize="small")
    return figure


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
        axes.set_title(training.run.name, fontsize="medium")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(depth - 0.5, -0.5)
    figure.colorbar(mesh, ax=panels, label=DISTANCES[stage])
    figure.supxlabel("tokens since the run began", fontsize="medium")
    figure.supylabel("layer", fontsize="medium")
    return figure
