"""The paper's equations 5 to 8, each a plain function.

Shape letters: B batch, T time, H heads, D hidden, N = B T, V here the vocabulary.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}  # logits exist for this many tokens only; more fill a GPU, fewer a cache


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


def next_token_loss(
    tokens: Tensor,
    student_hidden: Tensor,
    student_head: nn.Linear,
    teacher_hidden: Tensor | None = None,
    teacher_head: nn.Linear | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Eq. 5, CE + alpha KL, with a gradient; and [CE, KL] without: of the next token, per-token means in nats.

    CE is cross-entropy with the text, KL is Eq. 6's KL(teacher || student) of the distributions softened by `temperature`,
    times its square, so that its gradient keeps its size (Hinton et al., 2015); 0 without a teacher.

    tokens [B, T]; hidden states [B, T, D] after the final norm; heads map D to V. Both means run over the same B (T - 1)
    predictions. [B, T, V] never exists: logits are made for some of the tokens at a time and, since their gradient follows from
    themselves, so are the gradients of hidden states and head. Nothing is computed a second time in the backward pass.
    """
    labels = torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), -1)], 1).flatten()  # -1: nothing to predict
    return _NextTokenLoss.apply(
        student_hidden.flatten(0, 1), student_head.weight, labels, tokens[:, 1:].numel(),
        None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
        None if teacher_head is None else teacher_head.weight,
        alpha, temperature, torch.is_grad_enabled(),
    )  # fmt: skip


class _NextTokenLoss(torch.autograd.Function):
    """`next_token_loss` over hidden [N, D], head [V, D] and labels [N], with its gradients made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, head, labels, count, teacher_hidden, teacher_head, alpha, temperature, differentiate):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        weight = head.to(dtype)
        need_hidden, need_head = (need and differentiate for need in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head) if need_head else None
        total = torch.zeros(2, device=hidden.device)
        terms_of = _terms_by(hidden.device)
        pieces = -(-len(labels) // TOKENS_AT_ONCE["cuda" if hidden.is_cuda else "cpu"])
        size = -(-len(labels) // pieces)  # all alike, but for the last
        for rows in (slice(at, at + size) for at in range(0, len(labels), size)):
            x, expected = hidden[rows].to(dtype), None
            if teacher_hidden is not None:
                expected = teacher_hidden[rows].to(teacher_head.dtype) @ teacher_head.mT
            terms, d_logits = terms_of(x @ weight.mT, expected, labels[rows], alpha, temperature, need_hidden or need_head)
            total += terms
            if need_hidden:
                d_hidden[rows] = d_logits @ weight
            if need_head:
                _add_product(d_head, d_logits.mT, x)
        ctx.count = count
        ctx.save_for_backward(d_hidden, d_head)
        parts = total / count
        ctx.mark_non_differentiable(parts)
        return parts[0] + alpha * parts[1], parts

    @staticmethod
    def backward(ctx, grad, _):
        d_hidden, d_head = ctx.saved_tensors
        grad = grad / ctx.count
        return *(d if d is None else d * grad for d in (d_hidden, d_head)), *[None] * 7


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; on a GPU not rounded before it is added."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _terms_by(device: torch.device) -> Callable:
    """`_terms`, or what does the same where there is Triton."""
    if device.type == "cuda" and find_spec("triton"):
        from distill_pl.ops.gpu.losses import terms

        return terms
    return _terms


def _terms(logits: Tensor, expected: Tensor | None, labels: Tensor, alpha: float, temperature: float,
           differentiate: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Sums over tokens of CE and KL, [2] in fp32, and, if asked for, the gradient of CE + alpha KL with respect to the logits.

    logits and the teacher's, `expected`, [N, V]; labels [N], -1 where the token does not count.
    """
    counts = labels >= 0
    hit = torch.arange(logits.shape[-1], device=logits.device) == labels[:, None]
    log_q = log_softmax(logits.float(), -1)
    ce = -torch.where(hit, log_q, 0).sum()
    kl = torch.zeros_like(ce)
    if expected is not None:
        log_p = log_softmax(expected.float() / temperature, -1)
        soft_log_q = log_q if temperature == 1 else log_softmax(logits.float() / temperature, -1)
        p = log_p.exp()
        kl = ((p * (log_p - soft_log_q)).sum(-1) * counts).sum() * temperature**2
    terms = torch.stack([ce, kl])
    if not differentiate:
        return terms, None
    gradient = log_q.exp() - hit.float()
    if expected is not None:
        gradient = gradient + alpha * temperature * (soft_log_q.exp() - p)
    return terms, torch.where(counts[:, None], gradient, 0).to(logits.dtype)
