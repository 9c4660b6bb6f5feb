"""AdamW and the two learning-rate schedules of the paper's section 4.3."""

from collections.abc import Iterable

from torch.nn import Parameter
from torch.optim import AdamW


def adamw(parameters: Iterable[Parameter], lr: float, weight_decay: float) -> AdamW:
    """AdamW (0.9, 0.95); only matrices decay, not norms and biases. Fused on a GPU."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


def warmup_stable_decay(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the maximum learning rate at `step` of `steps`: up, level, and down to 0 over the last `decay` of them."""
    done = (step + 1) / steps
    return max(0.0, min(1.0, done / warmup if warmup else 1.0, (1 - step / steps) / decay if decay else 1.0))


def linear(step: int, steps: int, warmup: float) -> float:
    """Share of the maximum learning rate at `step` of `steps`: up over `warmup` of them, then down to 0 in a line."""
    return warmup_stable_decay(step, steps, warmup, decay=1 - warmup)
