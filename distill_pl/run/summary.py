"""Summarise the results of a study as Markdown: the paper's tables, the rankings, and what became of its claims.

A claim is judged by the difference of two students with the same seed: by its mean over the seeds and the 95% interval of that
mean (Student's t). It is confirmed where the whole interval agrees with the claim, contradicted where none of it does, and
otherwise undecided.
"""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from distill_pl.console import markdown
from distill_pl.data.sources import counted
from distill_pl.errors import InputError, one_line
from distill_pl.measure import paper, recall
from distill_pl.measure.report import SEEDS, half_width, interval
from distill_pl.run.folder import write_aside
from distill_pl.student.factory import StudentFactory

MIXER = inspect.signature(StudentFactory).parameters["mixer"].default
PUBLISHED = paper.TABLE_2 | paper.TABLE_3 | paper.APPENDIX_B
OTHERS = [mixer for mixer in paper.TABLE_1[1:] if mixer not in ("mlstm", "gla")]  # of the nine subquadratic ones
GAINS = [f"{mixer}_mm - {mixer}" for mixer in paper.TABLE_1 if mixer != "metala"]
DIGITS = {"perplexity": 2, "KL": 3, "nats": 3, "points": 2}  # after the point; 1 of all other measures
LITTLE = {"nats": 0.02, "points": 0.5}  # differences that the paper would call similar or minimal
SPANS = {  # of a claim: least and most that the left student may be better, in units of LITTLE
    "better": (0, math.inf), "worse": (-math.inf, 0), "similar": (-1, 1), "little or worse": (-math.inf, 1),
}  # fmt: skip


class Claim(NamedTuple):
    """Hold a claim of the paper: each left student is `span` (a key of SPANS) compared with the right one of its pair.

    A student is named by its experiment; `a - b` stands for the gain of a over b.
    """

    section: str
    text: str
    span: str
    pairs: list[tuple[str, str]]


def each(left: str, others: list[str]) -> list[tuple[str, str]]:
    """Pair a student with each of the others."""
    return [(left, other) for other in others]


CLAIMS = [
    Claim("5.1", "GLA is ahead of the seven others", "better", each("gla", OTHERS)),
    Claim("5.1", "xLSTM is ahead of the seven others, all with matrix mixing", "better",
          each("mlstm_mm", [f"{mixer}_mm" for mixer in OTHERS])),
    Claim("5.1", "matrix mixing helps MetaLA", "better", [("metala_mm", "metala")]),
    Claim("5.1", "matrix mixing helps MetaLA most", "better", each("metala_mm - metala", GAINS)),
    Claim("5.1", "matrix mixing helps Hedgehog", "better", [("hedgehog_mm", "hedgehog")]),
    Claim("5.1", "matrix mixing helps softmax attention", "better", [("softmax_mm", "softmax")]),
    Claim("5.1", "matrix mixing harms Mamba2", "worse", [("mamba2_mm", "mamba2")]),
    Claim("5.1, 6", "matrix mixing does little or harm for DeltaNet and RetNet", "little or worse",
          [("delta_net_mm", "delta_net"), ("retnet_mm", "retnet")]),
    Claim("5.2", "QKV copying helps GLA", "better", [("gla_qkv", "gla")]),
    Claim("5.2", "QKV copying helps xLSTM", "better", [("mlstm_qkv", "mlstm")]),
    Claim("5.2", "QKV copying helps more with matrix mixing", "better",
          [("gla_qkv_mm", "gla_qkv"), ("mlstm_qkv_mm", "mlstm_qkv")]),
    Claim("Table 3", "hidden alignment without QKV copying harms GLA", "worse", [("gla_mm_h2h", "gla_mm")]),
    Claim("5.2", "hidden alignment after matrix mixing helps xLSTM", "better", [("mlstm_mm_h2h", "mlstm_mm")]),
    Claim("5.2", "hidden alignment helps GLA and xLSTM with QKV copying and matrix mixing", "better",
          [("gla_qkv_mm_h2h", "gla_qkv_mm"), ("mlstm_qkv_mm_h2h", "mlstm_qkv_mm")]),
    Claim("5.2", "GLA gains by all techniques together", "better", [("gla_qkv_mm_h2h", "gla")]),
    Claim("5.2", "xLSTM with all techniques is best of all", "better",
          each("mlstm_qkv_mm_h2h", [name for name in paper.TABLE_3 if name != "mlstm_qkv_mm_h2h"])),
    Claim("6", "xLSTM with all techniques is close to softmax attention", "similar", [("mlstm_qkv_mm_h2h", "softmax")]),
    Claim("B", "distillation is better than plain training", "better", [("mlstm", "mlstm_plain")]),
    Claim("B", "copying all but attention is better than nothing", "better", [("mlstm_plain", "scratch_mlstm")]),
    Claim("B", "Frobenius norm and MSE do similarly well", "similar", [("mlstm_qkv_mm", "mlstm_qkv_mm_mse")]),
]  # fmt: skip
MEASURES = "Perplexity and KL(teacher, student), in nats a token, are of held-out text; accuracies and recall are in percent."
STATE_TOKENS = 8192  # after which results give the size of a state
MATERIAL = ("teacher", "data.dataset", "data.sequence_length", "data.validation_tokens")  # what a teacher's measures depend on
Rows = dict[str, dict[int, dict[str, float]]]  # by name and seed: a student's measures


