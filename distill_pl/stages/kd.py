"""Stage 3, knowledge distillation end to end (paper, section 3, Eqs. 5 and 6)."""

import torch
from torch import Tensor

from distill_pl.errors import InputError
from distill_pl.losses import next_token_losses
from distill_pl.optim import linear
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

    @property
    def part_names(self) -> list[str]:
        """The two terms of Eq. 5."""
        return ["train/ce", "train/kl"] if self.alpha else ["train/ce"]

    def share_of_lr(self, step: int, steps: int) -> float:
        """Warm-up, then linear (section 4.3)."""
        return linear(step, steps, self.warmup)

    def losses(self, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Eq. 5."""
        student = self.student.hidden_states(tokens)
        if not self.alpha:
            ce, _ = next_token_losses(tokens, student, self.student.lm_head)
            return ce, ce.detach()[None]
        teacher = self.teacher.hidden_states(tokens)
        ce, kl = next_token_losses(
            tokens, student, self.student.lm_head, teacher, self.teacher.head, self.temperature
        )  # fmt: skip
        return ce + self.alpha * kl, torch.stack([ce, kl]).detach()
