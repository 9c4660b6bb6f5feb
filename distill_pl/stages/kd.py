"""Stage 3, knowledge distillation end to end (paper, section 3, Eqs. 5 and 6)."""

from typing import ClassVar

from torch import Tensor, nn

from distill_pl.errors import InputError
from distill_pl.losses import kd_terms, next_token_loss
from distill_pl.stages.optim import linear
from distill_pl.stages.stage import Stage
from distill_pl.tokens import Tokens


class KDStage(Stage):
    """Stage 3, knowledge distillation end to end (Eqs. 5 and 6).

    Minimise cross-entropy on the text plus alpha times KL(teacher || student); all parameters train.

    Args:
        tokens: training tokens of this stage; default: the run's `tokens` less those of the other stages; 0 skips it.
        alpha: weight of the KL term; 0 is plain training, without a teacher (Appendix B).
        temperature: softens both distributions in the KL term, which is multiplied by its square.
    """

    name = "kd"
    compiles: ClassVar[tuple[str, ...]] = ("terms",)

    def __init__(self, student, teacher, *, tokens: Tokens | None = None, lr: float = 3e-4, alpha: float = 1.0,
                 temperature: float = 1.0, **kwargs):  # fmt: skip
        super().__init__(student, teacher, tokens=tokens, lr=lr, **kwargs)
        for key, value, good in [("alpha", alpha, alpha >= 0), ("temperature", temperature, temperature > 0)]:
            if not good:
                raise InputError(f"kd.{key} {value} is out of range")
        self.alpha, self.temperature = alpha, temperature
        self.terms = kd_terms
        if not alpha:
            del self.metrics["teacher_ce"]

    def compiled_modules(self) -> list[nn.Module]:
        """Return the student's layers and its final norm."""
        return [*self.student.model.layers, self.student.model.norm]

    def trained(self) -> list[nn.Parameter]:
        """Return all parameters of the student."""
        return list(self.student.parameters())

    @property
    def part_names(self) -> list[str]:
        """Name the two terms of Eq. 5."""
        return ["train/ce", "train/kl"] if self.alpha else ["train/ce"]

    def share_of_lr(self, step: int, steps: int) -> float:
        """Return the share of the learning rate: warm-up, then linear decay (section 4.3)."""
        return linear(step, steps, self.warmup)

    def losses_given(self, tokens: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Compute Eq. 5 for a batch of tokens [B, T]."""
        return self.losses_of(tokens, *self.hidden_states(tokens))

    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run tokens [B, T] -> final hidden states [B, T, D] of the student and, unless alpha is 0, of the teacher."""
        return self.student.hidden_states(tokens), self.teacher.hidden_states(tokens) if self.alpha else None

    def losses_of(self, tokens: Tensor, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute Eq. 5 and its terms from final hidden states [B, T, D]; teacher is None for plain training."""
        if teacher is None:
            loss, parts = next_token_loss(tokens, student, self.student.lm_head, terms=self.terms)
            return loss, parts[:1]
        return next_token_loss(
            tokens, student, self.student.lm_head, teacher, self.teacher.head, self.alpha, self.temperature, self.terms
        )

    def validate(self, tokens: Tensor) -> dict[str, Tensor]:
        """Compute the metrics of held-out tokens [B, T], running each model once."""
        student, teacher = self.hidden_states(tokens)
        loss, parts = self.losses_of(tokens, student, teacher)
        metrics = {"loss": loss, "student_ce": parts[0]}
        if teacher is not None:
            metrics["teacher_ce"] = next_token_loss(tokens, teacher, self.teacher.head)[0]
        return metrics
