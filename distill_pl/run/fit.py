"""`distill-pl fit`: the stages in order, each in a fresh Trainer, then the Hugging Face folder."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.fsdp import FSDPModule

from distill_pl.compiling import layers as compiling
from distill_pl.console import perplexities, quiet, say
from distill_pl.data.datamodule import ChunkDataModule
from distill_pl.errors import InputError
from distill_pl.ops import use_fla
from distill_pl.run.card import model_card
from distill_pl.run.folder import (
    AsideCheckpointIO,
    Leg,
    check_leg,
    check_run_folder,
    load_student,
    read_metrics,
    save_student,
    sole_user,
    write_config,
)
from distill_pl.run.monitor import Monitor
from distill_pl.stages import STAGES, Stage
from distill_pl.stages.sharding import FullyShardedStrategy, whole
from distill_pl.student.factory import StudentFactory, check_teacher
from distill_pl.student.modeling import Student
from distill_pl.student.transfer import as_transformer
from distill_pl.teacher import Teacher
from distill_pl.tokens import Tokens, short


def fit(config: Namespace) -> None:
    """Run what is left of the stages and export the student; a finished run is a no-op.

    `config` is the parsed command line of `distill-pl fit`. Raises InputError before anything is written.
    """
    quiet()
    legs = plan(config)
    check_run_folder(config)
    exported = Path(config.out) / "student"
    if exported.is_dir():
        say(f"{config.out} is finished, nothing to do: the student is in {exported}")
        return
    for leg in legs:
        check_leg(leg)
    data = ChunkDataModule(**config.data)
    probe = trainer_for(config)
    accumulation = data.accumulation(probe.world_size)

    exact = legs[0].name == "matrix_mixing" and config.matrix_mixing.estimator == "exact"
    if exact and config.trainer.strategy == "fsdp":  # ranks gather a mixer's slices once a sequence, and may hold out one more
        raise InputError("matrix_mixing.estimator exact does not go with trainer.strategy fsdp: choose probe, or ddp")

    factory = StudentFactory(**config.student)
    bf16 = precision(config).startswith("bf16")
    teacher = Teacher(config.teacher, torch.bfloat16 if bf16 else torch.float32)
    check_teacher(teacher)
    gpu = device(config).type == "cuda"
    compiled = gpu and config.compile and config.trainer.strategy != "fsdp"  # under which nobody has measured it
    if gpu:
        compiling.switch(compiled, teacher.config.hidden_size)
    length, positions = config.data.sequence_length, teacher.config.max_position_embeddings
    if length > positions:
        raise InputError(f"data.sequence_length {length} is beyond the teacher's {positions} positions: lower it")
    window = getattr(teacher.config, "sliding_window", None)
    if window is not None and length > window:  # within it, attention is plain causal attention
        raise InputError(f"data.sequence_length {length} is beyond the teacher's sliding window of {window}: lower it")
    data.open(teacher.tokenizer)
    student = factory.build(teacher, config.seed)
    stages = [STAGES[leg.name](student, teacher, **config[leg.name]) for leg in legs]
    describe(config, teacher, student, legs)
    data.prepare(legs[-1].first + legs[-1].steps * config.data.batch_size)
    with sole_user(Path(config.out), probe.global_rank):
        write_config(config)

        expected: float | str | None = "teacher" if factory.is_teacher else None
        for leg, stage in zip(legs, stages, strict=True):
            if leg.weights.is_file():
                say(f"{leg.name} is done: {leg.weights}")
            else:
                stage.student = student
                stage.captures = compiled
                student = run_stage(config, leg, stage, data, accumulation, expected)
            load_student(student, leg)
            expected = read_metrics(leg.weights)["student_ce"]
        export(config, legs, student, teacher)
        say(f"done: the student is in {exported}; held-out {perplexities(read_metrics(legs[-1].weights))}")


def plan(config: Namespace) -> list[Leg]:
    """The stages that have a budget, each with its span of the chunk file. Raises InputError for budgets that don't fit."""
    batch = config.data.batch_size * config.data.sequence_length
    budgets = {name: config[name].tokens for name in STAGES}
    given = sum(tokens or 0 for tokens in budgets.values())
    if given > config.tokens:
        parts = " + ".join(f"{name}.tokens {tokens}" for name, tokens in budgets.items() if tokens)
        raise InputError(f"tokens {config.tokens} is less than {parts}: raise tokens or lower the stages' budgets")
    if budgets["kd"] is None:
        budgets["kd"] = Tokens(config.tokens - given)
    legs: list[Leg] = []
    first = 0
    for number, (name, tokens) in enumerate(budgets.items(), start=1):
        if not tokens and config[name].tokens is not None:
            continue  # a budget of 0 was asked for
        steps = tokens // batch
        if steps == 0:
            raise InputError(
                f"{name}.tokens {tokens} is less than one batch of {config.data.batch_size} x {config.data.sequence_length}: "
                f"raise it (or tokens, of which kd gets the rest) to {batch}, or lower data.batch_size"
            )
        legs.append(Leg(name, Path(config.out) / f"{number}_{name}", first, steps))
        first += steps * config.data.batch_size
    if not legs:
        raise InputError(
            f"no stage has a budget: set kd.tokens above 0, or leave it out to get what is left of {config.tokens}"
        )
    return legs


