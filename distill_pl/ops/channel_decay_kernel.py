"""The channel-decay `mix` in Triton: what `channel_decay` says, in chunks of C tokens, forward and backward.

With b the cumulative sum of g from the chunk's start, S the state before the chunk and dS the gradient of the one after it,

    y = scale * ((q e^b) S + A v)                       S' = e^{b_C} S + (k e^{b_C - b})^T v
    dv = scale * A^T dy + (k e^{b_C - b}) dS            dS_before = e^{b_C} dS + scale * (q e^b)^T dy
    dg_t = sum_{s >= t in the chunk} (q_s dq_s - k_s dk_s) + sum_v S' dS

Two short scans carry S forward and dS backward in time; all else is done for all chunks at once. A is split as by
`channel_decay._triangle`: on the level that joins halves of s tokens, with R the b of the left half's last token,

    A_ij = (q_i e^{b_i - R}) (k_j e^{R - b_j})^T        i in the right, j in the left half of the same 2 s tokens

as a product over the whole chunk, masked. One configuration for all shapes: nothing is tuned when it first runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16
SCAN_KEYS = 32  # in one program of the scans
SCAN, OUTPUTS, GRADIENTS = ({"num_warps": warps, "num_stages": stages} for warps, stages in ((4, 1), (2, 1), (2, 1)))


@triton.jit
def _where(sequence, first, T, H, X: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """Where C tokens of N of X numbers lie in [B, T, H, X]: the first of them, the others relative to it, which exist."""
    row = tl.arange(0, C)[:, None]
    corner = ((sequence // H).to(tl.int64) * T + first) * H + sequence % H
    return corner * X, row * (H * X) + tl.arange(0, N)[None, :], first + row < T


@triton.jit
def _load(x, sequence, first, T, H, X: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    corner, inside, exists = _where(sequence, first, T, H, X, C, N)
    return tl.load(x + corner + inside, exists, 0.0)


@triton.jit
def _store(x, value, sequence, first, T, H, X: tl.constexpr, C: tl.constexpr):
    corner, inside, exists = _where(sequence, first, T, H, X, C, X)
    tl.store(x + corner + inside, value.to(x.dtype.element_ty), exists)


@triton.jit
def _grid(rows: tl.constexpr, X: tl.constexpr, columns: tl.constexpr):
    """Where [rows, columns] lie in [rows, X]."""
    return tl.arange(0, rows)[:, None] * X + tl.arange(0, columns)[None, :]


@triton.jit
def _scan(k, v, g, initial, sums, states, final, T, H, chunks, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
          N: tl.constexpr):  # fmt: skip
    """Forward in time, for N keys: b of all tokens [B H, chunks, C, K], S before every chunk and after the last."""
    sequence, start = tl.program_id(0), tl.program_id(1) * N
    square = sequence.to(tl.int64) * (K * V) + start * V
    if initial is None:
        state = tl.zeros([N, V], tl.float32)
    else:
        state = tl.load(initial + square + _grid(N, V, V))
    for chunk in range(chunks):
        block, first = sequence.to(tl.int64) * chunks + chunk, chunk * C
        g_chunk = _load(g + start, sequence, first, T, H, K, C, N)
        k_chunk = _load(k + start, sequence, first, T, H, K, C, N)
        v_chunk = _load(v, sequence, first, T, H, V, C, V)
        b, total = tl.cumsum(g_chunk, 0), tl.sum(g_chunk, 0)
        tl.store(sums + block * (C * K) + start + _grid(C, K, N), b)
        tl.store(states + block * (K * V) + start * V + _grid(N, V, V), state.to(v_chunk.dtype))
        added = (k_chunk * tl.exp(total[None, :] - b)).to(v_chunk.dtype)
        state = tl.dot(tl.trans(added), v_chunk, state * tl.exp(total)[:, None])
    tl.store(final + square + _grid(N, V, V), state)


@triton.jit
def _scan_back(q, dy, sums, d_final, d_states, d_initial, scale, T, H, chunks, K: tl.constexpr, V: tl.constexpr,
               C: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Backward in time, for N keys: the gradient of S after every chunk and before the first."""
    sequence, start = tl.program_id(0), tl.program_id(1) * N
    square = sequence.to(tl.int64) * (K * V) + start * V
    d_state = tl.load(d_final + square + _grid(N, V, V))
    for done in range(chunks):
        chunk = chunks - 1 - done
        block, first = sequence.to(tl.int64) * chunks + chunk, chunk * C
        q_chunk = _load(q + start, sequence, first, T, H, K, C, N)
        dy_chunk = _load(dy, sequence, first, T, H, V, C, V)
        b = tl.load(sums + block * (C * K) + start + _grid(C, K, N))
        total = tl.load(sums + block * (C * K) + (C - 1) * K + start + tl.arange(0, N))
        tl.store(d_states + block * (K * V) + start * V + _grid(N, V, V), d_state.to(dy_chunk.dtype))
        read = (q_chunk * (tl.exp(b) * scale)).to(dy_chunk.dtype)
        d_state = tl.dot(tl.trans(read), dy_chunk, d_state * tl.exp(total)[:, None])
    tl.store(d_initial + square + _grid(N, V, V), d_state)


