"""Triton kernels of the ops in `distill_pl.ops`, which import them on first use where there is a GPU."""

from torch import Tensor


def contiguous(*tensors: Tensor | None) -> list:
    """Make each tensor contiguous, leaving None as it is."""
    return [None if x is None else x.contiguous() for x in tensors]
