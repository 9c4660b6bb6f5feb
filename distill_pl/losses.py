"""The paper's equations 5 to 8, each a plain function.

Shape letters: B batch, T time, H heads, D hidden, V here the vocabulary.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

TOKENS_AT_ONCE = 1024  # logits exist for this many tokens only


def matrix_distance(squared: Tensor, length: int, norm: Literal["frobenius", "mse"]) -> Tensor:
    """Eq. 7 for one layer, averaged over batch and heads.

    squared [B, H] = |A_teacher - A_student|_F^2 of T x T matrices -> scalar: the Frobenius norm itself, or the mean
    squared error over all T x T entries (Appendix B compares the two).
    """
    if norm == "frobenius":
        return (squared + 1e-12).sqrt().mean()  # finite gradient where the matrices are equal
    return squared.mean() / length**2


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 8 for one layer: |h_teacher - h_student|_2 of [B, T, D] hidden states, averaged over tokens, in fp32."""
    squared = (student.float() - teacher.float()).square().sum(-1)
    return (squared + 1e-12).sqrt().mean()


def next_token_losses(
    tokens: Tensor,
    student_hidden: Tensor,
    student_head: nn.Module,
    teacher_hidden: Tensor | None = None,
    teacher_head: nn.Module | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The two terms of Eq. 5: next-token cross-entropy, and Eq. 6's KL(teacher || student), per-token means in nats.

    tokens [B, T]; hidden states [B, T, D] after the final norm; heads map D to V. Both means run over the same B (T - 1)
    predictions. The KL is of the distributions softened by `temperature`, times its square, so that its gradient keeps its
    size (Hinton et al., 2015); 0 without a teacher. [B, T, V] never exists: logits are made for a piece of the tokens at a
    time, and again in the backward pass.
    """
    labels = tokens[:, 1:].flatten()

    def pieces(hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        count = -(-len(labels) // TOKENS_AT_ONCE)
        return (None,) * count if hidden is None else hidden[:, :-1].flatten(0, 1).split(TOKENS_AT_ONCE)

    def sums(student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
        logits = student_head(student).float()
        ce = cross_entropy(logits, target, reduction="sum")
        if teacher is None or teacher_head is None:
            return torch.stack([ce, torch.zeros_like(ce)])
        with torch.no_grad():
            log_p = log_softmax(teacher_head(teacher).float() / temperature, -1)
        log_q = log_softmax(logits / temperature, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum() * temperature**2
        return torch.stack([ce, kl])

    run: Callable = sums
    if torch.is_grad_enabled():

        def run(*piece):
            return checkpoint(sums, *piece, use_reentrant=False, preserve_rng_state=False)

    total = torch.zeros(2, device=tokens.device)
    for piece in zip(pieces(student_hidden), pieces(teacher_hidden), labels.split(TOKENS_AT_ONCE), strict=True):
        total = total + run(*piece)
    ce, kl = total / len(labels)
    return ce, kl