@triton.jit
def _level(level, q, k, b, sums, K: tl.constexpr, C: tl.constexpr):
    """Of one level: which tokens are in a right half, e^{-|b - R|}, and [q e^{b - R} there, k e^{R - b} in left halves]."""
    token, s = tl.arange(0, C), 1 << level
    right = ((token & s) != 0)[:, None]
    border = tl.load(sums + ((token >> level + 1 << level + 1) + s - 1)[:, None] * K + tl.arange(0, K)[None, :])
    weight = tl.exp(-tl.abs(b - border))
    return right, weight, (tl.where(right, q, k) * weight).to(q.dtype)


@triton.jit
def _outputs(q, k, v, sums, states, y, scale, T, H, chunks, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
             LEVELS: tl.constexpr):  # fmt: skip
    sequence, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * C
    block = tl.program_id(0).to(tl.int64)
    q, k = _load(q, sequence, first, T, H, K, C, K), _load(k, sequence, first, T, H, K, C, K)
    sums += block * (C * K)
    b = tl.load(sums + _grid(C, K, K))
    state = tl.load(states + block * (K * V) + _grid(K, V, V))
    out = tl.dot((q * tl.exp(b)).to(state.dtype), state)
    row = tl.arange(0, C)
    apart = row[:, None] ^ row[None, :]
    a = tl.zeros([C, C], tl.float32)
    for level in range(LEVELS):
        _, _, halves = _level(level, q, k, b, sums, K, C)
        a = tl.where(apart >> level == 1, tl.dot(halves, tl.trans(halves)), a)
    a = tl.where(row[:, None] > row[None, :], a, tl.where(apart == 0, tl.sum(q.to(tl.float32) * k, 1)[:, None], 0.0))
    v = _load(v, sequence, first, T, H, V, C, V)
    _store(y, tl.dot(a.to(v.dtype), v, out) * scale, sequence, first, T, H, V, C)


