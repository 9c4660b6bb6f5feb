"""Stage 3, knowledge distillation end to end (paper, section 3, Eqs. 5 and 6)."""

import math
from typing import ClassVar, Literal

from torch import Tensor, nn

from distill_pl.errors import AT_LEAST_1, SHARE, InputError, Range, check_arguments
from distill_pl.losses import Divergence, Objective, kd_terms, next_token_loss
from distill_pl.stages.optim import linear
from distill_pl.stages.stage import DECAY, Stage
from distill_pl.tokens import Tokens


class KDStage(Stage):
    """Stage 3, knowledge distillation end to end (Eqs. 5 and 6).

    The loss is ce times the cross-entropy on the text plus alpha times the divergence of student and teacher.

    Args:
        tokens: training tokens of this stage; default: the run's `tokens` less those of the other stages; 0 skips it.
        ce: weight of the cross-entropy; with 0 the student learns from the teacher's distributions alone.
        alpha: weight of the divergence; 0 is plain training, without a teacher (Appendix B).
        temperature: softens both distributions in the divergence, which is multiplied by its square.
        divergence: `forward` is KL(teacher || student) of Eq. 6, `reverse` KL(student || teacher), `jensen_shannon` the mean of
            both distributions' KL to their mean.
        top_k: compute the divergence over the teacher's k likeliest tokens and one class of all others; default: all tokens.
        train: `all` parameters of the student, or its `mixers` alone.
        other_lr: learning rate outside the mixers, as a factor of lr.
        schedule: learning rate after warm-up: `linear` decay to final_lr (section 4.3), `cosine` decay to final_lr, or
            `stable_decay`: constant, then linear decay to final_lr over the share `decay` of the steps.
        decay: share of the steps, at the end, in which the learning rate falls; only with schedule stable_decay.
        final_lr: learning rate at the end, as a share of lr.
    """

    name = "kd"
    ranges: ClassVar[dict[str, Range]] = Stage.ranges | {
        "ce": Range(0, 1e6),
        "alpha": Range(0, 1e6),
        "temperature": Range(0.01, 100),  # beyond, rounding in fp32 is larger than the divergence, or it vanishes
        "top_k": AT_LEAST_1,
        "other_lr": Range(0, 1e6),
        "final_lr": SHARE,
    }
    as_teacher: ClassVar[tuple[str, ...]] = ("vocab_size",)
    compiles: ClassVar[tuple[str, ...]] = ("terms",)

    def __init__(
        self,
        student,
        teacher,
        *,
        tokens: Tokens | None = None,
        lr: float = 3e-4,
        ce: float = 1.0,
        alpha: float = 1.0,
        temperature: float = 1.0,
        divergence: Divergence = "forward",
        top_k: int | None = None,
        train: Literal["all", "mixers"] = "all",
        other_lr: float = 1.0,
        schedule: Literal["linear", "cosine", "stable_decay"] = "linear",
        decay: float = DECAY,
        final_lr: float = 0.0,
        **kwargs,
    ):
        check_arguments("kd", KDStage.__init__, locals(), self.ranges)
        super().__init__(student, teacher, tokens=tokens, lr=lr, decay=decay, **kwargs)
        self.objective = Objective(ce, alpha, temperature, divergence, top_k)
        if not ce and not alpha:
            raise InputError("kd.ce 0 and kd.alpha 0 leave nothing to learn: raise either")
        if not alpha and self.objective != Objective(ce, alpha):
            raise InputError("kd.alpha 0 follows no teacher: leave out kd.temperature, kd.divergence and kd.top_k, or raise it")
        if train == "mixers" and other_lr != 1:
            raise InputError(f"kd.other_lr {other_lr} has no effect with kd.train mixers: leave it out")
        if decay != DECAY and schedule != "stable_decay":
            raise InputError(f"kd.decay {decay} applies only to kd.schedule stable_decay, not to {schedule}: leave it out")
        self.train_only, self.other_lr = train, other_lr
        self.schedule, self.final_lr = schedule, final_lr
        self.terms = kd_terms
        if not alpha:
            del self.metrics["teacher_ce"]

    def compiled_modules(self) -> list[nn.Module]:
        """Return the student's layers and its final norm."""
        return [*self.student.model.layers, self.student.model.norm]

    def trained(self) -> list[nn.Parameter]:
        """Return all parameters of the student, or those of its mixers."""
        return list(self.student.parameters()) if self.train_only == "all" else self.mixer_parameters()

    @property
    def part_names(self) -> list[str]:
        """Name the terms of the loss; every kind of divergence is logged as train/kl."""
        return ["train/ce", "train/kl"] if self.objective.alpha else ["train/ce"]

    def share_of_lr(self, step: int, steps: int) -> float:
        """Return the learning rate at `step` of `steps` as a share of its maximum: warm-up, then the schedule."""
        if self.schedule == "stable_decay":
            share = super().share_of_lr(step, steps)
        else:
            share = linear(step, steps, self.warmup)
        if (step + 1) / steps <= self.warmup:
            return share
        if self.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.final_lr + (1 - self.final_lr) * share

    def losses_given(self, tokens: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss for a batch of tokens [B, T] -> a scalar, and its terms [CE, divergence] or [CE], detached."""
        return self.losses_of(tokens, *self.hidden_states(tokens))

    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run both models on tokens [B, T] -> final hidden states [B, T, D] of student and teacher; None if alpha is 0."""
        return self.student.hidden_states(tokens), self.teacher.hidden_states(tokens) if self.objective.alpha else None

    def losses_of(self, tokens: Tensor, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the loss and its terms from final hidden states [B, T, D]; teacher is None for plain training."""
        if teacher is None:
            loss, parts = next_token_loss(tokens, student, self.student.lm_head, objective=self.objective, terms=self.terms)
            return loss, parts[:1]
        return next_token_loss(tokens, student, self.student.lm_head, teacher, self.teacher.head, self.objective, self.terms)

    def validate(self, tokens: Tensor) -> dict[str, Tensor]:
        """Compute loss, student_ce and, with a teacher, teacher_ce of held-out tokens [B, T], running each model once."""
        student, teacher = self.hidden_states(tokens)
        loss, parts = self.losses_of(tokens, student, teacher)
        metrics = {"loss": loss, "student_ce": parts[0]}
        if teacher is not None:
            metrics["teacher_ce"] = next_token_loss(tokens, teacher, self.teacher.head)[0]
        return metrics
