"""Report a running stage: a console line now and then, and TensorBoard scalars with tokens on the x-axis."""

import math
import signal
import sys
import time
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from distill_pl.console import duration, perplexities, perplexity, say
from distill_pl.errors import InputError
from distill_pl.stages import Stage
from distill_pl.stages.async_copy import AsyncCopy
from distill_pl.tokens import short

SECONDS_BETWEEN_LINES = 10


def leave_on_sigterm(trainer: L.Trainer) -> None:
    """Make SIGTERM end the process at once, as Ctrl-C does, until the stage is over: files are whole at any moment.

    Lightning's own handler broadcasts, in the middle of whatever collective is under way: ranks that are all signalled at
    once, as by Slurm, crash or hang.
    """

    def leave(*_) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)  # the ranks that the launcher started
        sys.exit(1)

    signal.signal(signal.SIGTERM, leave)


def peak_gib(stage: Stage) -> float:
    """Return the most GPU memory, GiB, that this rank has had allocated so far."""
    return (torch.cuda.max_memory_allocated() + stage.graph_bytes) / 2**30


class Report(NamedTuple):
    """Hold what is to be reported of a finished step, while its numbers are still on their way from the GPU."""

    step: int
    ended: float  # time.monotonic() at its end
    to_tensorboard: bool
    to_console: bool
    lr: float
    numbers: AsyncCopy  # loss, parts, gradient norm


