"""Stage 1, matrix mixing (paper, section 3.1, Eq. 7): each mixing matrix is pulled to the teacher's attention matrix."""

from typing import Literal

import torch
from torch import Tensor, nn

from distill_pl.compiling.layers import compiled_on_gpu
from distill_pl.errors import InputError
from distill_pl.losses import matrix_distance
from distill_pl.mixers import SequenceMixer
from distill_pl.ops import softmax
from distill_pl.stages.optim import warmup_stable_decay
from distill_pl.stages.stage import Stage
from distill_pl.teacher import Layer

ENTRIES_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}  # of the matrices of all heads together; at least a sequence's


class MatrixMixingStage(Stage):
    """Stage 1, matrix mixing: each layer's mixing matrix is pulled to the teacher's attention matrix (Eq. 7).

    Student layer l sees the teacher's input of layer l; only what its mixing matrix depends on trains.

    Args:
        decay: share of the steps, at the end, in which the learning rate falls.
        estimator: `exact` builds both T x T matrices, a few sequences of the batch at a time; `probe` never does: for random
            signs z, E |(A_t - A_s) z|^2 = |A_t - A_s|_F^2, and both products are one fast pass.
        norm: `frobenius`, the norm itself, or `mse`, the mean squared error over the matrix (Appendix B).
        probes: columns of z; more estimate better.
    """

    name = "matrix_mixing"

    def __init__(
        self,
        student,
        teacher,
        *,
        lr: float = 2e-4,
        decay: float = 0.1,
        estimator: Literal["exact", "probe"] = "probe",
        norm: Literal["frobenius", "mse"] = "frobenius",
        probes: int = 64,
        **kwargs,
    ):
        super().__init__(student, teacher, lr=lr, **kwargs)
        self.decay, self.estimator, self.norm, self.probes = decay, estimator, norm, probes
        heads = {mixer.heads for mixer in student.mixers} - {teacher.config.num_attention_heads}
        if heads:
            raise InputError(
                f"matrix_mixing compares head by head: the student has {heads.pop()} heads, the teacher "
                f"{teacher.config.num_attention_heads}; choose student.shape copyable, or matrix_mixing.tokens 0"
            )

    def trained(self) -> list[torch.nn.Parameter]:
        """What the mixing matrices depend on."""
        return [parameter for mixer in self.student.mixers for parameter in mixing_parameters(mixer)]

    @property
    def part_names(self) -> list[str]:
        """One a layer."""
        return self.layer_names()

    def share_of_lr(self, step: int, steps: int) -> float:
        """Warm-up, stable, decay (section 4.3)."""
        return warmup_stable_decay(step, steps, self.warmup, self.decay)

    def draw(self, tokens: Tensor, seed: int) -> tuple[Tensor, ...]:
        """Probes: random signs [1, T, 1, P]."""
        if self.estimator == "exact":
            return ()
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 2, (1, tokens.shape[1], 1, self.probes), generator=generator, dtype=torch.int8)
        signs = bits.to(tokens.device) * 2 - 1  # bytes: for a copy of more than 64 KiB the CPU would wait until the GPU is idle
        return (signs,)

    def losses_given(self, tokens: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over layers of Eq. 7's distances."""
        distances = []
        for student_layer, layer in zip(self.student.model.layers, self.teacher.layers(tokens), strict=True):
            if self.estimator == "exact":
                distances.append(exact_distance(student_layer, layer, self.norm))
            else:
                squared = probed_distance(student_layer, layer, *drawn)
                distances.append(matrix_distance(squared, tokens.shape[1], self.norm))
        parts = torch.stack(distances)
        return parts.mean(), parts.detach()


def exact_distance(student_layer: nn.Module, layer: Layer, norm: Literal["frobenius", "mse"]) -> Tensor:
    """Eq. 7 for one layer, scalar: both matrices of a few sequences at a time, and right away the gradient."""
    batch, length, heads, _ = layer.query.shape
    at_once = max(1, ENTRIES_AT_ONCE["cuda" if layer.query.is_cuda else "cpu"] // (heads * length**2))
    rows = list(zip(*(x.tensor_split(-(-batch // at_once)) for x in (layer.input, layer.query, layer.key)), strict=True))

    def share(row: tuple[Tensor, ...]) -> Tensor:
        squared = squared_distance(student_layer, *row, layer.scale, layer.position)
        return matrix_distance(squared, length, norm) * (len(squared) / batch)

    if not torch.is_grad_enabled():
        return torch.stack([share(row) for row in rows]).sum()
    return _Differentiated.apply(share, rows, *(p for p in student_layer.self_attn.parameters() if p.requires_grad))


class _Differentiated(torch.autograd.Function):
    """A sum over rows and its gradient, a row at a time: no matrix is kept for the backward pass or built in it again."""

    @staticmethod
    def forward(ctx, share, rows, *parameters):
        total, ctx.gradients = 0, None
        for row in rows:
            torch.clear_autocast_cache()  # its casts belong to the graph of the row before
            with torch.enable_grad():
                value = share(row)
                gradients = torch.autograd.grad(value, parameters)
            total = total + value.detach()
            ctx.gradients = gradients if ctx.gradients is None else torch._foreach_add(ctx.gradients, gradients)
        torch.clear_autocast_cache()
        return total

    @staticmethod
    def backward(ctx, grad):
        return None, None, *torch._foreach_mul(ctx.gradients, grad)


@compiled_on_gpu
def squared_distance(student_layer: nn.Module, hidden: Tensor, query: Tensor, key: Tensor, scale: float, position) -> Tensor:
    """|A_teacher - A_student|_F^2, [B, H], from both matrices. hidden [B, T, D], query and key [B, T, heads, K]."""
    student = student_layer.self_attn.matrix(student_layer.input_layernorm(hidden), position)
    return (softmax.matrix(query, key, scale) - student).square().sum((-2, -1))


@compiled_on_gpu
def probed_distance(student_layer: nn.Module, layer: Layer, signs: Tensor) -> Tensor:
    """An unbiased estimate of |A_teacher - A_student|_F^2, [B, H], from probes signs [1, T, 1, P] of +1 and -1."""
    student = student_layer.self_attn.matrix_times(signs, student_layer.input_layernorm(layer.input), layer.position)
    values = signs.to(layer.key.dtype).expand(*layer.key.shape[:3], -1)
    teacher, _ = softmax.mix(layer.query, layer.key, values, layer.scale)
    return (teacher.float() - student.float()).square().sum(1).mean(-1)


def mixing_parameters(mixer: SequenceMixer) -> list[torch.nn.Parameter]:
    """The parameters that A depends on, found by asking: those that a matrix of four tokens has a gradient for."""
    parameters = list(mixer.requires_grad_(True).parameters())
    device = parameters[0].device
    generator = torch.Generator().manual_seed(0)
    sizes = (mixer.q_proj.in_features, mixer.key_dim)
    # on the CPU, as the generator is: Lightning calls this with the GPU as torch's default device
    hidden, angle = (torch.randn(1, 4, size, generator=generator, device="cpu").to(device) for size in sizes)
    with torch.enable_grad():
        total = mixer.matrix(hidden, (angle.cos(), angle.sin())).square().sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
