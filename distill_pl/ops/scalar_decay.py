"""Linear attention that forgets with one scalar per head: RetNet, Mamba2 (SSD) and, with a normaliser, mLSTM.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T               y_t = scale * S_t^T q_t
    A_ij = scale * (q_i . k_j) e^{G_i - G_j}        with G the cumulative sum of the log decay g <= 0

That is channel decay with one g for all channels of a head, and `mix` and `step` are computed so off the GPU, on which there is
a faster kernel. G_i - G_j is summed from j on: a difference of sums from the start loses its digits where gates are strong.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distill_pl.ops import Backend, channel_decay, promoted, use_fla


class Inputs(NamedTuple):
    """Hold the arguments of `mix`, for a sequence or (without T) for a token; see the module for the symbols."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    g: Tensor  # [B, T, H]: log decay <= 0
    scale: float
    backend: Backend = "auto"

def matrix(q: Tensor, k: Tensor, g: Tensor, scale: float, backend: Backend = "auto") -> Tensor:
    """q, k [B, T, H, K], log decay g [B, T, H] -> A [B, H, T, T], fp32."""
    length = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, g = (x.transpose(1, 2) for x in promoted(q, k, g[..., None]))
        decay = g.expand(-1, -1, -1, length).tril(-1).cumsum(-2)  # of the tokens after j up to i
        return (q * scale @ k.mT) * decay.exp().tril()


def mix(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
        state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k [B, T, H, K], v [B, T, H, V], g [B, T, H], state [B, H, K, V] fp32 -> y [B, T, H, V], state."""
    if use_fla(backend, q.device):
        # not chunk_simple_gla, which fla refuses on Hopper: Triton 3.4 to 3.7 miscompiles its backward pass
        from distill_pl.ops.gpu import fla_kernels as kernels

        return kernels.scalar_decay(q.to(v.dtype), k.to(v.dtype), v, g.float(), scale, state)
    return channel_decay.mix(q, k, v, g[..., None], scale, "torch", state)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
         state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k [B, H, K], v [B, H, V], g [B, H], state [B, H, K, V] fp32 -> y [B, H, V], state: the recurrence itself."""
    return channel_decay.step(q, k, v, g[..., None], scale, state=state)
