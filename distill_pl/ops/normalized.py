"""Linear attention with normalised rows (the paper's Eqs. 3 and 4): Hedgehog and, squared, ReBased.

    S_ij = (scale * q_i . k_j)^power, j <= i        A_ij = S_ij / (sum_j S_ij + eps)

q and k are features, which the mixer computes. S must not be negative: power 1 requires features that are not negative; with
power 2, S is a square. (q . k)^2 = f(q) . f(k), where f(x) holds the F = K (K + 1) / 2 products of two channels; with power 1,
f(x) = x and F = K. So both powers have a state of constant size, sum_j f(k_j) [v_j, 1]^T, [B, H, F, V + 1] in fp32, whose last
column is the normaliser. A token with k = 0 does not change it.
With power 2, the state costs several times as much as mixing a short sequence: `mix` omits it unless `remember`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill_pl.ops import Backend, promoted, use_fla

CHUNK = 64  # tokens that `mix` mixes by their scores, or F if that is more: a larger state should be updated less often


class Inputs(NamedTuple):
    """Hold the arguments of `mix`; those of `step` are the same without the dimension T."""

    q: Tensor  # [B, T, H, K]: features
    k: Tensor  # [B, T, H, K]: features
    v: Tensor  # [B, T, H, V]
    scale: float
    eps: float
    power: int = 1
    remember: bool = True  # whether `mix` also computes the state
    backend: Backend = "auto"


def _features(x: Tensor, power: int) -> Tensor:
    """Compute f(x): [..., K] -> [..., F], for power 2 all products of two channels.

    The squares come first, then the products of each channel with those 1, 2, ... K / 2 places further on, cyclically.
    """
    if power == 1:
        return x
    size = x.shape[-1]
    shifted = torch.cat([x, x], -1).unfold(-1, size, 1)[..., : size // 2 + 1, :]  # [..., shifts, K]
    return (x[..., None, :] * shifted).flatten(-2)[..., : size * (size + 1) // 2]


def _state_of(k: Tensor, v: Tensor, power: int) -> Tensor:
    """Compute sum_j f(k_j) v_j^T from k [..., T, K], v [..., T, V] -> [..., F, V].

    (q . k)^2 holds the product of two different channels twice: those rows are doubled here, and f need not be weighted.
    """
    state = _features(k, power).mT @ v
    return state if power == 1 else torch.cat([state[..., : k.shape[-1], :], 2 * state[..., k.shape[-1] :, :]], -2)


def _divided(sums: Tensor, eps: float) -> Tensor:
    """Divide sums [..., V + 1] by their last column, the row sum of S -> [..., V]."""
    return sums[..., :-1] / (sums[..., -1:] + eps)


def matrix(q: Tensor, k: Tensor, scale: float, eps: float, power: int = 1, remember: bool = True,
           backend: Backend = "auto") -> Tensor:  # fmt: skip
    """Build A from features q, k [B, T, H, K] -> [B, H, T, T], fp32 (float64 stays)."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = (x.transpose(1, 2) for x in promoted(q, k))
        scores = (q * scale @ k.mT).pow(power).tril()
        return scores / (scores.sum(-1, keepdim=True) + eps)


def mix(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, power: int = 1, remember: bool = True,
        backend: Backend = "auto", state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Mix a sequence: features q, k [B, T, H, K], v [B, T, H, V] -> y [B, T, H, V], state [B, H, F, V + 1] or None.

    y has the dtype of v. The state is fp32 (float64 stays), and None unless `remember`.
    """
    dtype = v.dtype
    if use_fla(backend, q.device) and power == 1:
        from distill_pl.ops.gpu import fla_kernels as kernels

        q, k, v = q.to(dtype), k.to(dtype), pad(v, (0, 1), value=1)
        sums, state = kernels.scalar_decay(q, k, v, None, scale, state)
        return _divided(sums.float(), eps).to(dtype), state if remember else None
    if use_fla(backend, q.device) and state is None and not remember and max(q.shape[-1], v.shape[-1]) <= 128:
        from distill_pl.ops.gpu import fla_kernels as kernels

        # Quadratic in time, without states. q is not scaled: where q . k is almost 0, rounding scale * q to bf16 would cost
        # more than all other roundings.
        y, total = kernels.squared(*(x.to(dtype).transpose(1, 2).contiguous() for x in (q, k, v)))  # [B, H, T, V], [B, H, T]
        return (y.float() / (total.float()[..., None] + eps / scale**2)).transpose(1, 2).to(dtype), None

    length, key_dim = q.shape[1], q.shape[-1]
    size = max(CHUNK, key_dim if power == 1 else key_dim * (key_dim + 1) // 2)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.transpose(1, 2) for x in promoted(q, k, v))
        q, v = q * scale, pad(v, (0, 1), value=1)
        outputs = []
        for start in range(0, length, size):
            q_c, k_c, v_c = (x[:, :, start : start + size] for x in (q, k, v))
            sums = (q_c @ k_c.mT).pow(power).tril() @ v_c
            if state is not None:
                sums = sums + _features(q_c, power) @ state
            outputs.append(_divided(sums, eps))
            if remember or start + size < length:
                added = _state_of(k_c, v_c, power)
                state = added if state is None else state + added
        return torch.cat(outputs, 2).transpose(1, 2).to(dtype), state if remember else None


def step(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, power: int = 1, remember: bool = True,
         backend: Backend = "auto", state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply the recurrence: features q, k [B, H, K], v [B, H, V] -> y [B, H, V], state [B, H, F, V + 1].

    y has the dtype of v, the state is fp32 (float64 stays).
    """
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x[..., None, :] for x in promoted(q, k, pad(v, (0, 1), value=1)))  # [B, H, 1, K or V + 1]
        q = q * scale
        # The token's own score is computed directly, without rounding f(k): it is the whole normaliser of a first token.
        sums = (q @ k.mT).pow(power) * v
        if state is not None:
            sums = sums + _features(q, power) @ state
        added = _state_of(k, v, power)
        state = added if state is None else state + added
        return _divided(sums, eps).squeeze(-2).to(dtype), state
