"""`distill-pl layers`: which layers of a student to put back to softmax attention."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from math import hypot
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
from torch import Tensor

from distill_pl.console import quiet, say
from distill_pl.errors import AT_LEAST_1, ROWS, SEED, InputError, check_numbers
from distill_pl.losses import kl_divergence
from distill_pl.measure import recall
from distill_pl.measure.evaluate import (
    TOKENS_PER_ROW,
    check_writable,
    haystack,
    held_out_chunks,
    is_run,
    load,
    other_settings,
    read_report,
    weights_path,
)
from distill_pl.mixers import Softmax
from distill_pl.run.folder import check_teacher_of, fingerprint, teacher_of, write_aside
from distill_pl.run.values import parse_lengths
from distill_pl.student.factory import StudentFactory
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher

AS_IT_IS = "none"  # in place of a layer's number


def layers(
    run: str,
    keep: int | None = None,
    tasks: str = "niah_single_2,mqar",
    lengths: str = "512,1024",
    limit: int = 25,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Measure for each layer of a run's student how much softmax attention in that layer alone would help, without training.

    Prints a table of KL(teacher || student) on held-out text, in nats a token, and of recall, with the teacher's attention in
    one layer, and writes it to RUN/eval/layers.json and RUN/eval/layers.png. A layer that matters has a lower KL and a
    higher recall than the first row, the student as it is.

    Args:
        run: run folder of `distill-pl fit`.
        keep: number of layers with softmax attention; also print which, as a value of `student.softmax_layers`: by KL, by
            recall, and evenly spaced, since layers that are best one by one need not be best together. By recall, layers that
            do not raise it by two standard errors follow by KL. Layers of softmax attention that the student has already
            count, and are kept by KL and by recall.
        tasks: names of recall tasks, see `distill-pl evaluate --help`; recall is their mean accuracy.
        lengths: lengths of the prompts of recall tasks, in tokens.
        limit: number of questions of each task and length.
        batch_size: sequences in a forward pass; for recall tasks, batch_size x 2048 tokens (x 4096 on a GPU).
        seed: seed of the questions.

    Raises:
        InputError: an option, model, run or text that cannot be used.
    """
    quiet()
    check_numbers({"limit": limit, "batch_size": batch_size, "seed": seed},
                  {"limit": AT_LEAST_1, "batch_size": ROWS, "seed": SEED})  # fmt: skip
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if unknown := [name for name in names if name not in recall.TASKS]:
        raise InputError(f"tasks={unknown[0]} is no recall task: give some of {', '.join(recall.TASKS)}")
    questions = recall.Questions(parse_lengths(lengths), limit, None, seed)
    if not is_run(run):
        raise InputError(f"run {run!r} is no run folder of distill-pl fit: give one that is finished")
    path, file = weights_path(run), Path(run) / "eval" / "layers.json"
    origin = teacher_of(Path(run))
    check_writable(file)
    model, tokenizer = load(path)
    student = cast(Student, model)  # but for one of softmax throughout, which is exported as its teacher's class
    others = [i for i, mixer in enumerate(getattr(model, "mixers", [])) if not isinstance(mixer, Softmax)]
    if not others:
        raise InputError(f"run {run!r} has softmax attention in every layer: give the run of a student with another mixer")
    before = [i for i in range(len(student.mixers)) if i not in others]  # layers of softmax attention already
    if keep is not None and not len(before) < keep <= len(student.mixers):
        kept = f", {len(before)} of which are softmax attention already" if before else ""
        raise InputError(f"keep {keep}: give a number of layers from {len(before) + 1} to {len(student.mixers)}{kept}")
    settings = {"tasks": names, "lengths": lengths, "limit": limit, "seed": seed}
    earlier = read_report(file)
    if earlier and (differing := other_settings(earlier, settings)):
        raise InputError(f"{file} holds results of other settings ({differing}): move it")
    teacher = Teacher(origin, student.dtype)
    if names and teacher.longest < min(questions.lengths[-1], teacher.config.max_position_embeddings):
        raise InputError(f"lengths {lengths}: no layer put back has the teacher's sliding window: give up to {teacher.longest}")
    check_teacher_of(Path(run), origin, fingerprint(teacher.model, torch.bfloat16))
    original = StudentFactory("softmax").assemble(teacher, seed=0).eval()
    original.to(student.device, student.dtype)  # type: ignore[arg-type]
    source = recall.make_source(tokenizer, haystack(student, tokenizer, Path(run), None))
    items = [recall.make_items(task, source, length, questions) for task in names for length in questions.lengths]
    chunks = held_out_chunks(student, tokenizer, Path(run))
    tokens_at_once = batch_size * TOKENS_PER_ROW[student.device.type]
    rows: list[dict[str, Any]] = []
    say("layer put back      KL  recall" if names else "layer put back      KL")
    for layer in [None, *others]:
        with put_back(student, original, layer):
            rows.append({"layer": layer, "kl": held_out_divergence(student, original, chunks, batch_size)})
            scores = [score for row in items for score in recall.score(student, tokenizer, row, tokens_at_once)]
        rows[-1] |= {"recall": mean(scores), "recall_stderr": recall.standard_error(scores)} if scores else {}
        recalled = f"  {rows[-1]['recall']:6.1%}" if scores else ""
        say(f"{AS_IT_IS if layer is None else layer:>14}  {rows[-1]['kl']:6.4f}{recalled}")
    write_aside(file, lambda aside: aside.write_text(json.dumps(settings | {"rows": rows}, indent=1)))
    from distill_pl.measure.plots import draw_layers

    draw_layers(rows, file.with_suffix(".png"))
    if keep is not None:
        say("")
        for by, chosen in choices(rows, keep, before).items():
            say(f"{by:14} --student.softmax_layers {json.dumps(chosen)}")
    say(f"\nwrote {file} and {file.with_suffix('.png')}")


