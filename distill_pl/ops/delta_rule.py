"""The delta rule (DeltaNet: Yang et al., 2025): a key's old value is erased before its new value is written.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T         y_t = scale * S_t^T q_t
    A   = scale * tril(Q K^T) (I + tril(diag(beta) K K^T, -1))^{-1} diag(beta)

Keys must have at most unit length and beta must lie between 0 and 1 (2 at most): then no step enlarges the state; with longer
keys the state explodes. Within a chunk, the product of the steps is one triangular solve (the paper's WY representation).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from distill_pl.ops import Backend, promoted, use_fla

CHUNK = 64  # tokens whose steps are solved for at once; chunks exchange only the K x V state


class Inputs(NamedTuple):
    """Hold the arguments of `mix` for a sequence, or without T those of `step` for a token."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K], at most of unit length
    v: Tensor  # [B, T, H, V]
    beta: Tensor  # [B, T, H], between 0 and 1
    scale: float
    backend: Backend = "auto"


def _erasures(k: Tensor, beta: Tensor) -> Tensor:
    """Compute tril(diag(beta) K K^T, -1), to which a unitriangular solve adds I. k [..., T, K], beta [..., T, 1]."""
    return (beta * k @ k.mT).tril(-1)


def matrix(q: Tensor, k: Tensor, beta: Tensor, scale: float, backend: Backend = "auto") -> Tensor:
    """Build A from q, k [B, T, H, K], beta [B, T, H] -> [B, H, T, T], fp32 (float64 stays).

    The columns are built chunk by chunk from the last: once A_ij is known for a chunk's keys, sum_j A_ij k_j is subtracted
    from all later queries, so that the chunks before see only what this one leaves of them.
    """
    length = q.shape[1]
    columns: list[Tensor] = []
    size = max(CHUNK, -(-length // 8))  # 8 chunks at most: torch.compile unrolls this loop
    with torch.autocast(q.device.type, enabled=False):
        q, k, beta = (x.transpose(1, 2) for x in promoted(q, k, beta[..., None]))
        queries = q[..., :0, :]
        chunks = list(zip(*(x.split(size, 2) for x in (q * scale, k, beta)), strict=True))
        for q_c, k_c, beta_c in reversed(chunks):
            queries = torch.cat([q_c, queries], -2)  # of this chunk and all later ones
            eye = torch.eye(k_c.shape[-2], dtype=k.dtype, device=k.device)
            inverse = solve_triangular(_erasures(k_c, beta_c), eye, upper=False, unitriangular=True)
            column = (queries @ k_c.mT).tril() @ inverse * beta_c.mT
            queries = queries - column @ k_c
            columns.insert(0, pad(column, (0, 0, length - column.shape[-2], 0)))
        return torch.cat(columns, -1)


def mix(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, backend: Backend = "auto",
        state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mix a sequence: q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H] -> y [B, T, H, V], state [B, H, K, V].

    y has the dtype of v, the state is fp32 (float64 stays).
    """
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
            right_side = beta_c * torch.cat([k_c, v_c], -1)
            solved = solve_triangular(_erasures(k_c, beta_c), right_side, upper=False, unitriangular=True)
            erased, added = solved.split([key_dim, v_c.shape[-1]], -1)
            u = added - erased @ state  # what each token of the chunk adds after all erasures: S grows by K^T U
            outputs.append(q_c @ state + (q_c @ k_c.mT).tril() @ u)
            state = state + k_c.mT @ u
        return torch.cat(outputs, 2).transpose(1, 2).to(dtype), state


def step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, backend: Backend = "auto",
         state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply the recurrence: q, k [B, H, K], v [B, H, V], beta [B, H] -> y [B, H, V], state [B, H, K, V].

    y has the dtype of v, the state is fp32 (float64 stays).
    """
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta = promoted(q, k, v, beta[..., None])
        if state is not None:
            v = v - torch.einsum("bhk,bhkv->bhv", k, state)
        added = k[..., :, None] * (beta * v)[..., None, :]
        state = added if state is None else state + added
        return (torch.einsum("bhk,bhkv->bhv", q, state) * scale).to(dtype), state