def summary(folder: Path) -> str:
    """Summarise all results in a folder, and draw study.png into it.

    Rankings and claims are left out where results differ in teacher, text or length. Raises InputError where there are none, a
    file is none of `distill-pl study`, or two are of one student and seed or of one student with different keys.
    """
    results = []
    rows: Rows = {}
    configs: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            result = json.loads(file.read_text())
            row, seed, values = result["row"], result["seed"], measured(result, "student")
            if not all(map(math.isfinite, [math.log(values["perplexity"]), *values.values()])):
                raise ValueError("a measure is not finite")
            overview([result])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} is damaged or no result of distill-pl study ({one_line(error)}): move it elsewhere, or delete it to "
                "have the run done again"
            ) from error
        config = {key: value for key, value in result["config"].items() if key not in SEEDS}
        if seed in rows.get(row, {}):
            raise InputError(f"{file} is a second result of {row} with seed {seed}: move one of the two elsewhere")
        if configs.setdefault(row, config) != config:
            differing = ", ".join(key for key in configs[row] | config if configs[row].get(key) != config.get(key))
            raise InputError(f"{file} has another {differing} than other seeds of {row}: give each study --results of its own")
        rows.setdefault(row, {})[seed] = values
        results.append(result)
    if not results:
        raise InputError(f"results {str(folder)!r} has no result yet: run the study first, or give the --results that it had")
    of_teacher = next((result for result in results if "teacher" in result["held_out"]), results[0])  # not in plain training
    comparable = len({tuple(map(result["config"].get, MATERIAL)) for result in results}) == 1
    if not comparable:  # then no teacher is that of all students
        of_teacher = {"held_out": {}, "evaluated": {"teacher": {}}}
    teacher: Rows = {"teacher": {0: measured(of_teacher, "teacher")}}
    beyond = sorted((average(rows[name], "perplexity"), name) for name in rows.keys() - PUBLISHED.keys())
    tables: dict[str, dict[str, Any]] = {
        "Table 3": paper.TABLE_3, "Table 2": paper.TABLE_2, "Appendix B": paper.APPENDIX_B,
        "Beyond the paper": dict.fromkeys(name for _, name in beyond),
    }  # fmt: skip
    draw(rows, teacher["teacher"][0].get("perplexity"), folder / "study.png")
    shared, changed = keys_of(results)
    text = ["# Results of `distill-pl study`", f"{overview(results)} {MEASURES}",
            *[f"All runs: {', '.join(shared)}."] * bool(shared), *guessing(of_teacher),
            "![held-out perplexity of each student](study.png)"]  # fmt: skip
    for title, published in tables.items():
        names = [name for name in published if name in rows]
        if names:
            found = {name: published[name] for name in names}
            keys = changed if title == "Beyond the paper" else None
            text += [f"### {title}", table({"teacher": paper.TEACHER} | found, teacher | rows, keys=keys)]
        if title in ("Table 3", "Table 2") and len(names) >= 3 and comparable:
            text.append(ranking(names, rows))
    if lengths := sorted({int(key.split()[1]) for runs in rows.values() for values in runs.values() for key in values
                          if key.startswith("recall ")}):  # fmt: skip
        mean_recall = {name: average(runs, "recall") for name, runs in rows.items()}
        best = sorted((name for name in rows if mean_recall[name] > 0.05), key=lambda name: -mean_recall[name])
        measures = ["M parameters", "MB of state", "recall", *(f"recall {length}" for length in lengths)]
        said = ("Percent of the answers found, mean over tasks, by length of the prompt in tokens; parameters of the model; "
                f"size of the state of one sequence after {STATE_TOKENS:,} tokens, by a model in bf16.")  # fmt: skip
        if chances := [row["chance"] for row in of_teacher["evaluated"]["teacher"].values() if "chance" in row]:
            said += (f" Guessing among the numbers and words of the prompt would score {100 * mean(chances):.1f}; models that "
                     "recall nothing score less, since they write others.")  # fmt: skip
        evaluated = sum(any("recall" in values for values in runs.values()) for runs in rows.values())
        if evaluated > len(best):
            said += f" Not shown: {counted(evaluated - len(best), 'student')} of less than 0.05%."
        shown = draw_recall_of(of_teacher, results, best, folder / "recall.png")
        shown_rows = dict.fromkeys([*["teacher"] * ("recall" in teacher["teacher"][0]), *best])
        text += ["### Recall", said, *[table(shown_rows, teacher | rows, measures)] * bool(shown_rows), *shown]
    judged = claims(rows) if comparable else None
    if judged is None:
        return "\n\n".join(text)
    signs = (
        "A + says that the student that the claim names first is better. Similar, close and little mean up to "
        f"{LITTLE['nats']} nats or {LITTLE['points']} points. Where a claim compares several students, the comparison least "
        "favourable to it is shown. Intervals are not corrected for the number of claims. Section 5.3, speed and memory, is "
        "for `distill-pl bench`."
    )
    return "\n\n".join([*text, "### The paper's claims", signs, judged])


