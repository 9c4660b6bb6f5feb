"""The paper's equations 5 to 8 as plain functions, and Eqs. 5 and 6 in one pass that never holds all logits in memory.

Shape letters: B batch, T time, H heads, D hidden, N = B T, V here the vocabulary.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from distill_pl.errors import InputError

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}  # tokens whose logits exist at once: many fill a GPU, few fit in a CPU's cache
IGNORED = -1  # label of a position that predicts nothing


def matrix_distance(squared: Tensor, length: int, norm: Literal["frobenius", "mse"]) -> Tensor:
    """Compute Eq. 7 for one layer, averaged over batch and heads.

    squared [B, H] = |A_teacher - A_student|_F^2; length: T of the T x T matrices. Returns a scalar, the mean Frobenius norm, or
    with norm `mse` the mean squared error over all entries (Appendix B compares the two).
    """
    if norm == "frobenius":
        return (squared + 1e-12).sqrt().mean()  # keeps the gradient finite where the matrices are equal
    if norm == "mse":
        return squared.mean() / length**2
    raise InputError(f"norm {norm!r} is unknown: choose frobenius or mse")


def hidden_distance(student: Tensor, teacher: Tensor, norm: Literal["l2", "mse"] = "l2") -> Tensor:
    """Compute Eq. 8 for one layer: |h_teacher - h_student|_2 of [B, T, D] hidden states, averaged over tokens, in fp32.

    norm `mse` gives the mean squared error over all entries instead.
    """
    squared = (student.float() - teacher.float()).square().sum(-1)
    if norm == "l2":
        return (squared + 1e-12).sqrt().mean()  # keeps the gradient finite where the states are equal
    if norm == "mse":
        return squared.mean() / student.shape[-1]
    raise InputError(f"norm {norm!r} is unknown: choose l2 or mse")


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute Eq. 6: KL(teacher || student), averaged over all positions of logits [..., V], in nats.

    Both distributions are softened by `temperature`, and the mean is multiplied by its square, so that the gradient keeps its
    size (Hinton et al., 2015).
    """
    log_p, log_q = (log_softmax(logits / temperature, -1) for logits in (teacher_logits, student_logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float = 1.0,
                      temperature: float = 1.0) -> Tensor:  # fmt: skip
    """Compute Eq. 5: cross-entropy with labels [...] + alpha * KL (Eq. 6), from logits [..., V], means over positions."""
    ce = cross_entropy(student_logits.flatten(0, -2), labels.flatten())
    return ce + alpha * kl_divergence(student_logits, teacher_logits, temperature)


Divergence = Literal["forward", "reverse", "jensen_shannon"]


class Objective(NamedTuple):
    """Hold the parameters of the loss ce * CE + alpha * divergence of student and teacher. The defaults are Eq. 5."""

    ce: float = 1.0
    alpha: float = 1.0
    temperature: float = 1.0  # softens both distributions in the divergence, which is multiplied by its square
    divergence: Divergence = "forward"  # KL(teacher || student) as in Eq. 6; reverse: KL(student || teacher)
    top_k: int | None = None  # the divergence is over the teacher's k likeliest tokens and one class of all others


EQUATION_5 = Objective()


def kd_terms(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, objective: Objective,
             need_gradient: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute [CE, divergence], fp32 sums over positions, and the objective's gradient with respect to the student's logits.

    Logits [N, V]; labels [N], IGNORED where a position predicts nothing; the divergence is 0 without a teacher. The gradient
    [N, V] has the dtype of the student's logits, and is None if not needed.
    """
    counted = labels >= 0
    is_label = torch.arange(student_logits.shape[-1], device=student_logits.device) == labels[:, None]
    log_q = log_softmax(student_logits.float(), -1)
    ce = -torch.where(is_label, log_q, 0).sum()
    divergence_sum = torch.zeros_like(ce)
    if teacher_logits is not None:
        temperature = objective.temperature
        log_p = log_softmax(teacher_logits.float() / temperature, -1)
        soft_log_q = log_q if temperature == 1 else log_softmax(student_logits.float() / temperature, -1)
        divergences, slope = divergence(log_p, soft_log_q, objective.divergence, objective.top_k)
        divergence_sum = (divergences * counted).sum() * temperature**2
    terms = torch.stack([ce, divergence_sum])
    if not need_gradient:
        return terms, None
    gradient = objective.ce * (log_q.exp() - is_label.float())
    if teacher_logits is not None:
        gradient = gradient + objective.alpha * temperature * slope
    return terms, torch.where(counted[:, None], gradient, 0).to(student_logits.dtype)


def divergence(log_p: Tensor, log_q: Tensor, kind: Divergence, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Compute a divergence of log probabilities [N, V], p the teacher's, q the student's -> [N] in nats, its gradient [N, V].

    The gradient is with respect to the logits of q: with g the derivative with respect to q, it is q (g - sum(q g)). With
    `top_k`, all but the teacher's k likeliest tokens count as one class: each of them has the class's ratio of p to q.
    """
    p, q = log_p.exp(), log_q.exp()
    if top_k is not None:
        # a mask of values below the k-th: a scatter by indices would not be deterministic
        others = log_p < log_p.topk(min(top_k, log_p.shape[-1]), -1).values[..., -1:]
        log_p, log_q = (torch.where(others, x.masked_fill(~others, -torch.inf).logsumexp(-1, True), x) for x in (log_p, log_q))
    if kind == "forward":
        slope = q - p if top_k is None else q - torch.where(others, q * (log_p - log_q).exp(), p)
        return (p * (log_p - log_q)).sum(-1), slope
    if kind == "reverse":
        values = (q * (log_q - log_p)).sum(-1)
        return values, q * (log_q - log_p - values[..., None])
    if kind != "jensen_shannon":
        raise InputError(f"divergence {kind!r} is unknown: choose one of {', '.join(get_args(Divergence))}")
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    to_middle = (q * (log_q - log_m)).sum(-1)
    return ((p * (log_p - log_m)).sum(-1) + to_middle) / 2, q * (log_q - log_m - to_middle[..., None]) / 2


def next_token_loss(
    tokens: Tensor,
    student_hidden: Tensor,
    student_head: nn.Linear,
    teacher_hidden: Tensor | None = None,
    teacher_head: nn.Linear | None = None,
    objective: Objective = EQUATION_5,
    terms: Callable = kd_terms,
) -> tuple[Tensor, Tensor]:
    """Compute the next-token objective from hidden states -> the loss, and its terms [CE, divergence] without gradient.

    All are means in nats per token over the same B (T - 1) predictions; the default objective is Eq. 5. The divergence is 0
    without a teacher. tokens [B, T]; hidden states [B, T, D] after the final norm; heads map D to V. `terms` is `kd_terms`, or
    the same function compiled.

    The logits [B, T, V] are never in memory as a whole: they are computed for some positions at a time, and in the same pass
    the gradients with respect to hidden states and head, which follow from these logits.
    """
    labels = torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), IGNORED)], 1).flatten()
    return _NextTokenLoss.apply(
        student_hidden.flatten(0, 1), student_head.weight, labels, tokens[:, 1:].numel(),
        None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
        None if teacher_head is None else teacher_head.weight,
        objective, torch.is_grad_enabled(), terms,
    )  # fmt: skip


