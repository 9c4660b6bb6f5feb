"""Short causal convolution of four taps in Triton, forward and backward, with the silu and the l2 norm that follow it.

    z_t = sum_i w_i x_{t-3+i}       u_t = silu(z_t)       y_t = u_t, or of unit length: n_t u_t,  n_t = (|u_t|^2 + eps)^{-1/2}
    du_t = dy_t, or n_t (dy_t - (dy_t . y_t) y_t)         dz_t = silu'(z_t) du_t
    dx_t = sum_i w_i dz_{t+3-i}     dw_i = sum_t dz_t x_{t-3+i}

x is 0 before the start of a sequence. Sums are in fp32. A program walks through S segments of a sequence side by side, four
tokens at a time, and keeps the three tokens before them in registers, so that memory is read and written once.

Shape letters: B batch, T time, H heads, X channels of a head, C = H X.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

CHANNELS = 64  # of a program, unless it normalises heads of another width
SEGMENTS, LENGTH, WARPS = 4, 32, 4  # segments of a program, tokens of a segment, warps of a program


@triton.jit
def _place(T, C, N, M: tl.constexpr, S: tl.constexpr, L: tl.constexpr):
    """Locate this program -> sequence, first token of each segment [S, 1], channels [1, M], which of them exist (at most N)."""
    blocks, lane = tl.cdiv(T, S * L), tl.arange(0, M)[None, :]
    start = (tl.program_id(1) % blocks * S + tl.arange(0, S)[:, None]) * L
    channel = tl.program_id(0) * N + lane
    return (tl.program_id(1) // blocks).to(tl.int64), start, channel, (lane < N) & (channel < C)


@triton.jit
def _load_three_before(x, C, exist):
    """Load x, in fp32, at the three tokens before the one that the pointers `x` are at."""
    return (tl.load(x - 3 * C, exist, 0.0).to(tl.float32), tl.load(x - 2 * C, exist, 0.0).to(tl.float32),
            tl.load(x - C, exist, 0.0).to(tl.float32))  # fmt: skip


@triton.jit
def _load_four(x, step, inside, left, FOURS: tl.constexpr):
    """Load x, in fp32, at four tokens from the one that the pointers are at; 0 beyond the `left` tokens that are left.

    FOURS: `left` is a multiple of four.
    """
    return (tl.load(x, inside & (left > 0), 0.0).to(tl.float32),
            tl.load(x + step, inside & (left > (0 if FOURS else 1)), 0.0).to(tl.float32),
            tl.load(x + 2 * step, inside & (left > (0 if FOURS else 2)), 0.0).to(tl.float32),
            tl.load(x + 3 * step, inside & (left > (0 if FOURS else 3)), 0.0).to(tl.float32))  # fmt: skip


@triton.jit
def _store_four(x, step, inside, left, x0, x1, x2, x3, FOURS: tl.constexpr):
    tl.store(x, x0.to(x.dtype.element_ty), inside & (left > 0))
    tl.store(x + step, x1.to(x.dtype.element_ty), inside & (left > (0 if FOURS else 1)))
    tl.store(x + 2 * step, x2.to(x.dtype.element_ty), inside & (left > (0 if FOURS else 2)))
    tl.store(x + 3 * step, x3.to(x.dtype.element_ty), inside & (left > (0 if FOURS else 3)))


@triton.jit
def _dot(w0, w1, w2, w3, x0, x1, x2, x3):
    return w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3


@triton.jit
def _sigmoid(x):
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))


@triton.jit
def _activate(z, eps, UNIT: tl.constexpr):
    """Compute y from z."""
    u = z * _sigmoid(z)
    if UNIT:
        u *= tl.rsqrt(tl.sum(u * u, 1) + eps)[:, None]
    return u


@triton.jit
def _activate_backward(z, dy, eps, UNIT: tl.constexpr):
    """Compute dz from z and dy."""
    gate = _sigmoid(z)
    u = z * gate
    if UNIT:
        n = tl.rsqrt(tl.sum(u * u, 1) + eps)[:, None]
        y = u * n
        dy = n * (dy - tl.sum(dy * y, 1)[:, None] * y)
    return dy * (gate + u * (1 - gate))


@triton.jit
def _forward_kernel(x, weight, y, T, C: tl.constexpr, N, eps, FOURS: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr,
                    S: tl.constexpr, L: tl.constexpr):  # fmt: skip
    sequence, start, channel, inside = _place(T, C, N, M, S, L)
    x += (sequence * T + start) * C + channel
    y += (sequence * T + start) * C + channel
    w0, w1, w2, w3 = _load_four(weight + channel * 4, 1, inside, 1, True)
    a, b, c = _load_three_before(x, C, inside & (start > 0) & (start < T))
    for done in range(0, L, 4):
        left = T - start - done
        x0, x1, x2, x3 = _load_four(x, C, inside, left, FOURS)
        y0 = _activate(_dot(w0, w1, w2, w3, a, b, c, x0), eps, UNIT)
        y1 = _activate(_dot(w0, w1, w2, w3, b, c, x0, x1), eps, UNIT)
        y2 = _activate(_dot(w0, w1, w2, w3, c, x0, x1, x2), eps, UNIT)
        y3 = _activate(_dot(w0, w1, w2, w3, x0, x1, x2, x3), eps, UNIT)
        _store_four(y, C, inside, left, y0, y1, y2, y3, FOURS)
        a, b, c = x1, x2, x3
        x += 4 * C
        y += 4 * C


@triton.jit
def _backward_kernel(x, weight, dy, dx, dw, T, C: tl.constexpr, N, eps, FOURS: tl.constexpr, UNIT: tl.constexpr,
                     M: tl.constexpr, S: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """Compute dx, four tokens behind those whose dz is made, and this program's share of dw."""
    sequence, start, channel, inside = _place(T, C, N, M, S, L)
    x += (sequence * T + start) * C + channel
    dy += (sequence * T + start) * C + channel
    dx += (sequence * T + start - 4) * C + channel
    w0, w1, w2, w3 = _load_four(weight + channel * 4, 1, inside, 1, True)
    a, b, c = _load_three_before(x, C, inside & (start > 0) & (start < T))
    none = tl.zeros([S, M], tl.float32)
    e0, e1, e2, e3, dw0, dw1, dw2, dw3 = none, none, none, none, none, none, none, none
    for done in range(0, L + 4, 4):
        left = T - start - done
        x0, x1, x2, x3 = _load_four(x, C, inside, left, FOURS)
        d0, d1, d2, d3 = _load_four(dy, C, inside, left, FOURS)
        d0 = _activate_backward(_dot(w0, w1, w2, w3, a, b, c, x0), d0, eps, UNIT)
        d1 = _activate_backward(_dot(w0, w1, w2, w3, b, c, x0, x1), d1, eps, UNIT)
        d2 = _activate_backward(_dot(w0, w1, w2, w3, c, x0, x1, x2), d2, eps, UNIT)
        d3 = _activate_backward(_dot(w0, w1, w2, w3, x0, x1, x2, x3), d3, eps, UNIT)
        if done < L:  # the tokens after these are another segment's
            dw0 += _dot(d0, d1, d2, d3, a, b, c, x0)
            dw1 += _dot(d0, d1, d2, d3, b, c, x0, x1)
            dw2 += _dot(d0, d1, d2, d3, c, x0, x1, x2)
            dw3 += _dot(d0, d1, d2, d3, x0, x1, x2, x3)
        if done > 0:
            e0 = _dot(w3, w2, w1, w0, e0, e1, e2, e3)
            e1 = _dot(w3, w2, w1, w0, e1, e2, e3, d0)
            e2 = _dot(w3, w2, w1, w0, e2, e3, d0, d1)
            e3 = _dot(w3, w2, w1, w0, e3, d0, d1, d2)
            _store_four(dx, C, inside, left + 4, e0, e1, e2, e3, FOURS)
        a, b, c, e0, e1, e2, e3 = x1, x2, x3, d0, d1, d2, d3
        x += 4 * C
        dy += 4 * C
        dx += 4 * C
    share = dw + (tl.program_id(1).to(tl.int64) * C + channel) * 4
    tl.store(share, tl.sum(dw0, 0)[None, :], inside)
    tl.store(share + 1, tl.sum(dw1, 0)[None, :], inside)
    tl.store(share + 2, tl.sum(dw2, 0)[None, :], inside)
    tl.store(share + 3, tl.sum(dw3, 0)[None, :], inside)


