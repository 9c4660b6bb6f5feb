"""The delta rule: a key's old value is taken out before its new one goes in (DeltaNet).

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T         y_t = scale * S_t^T q_t
    A   = scale * tril(Q K^T) (I + tril(diag(beta) K K^T, -1))^{-1} diag(beta)

Keys must have at most unit length, beta must lie between 0 and 1 (2 at most): then no step enlarges the state; with longer
keys it explodes. Within a chunk the product of the steps is one triangular solve (the WY form of Yang et al., 2024).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from distill_pl.ops import Backend, promoted, use_fla

CHUNK = 64  # tokens whose steps are solved for at once; chunks exchange only the K x V state


class Inputs(NamedTuple):
    """Hold the arguments of `mix`, for a sequence or (without T) for a token; see the module for the symbols."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K], at most of unit length
    v: Tensor  # [B, T, H, V]
    beta: Tensor  # [B, T, H], between 0 and 1
    scale: float
    backend: Backend = "auto"

def _steps(k: Tensor, beta: Tensor) -> Tensor:
    """I + tril(diag(beta) K K^T, -1), its diagonal left to the solver. k [..., T, K], beta [..., T, 1] -> [..., T, T]."""
    return (beta * k @ k.mT).tril(-1)


def matrix(q: Tensor, k: Tensor, beta: Tensor, scale: float, backend: Backend = "auto") -> Tensor:
    """q, k [B, T, H, K], beta [B, T, H] -> A [B, H, T, T], fp32.

    Queries walk back through the chunks: each takes from them what it answers itself, A_ij k_j of all its j.
    """
    length = q.shape[1]
    columns: list[Tensor] = []
    size = max(CHUNK, -(-length // 8))  # no more than 8 chunks, each of which has to be compiled
    with torch.autocast(q.device.type, enabled=False):
        q, k, beta = (x.transpose(1, 2) for x in promoted(q, k, beta[..., None]))
        queries = q[..., :0, :]
        chunks = list(zip(*(x.split(size, 2) for x in (q * scale, k, beta)), strict=True))
        for q_c, k_c, beta_c in reversed(chunks):
            queries = torch.cat([q_c, queries], -2)  # of this chunk and all later ones
            eye = torch.eye(k_c.shape[-2], dtype=k.dtype, device=k.device)
            inverse = solve_triangular(_steps(k_c, beta_c), eye, upper=False, unitriangular=True)
            column = (queries @ k_c.mT).tril() @ inverse * beta_c.mT
            queries = queries - column @ k_c
            columns.insert(0, pad(column, (0, 0, length - column.shape[-2], 0)))
        return torch.cat(columns, -1)


def mix(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, backend: Backend = "auto",
        state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H], state [B, H, K, V] fp32 -> y [B, T, H, V], state."""
    if use_fla(backend, q.device) and v.dtype != torch.float32:  # the kernel refuses fp32
        from distill_pl.ops.gpu import fla_kernels as kernels

        return kernels.delta_rule(q.to(v.dtype), k.to(v.dtype), v, beta.float(), scale, state)

    dtype, key_dim = v.dtype, k.shape[-1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta = (x.transpose(1, 2) for x in promoted(q, k, v, beta[..., None]))
        if state is None:
            state = v.new_zeros(*k.shape[:2], key_dim, v.shape[-1])
        outputs = []
        for q_c, k_c, v_c, beta_c in zip(*(x.split(CHUNK, 2) for x in (q * scale, k, v, beta)), strict=True):
            written = solve_triangular(_steps(k_c, beta_c), beta_c * torch.cat([k_c, v_c], -1), upper=False, unitriangular=True)
            erased, added = written.split([key_dim, v_c.shape[-1]], -1)
            u = added - erased @ state  # what each token of the chunk really adds: S grows by K^T U
            outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ u)
            state = state + k_c.mT @ u
        return torch.cat(outputs, 2).transpose(1, 2).to(dtype), state


def step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, backend: Backend = "auto",
         state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k [B, H, K], v [B, H, V], beta [B, H], state [B, H, K, V] fp32 -> y [B, H, V], state: the recurrence itself."""
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta = promoted(q, k, v, beta[..., None])
        if state is not None:
            v = v - torch.einsum("bhk,bhkv->bhv", k, state)
        added = k[..., :, None] * (beta * v)[..., None, :]
        state = added if state is None else state + added
        return (torch.einsum("bhk,bhkv->bhv", q, state) * scale).to(dtype), state
