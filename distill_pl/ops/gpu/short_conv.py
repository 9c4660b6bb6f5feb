"""Short convolutions of four taps in Triton, forward and backward, each with what follows it in one pass.

    z_t = sum_i w_i x_{t-3+i}       u_t = silu(z_t)       y_t = u_t, or of unit length: n_t u_t,  n_t = (|u_t|^2 + eps)^{-1/2}
    du_t = dy_t, or n_t (dy_t - (dy_t . y_t) y_t)         dz_t = silu'(z_t) du_t
    dx_t = sum_i w_i dz_{t+3-i}     dw_i = sum_t dz_t x_{t-3+i}

x is 0 before the start. All is added up in fp32. A program walks through S segments of a sequence side by side, four tokens at
a time, with the three before them in its registers: what lies in memory is read and written once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from distill_pl.compiling.joined_products import even_rows, results, token_steps, where_to

CHANNELS = 64  # of a program, where it need not be a head
SEGMENTS, LENGTH, WARPS = 4, 32, 4  # of a program; tokens of a segment


@triton.jit
def _place(T, C, N, M: tl.constexpr, S: tl.constexpr, L: tl.constexpr):
    """Of a program: sequence, first token of each segment [S, 1], channels [1, M], and which of them exist, N at most."""
    blocks, at = tl.cdiv(T, S * L), tl.arange(0, M)[None, :]
    start = (tl.program_id(1) % blocks * S + tl.arange(0, S)[:, None]) * L
    column = tl.program_id(0) * N + at
    return (tl.program_id(1) // blocks).to(tl.int64), start, column, (at < N) & (column < C)


@triton.jit
def _three(x, step: tl.constexpr, exist):
    """x at the three tokens before the one it points to, fp32."""
    return (tl.load(x - 3 * step, exist, 0.0).to(tl.float32), tl.load(x - 2 * step, exist, 0.0).to(tl.float32),
            tl.load(x - step, exist, 0.0).to(tl.float32))  # fmt: skip


@triton.jit
def _four(x, step: tl.constexpr, inside, left, FOURS: tl.constexpr):
    """x at the token it points to and the next three, fp32; 0 at those that are not left. FOURS: none or four of them are."""
    return (tl.load(x, inside & (left > 0), 0.0).to(tl.float32),
            tl.load(x + step, inside & (left > (0 if FOURS else 1)), 0.0).to(tl.float32),
            tl.load(x + 2 * step, inside & (left > (0 if FOURS else 2)), 0.0).to(tl.float32),
            tl.load(x + 3 * step, inside & (left > (0 if FOURS else 3)), 0.0).to(tl.float32))  # fmt: skip


@triton.jit
def _store(x, step: tl.constexpr, inside, left, x0, x1, x2, x3, FOURS: tl.constexpr):
    tl.store(x, x0.to(x.dtype.element_ty), inside & (left > 0))
    tl.store(x + step, x1.to(x.dtype.element_ty), inside & (left > (0 if FOURS else 1)))
    tl.store(x + 2 * step, x2.to(x.dtype.element_ty), inside & (left > (0 if FOURS else 2)))
    tl.store(x + 3 * step, x3.to(x.dtype.element_ty), inside & (left > (0 if FOURS else 3)))


@triton.jit
def _sum(w0, w1, w2, w3, x0, x1, x2, x3):
    return w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3


@triton.jit
def _sigmoid(x):
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))


@triton.jit
def _output(z, eps, UNIT: tl.constexpr):
    """y of z."""
    u = z * _sigmoid(z)
    if UNIT:
        u *= tl.rsqrt(tl.sum(u * u, 1) + eps)[:, None]
    return u


@triton.jit
def _d_sum(z, dy, eps, UNIT: tl.constexpr):
    """dz of dy."""
    open = _sigmoid(z)
    u = z * open
    if UNIT:
        n = tl.rsqrt(tl.sum(u * u, 1) + eps)[:, None]
        y = u * n
        dy = n * (dy - tl.sum(dy * y, 1)[:, None] * y)
    return dy * (open + u * (1 - open))


@triton.jit
def _outputs(x, weight, y, T, C, N, eps, x_step: tl.constexpr, y_step: tl.constexpr, FOURS: tl.constexpr, UNIT: tl.constexpr,
             M: tl.constexpr, S: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """y."""
    sequence, start, column, inside = _place(T, C, N, M, S, L)
    x += (sequence * T + start) * x_step + column
    y += (sequence * T + start) * y_step + column
    w0, w1, w2, w3 = _four(weight + column * 4, 1, inside, 1, True)
    a, b, c = _three(x, x_step, inside & (start > 0) & (start < T))
    for done in range(0, L, 4):
        left = T - start - done
        x0, x1, x2, x3 = _four(x, x_step, inside, left, FOURS)
        y0 = _output(_sum(w0, w1, w2, w3, a, b, c, x0), eps, UNIT)
        y1 = _output(_sum(w0, w1, w2, w3, b, c, x0, x1), eps, UNIT)
        y2 = _output(_sum(w0, w1, w2, w3, c, x0, x1, x2), eps, UNIT)
        y3 = _output(_sum(w0, w1, w2, w3, x0, x1, x2, x3), eps, UNIT)
        _store(y, y_step, inside, left, y0, y1, y2, y3, FOURS)
        a, b, c = x1, x2, x3
        x += 4 * x_step
        y += 4 * y_step


@triton.jit
def _gradients(x, weight, dy, dx, dw, T, C, N, eps, x_step: tl.constexpr, dy_step: tl.constexpr, dx_step: tl.constexpr,
               FOURS: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, S: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """dx, of the four tokens before those of which dz is made; this program's part of dw."""
    sequence, start, column, inside = _place(T, C, N, M, S, L)
    x += (sequence * T + start) * x_step + column
    dy += (sequence * T + start) * dy_step + column
    dx += (sequence * T + start - 4) * dx_step + column
    w0, w1, w2, w3 = _four(weight + column * 4, 1, inside, 1, True)
    a, b, c = _three(x, x_step, inside & (start > 0) & (start < T))
    none = tl.zeros([S, M], tl.float32)
    e0, e1, e2, e3, dw0, dw1, dw2, dw3 = none, none, none, none, none, none, none, none
    for done in range(0, L + 4, 4):
        left = T - start - done
        x0, x1, x2, x3 = _four(x, x_step, inside, left, FOURS)
        d0, d1, d2, d3 = _four(dy, dy_step, inside, left, FOURS)
        d0 = _d_sum(_sum(w0, w1, w2, w3, a, b, c, x0), d0, eps, UNIT)
        d1 = _d_sum(_sum(w0, w1, w2, w3, b, c, x0, x1), d1, eps, UNIT)
        d2 = _d_sum(_sum(w0, w1, w2, w3, c, x0, x1, x2), d2, eps, UNIT)
        d3 = _d_sum(_sum(w0, w1, w2, w3, x0, x1, x2, x3), d3, eps, UNIT)
        if done < L:  # what comes after is another segment's
            dw0 += _sum(d0, d1, d2, d3, a, b, c, x0)
            dw1 += _sum(d0, d1, d2, d3, b, c, x0, x1)
            dw2 += _sum(d0, d1, d2, d3, c, x0, x1, x2)
            dw3 += _sum(d0, d1, d2, d3, x0, x1, x2, x3)
        if done > 0:
            e0 = _sum(w3, w2, w1, w0, e0, e1, e2, e3)
            e1 = _sum(w3, w2, w1, w0, e1, e2, e3, d0)
            e2 = _sum(w3, w2, w1, w0, e2, e3, d0, d1)
            e3 = _sum(w3, w2, w1, w0, e3, d0, d1, d2)
            _store(dx, dx_step, inside, left + 4, e0, e1, e2, e3, FOURS)
        a, b, c, e0, e1, e2, e3 = x1, x2, x3, d0, d1, d2, d3
        x += 4 * x_step
        dy += 4 * dy_step
        dx += 4 * dx_step
    part = dw + (tl.program_id(1).to(tl.int64) * C + column) * 4
    tl.store(part, tl.sum(dw0, 0)[None, :], inside)
    tl.store(part + 1, tl.sum(dw1, 0)[None, :], inside)
    tl.store(part + 2, tl.sum(dw2, 0)[None, :], inside)
    tl.store(part + 3, tl.sum(dw3, 0)[None, :], inside)


