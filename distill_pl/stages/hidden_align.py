"""Stage 2, hidden-to-hidden alignment (paper, section 3.1, Eq. 8): train each block's output towards the teacher's."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from distill_pl.errors import check_arguments
from distill_pl.losses import hidden_distance
from distill_pl.stages.stage import Stage
from distill_pl.teacher import Layer


class HiddenAlignStage(Stage):
    """Stage 2, hidden-to-hidden alignment: train each block's output, or each mixer's, towards the teacher's (Eq. 8).

    Student block l reads the teacher's input of block l, and its output is compared with the teacher's output of block l.
    The mixers train; the norms and MLPs around them stay the teacher's until the last stage.

    Args:
        target: what is compared: `block`, the outputs of whole blocks (Eq. 8), or `mixer`, the outputs of the mixer and of the
            teacher's attention, after o_proj.
        norm: distance of two hidden states: `l2` is Eq. 8's, `mse` the mean squared error.
    """

    name = "hidden_align"
    compiles_with_layer: ClassVar[tuple[str, ...]] = ("layer_distance",)

    def __init__(self, student, teacher, *, lr: float = 2e-3, target: Literal["block", "mixer"] = "block",
                 norm: Literal["l2", "mse"] = "l2", **kwargs):  # fmt: skip
        check_arguments("hidden_align", HiddenAlignStage.__init__, locals(), self.ranges)
        super().__init__(student, teacher, lr=lr, **kwargs)
        self.target, self.norm = target, norm
        self.layer_distance = layer_distance

    def called(self) -> Sequence[nn.Module]:
        """Return the student's layers, or for the target `mixer` its mixers."""
        return self.student.mixers if self.target == "mixer" else super().called()

    def losses_given(self, tokens: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Compute Eq. 8's distance of each layer for tokens [B, T] -> their mean, and the distances [layers], detached."""
        layers = zip(self.student.model.layers, self.teacher.layers(tokens, with_mixed=self.target == "mixer"), strict=True)
        parts = torch.stack([self.layer_distance(student_layer, layer, self.norm) for student_layer, layer in layers])
        return parts.mean(), parts.detach()


def layer_distance(student_layer: nn.Module, layer: Layer, norm: Literal["l2", "mse"]) -> Tensor:
    """Compute Eq. 8 for one layer, a scalar: for outputs of mixer and attention if `layer.mixed` is given, else of blocks.

    The outputs are [B, T, D]; the mean is over tokens (l2) or entries (mse), in fp32.
    """
    if layer.mixed is None:
        return hidden_distance(student_layer(layer.input, position_embeddings=layer.position), layer.output, norm)
    mixed, _ = student_layer.self_attn(student_layer.input_layernorm(layer.input), layer.position)
    return hidden_distance(mixed, layer.mixed, norm)
