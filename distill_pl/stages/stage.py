"""What the three stages share: a student, a frozen teacher, one loss made of named parts, an optimiser and a schedule."""

import math
from abc import abstractmethod
from typing import ClassVar, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from distill_pl.compiling.layers import Captured, plainly
from distill_pl.errors import Diverged, InputError
from distill_pl.losses import next_token_loss
from distill_pl.stages.optim import adamw
from distill_pl.stages.sharding import shard
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher
from distill_pl.tokens import Tokens


class Later:
    """A tensor on its way to the CPU, which goes on meanwhile: a step waits for nothing."""

    def __init__(self, x: Tensor):
        self.copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
        self.arrived = torch.cuda.Event() if x.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def get(self) -> Tensor:
        """It, waited for."""
        if self.arrived:
            self.arrived.synchronize()
        return self.copy


class Unchecked(NamedTuple):
    """A step of which it is not known yet whether its loss and gradient were finite."""

    step: int
    batch: Tensor
    values: Tensor
    finite: Later


class Stage(L.LightningModule):
    """One objective. A subclass says which `parts` its loss has, computes them, and leaves trainable what it trains.

    After a training step `values` (of this rank's share of the batch: the loss, then its parts), `grad_norm` and the learning
    rate are there to be logged;
    after a validation run `validation` is: `loss`, and the cross-entropy of teacher and student in nats a token.

    Args:
        tokens: budget of this stage; 0 skips it.
        lr: maximum learning rate.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the whole gradient.
    """

    name: ClassVar[str]

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        *,
        tokens: Tokens | None = Tokens(0),  # noqa: B008 (an int)
        lr: float,
        warmup: float = 0.1,
        weight_decay: float = 0.0,
        clip: float = 1.0,
    ):
        super().__init__()
        for key, value, good in [("lr", lr, lr > 0), ("warmup", warmup, 0 <= warmup <= 1), ("clip", clip, clip > 0)]:
            if not good:
                raise InputError(f"{self.name}.{key} {value} is out of range")
        self.student = student
        self.teacher = teacher  # no nn.Module: neither DDP nor a checkpoint sees it
        self.lr, self.warmup, self.weight_decay, self.clip = lr, warmup, weight_decay, clip
        self.values: Tensor = torch.zeros(1)
        self.grad_norm: Tensor = torch.zeros(())
        self.validation: dict[str, float] = {}
        self.validated_at = -1  # step
        self.unchecked: Unchecked | None = None
        self.captures = False  # whether a step is to be a CUDA graph
        self.captured: Captured | None = None
        self.metrics = torch.nn.ModuleDict({key: MeanMetric() for key in ("loss", "teacher_ce", "student_ce")})

    @property
    @abstractmethod
    def part_names(self) -> list[str]:
        """What each part is called in the logs, e.g. align/layer_07."""

    @abstractmethod
    def losses_given(self, tokens: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T] and what was drawn -> the loss to minimise (scalar), its parts (one value per name, detached)."""

    def draw(self, tokens: Tensor, seed: int) -> tuple[Tensor, ...]:
        """What is random in the losses, from `seed` alone, so that a resumed run takes the same steps."""
        return ()

    def losses(self, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """`losses_given` with what is drawn."""
        return self.losses_given(tokens, *self.draw(tokens, seed))

    @abstractmethod
    def share_of_lr(self, step: int, steps: int) -> float:
        """The schedule: learning rate at `step` of `steps`, as a share of its maximum."""

    def layer_names(self) -> list[str]:
        """Part names of a loss with one part a layer."""
        return [f"align/layer_{index:02d}" for index in range(len(self.student.mixers))]

    @abstractmethod
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters of the student that this stage trains; all others are frozen."""

    def configure_model(self) -> None:
        """Freeze and unfreeze: before DDP wraps the module, which fixes what it reduces. Under FSDP, cut the models up."""
        if isinstance(self.student, FSDPModule):
            return  # by an earlier call
        trained = self.trained()
        self.student.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        if self.device_mesh is not None:
            shard(self.student, self.teacher.model, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """The teacher follows the student."""
        self.teacher.to(self.device)

    def on_validation_start(self) -> None:
        """Likewise; nothing is told of a student that is not known to be sound."""
        self.teacher.to(self.device)
        self.check_finite()

    def on_train_end(self) -> None:
        """Nor is such a one saved. What a graph held is free for the next stage."""
        self.check_finite()
        self.captured = None
        self.student.zero_grad()

    @property
    def pool_bytes(self) -> int:
        """GPU memory that a step takes beyond what counts as allocated."""
        return self.captured.pool_bytes if self.captured else 0

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Likewise."""
        self.check_finite()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One micro-batch of tokens [B, T]."""
        self.batch = batch
        count = self.trainer.accumulate_grad_batches
        inputs = (batch, *self.draw(batch, seed=self.global_step))
        if self.captures and self.captured is None:
            self.capture(inputs)
        loss, parts = (self.captured or self.losses_given)(*inputs)
        values = torch.cat([loss.detach()[None], parts]) / count
        self.is_first = batch_idx % count == 0  # of a step's micro-batches
        self.values = values if self.is_first else self.values + values
        return loss

    def capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Make the step a CUDA graph, if there is the memory, and a teacher that does not ask the CPU."""
        try:
            self.captured = Captured(self.losses_given, self.student, inputs)
        except RuntimeError as error:
            self.captures = False
            why = str(error).split("\n")[0]
            self.print(f"{self.name}: no CUDA graph of a step can be had, its kernels are launched one by one ({why})")

    def on_after_backward(self) -> None:
        """Of several micro-batches, take the first one's gradients away from where the graph writes the next one's."""
        if self.captured and self.trainer.accumulate_grad_batches > 1 and self.is_first:
            for parameter in self.student.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Held-out tokens [B, T]."""
        with plainly(self.device):  # the first losses come before anything is compiled: they are to be had at once
            for key, value in self.validate(batch).items():
                self.metrics[key].update(value, len(batch))

    def validate(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of held-out tokens [B, T], by metric: the stage's own loss, next-token cross-entropy of teacher and student."""
        loss, _ = self.losses(tokens, seed=0)  # however the held-out text is cut into batches
        return {
            "loss": loss,
            "teacher_ce": next_token_loss(tokens, self.teacher.hidden_states(tokens), self.teacher.head)[0],
            "student_ce": next_token_loss(tokens, self.student.hidden_states(tokens), self.student.lm_head)[0],
        }

    def on_validation_epoch_end(self) -> None:
        """Gather the means over all ranks."""
        self.validated_at = self.global_step
        self.validation = {key: metric.compute().item() for key, metric in self.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()

    def configure_optimizers(self):
        """AdamW, and the schedule over the stage's steps."""
        optimizer = adamw(self.student.parameters(), self.lr, self.weight_decay)
        steps = self.trainer.max_steps
        schedule = LambdaLR(optimizer, lambda step: self.share_of_lr(min(step, steps - 1), steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Optimizer, *args, **kwargs) -> None:
        """Clip to `clip`; take no step, and stop, if loss or gradient is not finite."""
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.check_finite()
        finite = torch.isfinite(self.grad_norm + self.values.sum())
        self.unchecked = Unchecked(self.global_step + 1, self.batch, self.values, Later(finite))
        if optimizer.defaults["fused"] and not isinstance(norm, DTensor):
            # it divides gradients by the one, takes no step if the other, and the CPU goes on without waiting for the GPU
            vars(optimizer).update(grad_scale=(norm.float() / self.clip).clamp(min=1), found_inf=(~finite).float())
        else:
            self.check_finite()
            clip_grads_with_norm_(parameters, self.clip, norm)

    def check_finite(self) -> None:
        """Raise Diverged if loss or gradient of the last step, which is checked once, were not finite."""
        last, self.unchecked = self.unchecked, None
        if last is not None and not last.finite.get():
            raise Diverged(
                f"{self.name}: not finite at step {last.step}, {self.culprit(last)}; the last checkpoint is intact. "
                f"Try a smaller {self.name}.lr (now {self.lr:g}), or look at this step's text"
            )

    @torch.no_grad()
    def culprit(self, last: Unchecked) -> str:
        """Where a loss or gradient first stopped being finite."""
        hidden = self.student.model.embed_tokens(last.batch)
        position = self.student.position(hidden)
        for index, layer in enumerate(self.student.model.layers):
            hidden = layer(hidden, position_embeddings=position)
            if not torch.isfinite(hidden).all():
                return f"in the output of layer {index}"
        for name, value in zip(self.part_names, last.values[1:].tolist(), strict=True):
            if not math.isfinite(value):
                return f"in {name}"
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            loss, _ = self.losses(last.batch, seed=last.step - 1)
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        bad = [name for name, g in zip(trained, gradients, strict=True) if g is not None and not g.isfinite().all()]
        return f"in the gradient of {bad[-1]}" if bad else "in a gradient"  # the last: a gradient comes from above