def run_stage(config: Namespace, leg: Leg, stage: Stage, data: ChunkDataModule, accumulation: int,
              expected: float | str | None) -> Student:  # fmt: skip
    """Train one stage to its end, from its checkpoint if it has one, and leave the student's weights in its folder.

    Returns the student, unsharded; where the ranks had a slice each, of its weights only rank 0's are right.
    """
    batch_tokens = config.data.batch_size * config.data.sequence_length
    resume = leg.checkpoint.is_file()
    done = torch.load(leg.checkpoint, mmap=True, weights_only=True)["global_step"] if resume else 0
    data.assign(leg.first, leg.steps)
    before = leg.first * config.data.sequence_length
    trainer = trainer_for(
        config,
        max_steps=leg.steps,
        accumulate_grad_batches=accumulation,
        max_epochs=1,  # else an exhausted loader begins again, for ever
        val_check_interval=accumulation * max(1, config.validate_every // batch_tokens),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the whole held-out text, before the first step
        logger=TensorBoardLogger(leg.folder, name="", version="", purge_step=before + done * batch_tokens + 1),
        callbacks=[
            Monitor(before, batch_tokens, expected),
            ModelCheckpoint(
                leg.folder,
                leg.checkpoint.stem,
                every_n_train_steps=max(1, config.checkpoint_every // batch_tokens),
                enable_version_counter=False,
            ),
        ],
        enable_checkpointing=True,
    )
    say(f"\n{leg.name}  {leg.steps:,} steps of {batch_tokens:,} tokens" + (f", resumed at step {done:,}" if resume else ""))
    try:
        with contextlib.suppress(SystemExit):  # how Lightning leaves on Ctrl-C and SIGTERM: silently, the latter with code 0
            trainer.fit(stage, datamodule=data, ckpt_path=leg.checkpoint if resume else None, weights_only=True)
    except torch.OutOfMemoryError as error:
        micro = data.chunks_at_once(trainer.world_size)
        remedy = f"a data.micro_batch_size below {micro}" if micro > 1 else "trainer.strategy fsdp on more GPUs"
        raise InputError(
            f"{leg.name}: the GPU's memory is full: run the same command again with {remedy}, which leaves the steps as they "
            "are; what was saved before is intact"
        ) from error
    if trainer.global_step < leg.steps:
        stopped = (
            f"distill-pl: {leg.name} was stopped at step {trainer.global_step:,}: run the same command again to go on from "
            + ("its last checkpoint" if leg.checkpoint.is_file() else "its beginning")
        )
        raise SystemExit(stopped if trainer.is_global_zero else 1)
    if stage.validated_at != leg.steps:
        trainer.validate(stage, datamodule=data, verbose=False)
    student = whole(stage.student) if isinstance(stage.student, FSDPModule) else stage.student
    save_student(student, leg, stage.validation)
    trainer.strategy.barrier()
    return student


def trainer_for(config: Namespace, **ours) -> L.Trainer:
    """A Trainer of the configuration's `trainer.*` and what this package decides itself."""
    plugins: list = [AsideCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # it loses steps; the batch script requeues
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    if config.trainer.strategy == "fsdp":
        defaults["strategy"] = FullyShardedStrategy()
    try:
        return L.Trainer(
            **(config.trainer.as_dict() | {"precision": precision(config)} | defaults | ours),
            plugins=plugins,
            default_root_dir=config.out,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,  # in which the slices of FSDP cannot be moved
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())[:300]}") from error


def precision(config: Namespace) -> str:
    """`trainer.precision`, by default bf16-mixed on a GPU that has bf16 (weights and Adam stay fp32), else fp32."""
    if config.trainer.precision is not None:
        return str(config.trainer.precision)
    return "bf16-mixed" if device(config).type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def device(config: Namespace) -> torch.device:
    """The kind of device that `trainer.accelerator` stands for here."""
    gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def describe(config: Namespace, teacher: Teacher, student: Student, legs: list[Leg]) -> None:
    """Say what is about to happen."""
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
        + ", then ".join(f"{leg.name} {short(leg.steps * batch)} tokens" for leg in legs)
        + f"\nout      {config.out}"
    )


@rank_zero_only
def export(config: Namespace, legs: list[Leg], student: Student, teacher: Teacher) -> None:
    """The Hugging Face folder, written aside and renamed. A student that is all softmax becomes its teacher's own class."""
    folder = Path(config.out) / "student"
    if folder.is_dir():  # another run did the whole of it while this one packed text
        return
    aside = folder.with_name("student.new")
    shutil.rmtree(aside, ignore_errors=True)
    student.config.backend = "auto"  # of this machine; the next one chooses for itself
    model = as_transformer(student)
    model.generation_config = teacher.model.generation_config  # what ends a text, and how its maker would sample
    model.save_pretrained(aside)
    teacher.tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(str(model_card(config, legs, model)))
    aside.rename(folder)
