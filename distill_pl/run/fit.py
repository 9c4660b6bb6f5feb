"""`distill-pl fit`: run the stages in order, each in a fresh Trainer, then export the Hugging Face folder."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from distill_pl.console import perplexities, quiet, say
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.errors import InputError
from distill_pl.run.export import check_export, export, lacking
from distill_pl.run.folder import (
    StageRun,
    check_fingerprints,
    check_room,
    check_run_folder,
    check_sizes,
    check_stage_files,
    check_teacher_of,
    disk_refused,
    fingerprint,
    load_student,
    next_stage,
    read_metrics,
    save_student,
    sole_user,
    steps_done,
    teacher_fingerprints,
    tokens_read,
    write_config,
    write_fingerprints,
)
from distill_pl.run.monitor import Monitor
from distill_pl.run.plan import check_length, check_sharding, describe, forecast, plan
from distill_pl.run.trainer import build_loggers, build_trainer, check_launcher, device, end_with_leader, leading, precision
from distill_pl.run.values import check_validation, check_values
from distill_pl.stages import STAGES, Stage
from distill_pl.stages.sharding import unsharded
from distill_pl.student.factory import StudentFactory, check_teacher
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher


def fit(config: Namespace) -> None:
    """Run the stages that are left to run and export the student; do nothing for a finished run.

    `config` is the parsed command line of `distill-pl fit`. Raises InputError for bad input, before training starts; during a
    stage, for a full GPU or disk.
    """
    quiet()
    end_with_leader()
    dry_run = config.pop("dry_run", False)
    check_values(config)
    plans = plan(config)
    out = Path(config.out)
    check_run_folder(config)
    exported = out / "student"
    if exported.is_dir():
        missing = ", ".join(lacking(exported))
        if not missing:
            say(f"{out} is finished, nothing to do: the student is in {exported}")
            return
        if not plans[-1].weights.is_file():
            raise InputError(
                f"{exported} lacks {missing}, and {plans[-1].weights}, from which it would be written again, is gone too: "
                "restore either, or choose another out to train again"
            )
    first = next_stage(plans)
    if later := [stage_run.folder for stage_run in plans[first + 1 :] if stage_run.folder.is_dir()]:
        raise InputError(
            f"{plans[first].weights} is gone, from which {later[0]} was begun: restore it, or delete {later[0]} and what "
            f"follows it to train {plans[first].name} again"
        )
    for stage_run in plans[max(0, first - 1) :]:
        check_stage_files(stage_run)
    data = ChunkDataModule(**config.data)
    probe = build_trainer(config)  # Lightning's own checks, and how many ranks there are
    check_launcher(config, probe)
    accumulation = data.accumulation(probe.world_size)
    check_validation(config, data.validation_batches(probe.world_size))
    check_sharding(config, plans)

    skipped = -(-tokens_read(config) // config.data.sequence_length)
    factory = StudentFactory(**config.student)
    bf16 = precision(config).startswith("bf16")
    teacher = Teacher(config.teacher, torch.bfloat16 if bf16 else torch.float32)
    check_teacher(teacher)
    check_length(config, teacher)
    fingerprints = teacher_fingerprints(teacher)
    check_fingerprints(config, fingerprints)
    if first < len(plans):
        data.open(teacher.tokenizer, teacher.config)
    student = factory.build(teacher, config.seed)
    if factory.start is not None:
        start = Path(config.student.start_from)
        for run in (start, start.parent):  # the run, or the folder of its student
            check_teacher_of(run, config.teacher, fingerprints["teacher"])
        fingerprints["start"] = fingerprint(factory.start)
    stages = [STAGES[stage_run.name](student, teacher, **config[stage_run.name]) for stage_run in plans]
    check_room(out, plans, sum(p.numel() for p in student.parameters()))
    check_export(config, plans, student, teacher)
    describe(config, teacher, student, plans)
    if dry_run:
        say(forecast(config, stages, plans))
        return
    chunks = plans[-1].first + plans[-1].steps * config.data.batch_size
    if first < len(plans):
        data.prepare(chunks, skipped)
        say(f"found    {data.describe()}")
        fingerprints["text"] = data.fingerprint()
    compiled = device(config).type == "cuda" and config.compile
    if compiled:
        from distill_pl.compiling import compile_stage
    with sole_user(out, probe.global_rank):
        check_run_folder(config)  # another run may have begun and stopped there since the first check
        check_fingerprints(config, fingerprints)
        if not probe.global_rank and next_stage(plans) != first:
            raise InputError(f"out {config.out!r} was trained by another process in the meantime: give the same command again")
        for stage_run in plans[:first] if not probe.global_rank else []:  # a kill came before `save_student` deleted it
            stage_run.checkpoint.unlink(missing_ok=True)
        if first < len(plans):
            fingerprints["held_out"] = data.chunks.fingerprint(0)
        write_fingerprints(out, {**fingerprints, "tokens_read": (skipped + chunks) * config.data.sequence_length})
        write_config(config)

        expected: float | str | None = "teacher" if factory.is_teacher else None
        if first and plans[first - 1].weights.is_file():  # else the stage that was begun has all in its checkpoint
            say(f"{plans[first - 1].name} is done: {plans[first - 1].weights}")
            load_student(student, plans[first - 1])
            expected = read_metrics(plans[first - 1].weights)["student_ce"]
        for stage_run, stage in zip(plans[first:], stages[first:], strict=True):
            stage.student = student
            callbacks = compile_stage(stage, sharded=config.trainer.strategy == "fsdp") if compiled else []
            student = run_stage(config, stage_run, stage, data, accumulation, expected, callbacks)
            load_student(student, stage_run)
            expected = read_metrics(stage_run.weights)["student_ce"]
        export(config, plans, student, teacher)
        say(f"done: the student is in {exported}; held-out {perplexities(read_metrics(plans[-1].weights))}")


def run_stage(config: Namespace, stage_run: StageRun, stage: Stage, data: ChunkDataModule, accumulation: int,
              expected: float | str | None, callbacks: Sequence[Callback]) -> Student:  # fmt: skip
    """Train one stage to its end, from its checkpoint if it has one, and save the student's weights in the stage's folder.

    accumulation: micro-batches of an optimizer step on each rank. expected: see Monitor. Returns the student, unsharded;
    after sharded training its weights are right on rank 0 only.
    """
    batch_tokens = config.data.batch_size * config.data.sequence_length
    resume = stage_run.checkpoint.is_file()
    done = steps_done(stage_run) if resume else 0
    data.assign(stage_run.first, stage_run.steps)
    before = stage_run.first * config.data.sequence_length
    trainer = build_trainer(
        config,
        stage_run.folder,
        max_steps=stage_run.steps,
        accumulate_grad_batches=accumulation,
        max_epochs=1,  # otherwise an exhausted loader starts again, for ever
        val_check_interval=accumulation * max(1, config.validate_every // batch_tokens),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the whole held-out text, before the first step
        logger=build_loggers(config, stage_run, done, before + done * batch_tokens),
        callbacks=[
            *callbacks,
            # batches that `limit_val_batches` counts hold other text with another data.micro_batch_size
            Monitor(before, batch_tokens, expected if config.trainer.limit_val_batches is None else None),
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
    finished = False
    try:
        # SystemExit is Lightning's way out on Ctrl-C and SIGTERM: silent, even in the last validation
        with leading(), contextlib.suppress(SystemExit):
            trainer.fit(stage, datamodule=data, ckpt_path=stage_run.checkpoint if resume else None, weights_only=True)
            if trainer.global_step == stage_run.steps != stage.validated_at:
                trainer.validate(stage, datamodule=data, verbose=False)
            finished = trainer.global_step == stage_run.steps
    except torch.OutOfMemoryError as error:
        micro = data.chunks_at_once(trainer.world_size)
        remedy = f"a data.micro_batch_size below {micro}" if micro > 1 else "trainer.strategy fsdp on more GPUs"
        raise InputError(
            f"{stage_run.name}: the GPU's memory is full: run the same command again with {remedy}, which leaves the steps "
            "as they are; what was saved before is intact"
        ) from error
    except RuntimeError as error:
        check_sizes(stage_run.checkpoint, error)
        raise
    except BrokenPipeError:  # of the console
        raise
    except OSError as error:  # of TensorBoard's writer
        with disk_refused(stage_run.folder):
            raise error
    if not finished:
        start = "its last checkpoint" if stage_run.checkpoint.is_file() else "its beginning"
        stopped = (
            f"distill-pl: {stage_run.name} was stopped at step {trainer.global_step:,}: run the same command again to go on "
            f"from {start}"
        )
        raise SystemExit(stopped if trainer.is_global_zero else 1)
    if config.trainer.profiler:
        say(f"{stage_run.name}  the profile is in {stage_run.folder}")
    student = unsharded(stage.student)
    save_student(student, stage_run, stage.validation)
    trainer.strategy.barrier()
    return student
