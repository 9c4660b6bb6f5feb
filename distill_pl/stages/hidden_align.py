"""Stage 2, hidden-to-hidden alignment (paper, section 3.1, Eq. 8): each block's output is pulled to the teacher's."""

import torch
from torch import Tensor, nn

from distill_pl.compiling.layers import compiled_on_gpu
from distill_pl.losses import hidden_distance
from distill_pl.stages.optim import warmup_stable_decay
from distill_pl.stages.stage import Stage
from distill_pl.teacher import Layer


class HiddenAlignStage(Stage):
    """Stage 2, hidden-to-hidden alignment: each block's output is pulled to the teacher's (Eq. 8).

    Student block l gets the teacher's input of block l and is compared with the teacher's output of block l.

    The mixers train; the norms and MLPs around them stay the teacher's until the last stage.

    Args:
        decay: share of the steps, at the end, in which the learning rate falls.
    """

    name = "hidden_align"

    def __init__(self, student, teacher, *, lr: float = 2e-3, decay: float = 0.1, **kwargs):
        super().__init__(student, teacher, lr=lr, **kwargs)
        self.decay = decay

    def trained(self) -> list[torch.nn.Parameter]:
        """The mixers."""
        return [parameter for mixer in self.student.mixers for parameter in mixer.parameters()]

    @property
    def part_names(self) -> list[str]:
        """One a layer."""
        return self.layer_names()

    def share_of_lr(self, step: int, steps: int) -> float:
        """Warm-up, stable, decay (section 4.3)."""
        return warmup_stable_decay(step, steps, self.warmup, self.decay)

    def losses_given(self, tokens: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over layers of Eq. 8's distances."""
        distances = []
        for student_layer, layer in zip(self.student.model.layers, self.teacher.layers(tokens), strict=True):
            distances.append(block_distance(student_layer, layer))
        parts = torch.stack(distances)
        return parts.mean(), parts.detach()


@compiled_on_gpu
def block_distance(student_layer: nn.Module, layer: Layer) -> Tensor:
    """Eq. 8 of one layer, scalar."""
    return hidden_distance(student_layer(layer.input, position_embeddings=layer.position), layer.output)
