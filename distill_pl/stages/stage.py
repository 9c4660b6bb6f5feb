"""The base class of the three stages: train a student with a frozen teacher on a loss that consists of named parts."""

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from distill_pl.errors import POSITIVE, SHARE, InputError, Range, check_arguments
from distill_pl.losses import next_token_loss
from distill_pl.mixers import SequenceMixer
from distill_pl.stages.async_copy import AsyncCopy
from distill_pl.stages.finite import FiniteCheck, Step
from distill_pl.stages.optim import adamw, clip_inside_step, warmup_stable_decay
from distill_pl.stages.sharding import eagerly, shard
from distill_pl.student.modeling import Student
from distill_pl.teacher import Teacher
from distill_pl.tokens import Tokens

DECAY = 0.1  # default of `decay`


class Stage(L.LightningModule):
    """Train a student on one objective against a frozen teacher.

    A subclass computes the parts of its loss in `losses_given`, and overrides `part_names`, `trained` and `share_of_lr` where
    their defaults, those of hidden alignment, do not apply. After a training step, `values` holds the loss and then its parts,
    averaged over this rank's share of the batch, and `grad_norm` the gradient's norm, for logging. After validation,
    `validation` holds the held-out `loss` and the cross-entropies `student_ce` and, unless kd.alpha is 0, `teacher_ce`, in nats
    per token.

    Args:
        student: the student, whose weights are trained in place.
        teacher: the frozen teacher, of which the student was made.
        tokens: training tokens of this stage in `distill-pl fit`; 0 skips it.
        lr: maximum learning rate.
        warmup: share of the steps in which the learning rate rises.
        decay: share of the steps, at the end, in which the learning rate falls.
        weight_decay: AdamW's weight decay, of parameters of two or more dimensions only.
        clip: maximum norm of the whole gradient.

    Raises:
        InputError: a value that is unknown or out of range, or a student that is not of this teacher.
    """

    name: ClassVar[str]
    ranges: ClassVar[dict[str, Range]] = {  # of the arguments that are numbers
        "lr": POSITIVE, "warmup": SHARE, "decay": SHARE, "weight_decay": Range(0, 1e6), "clip": Range(0, above=True),
    }  # fmt: skip
    # keys of a configuration in which student and teacher must agree
    as_teacher: ClassVar[tuple[str, ...]] = ("vocab_size", "num_hidden_layers", "hidden_size")
    compiles: ClassVar[tuple[str, ...]] = ()  # names of attributes, functions that distill_pl.compiling may compile
    compiles_with_layer: ClassVar[tuple[str, ...]] = ()  # names of further functions, which call one layer

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        *,
        tokens: Tokens | None = Tokens(0),  # noqa: B008 (an int)
        lr: float,
        warmup: float = 0.1,
        decay: float = DECAY,
        weight_decay: float = 0.0,
        clip: float = 1.0,
    ):
        super().__init__()
        check_arguments(self.name, Stage.__init__, locals(), self.ranges)
        for key, model, kind in [("student", student, Student), ("teacher", teacher, Teacher)]:
            if not isinstance(model, kind | None):  # None where only the other arguments are to be checked
                raise InputError(f"{self.name}: {key} is a {type(model).__name__}: give a {kind.__name__} of this package")
        for key in self.as_teacher if student and teacher else ():
            own, theirs = getattr(student.config, key), getattr(teacher.config, key)
            if own != theirs:
                raise InputError(f"{self.name}: {key} is {own} in the student, {theirs} in the teacher: give its own teacher")
        self.longest = teacher.longest if teacher else sys.maxsize
        self.student = student
        if student and self.name != "kd" and not self.aligned():
            raise InputError(f"{self.name}: all layers keep the teacher's attention, which is not aligned: set its tokens to 0")
        self.other_lr = 1.0  # learning rate outside the mixers, as a factor of lr
        self.teacher = teacher  # not an nn.Module, so that neither DDP nor checkpoints include it
        self.lr, self.warmup, self.decay, self.weight_decay, self.clip = lr, warmup, decay, weight_decay, clip
        self.values: Tensor = torch.zeros(1)
        self.grad_norm: Tensor = torch.zeros(())
        self.validation: dict[str, float] = {}
        self.validated_at = -1  # step of the last validation
        self.finite = FiniteCheck()
        self.captured_losses: Callable | None = None  # `losses_given` as CUDA graphs, if distill_pl.compiling made them
        self.graph_bytes = 0  # GPU memory that these graphs hold beyond what counts as allocated
        self.metrics = nn.ModuleDict({key: MeanMetric() for key in ("loss", "teacher_ce", "student_ce")})

    @property
    def part_names(self) -> list[str]:
        """Name each part of the loss as the logs do; by default one part for each layer: align/layer_00, ..."""
        return [f"align/layer_{index:02d}" for index in range(len(self.student.mixers))]

    @abstractmethod
    def losses_given(self, tokens: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss to minimise (scalar) and its parts (one value per name, detached) for tokens [B, T].

        drawn: the random tensors that `draw` returned for these tokens.
        """

    def draw(self, tokens: Tensor, seed: int) -> tuple[Tensor, ...]:
        """Draw the random tensors of the losses of tokens [B, T] from `seed` alone: a resumed run takes the same steps.

        Not part of `losses_given`, because a CUDA graph of it replays kernels without Python: these tensors are its inputs.
        """
        return ()

    def losses(self, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Compute the loss (scalar) and its parts (detached) for tokens [B, T], with random tensors drawn from `seed`.

        Raises InputError for a batch that the models cannot read, see `check_batch`.
        """
        self.check_batch(tokens)
        return self.losses_given(tokens, *self.draw(tokens, seed))

    def check_batch(self, batch: Any) -> None:
        """Raise InputError unless `batch` is a tensor of token ids [B, T] that both models can read.

        Ids are compared with the vocabulary while they are on the CPU; those on a GPU would have to be waited for.
        """
        if not isinstance(batch, Tensor) or batch.dtype not in (torch.int64, torch.int32) or batch.ndim != 2:
            found = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise InputError(f"{self.name}: a batch is {found}: let the loader yield token ids [B, T], a tensor of int64")
        length = batch.shape[1]
        if not batch.numel() or length < 2:
            raise InputError(f"{self.name}: a batch is of shape {list(batch.shape)}: give rows of at least 2 tokens")
        if length > self.longest:
            raise InputError(f"{self.name}: a batch has rows of {length} tokens, the teacher reads {self.longest}: cut them")
        if batch.device.type == "cpu":
            (least, most), size = (int(x) for x in batch.aminmax()), self.student.config.vocab_size
            if least < 0 or most >= size:
                raise InputError(
                    f"{self.name}: a batch has token ids from {least} to {most}, the vocabulary those from 0 to {size - 1}: "
                    "take the teacher's tokenizer, without padding"
                )

    def share_of_lr(self, step: int, steps: int) -> float:
        """Return the learning rate at `step` of `steps` as a share of its maximum: warm-up, stable, decay (section 4.3)."""
        return warmup_stable_decay(step, steps, self.warmup, self.decay)

    def compiled_modules(self) -> list[nn.Module]:
        """Return the modules of the student whose forward passes distill_pl.compiling compiles as a whole."""
        return []

    def called(self) -> Sequence[nn.Module]:
        """Return the modules of the student that the losses call: its layers, or its mixers."""
        return self.student.model.layers

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters of the student that this stage trains, by default those of `aligned`; all others are frozen."""
        return [parameter for mixer in self.aligned() for parameter in mixer.parameters()]

    def aligned(self) -> list[SequenceMixer]:
        """Return the mixers to align: not those in `softmax_layers`, the teacher's attention, which KD alone trains."""
        return [mixer for index, mixer in enumerate(self.student.mixers) if index not in self.student.config.softmax_layers]

    def mixer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the student's mixers."""
        return [parameter for mixer in self.student.mixers for parameter in mixer.parameters()]

    def configure_model(self) -> None:
        """Set which parameters train, before DDP fixes which gradients it reduces; under FSDP, shard both models.

        Raises InputError where there is no teacher.
        """
        if self.teacher is None:
            raise InputError(f"{self.name}: teacher is None: give a Teacher, even with kd.alpha 0, which does not use it")
        if isinstance(self.student, FSDPModule):
            return  # Lightning calls this hook again for a validation after training
        trained = self.trained()
        self.student.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        if self.device_mesh is not None:
            shard(self.student, self.called(), self.teacher.model, self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """Raise InputError where training ends before the schedule of the learning rate, which is max_steps long."""
        longest, steps = self.trainer.max_steps, self.trainer.estimated_stepping_batches
        if steps < longest:
            raise InputError(
                f"{self.name}: max_steps {longest} is the length of the learning rate's schedule, but max_epochs "
                f"{self.trainer.max_epochs} ends after {steps:.0f} steps: give one of the two"
            )

    def on_fit_start(self) -> None:
        """Move the teacher to the student's device: Lightning moves only submodules.

        Raises InputError for settings of a Trainer that the stage would not follow. With gradient scaling, gradients would be
        clipped at their scaled size, and an overflow, which a scaler expects, would count as divergence; weights and Adam's
        state are fp32.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise InputError("precision 16-mixed scales gradients, which no stage expects: choose 32-true or bf16-mixed")
        if self.student.dtype != torch.float32:
            raise InputError(f"{self.name}: a student in {self.student.dtype} is not trained: choose 32-true or bf16-mixed")
        if (clip := self.trainer.gradient_clip_val) is not None:
            raise InputError(f"{self.name} clips gradients itself: give it clip={clip} instead of gradient_clip_val={clip}")
        self.teacher.to(self.device)

    def on_validation_start(self) -> None:
        """Move the teacher to the student's device. Raises Diverged if the last step was not finite."""
        self.teacher.to(self.device)
        self.finite.verify(self)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Raise Diverged, before anything is saved, if the last step was not finite."""
        self.finite.verify(self)

    def on_train_end(self) -> None:
        """Raise Diverged if the last step was not finite; free the gradients."""
        self.finite.verify(self)
        self.student.zero_grad()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Tensor:
        """Return a batch that Lightning is about to move to the student's device. Raises InputError as `check_batch` does."""
        self.check_batch(batch)
        return batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Compute the loss of one micro-batch of tokens [B, T]; average `values` over a step's micro-batches."""
        self.batch = batch
        loss, parts = (self.captured_losses or self.losses_given)(batch, *self.draw(batch, seed=self.global_step))
        values, before = torch.cat([loss.detach()[None], parts]), batch_idx % self.trainer.accumulate_grad_batches
        self.values = values if before == 0 else (before * self.values + values) / (before + 1)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the losses of held-out tokens [B, T] to the metrics.

        Nothing is compiled here: the check of the loss at step 0 must fail at once, not after a minute of compilation.
        """
        with eagerly(self.device.type):
            for key, value in self.validate(batch).items():
                self.metrics[key].update(value, batch[:, 1:].numel())

    def validate(self, tokens: Tensor) -> dict[str, Tensor]:
        """Compute the stage's loss and both models' next-token cross-entropies, in nats per token, of tokens [B, T]."""
        loss, _ = self.losses(tokens, seed=0)  # one seed for all batches: the result must not depend on the batch size
        return {
            "loss": loss,
            "teacher_ce": next_token_loss(tokens, self.teacher.hidden_states(tokens), self.teacher.head)[0],
            "student_ce": next_token_loss(tokens, self.student.hidden_states(tokens), self.student.lm_head)[0],
        }

    def on_validation_epoch_end(self) -> None:
        """Average the metrics over all ranks into `validation`."""
        self.validated_at = self.global_step
        self.validation = {key: metric.compute().item() for key, metric in self.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
        # for callbacks such as EarlyStopping and ModelCheckpoint; distill_pl.run.monitor writes the curves. The values are of
        # all ranks already: without sync_dist, Lightning warns that they might not be
        self.log_dict({f"validation/{key}": value for key, value in self.validation.items()}, logger=False, sync_dist=True)

    def configure_optimizers(self):
        """Build AdamW and the learning-rate schedule over `trainer.max_steps` or, without it, `trainer.max_epochs`.

        Raises InputError where neither says how long the schedule is.
        """
        mixers = {id(parameter) for parameter in self.mixer_parameters()}
        factor = lambda parameter: 1.0 if id(parameter) in mixers else self.other_lr  # noqa: E731
        optimizer = adamw(self.student.parameters(), self.lr, self.weight_decay, factor)
        steps = self.trainer.estimated_stepping_batches if self.trainer.max_steps == -1 else max(1, self.trainer.max_steps)
        if steps in (-1, math.inf):
            raise InputError(f"{self.name}: the learning rate needs a length of training: give the Trainer max_steps")
        schedule = LambdaLR(optimizer, lambda step: self.share_of_lr(min(step, steps - 1), steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Optimizer, *args, **kwargs) -> None:
        """Clip the gradient to a norm of `clip`.

        If loss or gradient is not finite, the step is skipped and Diverged raised: at once, or on a GPU at the next step.
        """
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = torch.isfinite(self.grad_norm + self.values.sum())
        self.finite.verify(self)  # the step before this one; then record this one, since only one is pending at a time
        self.finite.record(Step(self.global_step + 1, self.batch, self.values, AsyncCopy(finite)))
        if optimizer.defaults.get("fused"):
            clip_inside_step(optimizer, self.grad_norm, self.clip, finite)
        else:  # on a CPU nothing is late: this step can be verified before it changes the weights
            self.finite.verify(self)
            clip_grads_with_norm_(parameters, self.clip, norm)
