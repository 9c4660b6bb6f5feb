"""Launch the losses of a training step and their gradient as two CUDA graphs instead of kernel by kernel.

    stage.draw -> [graph 1: both models, losses] -> [graph 2: backward] -> DDP averages gradients -> clipping, AdamW
"""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from distill_pl.stages import Stage


class StepGraphs(Callback):
    """Capture a stage's losses and their gradient at its first training step, and replay them from then on.

    If a step cannot be captured, because memory is short or the step waits for the GPU, the stage runs without graphs.
    """

    def __init__(self) -> None:
        self.losses: Callable | None = None
        self.is_captured = False

    def on_train_start(self, trainer: L.Trainer, stage: Stage) -> None:
        """Make the stage compute its losses by graphs, which its first step captures."""

        def losses(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            if self.losses is None:  # not earlier: capturing needs a batch, autocast and DDP as in a step
                self.losses = self.capture(stage, inputs)
            return self.losses(*inputs)

        stage.captured_losses = losses

    def capture(self, stage: Stage, inputs: tuple[Tensor, ...]) -> Callable:
        """Return the stage's losses as CUDA graphs for inputs of these shapes, or `stage.losses_given` if capturing fails."""
        try:
            captured, stage.graph_bytes = capture_losses(stage.losses_given, stage.student, inputs)
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            stage.print(f"{stage.name}: no CUDA graph of a step can be captured, so kernels are launched one by one ({reason})")
            return stage.losses_given
        self.is_captured = True
        return captured

    def on_train_batch_start(self, trainer: L.Trainer, stage: Stage, batch: Tensor, batch_idx: int) -> None:
        """Note whether this is the first micro-batch of a step."""
        self.is_first = batch_idx % trainer.accumulate_grad_batches == 0

    def on_after_backward(self, trainer: L.Trainer, stage: Stage) -> None:
        """Copy the first micro-batch's gradients out of the graph's buffers, which the next micro-batch overwrites."""
        if self.is_captured and trainer.accumulate_grad_batches > 1 and self.is_first:
            for parameter in stage.student.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    def on_train_end(self, trainer: L.Trainer, stage: Stage) -> None:
        """Free the graphs' memory, which the next stage needs."""
        self.losses = stage.captured_losses = None
        stage.graph_bytes, self.is_captured = 0, False


def capture_losses(losses: Callable[..., tuple[Tensor, Tensor]], student: nn.Module,
                   inputs: tuple[Tensor, ...]) -> tuple[Any, int]:  # fmt: skip
    """Capture `losses` of inputs and a student's parameters -> the same function as CUDA graphs, the GPU bytes of their pool.

    The graphs take inputs of the given shapes. Each call overwrites the results of the call before, and each backward pass the
    gradients of the one before: copy what is still needed.
    """
    pool = torch.cuda.graph_pool_handle()
    samples = tuple(x.clone() for x in inputs)  # become the graphs' input buffers: each call copies its inputs into them
    graphs = torch.cuda.make_graphed_callables(  # a warm-up run compiles and tunes, which cannot be captured
        _Losses(losses, student), samples, num_warmup_iters=1, allow_unused_input=True, pool=pool
    )
    # forget the warm-up's peak: from now on temporary tensors lie in the pool, whose bytes `peak_gib` adds
    torch.cuda.reset_peak_memory_stats()
    return graphs, pool_bytes(pool)


class _Losses(nn.Module):
    """Wrap a function of a student as a module with the student's parameters, which make_graphed_callables requires."""

    def __init__(self, losses: Callable, student: nn.Module):
        super().__init__()
        self.losses, self.student = losses, student

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.losses(*inputs)


def pool_bytes(pool: tuple[int, int]) -> int:
    """Return the GPU bytes that a graph's memory pool holds beyond what the allocator counts as allocated."""
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(pool)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)