@contextlib.contextmanager
def put_back(student: Student, original: Student, layer: int | None) -> Iterator[None]:
    """Lend `layer` of a student the attention of `original`, the teacher as a softmax student, or nothing for None."""
    if layer is None:
        yield
        return
    block: Any = student.model.layers[layer]
    own, block.self_attn = block.self_attn, original.mixers[layer]
    try:
        yield
    finally:
        block.self_attn = own


@torch.no_grad()
def held_out_divergence(student: Student, original: Student, chunks: Tensor, batch_size: int) -> float:
    """Compute Eq. 6, KL(original || student), on chunks [N, T], in nats a token."""
    total = 0.0
    for batch in chunks.split(batch_size):
        logits, expected = (model(batch.to(student.device), use_cache=False).logits.float() for model in (student, original))
        total += len(batch) * kl_divergence(logits, expected).item()
    return total / len(chunks)


def choices(rows: list[dict[str, Any]], keep: int, before: Sequence[int] = ()) -> dict[str, list[int]]:
    """Choose `keep` of a model's layers by lowest KL, by highest recall (then lowest KL), and evenly spaced.

    Recall counts where it is higher than the student's by two standard errors of the difference.

    rows: the student's, and those of all layers but those in `before`, which are kept by KL and by recall.
    """
    own, *others = rows
    by_divergence, more, count = sorted(others, key=lambda row: row["kl"]), keep - len(before), len(others) + len(before)
    chosen = {"by KL": [*before, *(row["layer"] for row in by_divergence[:more])]}
    if "recall" in own:

        def gained(row: dict[str, Any]) -> float:
            gain = row["recall"] - own["recall"]
            return gain if gain > 2 * hypot(row["recall_stderr"], own["recall_stderr"]) else 0.0

        chosen["by recall"] = [*before, *(row["layer"] for row in sorted(by_divergence, key=gained, reverse=True)[:more])]
    chosen["evenly spaced"] = [int((index + 0.5) * count / keep) for index in range(keep)]
    return {by: sorted(numbers) for by, numbers in chosen.items()}
