"""Softmax attention (the paper's Eqs. 1 and 2): the mixing of the teacher and of the control student.

    A_ij = softmax_{j <= i}(scale * q_i . k_j)

Grouped-query attention: k and v may have fewer heads than q, each serving H / kv_heads consecutive query heads.
`key_mask` [B, T] is True for the keys that may be attended to and False for padding; the state keeps it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from distill_pl.ops import promoted

State = tuple[Tensor, Tensor, Tensor]  # all keys and values so far [B, kv_heads, S, K or V], their mask [B, S]


class Inputs(NamedTuple):
    """Hold the arguments of `mix`; those of `step` are the same without the dimension T."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, kv_heads, K]
    v: Tensor  # [B, T, kv_heads, V]
    scale: float
    key_mask: Tensor | None = None  # bool [B, T]


def _visible(queries: int, key_mask: Tensor) -> Tensor:
    """Build the causal mask, bool [B, 1, queries, S], of the last `queries` of S positions; key_mask [B, S] hides padding.

    A padded query attends to itself, so that its row, which nobody reads, is finite.
    """
    keys = key_mask.shape[-1]
    query_position = torch.arange(keys - queries, keys, device=key_mask.device)[:, None]
    key_position = torch.arange(keys, device=key_mask.device)
    return ((key_position <= query_position) & key_mask[:, None, None, :]) | (key_position == query_position)


def weights(q: Tensor, k: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Compute softmax(scale * q_i . k_j) over the keys in visible, bool [B, 1, T, T] -> [B, H, T, T], fp32 (float64 stays).

    q [B, T, H, K], k [B, T, kv_heads, K].
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = promoted(q, k)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bihk,bjhk->bhij", q, k) * scale
        return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def matrix(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """Build Eq. 1's attention matrix A from q [B, T, H, K], k [B, T, kv_heads, K] -> [B, H, T, T], fp32 (float64 stays)."""
    if key_mask is None:
        key_mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    return weights(q, k, scale, _visible(q.shape[1], key_mask))


def mix(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None,
        state: State | None = None) -> tuple[Tensor, State]:  # fmt: skip
    """Compute Eq. 1 without A: q [B, T, H, K], k and v [B, T, kv_heads, K or V] -> y [B, T, H, V] in their dtype, State."""
    batch, length = q.shape[:2]
    masked = key_mask is not None or state is not None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if key_mask is None:
        key_mask = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    if state is not None:
        k, v, key_mask = (
            torch.cat(pair, dim=-2 if pair[0].ndim == 4 else -1) for pair in zip(state, (k, v, key_mask), strict=True)
        )
    visible = _visible(length, key_mask) if masked else None
    y = scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2), (k, v, key_mask)


def step(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None,
         state: State | None = None) -> tuple[Tensor, State]:  # fmt: skip
    """Compute Eq. 2, one query over all keys so far: q [B, H, K], k and v [B, kv_heads, K or V] -> y [B, H, V], State."""
    key_mask = key_mask if key_mask is None else key_mask[:, None]
    y, state = mix(q[:, None], k[:, None], v[:, None], scale, key_mask, state)
    return y[:, 0], state