class _NextTokenLoss(torch.autograd.Function):
    """Compute `next_token_loss` of hidden [N, D], head [V, D] and labels [N]; the forward pass also computes the gradients."""

    @staticmethod
    def forward(ctx, hidden, head, labels, count, teacher_hidden, teacher_head, objective, grad_enabled, terms):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        weight = head.to(dtype)
        need_hidden, need_head = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head) if need_head else None
        total = torch.zeros(2, device=hidden.device)
        pieces = -(-len(labels) // TOKENS_AT_ONCE["cuda" if hidden.is_cuda else "cpu"])
        size = -(-len(labels) // pieces)  # all pieces but the last have one shape, so that `terms` compiles once
        for rows in (slice(start, start + size) for start in range(0, len(labels), size)):
            x, teacher_logits = hidden[rows].to(dtype), None
            if teacher_hidden is not None:
                teacher_logits = teacher_hidden[rows].to(teacher_head.dtype) @ teacher_head.mT
            sums, d_logits = terms(x @ weight.mT, teacher_logits, labels[rows], objective, need_hidden or need_head)
            total += sums
            if need_hidden:
                d_hidden[rows] = d_logits @ weight
            if need_head:
                _add_product(d_head, d_logits.mT, x)
        ctx.count = count
        ctx.save_for_backward(d_hidden, d_head)
        parts = total / count
        ctx.mark_non_differentiable(parts)
        return objective.ce * parts[0] + objective.alpha * parts[1], parts

    @staticmethod
    def backward(ctx, grad, _):
        d_hidden, d_head = ctx.saved_tensors
        grad = grad / ctx.count
        return *(d if d is None else d * grad for d in (d_hidden, d_head)), *[None] * 7


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total` in place; on a GPU, the product is not rounded to the dtype of a and b first."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