def measured(result: dict[str, Any], model: str) -> dict[str, float]:
    """Collect the measures of `student` or `teacher` from a result: accuracies in percent, recall as the mean of its tasks."""
    held_out, tasks = result["held_out"], result["evaluated"][model]
    values = {"perplexity": held_out[model]} if model in held_out else {}
    if model == "student" and "kl" in held_out:
        values["KL"] = held_out["kl"]
    values |= {column: 100 * accuracy for column, (accuracy, _) in paper.columns(tasks).items()}
    if found := [100 * tasks[task]["acc"] for task in recall.TASKS if task in tasks]:
        values["recall"] = mean(found)
        by_length = [tasks[task]["by_length"] for task in recall.TASKS if task in tasks]
        shared = [length for length in by_length[0] if all(length in row for row in by_length)]
        values |= {f"recall {length}": 100 * mean(row[length] for row in by_length) for length in shared}
    if model == "student" and "parameters" in result:
        values["M parameters"] = result["parameters"] / 1e6
    if found := result.get("state_bytes", {}).get(model):
        values["MB of state"] = found / 1e6
    return values


def draw_recall_of(of_teacher: dict[str, Any], results: list[dict[str, Any]], rows: list[str], file: Path) -> list[str]:
    """Draw the recall of the teacher and of each of `rows`, the mean over its seeds -> lines of Markdown."""
    from distill_pl.measure.plots import Model, draw_recall

    students = []
    for row in rows:
        runs = [result for result in results if result["row"] == row]
        recalled = over_seeds([run["evaluated"]["student"] for run in runs])
        students.append(Model(row, runs[0]["config"].get("student.mixer", MIXER), recalled, {}))
    if not students:
        return []
    draw_recall([Model("teacher", None, of_teacher["evaluated"]["teacher"], {}), *students], file)
    return ["![recall against length, of these students](recall.png)"]


def over_seeds(found: list[dict[str, Any]]) -> dict[str, dict]:
    """Average recall results over seeds, by task and length, of the tasks and lengths that all have."""
    means = {}
    for task in recall.TASKS:
        if all(task in results for results in found):
            of_task = [results[task] for results in found]
            lengths = [length for length in of_task[0]["by_length"] if all(length in result["by_length"] for result in of_task)]
            by_length = {length: mean(result["by_length"][length] for result in of_task) for length in lengths}
            means[task] = {key: mean(result[key] for result in of_task) for key in ("acc", "chance")} | {"by_length": by_length}
    return means


