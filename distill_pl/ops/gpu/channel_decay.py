"""Compute `mix` of `distill_pl.ops.channel_decay` and its gradients in Triton.

    sequence   T tokens of one row and one head; the B H sequences are independent of each other
    segment    tokens of a sequence through which one program walks; S, or backward dS, stays in its registers
    block      64 tokens (BLOCK), the shortest segment; the backward pass stores S after each block
    chunk      C = 16 tokens (CHUNK; in scans 64), which are mixed by their matrix A

For each chunk, with b the cumulative sum of g from the chunk's start, S the state before it, S' the state after it, and dS the
gradient of S',

    y = scale * ((q e^b) S + A v)                       S' = e^{b_C} S + (k e^{b_C - b})^T v
    dv = scale * A^T dy + (k e^{b_C - b}) dS            dS_before = e^{b_C} dS + scale * (q e^b)^T dy
    dg_t = sum_{t <= s <= e} (q_s dq_s - k_s dk_s) + sum_v S'_e dS_e, with e the last token of t's block

With a temperature, g holds the gate's logits: the log decay is computed from them inside the kernels, so that it is never
written in fp32, and dg is the gradient of the logits.

A is one product, A_ij = (q_i e^{b_i - R}) (k_j e^{R - b_j})^T with R = b_C / 2. So that no exponent overflows, g below LOWEST
counts as LOWEST; what such a token then leaves of the past, 1e-4, is a thirtieth of bf16's rounding.

Where there are too few sequences to fill a GPU, each is cut into several segments, and two scans first compute S and dS at
their borders; else a sequence is one segment. One configuration serves all shapes: nothing is tuned at a first call.

Shape letters: B batch, T time, H heads, K key dim per head, V value dim per head; X is K or V; N key channels of one program.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from distill_pl.ops.gpu import contiguous

CHUNK = 16
LOG2_E = tl.constexpr(math.log2(math.e))  # e^x is computed as 2^(x log2 e), which is one instruction
LOWEST = tl.constexpr(-9 * LOG2_E.value)  # g = -9: then |b - R| <= CHUNK * 9 / 2 = 72, and e^72 = 2e31 fits into fp32 and bf16
BLOCK = 64  # tokens of a scan's iteration, and of the shortest segment
PROGRAMS = 512  # enough to fill a GPU: an H200 has 132 multiprocessors, with room for three programs of small states each
SCAN_KEYS = 32  # key channels of one program of a scan
STATE_OF_A_WARP = 1024  # numbers of the state that one warp's registers hold


@triton.jit
def _where(sequence, first, T, H, X: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """Locate N channels of C tokens in [B, T, H, X] -> offset of the first, offsets from there [C, N], which tokens exist."""
    row = tl.arange(0, C)[:, None]
    corner = (((sequence // H).to(tl.int64) * T + first) * H + sequence % H) * X
    return corner, row * (H * X) + tl.arange(0, N)[None, :], first + row < T


@triton.jit
def _load(x, sequence, first, T, H, X: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    corner, inside, exists = _where(sequence, first, T, H, X, C, N)
    return tl.load(x + corner + inside, exists, 0.0)


@triton.jit
def _store(x, value, sequence, first, T, H, X: tl.constexpr, C: tl.constexpr):
    corner, inside, exists = _where(sequence, first, T, H, X, C, X)
    tl.store(x + corner + inside, value.to(x.dtype.element_ty), exists)


@triton.jit
def _grid(rows: tl.constexpr, columns: tl.constexpr):
    """Return the offsets of a contiguous matrix [rows, columns]."""
    return tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]


@triton.jit
def _below(C: tl.constexpr):
    """Return the mask of the strict lower triangle [C, C]."""
    return tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]


@triton.jit
def _diagonal(x, C: tl.constexpr):
    """Take the diagonal of x [C, C] as [C, 1]."""
    return tl.sum(tl.where(tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :], x, 0.0), 1)[:, None]


@triton.jit
def _gates(g, sequence, first, T, H, K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, temperature: tl.constexpr):
    """Compute the log2 decay of N channels [C, N] from g, or from the logits g if there is a temperature."""
    decay = _load(g, sequence, first, T, H, K, C, N).to(tl.float32) * LOG2_E
    if temperature is not None:  # a token after the last reads the logit 0, but must not decay
        decay = (tl.minimum(decay, 0.0) - libdevice.fast_log2f(1.0 + libdevice.exp2(-tl.abs(decay)))) * (1 / temperature)
        decay = tl.where(first + tl.arange(0, C)[:, None] < T, decay, 0.0)
    return tl.maximum(decay, LOWEST)


@triton.jit
def _decays(g, sequence, first, T, H, K: tl.constexpr, C: tl.constexpr, temperature: tl.constexpr):
    """Compute b - R [C, K], in log2, and e^R [K].

    b_i - R = (sum of g up to token i - sum of g after it) / 2: g times a matrix of +-1/2, on tensor cores. As these take bf16,
    g is split into its upper 16 bits, which are a bf16 number, and the rest, rounded to bf16.
    """
    g = _gates(g, sequence, first, T, H, K, C, K, temperature)
    high = (g.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    halves = (0.5 - tl.trans(_below(C)).to(tl.float32)).to(tl.bfloat16)
    b = tl.dot(halves, (g - high).to(tl.bfloat16), tl.dot(halves, high.to(tl.bfloat16)))
    return b, libdevice.exp2(tl.sum(tl.where(tl.arange(0, C)[:, None] == C - 1, b, 0.0), 0))


@triton.jit
def _state(x, index, K: tl.constexpr, V: tl.constexpr):
    """Load state `index` of x [..., K, V], or zeros if x is None."""
    if x is None:
        state = tl.zeros([K, V], tl.float32)
    else:
        state = tl.load(x + index.to(tl.int64) * (K * V) + _grid(K, V))
    return state


# T: a sequence's length; size: a segment's. Decays are in log2 here. In kernels with `half`, b is the docstring's b - R, and
# S is scaled by half = e^R before and after each chunk, so that up = q e^{b - R} and down = k e^{R - b} serve both A and S.


@triton.jit
def _scan(k, v, g, initial, starts, T, H, segments, size, temperature: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
          C: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Compute S before every segment, for N key channels, forward in time."""
    sequence, start = tl.program_id(0), tl.program_id(1) * N
    state = _state(initial, sequence * (K // N) + tl.program_id(1), N, V)
    for segment in range(segments):
        tl.store(starts + ((sequence.to(tl.int64) * segments + segment) * K + start) * V + _grid(N, V), state)
        if segment < segments - 1:
            for first in range(segment * size, segment * size + size, C):
                g_chunk = _gates(g + start, sequence, first, T, H, K, C, N, temperature)
                b, total = tl.cumsum(g_chunk, 0), tl.sum(g_chunk, 0)
                v_chunk = _load(v, sequence, first, T, H, V, C, V)
                added = _load(k + start, sequence, first, T, H, K, C, N) * libdevice.exp2(total[None, :] - b)
                state = tl.dot(tl.trans(added.to(v_chunk.dtype)), v_chunk, state * libdevice.exp2(total)[:, None])


@triton.jit
def _scan_back(q, dy, g, d_final, ends, scale, T, H, segments, size, temperature: tl.constexpr, K: tl.constexpr,
               V: tl.constexpr, C: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Compute the gradient of S after every segment, for N key channels, backward in time."""
    sequence, start = tl.program_id(0), tl.program_id(1) * N
    d_state = _state(d_final, sequence * (K // N) + tl.program_id(1), N, V)
    for done in range(segments):
        segment = segments - 1 - done
        tl.store(ends + ((sequence.to(tl.int64) * segments + segment) * K + start) * V + _grid(N, V), d_state)
        if segment > 0:
            for before in range(0, size, C):
                first = segment * size + size - C - before
                g_chunk = _gates(g + start, sequence, first, T, H, K, C, N, temperature)
                b, total = tl.cumsum(g_chunk, 0), tl.sum(g_chunk, 0)
                dy_chunk = _load(dy, sequence, first, T, H, V, C, V)
                read = _load(q + start, sequence, first, T, H, K, C, N) * (libdevice.exp2(b) * scale)
                d_state = tl.dot(tl.trans(read.to(dy_chunk.dtype)), dy_chunk, d_state * libdevice.exp2(total)[:, None])


@triton.jit
def _outputs(q, k, v, g, starts, y, final, scale, T, H, segments, size, temperature: tl.constexpr, K: tl.constexpr,
             V: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Compute y of a segment, and S after the last segment."""
    sequence, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    state = _state(starts, tl.program_id(0), K, V)
    for first in range(segment * size, tl.minimum(segment * size + size, T), C):
        b, half = _decays(g, sequence, first, T, H, K, C, temperature)
        q_chunk, k_chunk = _load(q, sequence, first, T, H, K, C, K), _load(k, sequence, first, T, H, K, C, K)
        v_chunk = _load(v, sequence, first, T, H, V, C, V)
        dtype: tl.constexpr = v_chunk.dtype
        up, down = (q_chunk * libdevice.exp2(b)).to(dtype), (k_chunk * libdevice.exp2(-b)).to(dtype)
        state *= half[:, None]
        a = tl.where(tl.trans(_below(C)), 0.0, tl.dot(up, tl.trans(down)))
        out = tl.dot(a.to(dtype), v_chunk, tl.dot(up, state.to(dtype)))
        _store(y, out * scale, sequence, first, T, H, V, C)
        state = tl.dot(tl.trans(down), v_chunk, state) * half[:, None]
    if segment == segments - 1:
        tl.store(final + sequence.to(tl.int64) * (K * V) + _grid(K, V), state)


@triton.jit
def _d_queries(q, k, v, g, dy, starts, dq, inner, states, scale, T, H, segments, size, temperature: tl.constexpr,
               K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Compute dq of a segment, `inner` = q dq without the share of A's diagonal, and S after every block of BLOCK tokens."""
    sequence, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    blocks = tl.cdiv(T, BLOCK)
    state = _state(starts, tl.program_id(0), K, V)
    for first in range(segment * size, tl.minimum(segment * size + size, T), C):
        b, half = _decays(g, sequence, first, T, H, K, C, temperature)
        q_chunk, k_chunk = _load(q, sequence, first, T, H, K, C, K), _load(k, sequence, first, T, H, K, C, K)
        v_chunk, dy_chunk = _load(v, sequence, first, T, H, V, C, V), _load(dy, sequence, first, T, H, V, C, V)
        dtype: tl.constexpr = v_chunk.dtype
        down = (k_chunk * libdevice.exp2(-b)).to(dtype)
        state *= half[:, None]
        da = tl.dot(dy_chunk, tl.trans(v_chunk))
        now = _diagonal(da, C) * scale
        da = tl.where(_below(C), da, 0.0)
        grad = tl.trans(tl.dot(state.to(dtype), tl.trans(dy_chunk)))  # so the state is read from registers as it lies
        grad = tl.dot(da.to(dtype), down, grad) * (libdevice.exp2(b) * scale)
        _store(inner, q_chunk * grad, sequence, first, T, H, K, C)
        _store(dq, grad + now * k_chunk, sequence, first, T, H, K, C)
        state = tl.dot(tl.trans(down), v_chunk, state) * half[:, None]
        if (first + C) % BLOCK == 0 or first + C >= T:
            block = sequence.to(tl.int64) * blocks + first // BLOCK
            tl.store(states + block * (K * V) + _grid(K, V), state.to(dtype))


@triton.jit
def _d_others(q, k, v, g, dy, ends, inner, states, dk, dv, dg, d_initial, scale, T, H, segments, size,
              temperature: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Compute dk, dv and dg of a segment, and the gradient of S before the first segment."""
    sequence, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    blocks = tl.cdiv(T, BLOCK)
    d_state = _state(ends, tl.program_id(0), K, V)
    later = tl.zeros([C, K], tl.float32)  # all rows are equal
    tokens = tl.minimum(T - segment * size, size)
    for before in range(0, tl.cdiv(tokens, C)):
        first = segment * size + (tl.cdiv(tokens, C) - 1 - before) * C
        b, half = _decays(g, sequence, first, T, H, K, C, temperature)
        q_chunk, k_chunk = _load(q, sequence, first, T, H, K, C, K), _load(k, sequence, first, T, H, K, C, K)
        v_chunk, dy_chunk = _load(v, sequence, first, T, H, V, C, V), _load(dy, sequence, first, T, H, V, C, V)
        dtype: tl.constexpr = v_chunk.dtype
        if (first + C) % BLOCK == 0 or first + C >= T:
            block = sequence.to(tl.int64) * blocks + first // BLOCK
            after = tl.load(states + block * (K * V) + _grid(K, V)).to(tl.float32)
            later = tl.zeros([C, K], tl.float32) + tl.sum(after * d_state, 1)[None, :]
        fall = libdevice.exp2(-b)
        up, down = (q_chunk * (libdevice.exp2(b) * scale)).to(dtype), (k_chunk * fall).to(dtype)
        d_state *= half[:, None]
        a = tl.where(_below(C), 0.0, tl.dot(down, tl.trans(up)))  # A^T
        grad = tl.dot(a.to(dtype), dy_chunk, tl.dot(down, d_state.to(dtype)))
        _store(dv, grad, sequence, first, T, H, V, C)
        da = tl.dot(v_chunk, tl.trans(dy_chunk))  # dA^T
        now = _diagonal(da, C) * scale
        da = tl.where(tl.trans(_below(C)), da, 0.0)
        grad = tl.trans(tl.dot(d_state.to(dtype), tl.trans(v_chunk)))
        grad = tl.dot(da.to(dtype), up, grad) * fall
        change = _load(inner, sequence, first, T, H, K, C, K) - k_chunk * grad
        grad_g = tl.dot(1.0 - _below(C).to(tl.float32), change, later)
        if temperature is not None:
            logit = _load(g, sequence, first, T, H, K, C, K).to(tl.float32)
            grad_g = libdevice.fast_dividef(grad_g * (1 / temperature), 1.0 + libdevice.exp2(logit * LOG2_E))
        _store(dg, grad_g, sequence, first, T, H, K, C)
        later = tl.dot(tl.full([C, C], 1.0, tl.float32), change, later)
        _store(dk, grad + now * q_chunk, sequence, first, T, H, K, C)
        d_state = tl.dot(tl.trans(up), dy_chunk, d_state) * half[:, None]
    if d_initial is not None and segment == 0:
        tl.store(d_initial + sequence.to(tl.int64) * (K * V) + _grid(K, V), d_state)


def _cut(x: Tensor) -> tuple[int, int]:
    """Choose how many segments x [B, T, H, X] is cut into over time, and how many tokens each has."""
    batch, length, heads, _ = x.shape
    size = max(BLOCK, triton.next_power_of_2(length))
    while size > BLOCK and batch * heads * triton.cdiv(length, size) < PROGRAMS:
        size //= 2
    return triton.cdiv(length, size), size


def _starts(k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, cut: tuple[int, int],
            temperature: float | None) -> Tensor | None:  # fmt: skip
    """Compute S before every segment [B, H, segments, K, V]; None if it is 0 before the only one."""
    (batch, length, heads, key), value = k.shape, v.shape[-1]
    if cut[0] == 1:
        return state
    starts, keys = k.new_empty(batch, heads, cut[0], key, value, dtype=torch.float32), min(key, SCAN_KEYS)
    sizes = length, heads, *cut, temperature, key, value, BLOCK, keys
    _scan[batch * heads, key // keys](k, v, g, state, starts, *sizes, num_warps=4)
    return starts


def _options(k: Tensor, v: Tensor) -> dict[str, int | None]:
    """Choose so many warps that registers hold the state [K, V] in fp32; small states leave room for prefetching."""
    # at 64 x 64, three programs x 4 warps x 32 threads x 168 registers fill the 65,536 of a multiprocessor
    size = k.shape[-1] * v.shape[-1]
    fits = size <= 64 * 64
    warps = min(8, max(1, size // STATE_OF_A_WARP))
    return {"num_warps": warps, "num_stages": 3 if fits else 1, "maxnreg": 168 if fits else None}


@torch.library.custom_op("distill_pl::channel_decay", mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor | None = None,
          temperature: float | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mix q, k, g [B, T, H, K] and v [B, T, H, V] as `ops.channel_decay.mix` does -> y [B, T, H, V], state [B, H, K, V].

    q, k and v have one dtype, bf16 or fp32; g has any, the state is fp32; K and V are powers of two from 16 to 128. All tensors
    have gradients, the states too. torch.compile does not trace this custom operator.
    """
    q, k, v, g, state = contiguous(q, k, v, g, state)
    (batch, length, heads, key), value, cut = k.shape, v.shape[-1], _cut(k)
    y, final = v.new_empty(v.shape), k.new_empty(batch, heads, key, value, dtype=torch.float32)
    with torch.cuda.device_of(q):
        before = _starts(k, v, g, state, cut, temperature)
        sizes = length, heads, *cut, temperature, key, value, CHUNK
        _outputs[batch * heads * cut[0],](q, k, v, g, before, y, final, scale, *sizes, **_options(k, v))
    return y, final


@torch.library.custom_op("distill_pl::channel_decay_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor | None, temperature: float | None,
              dy: Tensor, d_final: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v, g and, unless it is None, of the initial state, from dy and that of the final state."""
    q, k, v, g, state, dy, d_final = contiguous(q, k, v, g, state, dy, d_final)
    (batch, length, heads, key), value, cut = k.shape, v.shape[-1], _cut(k)
    dq, dk, dv, dg, d_initial = gradients = _gradients(q, k, v, g, state)
    inner = k.new_empty(k.shape, dtype=torch.float32)
    states = v.new_empty(batch, heads, triton.cdiv(length, BLOCK), key, value)
    with torch.cuda.device_of(q):
        before, ends = _starts(k, v, g, state, cut, temperature), d_final
        if cut[0] > 1:
            ends, keys = inner.new_empty(batch, heads, cut[0], key, value), min(key, SCAN_KEYS)
            sizes = length, heads, *cut, temperature, key, value, BLOCK, keys
            _scan_back[batch * heads, key // keys](q, dy, g, d_final, ends, scale, *sizes, num_warps=4)
        sizes = length, heads, *cut, temperature, key, value, CHUNK, BLOCK
        programs, options = batch * heads * cut[0], _options(k, v)
        _d_queries[programs,](q, k, v, g, dy, before, dq, inner, states, scale, *sizes, **options)
        others = dk, dv, dg, None if state is None else d_initial
        options |= {"maxnreg": None}  # fewer registers would spill
        _d_others[programs,](q, k, v, g, dy, ends, inner, states, *others, scale, *sizes, **options)
    return gradients


def _gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor,
               state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate the gradients of q, k, v, g and the initial state; the last is empty if there is no state."""
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, g))
    return dq, dk, dv, dg, k.new_empty(0) if state is None else state.new_empty(state.shape)


@fused.register_fake
def _(q, k, v, g, scale, state=None, temperature=None):
    final = k.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape), final


@_backward.register_fake
def _(q, k, v, g, scale, state, temperature, dy, d_final):
    return _gradients(q, k, v, g, state)


def _save(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, state, ctx.temperature = inputs
    ctx.save_for_backward(q, k, v, g, state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, d_final):
    q, k, v, g, state = ctx.saved_tensors
    dy = v.new_zeros(v.shape) if dy is None else dy
    dq, dk, dv, dg, d_initial = _backward(q, k, v, g, ctx.scale, state, ctx.temperature, dy, d_final)
    return dq, dk, dv, dg, None, None if state is None else d_initial, None


fused.register_autograd(_differentiate, setup_context=_save)
