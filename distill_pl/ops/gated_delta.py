"""Delta rules: the state decays, a key's old value is erased, and its new value is written.

    S_t = (I - beta_t b_t r_t^T) diag(e^{g_t}) S_{t-1} + beta_t k_t v_t^T         y_t = scale * S_t^T q_t

- DeltaNet (Yang et al., 2025) has r = b = k and no decay; Gated DeltaNet (Yang et al., 2024) adds a log decay g <= 0 per head,
  KDA (Kimi Linear, 2025) one per key channel.
- RWKV-7 (Peng et al., 2025) reads the old value along r and erases it along b, which both differ from k.

For r = b = k, keys must have at most unit length and beta must lie between 0 and 1 (2 at most): then no step enlarges the
state; with longer keys the state explodes.

A chunk of tokens is one linear map of the state S before it and of its values v (the WY representation of Yang et al.):

    y = read S + inner v            S' = moved S + written^T v

`read` and `inner` say how queries read S and the chunk's own values, `moved` what becomes of S, `written` at which keys values
are added; shapes: see `Chunks`. All decays in this map are from one token to a later one, so none exceeds 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from distill_pl.ops import Backend, channel_decay, promoted, scalar_decay, use_fla

CHUNK = 64  # tokens of a chunk


class Inputs(NamedTuple):
    """Hold the arguments of `mix`; those of `step` are the same without the dimension T."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    beta: Tensor  # [B, T, H], between 0 and 1
    scale: float
    backend: Backend = "auto"
    g: Tensor | None = None  # log decay <= 0: [B, T, H, K], or [B, T, H, 1] for one per head; None: no decay
    r: Tensor | None = None  # [B, T, H, K]; None: r = k
    b: Tensor | None = None  # [B, T, H, K]; None: b = k


class Chunks(NamedTuple):
    """Hold the linear maps of all chunks of C tokens, [B, chunks, H, ...]; the module's docstring defines them."""

    read: Tensor  # [..., C, K]
    inner: Tensor  # [..., C, C]
    moved: Tensor  # [..., K, K]
    written: Tensor  # [..., C, K]


