"""Linear attention with one scalar decay per head: RetNet, Mamba2 (SSD: Dao and Gu, 2024) and, with a normaliser, mLSTM.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T               y_t = scale * S_t^T q_t
    A_ij = scale * (q_i . k_j) e^{G_i - G_j}        with G the cumulative sum of the log decay g <= 0

This is channel decay with one g for all channels of a head: `mix` and `step` call ops/channel_decay.py, except that `mix` has a
faster kernel on a GPU. `matrix` sums g over the tokens after j to obtain G_i - G_j: a difference of sums from the start would
lose its digits where gates are strong.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distill_pl.ops import Backend, channel_decay, promoted, use_fla


class Inputs(NamedTuple):
    """Hold the arguments of `mix`; those of `step` are the same without the dimension T."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    g: Tensor  # [B, T, H]: log decay <= 0
    scale: float
    backend: Backend = "auto"


def matrix(q: Tensor, k: Tensor, g: Tensor, scale: float, backend: Backend = "auto") -> Tensor:
    """Build A from q, k [B, T, H, K], log decay g [B, T, H] -> [B, H, T, T], fp32 (float64 stays)."""
    length = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, g = (x.transpose(1, 2) for x in promoted(q, k, g[..., None]))
        decay = g.expand(-1, -1, -1, length).tril(-1).cumsum(-2)  # [B, H, i, j]: G_i - G_j
        return (q * scale @ k.mT) * decay.exp().tril()


def mix(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
        state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mix a sequence: q, k [B, T, H, K], v [B, T, H, V], g [B, T, H] -> y [B, T, H, V], state [B, H, K, V].

    y has the dtype of v, the state is fp32 (float64 stays).
    """
    if use_fla(backend, q.device):
        # not chunk_simple_gla, which fla refuses on Hopper: Triton 3.4 to 3.7.0 miscompiles its backward pass
        from distill_pl.ops.gpu import fla_kernels as kernels

        return kernels.scalar_decay(q.to(v.dtype), k.to(v.dtype), v, g.float(), scale, state)
    return channel_decay.mix(q, k, v, g[..., None], scale, "torch", state)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
         state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply the recurrence: q, k [B, H, K], v [B, H, V], g [B, H] -> y [B, H, V], state [B, H, K, V].

    y has the dtype of v, the state is fp32 (float64 stays).
    """
    return channel_decay.step(q, k, v, g[..., None], scale, state=state)
