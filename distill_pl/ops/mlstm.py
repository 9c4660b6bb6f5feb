"""mLSTM (Beck et al., 2024): scalar decay with an exponential input gate, a running maximum m of the gates and a normaliser.

    m_t = max(g_t + m_{t-1}, i_t), m_0 = 0           C_t = e^{g_t + m_{t-1} - m_t} C_{t-1} + e^{i_t - m_t} k_t v_t^T
    y_t = C_t^T q_t / (max(|n_t . q_t|, e^{-m_t}) + eps)    n_t: the same recurrence with 1 for v_t;  q_t scaled

So it is scalar decay with the gates k' = e^{i_t - m_t} k_t and g'_t = g_t + m_{t-1} - m_t <= 0, on v' = [v, 1]: no exponent is
ever positive and no kernel of its own is needed. m cancels from y but for eps, hence it takes no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill_pl.ops import Backend, promoted, scalar_decay, use_fla

EPS = 1e-6  # xLSTM's
LIMIT = 80.0  # of -m, so that e^{-m} is finite in fp32; m is as low only where all input gates stay shut

State = tuple[Tensor, Tensor]  # [B, H, K, V + 2] fp32: C and, in each of the last two columns, n;  m [B, H] fp32


class Inputs(NamedTuple):
    """Hold the arguments of `mix`, for a sequence or (without T) for a token; see the module for the symbols."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    i: Tensor  # [B, T, H]: log of the input gate
    g: Tensor  # [B, T, H]: log of the forget gate, <= 0
    scale: float
    backend: Backend = "auto"

@torch.no_grad()
def _maxima(i: Tensor, g: Tensor, before: Tensor) -> Tensor:
    """m [B, T, H] from gates i, g [B, T, H] and m_0 [B, H]. Any other m near it would do, so sums from the start do."""
    decay = g.cumsum(1)
    highest = (i - decay).mT.cummax(-1).values.mT  # over the last dimension a GPU is quicker
    return decay + torch.maximum(highest, before[:, None])


def _gated(k: Tensor, i: Tensor, g: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
    """k', g' and m of a sequence."""
    k, i, g = promoted(k, i, g)
    before = torch.zeros_like(i[:, 0]) if state is None else state[1]
    m = _maxima(i, g, before)
    return k * (i - m).exp()[..., None], g + torch.cat([before[:, None], m[:, :-1]], 1) - m, m


def _divisor(n: Tensor, m: Tensor) -> Tensor:
    """Of y, from n . q and m."""
    return torch.maximum(n.abs(), (-m).clamp(max=LIMIT).exp()) + EPS


def _with_ones(v: Tensor) -> Tensor:
    """v' = [v, 1, 1]: two, so that the width stays even."""
    return pad(v, (0, 2), value=1)


def _normalized(y: Tensor, m: Tensor) -> Tensor:
    """y' [..., V + 2] -> y [..., V]."""
    return y[..., :-2] / _divisor(y[..., -1], m)[..., None]


def matrix(q: Tensor, k: Tensor, i: Tensor, g: Tensor, scale: float, backend: Backend = "auto") -> Tensor:
    """q, k [B, T, H, K], input gate i and log forget gate g <= 0 [B, T, H] -> A [B, H, T, T], fp32."""
    with torch.autocast(q.device.type, enabled=False):
        k, g, m = _gated(k, i, g, None)
        a = scalar_decay.matrix(q, k, g, scale)
        return a / _divisor(a.sum(-1), m.transpose(1, 2))[..., None]


def mix(q: Tensor, k: Tensor, v: Tensor, i: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
        state: State | None = None) -> tuple[Tensor, State]:  # fmt: skip
    """q, k [B, T, H, K], v [B, T, H, V], i, g [B, T, H] -> y [B, T, H, V], state."""
    dtype, cell = v.dtype, None if state is None else state[0]
    with torch.autocast(q.device.type, enabled=False):
        k, g, m = _gated(k, i, g, state)
        if not use_fla(backend, q.device):
            (v,) = promoted(v)  # its two parts are rounded after the division only
        y, cell = scalar_decay.mix(q, k, _with_ones(v), g, scale, backend, cell)
        (y,) = promoted(y)
        return _normalized(y, m).to(dtype), (cell, m[:, -1].clone())  # a view would keep all of m alive


def step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
         state: State | None = None) -> tuple[Tensor, State]:  # fmt: skip
    """q, k [B, H, K], v [B, H, V], i, g [B, H] -> y [B, H, V], state."""
    dtype, cell = v.dtype, None if state is None else state[0]
    with torch.autocast(q.device.type, enabled=False):
        k, g, m = (x[:, 0] for x in _gated(k[:, None], i[:, None], g[:, None], state))
        y, cell = scalar_decay.step(q, k, _with_ones(*promoted(v)), g, scale, state=cell)
        return _normalized(y, m).to(dtype), (cell, m)
