"""`distill-pl fit`: run the stages in order, each in a fresh Trainer, then export the Hugging Face folder."""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from distill_pl.console import is_first_rank, perplexities, quiet, say
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.errors import InputError
from distill_pl.ops import use_fla
from distill_pl.run.card import model_card
from distill_pl.run.folder import (
    StageRun,
    check_run_folder,
    check_stage_files,
    load_student,
    read_metrics,
    save_student,
    sole_user,
    write_config,
)
from distill_pl.run.monitor import Monitor
from distill_pl.run.trainer import build_trainer, device, precision
from distill_pl.run.values import check_validation, check_values
from distill_pl.stages import STAGES, Stage
from distill_pl.stages.sharding import unsharded
from distill_pl.student.factory import StudentFactory, check_teacher
from distill_pl.student.modeling import Student
from distill_pl.student.transfer import as_transformer
from distill_pl.teacher import Teacher
from distill_pl.tokens import Tokens, short


def fit(config: Namespace) -> None:
    """Run the stages that are left to run and export the student; do nothing for a finished run.

    `config` is the parsed command line of `distill-pl fit`. Raises InputError before anything is written.
    """
    quiet()
    check_values(config)
    plans = plan(config)
    check_run_folder(config)
    exported = Path(config.out) / "student"
    if exported.is_dir():
        say(f"{config.out} is finished, nothing to do: the student is in {exported}")
        return
    for stage_run in plans:
        check_stage_files(stage_run)
    data = ChunkDataModule(**config.data)
    probe = build_trainer(config)  # Lightning's own checks, and how many ranks there are
    accumulation = data.accumulation(probe.world_size)
    check_validation(config, -(-(data.validation_chunks // probe.world_size) // data.chunks_at_once(probe.world_size)))
    check_sharding(config, plans)

    factory = StudentFactory(**config.student)
    bf16 = precision(config).startswith("bf16")
    teacher = Teacher(config.teacher, torch.bfloat16 if bf16 else torch.float32)
    check_teacher(teacher)
    check_length(config, teacher)
    data.open(teacher.tokenizer)
    student = factory.build(teacher, config.seed)
    stages = [STAGES[stage_run.name](student, teacher, **config[stage_run.name]) for stage_run in plans]
    describe(config, teacher, student, plans)
    data.prepare(plans[-1].first + plans[-1].steps * config.data.batch_size)
    # under fsdp compiled layers have not been measured
    compiled = device(config).type == "cuda" and config.compile and config.trainer.strategy != "fsdp"
    if compiled:
        from distill_pl.compiling import compile_stage
    with sole_user(Path(config.out), probe.global_rank):
        write_config(config)

        expected: float | str | None = "teacher" if factory.is_teacher else None
        for stage_run, stage in zip(plans, stages, strict=True):
            if stage_run.weights.is_file():
                say(f"{stage_run.name} is done: {stage_run.weights}")
            else:
                stage.student = student
                callbacks = [compile_stage(stage)] if compiled else []
                student = run_stage(config, stage_run, stage, data, accumulation, expected, callbacks)
            load_student(student, stage_run)
            expected = read_metrics(stage_run.weights)["student_ce"]
        export(config, plans, student, teacher)
        say(f"done: the student is in {exported}; held-out {perplexities(read_metrics(plans[-1].weights))}")


def check_sharding(config: Namespace, plans: list[StageRun]) -> None:
    """Raise InputError for exact matrices under fsdp.

    Ranks gather a mixer's weights once a sequence, and in validation one rank may have a sequence more than the others.
    """
    exact = plans[0].name == "matrix_mixing" and config.matrix_mixing.estimator == "exact"
    if exact and config.trainer.strategy == "fsdp":
        raise InputError("matrix_mixing.estimator exact does not go with trainer.strategy fsdp: choose probe, or ddp")


def check_length(config: Namespace, teacher: Teacher) -> None:
    """Raise InputError for sequences that the teacher has no positions for, or whose tokens it does not all see."""
    length, positions = config.data.sequence_length, teacher.config.max_position_embeddings
    if length > positions:
        raise InputError(f"data.sequence_length {length} is beyond the teacher's {positions} positions: lower it")
    window = getattr(teacher.config, "sliding_window", None)
    if window is not None and length > window:  # within the window, attention is plain causal attention
        raise InputError(f"data.sequence_length {length} is beyond the teacher's sliding window of {window}: lower it")


def plan(config: Namespace) -> list[StageRun]:
    """Plan the stages that have a budget, each with a span of the chunk file. Raises InputError for budgets that don't fit."""
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


def run_stage(config: Namespace, stage_run: StageRun, stage: Stage, data: ChunkDataModule, accumulation: int,
              expected: float | str | None, callbacks: Sequence[Callback]) -> Student:  # fmt: skip
    """Train one stage to its end, from its checkpoint if it has one, and save the student's weights in the stage's folder.

    accumulation: micro-batches of an optimizer step on each rank. expected: see Monitor. Returns the student, unsharded;
    after sharded training its weights are right on rank 0 only.
    """
    batch_tokens = config.data.batch_size * config.data.sequence_length
    resume = stage_run.checkpoint.is_file()
    done = torch.load(stage_run.checkpoint, mmap=True, weights_only=True)["global_step"] if resume else 0
    data.assign(stage_run.first, stage_run.steps)
    before = stage_run.first * config.data.sequence_length
    trainer = build_trainer(
        config,
        max_steps=stage_run.steps,
        accumulate_grad_batches=accumulation,
        max_epochs=1,  # otherwise an exhausted loader starts again, for ever
        val_check_interval=accumulation * max(1, config.validate_every // batch_tokens),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the whole held-out text, before the first step
        logger=TensorBoardLogger(stage_run.folder, name="", version="", purge_step=before + done * batch_tokens + 1),
        callbacks=[
            *callbacks,
            Monitor(before, batch_tokens, expected),
            ModelCheckpoint(
                stage_run.folder,
                stage_run.checkpoint.stem,
                every_n_train_steps=max(1, config.checkpoint_every // batch_tokens),
                enable_version_counter=False,
            ),
        ],
        enable_checkpointing=True,
    )
    resumed = f", resumed at step {done:,}" if resume else ""
    say(f"\n{stage_run.name}  {stage_run.steps:,} steps of {batch_tokens:,} tokens{resumed}")
    try:
        with contextlib.suppress(SystemExit):  # Lightning's way out on Ctrl-C and SIGTERM: silent, with code 0
            trainer.fit(stage, datamodule=data, ckpt_path=stage_run.checkpoint if resume else None, weights_only=True)
    except torch.OutOfMemoryError as error:
        micro = data.chunks_at_once(trainer.world_size)
        remedy = f"a data.micro_batch_size below {micro}" if micro > 1 else "trainer.strategy fsdp on more GPUs"
        raise InputError(
            f"{stage_run.name}: the GPU's memory is full: run the same command again with {remedy}, which leaves the steps "
            "as they are; what was saved before is intact"
        ) from error
    if trainer.global_step < stage_run.steps:
        start = "its last checkpoint" if stage_run.checkpoint.is_file() else "its beginning"
        stopped = (
            f"distill-pl: {stage_run.name} was stopped at step {trainer.global_step:,}: run the same command again to go on "
            f"from {start}"
        )
        raise SystemExit(stopped if trainer.is_global_zero else 1)
    if stage.validated_at != stage_run.steps:
        trainer.validate(stage, datamodule=data, verbose=False)
    student = unsharded(stage.student)
    save_student(student, stage_run, stage.validation)
    trainer.strategy.barrier()
    return student


def describe(config: Namespace, teacher: Teacher, student: Student, plans: list[StageRun]) -> None:
    """Print what is about to run: teacher, student, text, stages and folder."""
    count = sum(p.numel() for p in student.parameters())
    base = teacher.config
    own = sum(p.numel() for p in teacher.model.parameters())
    copied = {
        "scratch": "nothing copied",
        "fresh": "all but attention copied",
        "qkv": f"all but attention copied, and of it {', '.join(student.mixers[0].copies)}",
    }[config.student.init]
    batch = config.data.batch_size * config.data.sequence_length
    say(
        f"teacher  {config.teacher}: {type(teacher.model).__name__}, {short(own)} parameters, "
        f"{base.num_hidden_layers} layers of {base.num_attention_heads} heads ({base.num_key_value_heads} kv)\n"
        f"student  {config.student.mixer}: {short(count)} parameters, {copied}; "
        f"mixing by {'Triton kernels' if use_fla(config.student.backend, device(config)) else 'torch'}, {precision(config)}\n"
        f"text     {config.data.dataset}, chunks of {config.data.sequence_length}, {config.data.batch_size} a step\n"
        f"stages   "
        + ", then ".join(f"{stage_run.name} {short(stage_run.steps * batch)} tokens" for stage_run in plans)
        + f"\nout      {config.out}"
    )


def export(config: Namespace, plans: list[StageRun], student: Student, teacher: Teacher) -> None:
    """Write the Hugging Face folder beside its place and rename it, on rank 0.

    A student of softmax attention throughout is saved as its teacher's own class.
    """
    folder = Path(config.out) / "student"
    if not is_first_rank() or folder.is_dir():  # another run may have finished everything while this one packed text
        return
    aside = folder.with_name("student.new")
    shutil.rmtree(aside, ignore_errors=True)
    student.config.backend = "auto"  # the choice was for this machine
    model = as_transformer(student)
    model.generation_config = teacher.model.generation_config  # end-of-text tokens and sampling defaults
    model.save_pretrained(aside)
    teacher.tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(str(model_card(config, plans, model)))
    aside.rename(folder)
