"""Triton kernels for `distill_pl.ops`; an op imports its kernel when it is first used on a GPU."""

from torch import Tensor


def contiguous(*tensors: Tensor | None) -> list:
    """Make each tensor contiguous, leaving None as it is."""
    return [None if x is None else x.contiguous() for x in tensors]
