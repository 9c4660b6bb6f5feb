"""Stage 1, matrix mixing (paper, section 3.1, Eq. 7): train each mixing matrix towards the teacher's attention matrix."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from distill_pl.errors import InputError, Range, check_arguments
from distill_pl.losses import matrix_distance
from distill_pl.mixers import SequenceMixer
from distill_pl.ops import softmax
from distill_pl.stages.stage import Stage
from distill_pl.teacher import Layer

# most entries of T x T matrices, over sequences and heads, in memory at once; but at least one sequence's
ENTRIES_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}


class MatrixMixingStage(Stage):
    """Stage 1, matrix mixing: train each layer's mixing matrix towards the teacher's attention matrix (Eq. 7).

    Student layer l reads the teacher's input of layer l. Only parameters on which the mixing matrices depend are trained.

    Args:
        estimator: `exact` builds both T x T matrices, a few sequences of the batch at a time; `probe` estimates their
            distance without building them: for random signs z, E |(A_t - A_s) z|^2 = |A_t - A_s|_F^2.
        norm: `frobenius`, the Frobenius norm of the difference, or `mse`, its mean squared entry (Appendix B).
        probes: number of random vectors z; more give a more exact estimate.
    """

    name = "matrix_mixing"
    ranges: ClassVar[dict[str, Range]] = Stage.ranges | {"probes": Range(1, 1e4)}
    compiles_with_layer: ClassVar[tuple[str, ...]] = ("squared_distance", "probed_distance")

    def __init__(
        self,
        student,
        teacher,
        *,
        lr: float = 2e-4,
        estimator: Literal["exact", "probe"] = "probe",
        norm: Literal["frobenius", "mse"] = "frobenius",
        probes: int = 64,
        **kwargs,
    ):
        check_arguments("matrix_mixing", MatrixMixingStage.__init__, locals(), self.ranges)
        super().__init__(student, teacher, lr=lr, **kwargs)
        self.estimator, self.norm, self.probes = estimator, norm, probes
        self.squared_distance, self.probed_distance = squared_distance, probed_distance
        if student and (heads := {mixer.heads for mixer in student.mixers} - {teacher.config.num_attention_heads}):
            raise InputError(
                f"matrix_mixing compares head by head: the student has {heads.pop()} heads, the teacher "
                f"{teacher.config.num_attention_heads}; choose student.shape copyable, or matrix_mixing.tokens 0"
            )

    def called(self) -> Sequence[nn.Module]:
        """Return the student's mixers."""
        return self.student.mixers

    def trained(self) -> list[torch.nn.Parameter]:
        """Return the parameters that the mixing matrices of the aligned mixers depend on."""
        return [parameter for mixer in self.aligned() for parameter in mixing_parameters(mixer)]

    def draw(self, tokens: Tensor, seed: int) -> tuple[Tensor, ...]:
        """Draw the probes from `seed`: random signs z [1, T, 1, P], int8; nothing for exact matrices."""
        if self.estimator == "exact":
            return ()
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 2, (1, tokens.shape[1], 1, self.probes), generator=generator, dtype=torch.int8)
        signs = bits.to(tokens.device) * 2 - 1  # int8: before copies of more than 64 KiB the CPU waits for an idle GPU
        return (signs,)

    def losses_given(self, tokens: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Compute Eq. 7's distance of each layer for tokens [B, T] -> their mean, and the distances [layers], detached."""
        distances = []
        for student_layer, layer in zip(self.student.model.layers, self.teacher.layers(tokens), strict=True):
            if self.estimator == "exact":
                distances.append(exact_distance(student_layer, layer, self.norm, self.squared_distance))
            else:
                squared = self.probed_distance(student_layer, layer, *drawn)
                distances.append(matrix_distance(squared, tokens.shape[1], self.norm))
        parts = torch.stack(distances)
        return parts.mean(), parts.detach()


def squared_distance(student_layer: nn.Module, hidden: Tensor, query: Tensor, key: Tensor, scale: float, position) -> Tensor:
    """Compute |A_teacher - A_student|_F^2 [B, H] from both matrices.

    hidden [B, T, D], the layer's input, query and key [B, T, heads, K], after RoPE, scale and position are the teacher's.
    """
    student = student_layer.self_attn.matrix(student_layer.input_layernorm(hidden), position)
    return (softmax.matrix(query, key, scale) - student).square().sum((-2, -1))


def probed_distance(student_layer: nn.Module, layer: Layer, signs: Tensor) -> Tensor:
    """Estimate |A_teacher - A_student|_F^2 [B, H] without bias from probes `signs` [1, T, 1, P] of +1 and -1."""
    student = student_layer.self_attn.matrix_times(signs, student_layer.input_layernorm(layer.input), layer.position)
    values = signs.to(layer.key.dtype).expand(*layer.key.shape[:3], -1)
    teacher, _ = softmax.mix(layer.query, layer.key, values, layer.scale)
    return (teacher.float() - student.float()).square().sum(1).mean(-1)


def exact_distance(student_layer: nn.Module, layer: Layer, norm: Literal["frobenius", "mse"],
                   squared_distance: Callable = squared_distance) -> Tensor:  # fmt: skip
    """Compute Eq. 7 for one layer, a scalar, from the matrices of a few sequences at a time.

    The gradient is computed along with the loss, so that no matrix is kept for the backward pass or built again in it.
    """
    batch, length, heads, _ = layer.query.shape
    at_once = max(1, ENTRIES_AT_ONCE["cuda" if layer.query.is_cuda else "cpu"] // (heads * length**2))
    pieces = list(zip(*(x.tensor_split(-(-batch // at_once)) for x in (layer.input, layer.query, layer.key)), strict=True))

    def distance(piece: tuple[Tensor, ...]) -> Tensor:
        squared = squared_distance(student_layer, *piece, layer.scale, layer.position)
        return matrix_distance(squared, length, norm) * (len(squared) / batch)

    trained = [parameter for parameter in student_layer.self_attn.parameters() if parameter.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        return torch.stack([distance(piece) for piece in pieces]).sum()
    return _SumOverPieces.apply(distance, pieces, *trained)


class _SumOverPieces(torch.autograd.Function):
    """Sum `distance` over pieces of a batch; the forward pass also computes the gradient of each piece."""

    @staticmethod
    def forward(ctx, distance, pieces, *parameters):
        total, ctx.gradients = 0, None
        for piece in pieces:
            torch.clear_autocast_cache()  # autocast's cached weights belong to the graph of the piece before
            with torch.enable_grad():
                value = distance(piece)
                gradients = torch.autograd.grad(value, parameters, materialize_grads=True)  # not all shape the matrix
            total = total + value.detach()
            ctx.gradients = gradients if ctx.gradients is None else torch._foreach_add(ctx.gradients, gradients)
        torch.clear_autocast_cache()
        return total

    @staticmethod
    def backward(ctx, grad):
        return None, None, *torch._foreach_mul(ctx.gradients, grad)


def mixing_parameters(mixer: SequenceMixer) -> list[torch.nn.Parameter]:
    """Find the parameters on which A depends: those for which the matrix of four random tokens has a gradient."""
    parameters = list(mixer.requires_grad_(True).parameters())
    generator = torch.Generator().manual_seed(0)
    sizes = (mixer.q_proj.in_features, mixer.key_dim)
    # on the CPU like the generator, although Lightning calls this with the GPU as torch's default device
    hidden, angle = (torch.randn(1, 4, size, generator=generator, device="cpu").to(parameters[0]) for size in sizes)
    with torch.enable_grad():
        total = mixer.matrix(hidden, (angle.cos(), angle.sin())).square().sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
