"""mLSTM (Beck et al., 2024): scalar decay with an exponential input gate, a stabiliser m and a normaliser n.

    m_t = max(g_t + m_{t-1}, i_t), m_0 = 0           C_t = e^{g_t + m_{t-1} - m_t} C_{t-1} + e^{i_t - m_t} k_t v_t^T
    y_t = C_t^T q_t / (max(|n_t . q_t|, e^{-m_t}) + eps)    n_t: the same recurrence with 1 for v_t;  q_t scaled

This is scalar decay with k'_t = e^{i_t - m_t} k_t and g'_t = g_t + m_{t-1} - m_t <= 0 on v' = [v, 1]: no exponent is ever
positive and mLSTM needs no kernel of its own. m cancels from y except for eps, so no gradient flows through m.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill_pl.ops import Backend, promoted, scalar_decay, use_fla

EPS = 1e-6  # as in xLSTM

State = tuple[Tensor, Tensor]  # C with n as two equal last columns [B, H, K, V + 2], m [B, H]; both fp32


class Inputs(NamedTuple):
    """Hold the arguments of `mix`; those of `step` are the same without the dimension T."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    i: Tensor  # [B, T, H]: log of the input gate
    g: Tensor  # [B, T, H]: log of the forget gate, <= 0
    scale: float
    backend: Backend = "auto"


@torch.no_grad()
def _stabiliser(i: Tensor, g: Tensor, before: Tensor) -> Tensor:
    """Compute m [B, T, H] from the log gates i, g [B, T, H] and the m before them [B, H].

    m cancels from y, so it does not matter that cumulative sums from the start lose digits.
    """
    decay = g.cumsum(1)
    highest = (i - decay).mT.cummax(-1).values.mT  # transposed: cummax over the last dimension is faster on a GPU
    return decay + torch.maximum(highest, before[:, None])


def _stabilised(k: Tensor, i: Tensor, g: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute k' [B, T, H, K], g' [B, T, H] and m [B, T, H] of a sequence, as the module's docstring defines them."""
    k, i, g = promoted(k, i, g)
    before = torch.zeros_like(i[:, 0]) if state is None else state[1]
    m = _stabiliser(i, g, before)
    return k * (i - m).exp()[..., None], g + torch.cat([before[:, None], m[:, :-1]], 1) - m, m


def _divisor(n_q: Tensor, m: Tensor) -> Tensor:
    """Compute max(|n . q|, e^{-m}) + eps from n_q = n . q and m, of one shape; infinite while all input gates are closed."""
    return torch.maximum(n_q.abs(), (-m).exp()) + EPS


def _with_ones(v: Tensor) -> Tensor:
    """Extend v [..., V] to v' = [v, 1, 1] [..., V + 2]: two columns, because the kernel needs an even width."""
    return pad(v, (0, 2), value=1)


def _normalized(y: Tensor, m: Tensor) -> Tensor:
    """Divide y' [..., V + 2], the result of mixing v', by its normaliser for m [...] -> y [..., V]."""
    return y[..., :-2] / _divisor(y[..., -1], m)[..., None]


def matrix(q: Tensor, k: Tensor, i: Tensor, g: Tensor, scale: float, backend: Backend = "auto") -> Tensor:
    """Build A from q, k [B, T, H, K], log input gate i and log forget gate g [B, T, H] -> [B, H, T, T], at least fp32."""
    with torch.autocast(q.device.type, enabled=False):
        k, g, m = _stabilised(k, i, g, None)
        a = scalar_decay.matrix(q, k, g, scale)
        return a / _divisor(a.sum(-1), m.transpose(1, 2))[..., None]


def mix(q: Tensor, k: Tensor, v: Tensor, i: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
        state: State | None = None) -> tuple[Tensor, State]:  # fmt: skip
    """Mix a sequence: q, k [B, T, H, K], v [B, T, H, V], i, g [B, T, H] -> y [B, T, H, V] in the dtype of v, State."""
    dtype, cell = v.dtype, None if state is None else state[0]
    with torch.autocast(q.device.type, enabled=False):
        k, g, m = _stabilised(k, i, g, state)
        if not use_fla(backend, q.device):
            (v,) = promoted(v)  # so that sums and normaliser are rounded only after the division
        y, cell = scalar_decay.mix(q, k, _with_ones(v), g, scale, backend, cell)
        (y,) = promoted(y)
        return _normalized(y, m).to(dtype), (cell, m[:, -1].clone())  # a view would keep all of m in memory


def step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
         state: State | None = None) -> tuple[Tensor, State]:  # fmt: skip
    """Apply the recurrence: q, k [B, H, K], v [B, H, V], i, g [B, H] -> y [B, H, V] in the dtype of v, State."""
    dtype, cell = v.dtype, None if state is None else state[0]
    with torch.autocast(q.device.type, enabled=False):
        k, g, m = (x[:, 0] for x in _stabilised(k[:, None], i[:, None], g[:, None], state))
        y, cell = scalar_decay.step(q, k, _with_ones(*promoted(v)), g, scale, state=cell)
        return _normalized(y, m).to(dtype), (cell, m)