def _grid(x: Tensor, unit: bool) -> tuple[int, int]:
    """Count the programs, across channels and over sequences."""
    batch, length, heads, size = x.shape
    return triton.cdiv(heads * size, size if unit else CHANNELS), batch * triton.cdiv(length, SEGMENTS * LENGTH)


def _sizes(x: Tensor, unit: bool, eps: float) -> tuple:
    """List the arguments that end both kernels' signatures."""
    (_, length, heads, size), channels = x.shape, x.shape[3] if unit else CHANNELS
    return length, heads * size, channels, eps, length % 4 == 0, unit, triton.next_power_of_2(channels), SEGMENTS, LENGTH


@torch.library.custom_op("distill_pl::short_conv", mutates_args=())
def short_conv(x: Tensor, weight: Tensor, unit: bool, eps: float) -> Tensor:
    """Convolve x [B, T, H, X] with weight [H X, 4] over time, then silu, then (`unit`) scale each head to unit length.

    eps stands under the root of the l2 norm. Returns y [B, T, H, X] in the dtype of x. Differentiable by x and weight.
    """
    x, y = x.contiguous(), x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        _forward_kernel[_grid(x, unit)](x, weight.contiguous(), y, *_sizes(x, unit, eps), num_warps=WARPS)
    return y


@torch.library.custom_op("distill_pl::short_conv_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, dy: Tensor, unit: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Compute dx, and dw in a share for each program [programs, H X, 4]."""
    x, dy, dx = x.contiguous(), dy.contiguous(), x.new_empty(x.shape)
    dw = x.new_empty(_grid(x, unit)[1], *weight.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[_grid(x, unit)](x, weight.contiguous(), dy, dx, dw, *_sizes(x, unit, eps), num_warps=WARPS)
    return dx, dw


@short_conv.register_fake
def _(x, weight, unit, eps):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(x, weight, dy, unit, eps):
    return x.new_empty(x.shape), x.new_empty(_grid(x, unit)[1], *weight.shape, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.unit, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dy):
    x, weight = ctx.saved_tensors
    dx, dw = _backward(x, weight, dy, ctx.unit, ctx.eps)
    return dx, dw.sum(0).to(weight.dtype), None, None


short_conv.register_autograd(_differentiate, setup_context=_save)
