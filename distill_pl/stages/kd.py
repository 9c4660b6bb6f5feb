"""Stage 3, knowledge distillation end to end (paper, section 3, Eqs. 5 and 6)."""

import torch
from torch import Tensor

from distill_pl.errors import InputError
from distill_pl.losses import next_token_loss
from distill_pl.stages.optim import linear
from distill_pl.stages.stage import Stage
from distill_pl.tokens import Tokens


class KDStage(Stage):
    """Stage 3, knowledge distillation, end to end (Eqs. 5 and 6).

    Cross-entropy on the text plus alpha times KL(teacher || student); everything
    trains.

    Args:
        tokens: budget of this stage; default: what the others leave of the run's `tokens`; 0 skips it.
        alpha: weight of the KL term; 0 is plain training, without a teacher (Appendix B).
        temperature: softens both distributions in the KL term.
    """

    name = "kd"

    def __init__(self, student, teacher, *, tokens: Tokens | None = None, lr: float = 3e-4, alpha: float = 1.0,
                 temperature: float = 1.0, **kwargs):  # fmt: skip
        super().__init__(student, teacher, tokens=tokens, lr=lr, **kwargs)
        for key, value, good in [("alpha", alpha, alpha >= 0), ("temperature", temperature, temperature > 0)]:
            if not good:
                raise InputError(f"kd.{key} {value} is out of range")
        self.alpha, self.temperature = alpha, temperature
        if not alpha:
            del self.metrics["teacher_ce"]

    def trained(self) -> list[torch.nn.Parameter]:
        """Everything."""
        return list(self.student.parameters())

    def on_fit_start(self) -> None:
        """On a GPU, compile the student's layers, of which one compilation serves all that are alike, and its last norm."""
        super().on_fit_start()
        if self.device.type == "cuda":
            for module in (*self.student.model.layers, self.student.model.norm):
                module.compile(dynamic=False)

    @property
    def part_names(self) -> list[str]:
        """The two terms of Eq. 5."""
        return ["train/ce", "train/kl"] if self.alpha else ["train/ce"]

    def share_of_lr(self, step: int, steps: int) -> float:
        """Warm-up, then linear (section 4.3)."""
        return linear(step, steps, self.warmup)

    def losses_given(self, tokens: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 5."""
        return self.losses_of(tokens, *self.hidden_states(tokens))

    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, T] -> [B, T, D] of the student and, if it counts, of the teacher."""
        return self.student.hidden_states(tokens), self.teacher.hidden_states(tokens) if self.alpha else None

    def losses_of(self, tokens: Tensor, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """`losses` from what the heads read."""
        head = self.student.lm_head
        if teacher is None:
            loss, parts = next_token_loss(tokens, student, head)
            return loss, parts[:1]
        return next_token_loss(tokens, student, head, teacher, self.teacher.head, self.alpha, self.temperature)

    def validate(self, tokens: Tensor) -> dict[str, Tensor]:
        """As every stage does, but that the loss has seen it all already."""
        student, teacher = self.hidden_states(tokens)
        loss, parts = self.losses_of(tokens, student, teacher)
        found = {"loss": loss, "student_ce": parts[0]}
        return found if teacher is None else found | {"teacher_ce": next_token_loss(tokens, teacher, self.teacher.head)[0]}
