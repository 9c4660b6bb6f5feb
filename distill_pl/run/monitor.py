"""What a person sees of a running stage: a console line now and then, and TensorBoard with tokens on its x-axis."""

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
from distill_pl.stages.stage import Later
from distill_pl.tokens import short

SECONDS_BETWEEN_LINES = 10


def leave_on_sigterm(trainer: L.Trainer) -> None:
    """Until the stage is over, leave on SIGTERM as on Ctrl-C: what is on disk is whole at any moment.

    Lightning's own handler broadcasts, which breaks into the collective that is under way: ranks that are all signalled at
    once, as by Slurm, crash or hang.
    """

    def leave(*_) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)  # the ranks that it started
        sys.exit(1)

    signal.signal(signal.SIGTERM, leave)


class Unreported(NamedTuple):
    """What is to be said of a step: when it ended, whether in TensorBoard and on the console, its losses and gradient norm."""

    step: int
    ended: float
    logged: bool
    said: bool
    lr: float
    numbers: Later


class Monitor(Callback):
    """Reports a stage, and checks at its first validation that it starts from where the one before it ended.

    Args:
        tokens_before: tokens that earlier stages consumed: where this stage begins on TensorBoard's x-axis.
        tokens_per_step: of one optimiser step, over all ranks.
        expected_ce: cross-entropy in nats a token that the student must have on the held-out text at step 0: what the last
            stage ended with, "teacher" for an exact copy of it; None where nothing is known.
    """

    def __init__(self, tokens_before: int, tokens_per_step: int, expected_ce: float | str | None):
        self.tokens_before, self.tokens_per_step, self.expected_ce = tokens_before, tokens_per_step, expected_ce
        self.first_step = self.logged_step = 0
        self.began = self.logged_at = self.paused_at = 0.0
        self.spoke_at = -math.inf
        self.unreported: Unreported | None = None

    def on_train_start(self, trainer: L.Trainer, stage: Stage) -> None:
        """Start the clocks."""
        leave_on_sigterm(trainer)  # a resumed stage starts here, without the validation at step 0
        self.first_step = self.logged_step = trainer.global_step
        self.began = self.logged_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, stage: Stage, outputs, batch, batch_idx: int) -> None:
        """Report the step before, the numbers of which are there by now; of the last step, wait for them."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a part of a step
        self.report(trainer, stage)
        step, values, now = trainer.global_step, stage.values, time.monotonic()
        last = step == trainer.max_steps
        logged = step % trainer.log_every_n_steps == 0 or last  # type: ignore[attr-defined]
        if logged:
            values = trainer.strategy.reduce(values, reduce_op="mean")  # type: ignore[arg-type]
        said = now - self.spoke_at >= SECONDS_BETWEEN_LINES or last  # of the first step in any case
        if logged or said:
            lr, numbers = trainer.optimizers[0].param_groups[0]["lr"], torch.cat([values, stage.grad_norm.to(values)[None]])
            self.unreported = Unreported(step, now, logged, said, lr, Later(numbers))
        if last:
            self.report(trainer, stage)

    def report(self, trainer: L.Trainer, stage: Stage) -> None:
        """Write to TensorBoard every `trainer.log_every_n_steps` steps, to the console every few seconds."""
        unreported, self.unreported = self.unreported, None
        if unreported is None:
            return
        step, now, logged, said, lr, numbers = unreported
        *values, grad_norm = numbers.get().tolist()
        steps = trainer.max_steps
        if step == self.first_step + 1:  # the first step also compiles and allocates: it says nothing about speed
            self.logged_step, self.logged_at = step, now
            self.began = now
        if logged:
            scalars = dict(zip(["train/loss", *stage.part_names], values, strict=True))
            scalars |= {"train/lr": lr, "train/grad_norm": grad_norm}
            if step > self.logged_step:
                scalars["train/tokens_per_second"] = self.speed(step - self.logged_step, now - self.logged_at)
            if stage.device.type == "cuda":
                scalars["train/peak_gib"] = (torch.cuda.max_memory_allocated() + stage.pool_bytes) / 2**30
            self.logged_step, self.logged_at = step, now
            self.write(trainer, scalars, step)
        if said:
            self.spoke_at = now
            line = f"{stage.name}  step {step:,}/{steps:,} ({step / steps:.0%})  loss {values[0]:.4f}"
            if step > self.first_step + 1:
                speed = self.speed(step - self.first_step - 1, now - self.began)
                left = (steps - step) * self.tokens_per_step / speed
                line += f"  {short(speed)} tokens/s  {duration(left)} left"
            say(line)

    def on_save_checkpoint(self, trainer: L.Trainer, stage: Stage, checkpoint: dict) -> None:
        """A run that goes on from here does not report this step again."""
        self.report(trainer, stage)

    def on_load_checkpoint(self, trainer: L.Trainer, stage: Stage, checkpoint: dict) -> None:
        """Let Lightning count micro-batches as they are now: ranks or data.micro_batch_size may have changed since."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            for key in counts:
                counts[key] = checkpoint["global_step"] * trainer.accumulate_grad_batches

    def speed(self, steps: int, seconds: float) -> float:
        """Tokens a second over all ranks."""
        return steps * self.tokens_per_step / max(seconds, 1e-9)

    def on_validation_start(self, trainer: L.Trainer, stage: Stage) -> None:
        """Stop the clocks: tokens/s is of training. A stage's first hook once Lightning has installed its signal handlers."""
        leave_on_sigterm(trainer)
        self.report(trainer, stage)
        self.paused_at = time.monotonic()

    def write(self, trainer: L.Trainer, scalars: dict[str, float], step: int) -> None:
        """At the number of tokens consumed since the run began."""
        trainer.logger.log_metrics(scalars, step=self.tokens_before + step * self.tokens_per_step)

    def on_validation_end(self, trainer: L.Trainer, stage: Stage) -> None:
        """Report held-out loss and perplexities; at step 0, compare with what was expected."""
        paused = time.monotonic() - self.paused_at
        self.began, self.logged_at = self.began + paused, self.logged_at + paused
        found = stage.validation
        models = [key.removesuffix("_ce") for key in found if key.endswith("_ce")]
        scalars = {f"validation/{model}_perplexity": perplexity(found[f"{model}_ce"]) for model in models}
        self.write(trainer, {"validation/loss": found["loss"]} | scalars, trainer.global_step)
        say(
            f"{stage.name}  step {trainer.global_step:,}/{trainer.max_steps:,} held-out: loss {found['loss']:.4f}  "
            f"{perplexities(found)}"
        )
        if trainer.sanity_checking:
            self.check_start(stage)

    def check_start(self, stage: Stage) -> None:
        """Raise InputError unless the student starts as the stage before left it."""
        found = stage.validation["student_ce"]
        if not math.isfinite(found):
            raise InputError(f"{stage.name}: the student's held-out loss is {found} before the first step")
        expected = stage.validation.get("teacher_ce") if self.expected_ce == "teacher" else self.expected_ce
        if expected is None:
            return
        expected = float(expected)
        if abs(found - expected) > 0.01 * max(1.0, expected):
            raise InputError(
                f"{stage.name}: the student starts at {found:.4f} nats a token, expected {expected:.4f}: the weights it "
                "should start from did not arrive; delete this run's stage folders from here on and run again"
            )