def _split(x: Tensor, size: int) -> Tensor:
    """Split x [B, T, ...] -> [B * chunks, size, ...] in fp32 (float64 stays), with zeros after T, which change nothing."""
    x = pad(promoted(x)[0], (*(0, 0) * (x.ndim - 2), 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).flatten(0, 1)


def _chunks(size: int, q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, r: Tensor | None, b: Tensor | None) -> Chunks:
    """Compute the maps of all chunks of `size` tokens; the tensors are those of `Inputs`."""
    batch, tied = len(q), b is None
    r, b = (k if x is None else x for x in (r, b))
    beta = beta[..., None]
    g = torch.zeros_like(beta) if g is None else g
    q, k, r, b, g, beta = (_split(x, size) for x in (q, k, r, b, g, beta))
    k, b = k * beta, b * beta
    decays = None
    if g.shape[-1] == 1:  # [B * chunks, H, size, size]: e^{G_i - G_j} for i >= j, G the cumulative sum of g
        one = torch.ones_like(beta)
        decays = scalar_decay.matrix(one, one, g[..., 0], 1.0)

    def products(x: Tensor, y: Tensor) -> Tensor:
        if decays is None:
            return channel_decay.matrix(x, y, g, 1.0)
        return x.transpose(1, 2) @ y.permute(0, 2, 3, 1) * decays

    q_k, r_k = products(q, k), products(r, k)
    q_b, r_b = (q_k, r_k) if tied else (products(q, b), products(r, b))
    since_start, until_end = g.cumsum(1).exp(), pad(g[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1).exp()
    q, r, k, b = (x.transpose(1, 2) for x in (q * since_start, r * since_start, k * until_end, b * until_end))
    # found: its row t is the old value, r_t^T diag(e^{g_t}) S_{t-1}. So (I + tril(r_b, -1)) found = r S + tril(r_k, -1) v, S
    # being the state before the chunk; solved as a map of S and of v. unitriangular takes 1 for the diagonal of r_b
    found = solve_triangular(r_b, torch.cat([r, r_k.tril(-1)], -1), upper=False, unitriangular=True)
    in_state, in_v = found.split([q.shape[-1], size], -1)
    kept = torch.diag_embed(since_start[:, -1].expand(-1, -1, q.shape[-1]))
    maps = (q - q_b @ in_state, q_k - q_b @ in_v, kept - b.mT @ in_state, k - in_v.mT @ b)
    return Chunks(*(x.unflatten(0, (batch, -1)) for x in maps))


def matrix(q: Tensor, k: Tensor, beta: Tensor, scale: float, backend: Backend = "auto", g: Tensor | None = None,
           r: Tensor | None = None, b: Tensor | None = None) -> Tensor:  # fmt: skip
    """Build A from q, k [B, T, H, K], beta [B, T, H] and g, r, b of `Inputs` -> [B, H, T, T], fp32 (float64 stays).

    Columns are built from the last chunk to the first; all later queries are carried back to the start of each chunk.
    """
    length = q.shape[1]
    columns: list[Tensor] = []
    size = min(length, max(CHUNK, -(-length // 8)))  # 8 chunks at most: torch.compile unrolls this loop
    with torch.autocast(q.device.type, enabled=False):
        chunks = _chunks(size, q, k, beta, g, r, b)
        queries = chunks.read[:, 0, :, :0]
        for read, inner, moved, written in zip(*(x.unbind(1)[::-1] for x in chunks), strict=True):
            column = torch.cat([inner, queries @ written.mT], -2)
            queries = torch.cat([read, queries @ moved], -2)
            columns.insert(0, pad(column, (0, 0, size * (chunks.read.shape[1] - 1 - len(columns)), 0)))
        return torch.cat(columns, -1)[..., :length, :length] * scale


def mix(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, backend: Backend = "auto", state: Tensor | None = None,
        g: Tensor | None = None, r: Tensor | None = None, b: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mix a sequence: q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H] -> y [B, T, H, V], state [B, H, K, V].

    g, r, b are those of `Inputs`. y has the dtype of v, the state is fp32 (float64 stays).
    """
    if use_fla(backend, q.device) and v.dtype != torch.float32:  # the kernels refuse fp32
        from distill_pl.ops.gpu import fla_kernels as kernels

        beta = beta.float()
        if r is None and b is None:
            q, k = q.to(v.dtype), k.to(v.dtype)
            if g is None:
                return kernels.delta_rule(q, k, v, beta, scale, state)
            return kernels.gated_delta(q, k, v, g.float(), beta, scale, state)
        r, b = (k if x is None else x for x in (r, b))
        g = torch.zeros_like(k, dtype=torch.float32) if g is None else g.float().expand_as(k)
        weight = beta[..., None]
        written, read, erased = k * weight, r * g.exp(), -b * weight  # the kernel reads the state before it decays
        q, k, r, b = (x.to(v.dtype) for x in (q, written, read, erased))
        return kernels.rank_one(q, k, v, r, b, g, scale, state)

    length, dtype = q.shape[1], v.dtype
    size = min(length, CHUNK)
    with torch.autocast(q.device.type, enabled=False):
        chunks = _chunks(size, q, k, beta, g, r, b)
        v = _split(v, size).unflatten(0, (len(v), -1)).transpose(2, 3)
        added = chunks.written.mT @ v  # [B, chunks, H, K, V]
        if state is None:
            state = added.new_zeros(added[:, 0].shape)
        before = []
        for moved, new in zip(chunks.moved.unbind(1), added.unbind(1), strict=True):
            before.append(state)
            state = moved @ state + new
        y = chunks.inner @ v + chunks.read @ torch.stack(before, 1)
        return (y.transpose(2, 3).flatten(1, 2)[:, :length] * scale).to(dtype), state


def step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, backend: Backend = "auto", state: Tensor | None = None,
         g: Tensor | None = None, r: Tensor | None = None, b: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply the recurrence: q, k [B, H, K], v [B, H, V], beta [B, H] -> y [B, H, V], state [B, H, K, V].

    g, r, b are those of `Inputs` without T. y has the dtype of v, the state is fp32 (float64 stays).
    """
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta = promoted(q, k, v, beta[..., None])
        if state is not None:
            if g is not None:
                state = promoted(g)[0].exp()[..., None] * state
            found = torch.einsum("bhk,bhkv->bhv", k if r is None else promoted(r)[0], state)
            if b is None:
                v = v - found
            else:
                state = state - promoted(b)[0][..., :, None] * (beta * found)[..., None, :]
        added = k[..., :, None] * (beta * v)[..., None, :]
        state = added if state is None else state + added
        return (torch.einsum("bhk,bhkv->bhv", q, state) * scale).to(dtype), state