def _channels(x: Tensor, unit: bool) -> int:
    """Of a program: a head's where it is brought to unit length."""
    return x.shape[3] if unit else CHANNELS


def _grid(x: Tensor, unit: bool) -> tuple[int, int]:
    """How many programs, across channels and over sequences."""
    batch, length, heads, size = x.shape
    return triton.cdiv(heads * size, _channels(x, unit)), batch * triton.cdiv(length, SEGMENTS * LENGTH)


def _sizes(x: Tensor, unit: bool, eps: float, *others: Tensor) -> tuple:
    """What both kernels want to know."""
    (_, length, heads, size), channels = x.shape, _channels(x, unit)
    program = triton.next_power_of_2(channels), SEGMENTS, LENGTH
    return length, heads * size, channels, eps, *token_steps(x, *others), length % 4 == 0, unit, *program


@torch.library.custom_op("distill_pl::short_convs", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _forward(inputs: Sequence[Tensor], weights: Sequence[Tensor], unit: Sequence[bool], eps: float) -> list[Tensor]:
    inputs, outputs = even_rows(*inputs), [x.new_empty(x.shape) for x in inputs]
    with torch.cuda.device_of(inputs[0]):
        for x, weight, y, so in zip(inputs, weights, outputs, unit, strict=True):
            _outputs[_grid(x, so)](x, weight.contiguous(), y, *_sizes(x, so, eps, y), num_warps=WARPS)
    return outputs


def _to_fill(inputs: Sequence[Tensor], weights: Sequence[Tensor], unit: Sequence[bool], width: int,
             starts: Sequence[int]) -> list[Tensor]:  # fmt: skip
    """Room for the gradients of inputs; of weights, for each program's part; for all the former that have a start."""
    *dx, whole = results(inputs, width, starts)
    sizes = ((_grid(x, so)[1], *w.shape) for x, w, so in zip(inputs, weights, unit, strict=True))
    return [*dx, *(whole.new_empty(size, dtype=torch.float32) for size in sizes), whole]


@torch.library.custom_op("distill_pl::short_convs_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _backward(inputs: Sequence[Tensor], weights: Sequence[Tensor], dy: Sequence[Tensor], unit: Sequence[bool], eps: float,
              width: int, starts: Sequence[int]) -> list[Tensor]:  # fmt: skip
    """Gradients; `width` and `starts` are what joined_products says."""
    inputs, dy, filled = even_rows(*inputs), even_rows(*dy), _to_fill(inputs, weights, unit, width, starts)
    each = zip(inputs, weights, dy, where_to(filled, inputs, starts), filled[len(inputs) :], unit, strict=False)
    with torch.cuda.device_of(inputs[0]):
        for x, weight, dy_x, dx, dw, so in each:
            sizes = _sizes(x, so, eps, dy_x, dx)
            _gradients[_grid(x, so)](x, weight.contiguous(), dy_x, dx, dw, *sizes, num_warps=WARPS)
    return filled


@_forward.register_fake
def _(inputs, weights, unit, eps):
    return [x.new_empty(x.shape) for x in inputs]


@_backward.register_fake
def _(inputs, weights, dy, unit, eps, width, starts):
    return _to_fill(inputs, weights, unit, width, starts)


def _save(ctx, inputs, output) -> None:
    xs, weights, ctx.unit, ctx.eps = inputs
    ctx.save_for_backward(*xs, *weights)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy):
    count = len(ctx.unit)
    read = [i for i, d in enumerate(dy) if d is not None]  # the others have no gradient, as if they stood alone
    xs, weights, dy, unit = ([x[i] for i in read] for x in (ctx.saved_tensors, ctx.saved_tensors[count:], dy, ctx.unit))
    gradients = _backward(xs, weights, dy, unit, ctx.eps, 0, [])
    dx, dw = [None] * count, [None] * count
    for i, x, parts, weight in zip(read, gradients, gradients[len(read) :], weights, strict=False):
        dx[i], dw[i] = x, parts.sum(0).to(weight.dtype)
    return dx, dw, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def short_convs(inputs: Sequence[Tensor], weights: Sequence[Tensor], unit: Sequence[bool], eps: float) -> list[Tensor]:
    """inputs [B, T, H, X] by weights [H X, 4] each, then silu and, where `unit`, to unit length per head, eps under the root.

    Differentiable; one operator to torch.compile.
    """
    return _forward(inputs, weights, unit, eps)
