"""Stop a run whose loss or gradient is not finite, and say in which layer it stopped being finite."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_pl.errors import Diverged
from distill_pl.stages.async_copy import AsyncCopy


class Step(NamedTuple):
    """Hold a training step until it is known whether its loss and gradient were finite."""

    number: int  # counted from 1
    batch: Tensor  # tokens [B, T] of its last micro-batch
    values: Tensor  # the loss, then its parts
    finite: AsyncCopy  # of a bool: whether loss and gradient were finite


class FiniteCheck:
    """Check every step of a stage, one step late: at once, the CPU would wait for the GPU (6% of a step)."""

    def __init__(self) -> None:
        self.pending: Step | None = None

    def record(self, step: Step) -> None:
        """Store a step, which the next `verify` checks."""
        self.pending = step

    def verify(self, stage: Any) -> None:
        """Raise Diverged, naming step and layer, if the loss or gradient of the recorded step of `stage` was not finite."""
        step, self.pending = self.pending, None
        if step is not None and not step.finite.get():
            raise Diverged(
                f"{stage.name}: not finite at step {step.number}, {_first_not_finite(stage, step)}; the last checkpoint is "
                f"intact. Try a smaller {stage.name}.lr (now {stage.lr:g}), or look at this step's text"
            )


@torch.no_grad()
def _first_not_finite(stage: Any, step: Step) -> str:
    """Run a step's last micro-batch again and name what is not finite first: a layer, a part of the loss, or a gradient."""
    inputs: list[Tensor] = []
    last = stage.student.hidden_states(step.batch, record=inputs)  # also gathers what FSDP has sharded
    for index, hidden in enumerate([*inputs[1:], last]):
        if not torch.isfinite(hidden).all():
            return f"in the output of layer {index}"
    for name, value in zip(stage.part_names, step.values[1:].tolist(), strict=True):
        if not math.isfinite(value):
            return f"in {name}"
    trained = {name: p for name, p in stage.student.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        loss, _ = stage.losses(step.batch, seed=step.number - 1)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    bad = [name for name, g in zip(trained, gradients, strict=True) if g is not None and not g.isfinite().all()]
    return f"in the gradient of {bad[-1]}" if bad else "in a gradient"  # the last one: gradients flow backward
