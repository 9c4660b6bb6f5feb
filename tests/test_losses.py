"""The losses are the paper's equations, computed here from whole tensors."""

import math

import pytest
import torch
from torch import Tensor, nn

import distill_pl.losses
from distill_pl.errors import InputError
from distill_pl.losses import (
    Objective,
    distillation_loss,
    divergence,
    hidden_distance,
    kd_terms,
    kl_divergence,
    matrix_distance,
    next_token_loss,
)

ROWS, LENGTH, HIDDEN, VOCAB = 3, 9, 8, 23


def make(seed: int = 0) -> tuple[Tensor, Tensor, nn.Linear, Tensor, nn.Linear]:
    """Make tokens, and hidden states and a head of a student and of a wider teacher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH))
        student, teacher = torch.randn(ROWS, LENGTH, HIDDEN), torch.randn(ROWS, LENGTH, 2 * HIDDEN)
        heads = nn.Linear(HIDDEN, VOCAB, bias=False), nn.Linear(2 * HIDDEN, VOCAB, bias=False)
    return tokens, student.requires_grad_(True), heads[0], teacher, heads[1].requires_grad_(False)


def whole(tokens: Tensor, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute Eqs. 5 (without alpha KL) and 6 from logits [B, T, V] by the plain functions."""
    student_logits, teacher_logits, labels = student_logits[:, :-1], teacher_logits[:, :-1], tokens[:, 1:]
    ce = distillation_loss(student_logits, teacher_logits, labels, alpha=0.0)
    return ce, kl_divergence(student_logits, teacher_logits, temperature)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_plain_functions_are_equations_5_and_6(temperature):
    tokens, student, head, teacher, teacher_head = make()
    labels = tokens[:, 1:]
    q, p = ((x[:, :-1] / temperature).softmax(-1) for x in (head(student), teacher_head(teacher)))
    ce = -head(student)[:, :-1].log_softmax(-1).gather(-1, labels[..., None]).mean()
    kl = (p * (p / q).log()).sum(-1).mean() * temperature**2
    logits = head(student)[:, :-1], teacher_head(teacher)[:, :-1]
    torch.testing.assert_close(kl_divergence(*logits, temperature), kl)
    torch.testing.assert_close(distillation_loss(*logits, labels, 0.7, temperature), ce + 0.7 * kl)


@pytest.mark.parametrize("at_once", [1, 5, 9, 27, 1024])  # there are 27 positions, 24 with a prediction
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_and_its_gradients_are_those_of_whole_logits(monkeypatch, at_once, temperature):
    monkeypatch.setitem(distill_pl.losses.TOKENS_AT_ONCE, "cpu", at_once)
    tokens, student, head, teacher, teacher_head = make()
    leaves = [student, head.weight]
    expected = whole(tokens, head(student), teacher_head(teacher), temperature)
    assert min(expected) > 0.1
    for alpha in (0.0, 0.7, 2.0):
        loss, parts = next_token_loss(tokens, student, head, teacher, teacher_head, Objective(1.0, alpha, temperature))
        reference = expected[0] + alpha * expected[1]
        torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
        torch.testing.assert_close(parts, torch.stack(expected), rtol=1e-5, atol=0)
        for weight in (1.0, 0.3):  # as where gradients of micro-batches add up
            gradients = [torch.autograd.grad(weight * x, leaves, retain_graph=True) for x in (loss, reference)]
            for gradient, correct in zip(*gradients, strict=True):
                torch.testing.assert_close(gradient, correct, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        _, parts = next_token_loss(tokens, student, head, teacher, teacher_head, Objective(temperature=temperature))
    torch.testing.assert_close(parts, torch.stack(expected), rtol=1e-5, atol=0)


def test_logits_of_all_tokens_never_exist(monkeypatch):
    monkeypatch.setitem(distill_pl.losses.TOKENS_AT_ONCE, "cpu", 5)
    tokens, student, head, teacher, teacher_head = make()
    seen = []

    def terms(*args):
        seen.extend(args[:2])
        return kd_terms(*args)

    next_token_loss(tokens, student, head, teacher, teacher_head, terms=terms)[0].backward()
    assert seen and all(logits.numel() <= 5 * VOCAB for logits in seen)


def test_without_a_teacher_there_is_cross_entropy_alone():
    tokens, student, head, teacher, teacher_head = make()
    loss, (ce, kl) = next_token_loss(tokens, student, head)
    assert kl == 0 and loss == ce
    torch.testing.assert_close(ce, next_token_loss(tokens, student, head, teacher, teacher_head)[1][0])
    assert torch.autograd.grad(loss, head.weight)[0].abs().max() > 0


def identity(size: int) -> nn.Linear:
    head = nn.Linear(size, size, bias=False)
    nn.init.eye_(head.weight)
    return head


def distributions(*rows: list[float]) -> Tensor:
    """Make hidden states [1, len(rows) + 1, V] that are log probabilities already; nothing is predicted from the last."""
    return torch.tensor([[*rows, [1 / len(rows[0])] * len(rows[0])]]).log()


def test_kl_is_of_the_teacher_from_the_student():
    sure, even = [0.9, 0.1], [0.5, 0.5]
    tokens, head = torch.zeros(1, 2, dtype=torch.long), identity(2)
    _, (_, kl) = next_token_loss(tokens, distributions(even), head, distributions(sure), head)
    assert kl.item() == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-5)
    _, (_, reverse) = next_token_loss(tokens, distributions(sure), head, distributions(even), head)
    assert reverse.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-5)


