"""Linear attention with a decay per key channel: GLA (Yang et al., 2024) and, with other gates, HGRN2 and MetaLA.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T         y_t = scale * S_t^T q_t
    A_ij = scale * sum_c q_ic k_jc e^{G_ic - G_jc}  with G the cumulative sum of the log decay g <= 0

If a temperature is given, g holds the logits of gates: the log decay is then logsigmoid(g) / temperature.

The textbook factorisation (q e^G)(k e^-G)^T overflows fp32 within a few hundred tokens. `_triangle` avoids that: it splits
the sequence into blocks of keys, and a query that looks back past a block is decayed by that block's total decay. G is then
measured from the end of each block, so no exponent is ever positive. The diagonal blocks are computed recursively.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from distill_pl.ops import Backend, promoted, use_fla

SMALL = 8  # up to so many queries, q k^T is a sum over channels instead of a matrix product
CHUNK = 64  # tokens that `mix` mixes by their matrix A; between chunks it passes on the K x V state
# widths K and V of the package's own kernel; all others take fla's, which autotunes for minutes at every new shape
FUSED = (16, 32, 64, 128)


class Inputs(NamedTuple):
    """Hold the arguments of `mix`; those of `step` are the same without the dimension T."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    g: Tensor  # [B, T, H, K]: log decay <= 0, or the gate's logits if there is a temperature
    scale: float
    backend: Backend = "auto"
    temperature: float | None = None


def log_decay(g: Tensor, temperature: float | None) -> Tensor:
    """Return the log decay <= 0 in fp32 (float64 stays), in the shape of g; g holds logits if there is a temperature."""
    (g,) = promoted(g)
    return g if temperature is None else logsigmoid(g) / temperature


def _triangle(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Build A without its scale. q, k, log decay g [..., T, K], T a power of two -> [..., T, T]."""
    if q.shape[-2] == 1:
        return (q * k).sum(-1, keepdim=True)  # A_ii: nothing has decayed
    q, k, g = (x.unflatten(-2, (min(8, q.shape[-2]), -1)) for x in (q, k, g))  # [..., blocks, size, K]
    diagonal = _triangle(q, k, g)  # [..., blocks, size, size]
    blocks, size = diagonal.shape[-3:-1]
    q, k, block_decay = q * g.cumsum(-2).exp(), k * _sum_after(g).exp(), g.sum(-2, keepdim=True).exp()
    columns: list[Tensor] = []
    queries = q[..., 0, :0, :]  # of all blocks after block j, decayed since the end of block j
    for j in reversed(range(blocks)):
        column = torch.cat([diagonal[..., j, :, :], _products(queries, k[..., j, :, :])], -2)
        columns.insert(0, pad(column, (0, 0, j * size, 0)))
        queries = torch.cat([q[..., j, :, :], queries * block_decay[..., j, :, :]], -2)
    return torch.cat(columns, -1)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Compute q k^T: [..., S, K], [..., size, K] -> [..., S, size]; matrix products are slow for very many small matrices."""
    return (q[..., :, None, :] * k[..., None, :, :]).sum(-1) if q.shape[-2] <= SMALL else q @ k.mT


def _sum_after(g: Tensor) -> Tensor:
    """Sum g [..., T, K] over all later tokens, from the end: a difference of sums from the start would lose digits."""
    return g.flip(-2).cumsum(-2).flip(-2) - g


def _heads_first(length: int, *tensors: Tensor) -> list[Tensor]:
    """Transpose [B, T, H, X] -> [B, H, length, X] in fp32 (float64 stays), with zeros after T, which change nothing."""
    return [pad(x.transpose(1, 2), (0, 0, 0, length - x.shape[1])) for x in promoted(*tensors)]


def matrix(q: Tensor, k: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
           temperature: float | None = None) -> Tensor:  # fmt: skip
    """Build A from q, k, g [B, T, H, K] -> [B, H, T, T], fp32 (float64 stays), by O(T K log T) exponentials."""
    length = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, g = _heads_first(1 << (length - 1).bit_length(), q, k, log_decay(g, temperature))
        return _triangle(q, k, g)[..., :length, :length] * scale


def mix(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
        state: Tensor | None = None, temperature: float | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mix a sequence: q, k, g [B, T, H, K], v [B, T, H, V] -> y [B, T, H, V] in the dtype of v, state [B, H, K, V] fp32."""
    if use_fla(backend, q.device):
        q, k = q.to(v.dtype), k.to(v.dtype)
        small = q.shape[-1] * v.shape[-1] <= 64 * 64
        # with wider heads in fp32 the kernel needs a large GPU
        if q.shape[-1] in FUSED and v.shape[-1] in FUSED and (small or v.dtype == torch.bfloat16):
            from distill_pl.ops.gpu.channel_decay import fused

            dtype = v.dtype
            if dtype == torch.float16:  # its exponent range is too small for the kernel
                q, k, v = q.float(), k.float(), v.float()
            y, state = fused(q, k, v, g, scale, state, temperature)
            return y.to(dtype), state
        from distill_pl.ops.gpu import fla_kernels as kernels

        g = log_decay(g, temperature)
        return kernels.chunk_gla(q, k, v, g, scale=scale, initial_state=state, output_final_state=True)

    length, dtype = q.shape[1], v.dtype
    size = min(CHUNK, 1 << (length - 1).bit_length())
    with torch.autocast(q.device.type, enabled=False):
        padded = _heads_first(-(-length // size) * size, q, k, v, log_decay(g, temperature))
        q, k, v, g = (x.unflatten(2, (-1, size)) for x in padded)  # [B, H, chunks, size, K or V]
        decay = g.cumsum(-2)
        total = decay[..., -1:, :]
        added = (k * _sum_after(g).exp()).mT @ v  # [B, H, chunks, K, V]: what each chunk adds to the state after it
        if state is None:
            state = added.new_zeros(added[:, :, 0].shape)
        before = []
        for chunk in range(q.shape[2]):
            before.append(state)
            state = total[:, :, chunk].exp().mT * state + added[:, :, chunk]
        y = _triangle(q, k, g) @ v + (q * decay.exp()) @ torch.stack(before, 2)
        return (y.flatten(2, 3)[:, :, :length] * scale).transpose(1, 2).to(dtype), state


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, backend: Backend = "auto",
         state: Tensor | None = None, temperature: float | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply the recurrence: q, k, g [B, H, K], v [B, H, V] -> y [B, H, V] in the dtype of v, state [B, H, K, V] fp32."""
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = promoted(q, k, v, log_decay(g, temperature))
        added = k[..., :, None] * v[..., None, :]
        state = added if state is None else g.exp()[..., None] * state + added
        return (torch.einsum("bhk,bhkv->bhv", q, state) * scale).to(dtype), state
