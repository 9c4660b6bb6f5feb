"""Compute a short causal convolution and silu by fla's kernels, as custom operators, which torch.compile does not trace.

    y_t = silu(sum_{i < W} w_i x_{t-W+1+i}) for each channel, with x = 0 before the start of a sequence

Shape letters: B batch, T time, C channels, W taps (4).
"""

import os

import torch
from torch import Tensor

# fla's Gluon kernels, which fla leaves off by default, save 6% of a training step of DeltaNet; fla falls back to Triton itself
os.environ.setdefault("FLA_CONV_GLUON", "1")

from fla.modules.causal_conv1d import causal_conv1d_bwd, causal_conv1d_fwd  # noqa: E402


@torch.library.custom_op("distill_pl::short_conv", mutates_args=())
def short_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve x [B, T, C] with weight [C, W] over time, then silu -> y [B, T, C] in the dtype of x. Differentiable."""
    with torch.cuda.device_of(x):
        return causal_conv1d_fwd(x.contiguous(), weight.contiguous(), None, None, activation="silu")[0]


@torch.library.custom_op("distill_pl::short_conv_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x [B, T, C] and weight [C, W] from that of y, dy [B, T, C]."""
    with torch.cuda.device_of(x):
        return causal_conv1d_bwd(x.contiguous(), dy.contiguous(), None, weight.contiguous(), activation="silu")[:2]


@short_conv.register_fake
def _(x, weight):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(x, weight, dy):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


short_conv.register_autograd(
    lambda ctx, dy: _backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