@triton.jit
def _gradients(q, k, v, dy, sums, states, d_states, dq, dk, dv, dg, scale, T, H, chunks, K: tl.constexpr, V: tl.constexpr,
               C: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    sequence, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * C
    block = tl.program_id(0).to(tl.int64)
    q, k = _load(q, sequence, first, T, H, K, C, K), _load(k, sequence, first, T, H, K, C, K)
    v, dy = _load(v, sequence, first, T, H, V, C, V), _load(dy, sequence, first, T, H, V, C, V)
    sums += block * (C * K)
    b, total = tl.load(sums + _grid(C, K, K)), tl.load(sums + (C - 1) * K + tl.arange(0, K))
    state = tl.load(states + block * (K * V) + _grid(K, V, V))
    d_state = tl.load(d_states + block * (K * V) + _grid(K, V, V))
    # what goes through the states
    q_grad = tl.dot(dy, tl.trans(state)) * (tl.exp(b) * scale)
    k_grad = tl.dot(v, tl.trans(d_state)) * tl.exp(total[None, :] - b)
    later = tl.exp(total) * tl.sum(state.to(tl.float32) * d_state, 1) + tl.sum(k * k_grad, 0)
    added = (k * tl.exp(total[None, :] - b)).to(v.dtype)
    v_grad = tl.dot(added, d_state)
    # what goes through A: a and its gradient are symmetric here, one half of each is A's
    row = tl.arange(0, C)
    apart = row[:, None] ^ row[None, :]
    da = tl.where(row[:, None] > row[None, :], tl.dot(dy, tl.trans(v)), tl.dot(v, tl.trans(dy))) * scale
    a = tl.zeros([C, C], tl.float32)
    for level in range(LEVELS):
        right, weight, halves = _level(level, q, k, b, sums, K, C)
        a = tl.where(apart >> level == 1, tl.dot(halves, tl.trans(halves)), a)
        grad = tl.dot(tl.where(apart >> level == 1, da, 0.0).to(v.dtype), halves) * weight
        q_grad += tl.where(right, grad, 0.0)
        k_grad += tl.where(right, 0.0, grad)
    a = tl.where(row[:, None] < row[None, :], a, tl.where(apart == 0, tl.sum(q.to(tl.float32) * k, 1)[:, None], 0.0))
    v_grad += tl.dot(a.to(v.dtype), dy) * scale
    # the diagonal of A does not depend on g
    _store(dg, tl.cumsum(q * q_grad - k * k_grad, 0, reverse=True) + later[None, :], sequence, first, T, H, K, C)
    diagonal = tl.sum(dy.to(tl.float32) * v, 1)[:, None] * scale
    _store(dq, q_grad + diagonal * k, sequence, first, T, H, K, C)
    _store(dk, k_grad + diagonal * q, sequence, first, T, H, K, C)
    _store(dv, v_grad, sequence, first, T, H, V, C)


def _scanned(k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The sizes every kernel ends with (T, H, chunks, K, V, C), and the results of `_scan`."""
    (batch, length, heads, key), value = k.shape, v.shape[-1]
    chunks, keys = triton.cdiv(length, CHUNK), min(key, SCAN_KEYS)
    sizes = length, heads, chunks, key, value, CHUNK
    sums, final = g.new_empty(batch, heads, chunks, CHUNK, key), g.new_empty(batch, heads, key, value)
    states = v.new_empty(batch, heads, chunks, key, value)
    _scan[batch * heads, key // keys](k, v, g, state, sums, states, final, *sizes, keys, **SCAN)
    return sizes, sums, states, final


@torch.library.custom_op("distill_pl::channel_decay", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    y = torch.empty_like(v)
    with torch.cuda.device_of(q):
        sizes, sums, states, final = _scanned(k, v, g, None if state is None else state.contiguous())
        blocks, levels = states[..., 0, 0].numel(), CHUNK.bit_length() - 1
        _outputs[blocks,](q, k, v, sums, states, y, scale, *sizes, levels, **OUTPUTS)
    return y, final


@torch.library.custom_op("distill_pl::channel_decay_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor | None, dy: Tensor,
              d_final: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, g, dy, d_final = (x.contiguous() for x in (q, k, v, g, dy, d_final))
    dq, dk, dv, dg, d_initial = (torch.empty_like(x) for x in (q, k, v, g, d_final))
    with torch.cuda.device_of(q):
        sizes, sums, states, _ = _scanned(k, v, g, None if state is None else state.contiguous())
        blocks, levels = states[..., 0, 0].numel(), CHUNK.bit_length() - 1
        d_states, (batch, _, heads, key), keys = torch.empty_like(states), k.shape, min(k.shape[-1], SCAN_KEYS)
        _scan_back[batch * heads, key // keys](q, dy, sums, d_final, d_states, d_initial, scale, *sizes, keys, **SCAN)
        results = dq, dk, dv, dg
        _gradients[blocks,](q, k, v, dy, sums, states, d_states, *results, scale, *sizes, levels, **GRADIENTS)
    return dq, dk, dv, dg, d_initial


@_forward.register_fake
def _(q, k, v, g, scale, state):
    final = g.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    return torch.empty_like(v, memory_format=torch.contiguous_format), final


@_backward.register_fake
def _(q, k, v, g, scale, state, dy, d_final):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, d_final))


def _save(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, state = inputs
    ctx.save_for_backward(q, k, v, g, state)


def _differentiate(ctx, dy, d_final):
    q, k, v, g, state = ctx.saved_tensors
    dq, dk, dv, dg, d_initial = _backward(q, k, v, g, ctx.scale, state, dy, d_final)
    return dq, dk, dv, dg, None, None if state is None else d_initial


_forward.register_autograd(_differentiate, setup_context=_save)


def fused(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K] and v [B, T, H, V] of one dtype, g and state fp32, K and V powers of two -> y, state.

    Differentiable, both ways through the state; one operator to torch.compile.
    """
    return _forward(q, k, v, g, scale, state)
