"""Plan a run: what each stage consumes and costs, printed before it starts or, with `--dry_run`, instead of starting it."""

from pathlib import Path
from shutil import disk_usage

from jsonargparse import Namespace

from distill_pl.console import aligned, say
from distill_pl.errors import InputError
from distill_pl.mixers import MIXERS
from distill_pl.ops import use_fla
from distill_pl.run.folder import StageRun, existing_folder, next_stage, room_needed, steps_done
from distill_pl.run.trainer import device, precision
from distill_pl.stages import STAGES, Stage
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher
from distill_pl.tokens import Tokens, short


def plan(config: Namespace) -> list[StageRun]:
    """Return the stages that have a budget, in order, each with its span of the chunk file.

    Raises InputError for budgets that do not fit.
    """
    batch = config.data.batch_size * config.data.sequence_length
    budgets = {name: config[name].tokens for name in STAGES}
    given = sum(tokens or 0 for tokens in budgets.values())
    if given > config.tokens:
        parts = " + ".join(f"{name}.tokens {tokens}" for name, tokens in budgets.items() if tokens)
        raise InputError(f"tokens {config.tokens} is less than {parts}: raise tokens or lower the stages' budgets")
    if budgets["kd"] is None:
        budgets["kd"] = Tokens(config.tokens - given)
    plans: list[StageRun] = []
    first = 0
    for number, (name, tokens) in enumerate(budgets.items(), start=1):
        if not tokens and (name != "kd" or config.kd.tokens is not None):
            continue  # a budget of 0 was asked for
        steps = (tokens or 0) // batch
        if steps == 0:
            raise InputError(
                f"{name}.tokens {tokens} is less than one batch of {config.data.batch_size} x {config.data.sequence_length}: "
                f"raise it (or tokens, of which kd gets the rest) to {batch}, or lower data.batch_size"
            )
        plans.append(StageRun(name, Path(config.out) / f"{number}_{name}", first, steps))
        first += steps * config.data.batch_size
    if not plans:
        raise InputError(
            f"no stage has a budget: set kd.tokens above 0, or leave it out to get what is left of {config.tokens}"
        )
    return plans


def check_sharding(config: Namespace, plans: list[StageRun]) -> None:
    """Raise InputError for exact matrices under fsdp.

    Ranks gather a mixer's weights once a sequence, and in validation one rank may have a sequence more than the others.
    """
    exact = plans[0].name == "matrix_mixing" and config.matrix_mixing.estimator == "exact"
    if exact and config.trainer.strategy == "fsdp":
        raise InputError("matrix_mixing.estimator exact does not go with trainer.strategy fsdp: choose probe, or ddp")


def check_length(config: Namespace, teacher: Teacher) -> None:
    """Raise InputError for sequences that the teacher has no positions for, or whose tokens it does not all see."""
    length, longest = config.data.sequence_length, teacher.longest
    if length > longest:
        what = "positions" if longest == teacher.config.max_position_embeddings else "tokens within its sliding window"
        raise InputError(f"data.sequence_length {length} is beyond the teacher's {longest} {what}: lower it")


def describe(config: Namespace, teacher: Teacher, student: Student, plans: list[StageRun]) -> None:
    """Print what is about to run: teacher, student, text, stages and folder."""
    count = sum(p.numel() for p in student.parameters())
    base = teacher.config
    own = sum(p.numel() for p in teacher.model.parameters())
    copied = {
        "scratch": "nothing copied",
        "fresh": "all but attention copied",
        "qkv": f"all but attention copied, and of it {', '.join(MIXERS[config.student.mixer].copies)}",
    }[config.student.init]
    if config.student.start_from:
        copied = f"going on from {config.student.start_from}"
    batch = config.data.batch_size * config.data.sequence_length
    window = f" with a window of {student.config.window}" if student.config.window else ""
    kept = f", the teacher's attention in layers {student.config.softmax_layers}" if student.config.softmax_layers else ""
    say(
        f"teacher  {config.teacher}: {type(teacher.model).__name__}, {short(own)} parameters, "
        f"{base.num_hidden_layers} layers of {base.num_attention_heads} heads ({base.num_key_value_heads} kv)\n"
        f"student  {config.student.mixer}{window}{kept}: {short(count)} parameters, {copied}; "
        f"mixing by {'Triton kernels' if use_fla(config.student.backend, device(config)) else 'torch'}, {precision(config)}\n"
        f"text     {config.data.dataset}, chunks of {config.data.sequence_length}, {config.data.batch_size} a step\n"
        f"stages   "
        + ", then ".join(f"{stage_run.name} {short(stage_run.steps * batch)} tokens" for stage_run in plans)
        + f"\nout      {config.out}"
    )


def forecast(config: Namespace, stages: list[Stage], plans: list[StageRun]) -> str:
    """Lay out, for `--dry_run`, the steps, tokens and trained parameters of each stage, what is done, memory and disk.

    Memory is that of weights, gradients and Adam's state of the largest stage that is left, for each rank of a DDP run;
    activations, which grow with data.micro_batch_size, come on top.
    """
    batch = config.data.batch_size * config.data.sequence_length
    student, teacher = stages[0].student, stages[0].teacher
    parameters, left = sum(p.numel() for p in student.parameters()), next_stage(plans)
    rows, trained = [["stage", "steps", "tokens", "trained parameters", ""]], [0]
    for index, (stage_run, stage) in enumerate(zip(plans, stages, strict=True)):
        student.requires_grad_(False)
        count = sum(p.numel() for p in stage.trained())
        state = "to be run"
        if index < left:
            state = "done"
        else:
            trained.append(count)
        if index == left and stage_run.checkpoint.is_file():
            state = f"to be resumed at step {steps_done(stage_run):,}"
        rows.append([stage_run.name, f"{stage_run.steps:,}", short(stage_run.steps * batch), short(count), state])
    memory = (4 * parameters + 12 * max(trained) + sum(p.nbytes for p in teacher.model.parameters())) / 2**30
    return (
        f"{aligned(rows)}\n"
        f"memory   {memory:.3g} GiB a rank for weights, gradients and Adam; activations come on top\n"
        f"disk     up to {room_needed(plans, parameters) / 1e9:.3g} GB for checkpoints and weights, "
        f"{disk_usage(existing_folder(Path(config.out))).free / 1e9:.3g} GB are free"
    )