def test_each_position_predicts_the_next_token():
    head = identity(3)
    certain = distributions([1 - 2e-6, 1e-6, 1e-6], [1e-6, 1 - 2e-6, 1e-6])
    right, wrong = torch.tensor([[2, 0, 1]]), torch.tensor([[0, 1, 2]])
    assert next_token_loss(right, certain, head)[0].item() < 1e-5
    assert next_token_loss(wrong, certain, head)[0].item() > 10


def test_kl_of_equals_is_zero_with_a_zero_gradient():
    tokens, _, _, hidden, head = make()
    student = hidden.clone().requires_grad_(True)
    _, (_, kl) = next_token_loss(tokens, student, head, hidden, head, Objective(temperature=2.0))
    assert abs(kl.item()) < 1e-6
    losses = [next_token_loss(tokens, student, head, hidden, head, Objective(1.0, alpha, 2.0))[0] for alpha in (0, 1)]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)  # of the cross-entropy alone


def test_losses_are_means_over_tokens():
    tokens, student, head, teacher, teacher_head = make()
    once = next_token_loss(tokens, student, head, teacher, teacher_head)
    twice = [x.repeat(2, *[1] * (x.ndim - 1)) for x in (tokens, student, teacher)]
    again = next_token_loss(twice[0], twice[1], head, twice[2], teacher_head)
    for value, expected in zip(again, once, strict=True):
        torch.testing.assert_close(value, expected)


def test_bf16_is_summed_in_fp32():
    tokens, student, head, teacher, teacher_head = make()
    student, teacher, head, teacher_head = (x.bfloat16() for x in (student, teacher, head, teacher_head))
    expected = whole(tokens, head(student).float(), teacher_head(teacher).float(), temperature=2.0)
    _, half = next_token_loss(tokens, student, head, teacher, teacher_head, Objective(temperature=2.0))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, torch.stack(expected), rtol=1e-5, atol=0)


def test_another_norm_or_divergence_is_refused():
    x = torch.rand(2, 3, 4)
    for call in (lambda: matrix_distance(x[0], 3, "Frobenius"), lambda: hidden_distance(x, x, "L2"),
                 lambda: divergence(x[0], x[0], "revers", None)):  # fmt: skip
        with pytest.raises(InputError, match=r"'(Frobenius|L2|revers)' is unknown: choose"):
            call()


def test_matrix_distance():
    difference = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    squared = difference.square().sum((-2, -1))
    norms = torch.stack([torch.linalg.matrix_norm(difference[b, h]) for b in range(2) for h in range(3)])
    torch.testing.assert_close(matrix_distance(squared, 7, "frobenius"), norms.mean())
    torch.testing.assert_close(matrix_distance(squared, 7, "mse"), difference.square().mean())


def test_hidden_distance():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 8, generator=generator).unbind(0)
    norms = [torch.linalg.vector_norm(student[b, t] - teacher[b, t]) for b in range(2) for t in range(5)]
    torch.testing.assert_close(hidden_distance(student, teacher), torch.stack(norms).mean())
    assert hidden_distance(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("norm", ["frobenius", "mse"])
def test_gradients_are_finite_where_student_and_teacher_are_equal(norm):
    a = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    same = a.clone().requires_grad_(True)
    loss = matrix_distance((a - same).square().sum((-2, -1)), 7, norm)
    assert torch.autograd.grad(loss, same)[0].abs().max() == 0
    loss = hidden_distance(same, a)
    assert torch.autograd.grad(loss, same)[0].abs().max() == 0
    assert loss < 1e-5


def coarse(log_p: Tensor, top: Tensor) -> Tensor:
    """Keep log probabilities [..., V] of the tokens `top` [..., k] and add up those of all others -> [..., k + 1]."""
    kept = log_p.gather(-1, top)
    return torch.cat([kept, torch.log1p(-kept.exp().sum(-1, keepdim=True))], -1)


@pytest.mark.parametrize("top_k", [None, 1, 4, 22])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_and_their_gradients_are_those_of_their_definitions(kind, top_k, temperature):
    tokens, student, head, teacher, teacher_head = make()
    log_q, log_p = ((h(x)[:, :-1] / temperature).log_softmax(-1) for h, x in ((head, student), (teacher_head, teacher)))
    if top_k is not None:
        top = log_p.topk(top_k, -1).indices
        log_q, log_p = coarse(log_q, top), coarse(log_p, top)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1).mean()  # noqa: E731
    value = {"forward": kl(log_p, log_q), "reverse": kl(log_q, log_p),
             "jensen_shannon": (kl(log_p, log_m) + kl(log_q, log_m)) / 2}[kind] * temperature**2  # fmt: skip
    ce = distillation_loss(head(student)[:, :-1], teacher_head(teacher)[:, :-1], tokens[:, 1:], alpha=0.0)
    objective = Objective(0.5, 0.7, temperature, kind, top_k)
    loss, parts = next_token_loss(tokens, student, head, teacher, teacher_head, objective)
    torch.testing.assert_close(parts, torch.stack([ce, value]), rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(x, [student, head.weight], retain_graph=True) for x in (loss, 0.5 * ce + 0.7 * value)]
    for gradient, correct in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-4, atol=1e-6)


def test_top_k_of_all_tokens_is_the_whole_divergence():
    tokens, student, head, teacher, teacher_head = make()
    for kind in ("forward", "reverse", "jensen_shannon"):
        whole_loss, all_of_them = (
            next_token_loss(tokens, student, head, teacher, teacher_head, Objective(divergence=kind, top_k=k))[0]
            for k in (None, VOCAB)
        )
        torch.testing.assert_close(whole_loss, all_of_them)
