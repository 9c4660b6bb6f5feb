"""Softmax attention within a sliding window and to the first tokens, the sinks (Xiao et al., 2024, StreamingLLM).

    A_ij = softmax(scale * q_i . k_j) over the keys j <= i that are among the last `window` tokens, i included, or the `sinks`

The sinks are the first tokens of a row that are not padding; `key_mask` [B, T] is False for padding. k and v may have fewer
heads than q (grouped-query attention). Time and memory grow linearly with T, and the state has a constant size: a token that
leaves the window becomes a sink if there are fewer than `sinks`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from distill_pl.ops import softmax

# keys and values of the sinks, then of the last window - 1 tokens [B, kv_heads, S, K or V]; which of them exist, bool [B, S]
State = tuple[Tensor, Tensor, Tensor]


class Inputs(NamedTuple):
    """Hold the arguments of `mix`; those of `step` are the same without the dimension T."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, kv_heads, K]
    v: Tensor  # [B, T, kv_heads, V]
    scale: float
    window: int
    sinks: int
    key_mask: Tensor | None = None  # bool [B, T]


def _first(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the first `count` True entries of each row of mask [B, S] -> their indices, and which exist, both [B, count]."""
    number = torch.arange(1, count + 1, device=mask.device)[:, None]
    found = mask[:, None] & (mask.cumsum(-1)[:, None] == number)
    return found.int().argmax(-1), found.any(-1)


def _select(x: Tensor, index: Tensor, exists: Tensor) -> Tensor:
    """Select tokens of x [B, heads, S, X] by index [B, N] -> [B, heads, N, X], zero where there is none."""
    return x.take_along_dim(index[:, None, :, None], 2).where(exists[:, None, :, None], 0)


def _visible(queries: int, mask: Tensor, window: int, sinks: int) -> Tensor:
    """Build the mask, bool [B, 1, queries, S], of the last `queries` of S tokens; mask [B, S] hides padding.

    A padded query attends to itself, so that its row, which nobody reads, is finite.
    """
    position = torch.arange(mask.shape[-1], device=mask.device)
    distance = (position[len(position) - queries :, None] - position).expand(len(mask), 1, -1, -1)
    is_sink = mask.cumsum(-1) <= sinks
    seen = mask[:, None, None] & ((distance < window) | is_sink[:, None, None])
    return (seen & (distance >= 0)) | (distance == 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Attend from q [B, H, T, K] to k and v [B, kv_heads, S, K or V] where visible [B, 1, T, S] -> [B, H, T, V].

    Queries that share a kv head are concatenated over T: no memory-efficient kernel takes grouped heads with a mask.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    visible = visible.repeat(1, 1, grouped.shape[2], 1)
    y = scaled_dot_product_attention(grouped.flatten(2, 3), k, v, attn_mask=visible, scale=scale)
    return y.unflatten(2, grouped.shape[2:4]).flatten(1, 2)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, window: int, sinks: int) -> Tensor:
    """Attend from the last T of S tokens, in blocks of `window` queries, to their own block, the one before it and the sinks.

    q [B, H, T, K], k and v [B, kv_heads, S, K or V], mask bool [B, S], False for padding -> [B, H, T, V].
    """
    batch, queries, missing = len(q), q.shape[2], -k.shape[2] % window
    q = pad(q, (0, 0, k.shape[2] - queries + missing, 0))
    k, v, mask = pad(k, (0, 0, missing, 0)), pad(v, (0, 0, missing, 0)), pad(mask, (missing, 0))
    index, exists = _first(mask, sinks)

    def per_block(x: Tensor) -> Tensor:
        own = x.unflatten(2, (-1, window))  # [B, heads, blocks, window, X]
        previous = pad(own[:, :, :-1], (0, 0, 0, 0, 1, 0))
        sink = _select(x, index, exists)[:, :, None].expand(-1, -1, own.shape[2], -1, -1)
        return torch.cat([sink, previous, own], 3).transpose(1, 2).flatten(0, 1)  # [B blocks, heads, sinks + 2 window, X]

    position = torch.arange(mask.shape[1], device=q.device).unflatten(0, (-1, window))  # [blocks, window]
    distance = position[0, :, None] - torch.arange(-window, window, device=q.device)
    own = mask.unflatten(1, (-1, window))
    there = torch.cat([pad(own[:, :-1], (0, 0, 1, 0)), own], 2)[:, :, None]
    near = (there & (distance >= 0) & (distance < window)) | (distance == 0)
    far = exists[:, None, None] & (position[..., None] - index[:, None, None] >= window)  # sinks in the window are in `near`
    visible = torch.cat([far, near], 3).flatten(0, 1)[:, None]  # [B blocks, 1, window, sinks + 2 window]
    blocks = q.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)
    y = _attend(blocks, per_block(k), per_block(v), scale, visible)
    return y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, -queries:]


def _attend_compiled(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: int) -> Tensor:
    """Attend from q [B, H, T, K] to k and v [B, kv_heads, T, K or V], without padding -> [B, H, T, V].

    FlexAttention's kernel skips blocks of keys that no query of a block sees. It needs torch.compile, K and V of at
    least 16 and, for gradients, a GPU.
    """

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((query - key < window) | (key < sinks))

    mask = create_block_mask(seen, None, None, q.shape[2], k.shape[2], device=q.device)
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)


def _remember(k: Tensor, v: Tensor, mask: Tensor, window: int, sinks: int) -> State:
    """Return the state after all S tokens, from k and v [B, kv_heads, S, K or V] and mask bool [B, S], False for padding."""
    missing = max(0, sinks + window - 1 - mask.shape[1])
    k, v, mask = pad(k, (0, 0, missing, 0)), pad(v, (0, 0, missing, 0)), pad(mask, (missing, 0))
    border = mask.shape[1] - (window - 1)
    index, exists = _first(mask[:, :border], sinks)
    k, v = (torch.cat([_select(x, index, exists), x[:, :, border:]], 2) for x in (k, v))
    return k, v, torch.cat([exists, mask[:, border:]], 1)


def matrix(q: Tensor, k: Tensor, scale: float, window: int, sinks: int, key_mask: Tensor | None = None) -> Tensor:
    """Build A from q [B, T, H, K], k [B, T, kv_heads, K] -> [B, H, T, T], fp32 (float64 stays)."""
    if key_mask is None:
        key_mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    return softmax.weights(q, k, scale, _visible(q.shape[1], key_mask, window, sinks))


def mix(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: int, key_mask: Tensor | None = None,
        state: State | None = None) -> tuple[Tensor, State]:  # fmt: skip
    """Mix a sequence: q [B, T, H, K], k and v [B, T, kv_heads, K or V] -> y [B, T, H, V] in their dtype, State."""
    flex = q.is_cuda and torch.compiler.is_compiling() and key_mask is None and state is None  # as in training steps
    if key_mask is None:
        key_mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if state is not None:  # window - 1 tokens lie between its sinks and the new ones, so sinks are in no window
        k, v, key_mask = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2), torch.cat([state[2], key_mask], 1)
    if flex and min(q.shape[-1], v.shape[-1]) >= 16:
        y = _attend_compiled(q, k, v, scale, window, sinks)
    elif q.shape[2] <= window:
        y = _attend(q, k, v, scale, _visible(q.shape[2], key_mask, window, sinks))
    else:
        y = _attend_in_blocks(q, k, v, scale, key_mask, window, sinks)
    return y.transpose(1, 2), _remember(k, v, key_mask, window, sinks)


def step(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: int, key_mask: Tensor | None = None,
         state: State | None = None) -> tuple[Tensor, State]:  # fmt: skip
    """Attend from one token: q [B, H, K], k and v [B, kv_heads, K or V] -> y [B, H, V], State."""
    key_mask = key_mask if key_mask is None else key_mask[:, None]
    y, state = mix(q[:, None], k[:, None], v[:, None], scale, window, sinks, key_mask, state)
    return y[:, 0], state