class Monitor(Callback):
    """Report a stage, and check at its first validation that the student is what the stage before left.

    Args:
        tokens_before: tokens that earlier stages consumed: where this stage begins on TensorBoard's x-axis.
        tokens_per_step: tokens of one optimizer step, over all ranks.
        expected_ce: cross-entropy in nats a token that the student must have on the held-out text at step 0: what the stage
            before ended with, or "teacher" for an exact copy of the teacher; None where nothing is known.
    """

    def __init__(self, tokens_before: int, tokens_per_step: int, expected_ce: float | str | None):
        self.tokens_before, self.tokens_per_step, self.expected_ce = tokens_before, tokens_per_step, expected_ce
        self.first_step = self.logged_step = 0
        self.began = self.logged_at = self.paused_at = 0.0
        self.printed_at = -math.inf
        self.pending: Report | None = None

    def on_train_start(self, trainer: L.Trainer, stage: Stage) -> None:
        """Start the clocks."""
        leave_on_sigterm(trainer)  # a resumed stage starts here, without the validation at step 0
        self.first_step = self.logged_step = trainer.global_step
        self.began = self.logged_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, stage: Stage, outputs, batch, batch_idx: int) -> None:
        """Report the step before, whose numbers have arrived by now, and note this one; wait only for the last step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # not the last micro-batch of a step
        self.report(trainer, stage)
        step, values, now = trainer.global_step, stage.values, time.monotonic()
        is_last = step == trainer.max_steps
        to_tensorboard = step % trainer.log_every_n_steps == 0 or is_last  # type: ignore[attr-defined]
        if to_tensorboard:
            values = trainer.strategy.reduce(values, reduce_op="mean")  # type: ignore[arg-type]
        to_console = now - self.printed_at >= SECONDS_BETWEEN_LINES or is_last
        if to_tensorboard or to_console:
            numbers = AsyncCopy(torch.cat([values, stage.grad_norm.to(values)[None]]))
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            self.pending = Report(step, now, to_tensorboard, to_console, lr, numbers)
        if is_last:
            self.report(trainer, stage)

    def report(self, trainer: L.Trainer, stage: Stage) -> None:
        """Write the pending report to TensorBoard (every `trainer.log_every_n_steps` steps) and to the console."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        step, now, steps = pending.step, pending.ended, trainer.max_steps
        *values, grad_norm = pending.numbers.get().tolist()
        if step == self.first_step + 1:  # the first step also compiles and allocates: its time says nothing about speed
            self.logged_step, self.logged_at = step, now
            self.began = now
        if pending.to_tensorboard:
            scalars = dict(zip(["train/loss", *stage.part_names], values, strict=True))
            scalars |= {"train/lr": pending.lr, "train/grad_norm": grad_norm}
            if step > self.logged_step:
                scalars["train/tokens_per_second"] = self.speed(step - self.logged_step, now - self.logged_at)
            if stage.device.type == "cuda":
                scalars["train/peak_gib"] = peak_gib(stage)
            self.logged_step, self.logged_at = step, now
            self.write(trainer, scalars, step)
        if pending.to_console:
            self.printed_at = now
            line = f"{stage.name}  step {step:,}/{steps:,} ({step / steps:.0%})  loss {values[0]:.4f}"
            if step > self.first_step + 1:
                speed = self.speed(step - self.first_step - 1, now - self.began)
                left = (steps - step) * self.tokens_per_step / speed
                memory = f"  {peak_gib(stage):.1f} GiB" if stage.device.type == "cuda" else ""
                line += f"  {short(speed)} tokens/s{memory}  {duration(left)} left"
            say(line)

    def on_save_checkpoint(self, trainer: L.Trainer, stage: Stage, checkpoint: dict) -> None:
        """Report the step that is saved: a run that resumes from here does not take this step again."""
        self.report(trainer, stage)

    def on_load_checkpoint(self, trainer: L.Trainer, stage: Stage, checkpoint: dict) -> None:
        """Restate Lightning's count of micro-batches: ranks or data.micro_batch_size may have changed since the save."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            for key in counts:
                counts[key] = checkpoint["global_step"] * trainer.accumulate_grad_batches

    def speed(self, steps: int, seconds: float) -> float:
        """Return tokens a second over all ranks."""
        return steps * self.tokens_per_step / max(seconds, 1e-9)

    def on_validation_start(self, trainer: L.Trainer, stage: Stage) -> None:
        """Stop the clocks, since tokens/s is of training, and report the step before."""
        leave_on_sigterm(trainer)  # of a stage's hooks the first that runs after Lightning has installed its signal handlers
        self.report(trainer, stage)
        self.paused_at = time.monotonic()

    def write(self, trainer: L.Trainer, scalars: dict[str, float], step: int) -> None:
        """Write scalars to all loggers at the number of tokens consumed since the run began."""
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=self.tokens_before + step * self.tokens_per_step)

    def on_validation_end(self, trainer: L.Trainer, stage: Stage) -> None:
        """Report held-out loss and perplexities; at step 0, check them against what is expected."""
        paused = time.monotonic() - self.paused_at
        self.began, self.logged_at = self.began + paused, self.logged_at + paused
        losses = stage.validation
        models = [key.removesuffix("_ce") for key in losses if key.endswith("_ce")]
        scalars = {f"validation/{model}_perplexity": perplexity(losses[f"{model}_ce"]) for model in models}
        self.write(trainer, {"validation/loss": losses["loss"]} | scalars, trainer.global_step)
        say(
            f"{stage.name}  step {trainer.global_step:,}/{trainer.max_steps:,} held-out: loss {losses['loss']:.4f}  "
            f"{perplexities(losses)}"
        )
        if trainer.sanity_checking:
            self.check_start(stage)

    def check_start(self, stage: Stage) -> None:
        """Raise InputError unless the student's held-out cross-entropy at step 0 is the expected one, within 1%."""
        student_ce = stage.validation["student_ce"]
        if not math.isfinite(student_ce):
            raise InputError(
                f"{stage.name}: the student's held-out loss is {student_ce} before the first step: check the weights of the "
                "teacher and of student.start_from"
            )
        expected = stage.validation.get("teacher_ce") if self.expected_ce == "teacher" else self.expected_ce
        if expected is None:
            return
        expected = float(expected)
        if abs(student_ce - expected) > 0.01 * max(1.0, expected):
            raise InputError(
                f"{stage.name}: the student starts at {student_ce:.4f} nats a token, expected {expected:.4f}: the weights it "
                "should start from were not loaded: delete this run's stage folders from here on and run again"
            )