def keys_of(results: list[dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """List the keys that are not the defaults: those that all results share and, by student, the others."""
    pairs = {result["row"]: {f"`{key} {str(value).lower() if isinstance(value, bool) else value}`"
                             for key, value in result["config"].items()
                             if key not in ("student.mixer", *SEEDS)} for result in results}  # fmt: skip
    shared = set.intersection(*pairs.values())
    return sorted(shared), {row: ", ".join(sorted(found - shared)) for row, found in pairs.items()}


def guessing(result: dict[str, Any]) -> list[str]:
    """Say on which of the paper's tasks the teacher is not two standard errors above guessing, if on any."""
    found = paper.columns(result["evaluated"]["teacher"])
    names = [column for column, chance in paper.CHANCE.items()
             if column in found and found[column][0] - 2 * found[column][1] <= chance]  # fmt: skip
    return [f"The teacher does no better than guessing on {', '.join(names).removesuffix('.')}."] if names else []


def overview(results: list[dict[str, Any]]) -> str:
    """Say in a sentence how many runs there are, of what."""

    def of(read: Callable[[dict], object]) -> str:
        return ", ".join(sorted({str(read(result)) for result in results}))

    config = [f"{key.split('.')[-1]} {of(lambda result, key=key: result['config'][key])}"
              for key in ("teacher", "data.dataset", "tokens")]  # fmt: skip
    device, version = of(lambda result: result["device"]), of(lambda result: result["versions"]["torch"])
    runs = counted(len(results), "run")
    return f"{runs} ({'; '.join(config)}) on {device}, torch {version}. Mean ± half the 95% interval over seeds."


def table(published: dict[str, Any], rows: Rows,
          measures: Sequence[str] = ("perplexity", "KL", *paper.COLUMNS, "Avg.", "recall"),
          keys: dict[str, str] | None = None) -> str:  # fmt: skip
    """Lay out rows in the order of `published`, the paper's averages and their keys last; empty columns are left out."""
    columns = [column for column in measures
               if any(column in values for name in published for values in rows.get(name, {}).values())]  # fmt: skip
    beside = any(accuracies and accuracies[-1] is not None for name, accuracies in published.items() if name != "teacher")
    lines = [["student", "seeds", *columns, *["paper's Avg."] * beside, *["other keys that are not the defaults"] * bool(keys)]]
    for name, accuracies in published.items():
        runs = rows.get(name, {}).values()
        cells = [interval([values[column] for values in runs if column in values], DIGITS.get(column, 1)) for column in columns]
        published_average = f"{accuracies[-1]:.2f}" if accuracies and accuracies[-1] is not None else ""
        lines.append([name, "" if name == "teacher" else str(len(runs)), *cells, *[published_average] * beside,
                      *([keys.get(name, "")] if keys else [])])  # fmt: skip
    return markdown(lines)


def ranking(names: list[str], rows: Rows) -> str:
    """Compare the ranking of rows with the paper's by Kendall's tau, of means and by the seeds that all have, in a sentence."""
    from scipy.stats import kendalltau

    published, parts = [PUBLISHED[name][-1] for name in names], []
    for measure, sign in [("perplexity", -1), ("Avg.", 1)]:
        values = [values_of(rows, name, measure, lambda value, sign=sign: sign * value) for name in names]
        if all(values):
            tau = kendalltau([mean(found.values()) for found in values], published)
            seeds = set.intersection(*(set(found) for found in values))
            taus = [kendalltau([found[seed] for found in values], published).statistic for seed in seeds]
            over_seeds = f", by seed {interval(taus)}" if len(taus) > 1 else ""
            parts.append(f"{tau.statistic:.2f} by {measure} (p = {tau.pvalue:.2g}{over_seeds})")
    return f"Kendall's tau to the paper's ranking of these {len(names)}: {', '.join(parts)}."


def claims(rows: Rows) -> str | None:
    """Lay out each claim of the paper with the paper's difference, that here and the verdict, by loss and by accuracy.

    Claims of whose students none was run are left out; without any other, return None.
    """
    lines = [["section", "claim", "paper: points", "here: nats of held-out loss", "here: points of accuracy"]]
    for claim in CLAIMS:
        paper = judge(claim, "points", lambda name: {0: found} if (found := PUBLISHED[name][-1]) else {})
        loss = judge(claim, "nats", lambda name: values_of(rows, name, "perplexity", lambda value: -math.log(value)))
        points = judge(claim, "points", lambda name: values_of(rows, name, "Avg.", lambda value: value))
        if {loss, points} != {"not run"}:
            lines.append([claim.section, claim.text, paper.removesuffix(", one seed"), loss, points])
    return markdown(lines) if len(lines) > 1 else None


def values_of(rows: Rows, name: str, measure: str, better: Callable[[float], float]) -> dict[int, float]:
    """Return a measure of a student by seed, turned so that more is better."""
    return {seed: better(values[measure]) for seed, values in rows.get(name, {}).items() if measure in values}


def judge(claim: Claim, unit: str, values: Callable[[str], dict[int, float]]) -> str:
    """Say how much better the left student of the least favourable pair is than the right one, and what that means.

    values: a student's name -> its measure by seed, of which more is better.
    """
    least, most = (bound * LITTLE[unit] if bound else 0 for bound in SPANS[claim.span])
    found: list[tuple[tuple[bool, float], str, str]] = []  # not against the claim, how far within it; in words; verdict
    for left, right in claim.pairs:
        a, b = by_seed(left, values), by_seed(right, values)
        differences = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
        if not differences:
            continue
        middle, spread = mean(differences), half_width(differences)
        low, high = middle - spread, middle + spread
        outside = high < least or low > most
        verdict = "confirmed" if least < low and high < most else "contradicted" if outside else "undecided"
        verdict = verdict if len(differences) > 1 else "one seed"
        of_several = f" ({f'{left} ' * (claim.pairs[0][0] != claim.pairs[-1][0])}against {right})" * (len(claim.pairs) > 1)
        margin = min(low - least, most - high)
        found.append(((not outside, margin), interval(differences, DIGITS[unit], "+") + of_several, verdict))
    if not found:
        return "not run"
    verdicts = {verdict for *_, verdict in found}
    whole = "contradicted" if "contradicted" in verdicts else verdicts.pop() if len(verdicts) == 1 else "undecided"
    if len(found) < len(claim.pairs):
        whole = f"{whole.replace('confirmed', 'undecided')}, {len(found)} of {len(claim.pairs)} pairs run"
    return f"{min(found)[1]}, {whole}"


def by_seed(student: str, values: Callable[[str], dict[int, float]]) -> dict[int, float]:
    """Return a student's measure by seed, or that of a gain `a - b`, for the seeds that both have."""
    first, *rest = (values(name) for name in student.split(" - "))
    return {seed: value - sum(other[seed] for other in rest) for seed, value in first.items() if all(seed in o for o in rest)}


def draw(rows: Rows, teacher: float | None, file: Path) -> None:
    """Draw each student's held-out perplexity with its 95% interval, the best on top.

    Where there are three students of the paper, a second panel compares their ranking by perplexity with the paper's.
    """
    from matplotlib.figure import Figure

    from distill_pl.measure.plots import label_logarithmic

    found = {name: [values["perplexity"] for values in runs.values()] for name, runs in rows.items()}
    names = sorted(found, key=lambda name: -mean(found[name]))
    published = {name: average for name in names if name in PUBLISHED and (average := PUBLISHED[name][-1]) is not None}
    compared = len(published) >= 3
    width = 5 + 2 * compared + (0.07 + 0.09 * compared) * max(map(len, names))  # inches
    figure = Figure(figsize=(width, max(4, 0.2 * len(names))), layout="constrained")
    left, *others = figure.subplots(1, 1 + compared, squeeze=False)[0]
    for place, name in enumerate(names):
        color = "C0" if name in PUBLISHED else "C1"
        left.errorbar(mean(found[name]), place, xerr=half_width(found[name]), marker="o", markersize=4, capsize=2, color=color)
    left.set_yticks(range(len(names)), names, fontsize="small")
    left.set(title="blue: students of the paper\norange: beyond it; line: teacher", ylim=(-1, len(names)))
    left.set(xscale="log", xlabel="held-out perplexity, mean and 95% interval")
    label_logarithmic(left.xaxis)
    left.grid(axis="x", which="both", alpha=0.3)
    if teacher is not None:
        left.axvline(teacher, color="black", linewidth=1)
    for right in others:
        of_paper = sorted(published, key=published.__getitem__)
        right.set(title="best on top: by the paper's average accuracy\nand by perplexity here", xlim=(0, 1), xticks=[])
        for axes, order in [(right, of_paper), (right.twinx(), published)]:
            axes.set_yticks(range(len(order)), list(order), fontsize="small")
            axes.set_ylim(-1, len(order))
        for place, name in enumerate(published):
            right.plot([0, 1], [of_paper.index(name), place], color="C0", marker="o", markersize=4, clip_on=False)
    write_aside(file, lambda aside: figure.savefig(aside, format="png", dpi=120))


def average(runs: dict[int, dict[str, float]], measure: str) -> float:
    """Return the mean of a measure over a student's runs; a run without it counts as 0."""
    return mean(values.get(measure, 0.0) for values in runs.values())
