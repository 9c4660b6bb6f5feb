"""AdamW, the two learning-rate schedules of the paper's section 4.3, and gradient clipping that does not wait for the GPU."""

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer


def adamw(parameters: Iterable[Parameter], lr: float, weight_decay: float,
          share_of_lr: Callable[[Parameter], float] = lambda _: 1.0) -> AdamW:  # fmt: skip
    """Build AdamW with betas (0.9, 0.95), fused on a GPU, with weight decay for parameters of two or more dimensions.

    share_of_lr gives a parameter's learning rate as a share of `lr`; groups are sorted so that the first has the largest.
    """
    parameters = [p for p in parameters if p.requires_grad]
    groups: dict[tuple[float, bool], list[Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((share_of_lr(parameter), parameter.ndim >= 2), []).append(parameter)
    options = [
        {"params": members, "lr": share * lr, "weight_decay": weight_decay if is_matrix else 0.0}
        for (share, is_matrix), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    return AdamW(options, lr=lr, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


def warmup_stable_decay(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the learning rate at `step` of `steps` as a share of its maximum: rising, constant, then falling to 0, linearly.

    warmup and decay are the shares of the steps in which the rate rises and falls.
    """
    done = (step + 1) / steps
    return max(0.0, min(1.0, done / warmup if warmup else 1.0, (1 - step / steps) / decay if decay else 1.0))


def linear(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate at `step` of `steps` as a share of its maximum: rising for a share `warmup`, falling to 0."""
    return warmup_stable_decay(step, steps, warmup, decay=1 - warmup)


def clip_inside_step(optimizer: Optimizer, norm: Tensor, clip: float, finite: Tensor) -> None:
    """Make the next step of a fused optimizer clip gradients of norm `norm` to `clip`, and change nothing unless `finite`.

    `norm` and `finite`, scalars on the GPU, need not be copied to the CPU. torch's fused optimizers divide gradients by their
    attribute `grad_scale` and skip the step if `found_inf` is 1; both attributes serve torch's GradScaler and are undocumented.
    """
    vars(optimizer).update(grad_scale=(norm.float() / clip).clamp(min=1), found_inf=(~finite).float())
