"""Multiply one row, the hidden state of the only token of a decoding step, by all matrices that read it, in one kernel.

    total = x + residual        y = [h W_1^T + bias_1, h W_2^T + bias_2, ..]        h = RMSNorm(total)

The kernel should take no longer than the GPU needs to read the weights. Therefore it requests them before the previous kernel
has ended (programmatic dependent launch, from Hopper on), and every program computes total and h again, although one would do:
kernels of their own would take longer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear, silu
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TILE = 4096  # weights of a program: enough to keep the memory busy, few enough for its registers


def launches_early() -> bool:
    """Return whether the GPU has programmatic dependent launch: kernels that start before the previous one has ended."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def _kernel(x, residual, gain, y, total, weights, biases, eps, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
            SIZES: tl.constexpr, PROGRAMS: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
            EARLY: tl.constexpr):  # fmt: skip
    """Multiply ROWS rows of one of the weights by x; weight i has SIZES[i] rows, and its first program is PROGRAMS[i].

    BLOCK: K rounded up to a power of two. GATED: rows of weights 0 and 1 at once. The first program also stores `total`.
    """
    if EARLY:
        gdc_launch_dependents()  # at once: the next kernel may request its weights, and waits before it reads this one's y
    program = tl.program_id(0)
    weight, start, size, out = weights[0], 0, SIZES[0], y
    bias = biases[0] if len(biases) > 0 else None
    for i in tl.static_range(1, len(PROGRAMS)):
        out += tl.where(program >= PROGRAMS[i], SIZES[i - 1], 0)
        if program >= PROGRAMS[i]:
            weight, start, size = weights[i], PROGRAMS[i], SIZES[i]
            bias = biases[i] if len(biases) > 0 else None
    row, column = (program - start) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < size)[:, None] & (column < K)[None, :]
    offsets = row[:, None].to(tl.int64) * K + column[None, :]
    tile = tl.load(weight + offsets, inside, 0.0)
    if GATED:
        up_tile = tl.load(weights[1] + offsets, inside, 0.0)
    if NORM:
        gain = tl.load(gain + column, column < K, 0.0)
    product, up = 0.0, 0.0
    if len(biases) > 0:
        product = tl.load(bias + row, row < size, 0.0).to(tl.float32)
        if GATED:
            up = tl.load(biases[1] + row, row < size, 0.0).to(tl.float32)
    if EARLY:
        gdc_wait()  # loads above this line must not depend on the previous kernel
    dtype: tl.constexpr = y.dtype.element_ty
    h = tl.load(x + column, column < K, 0.0).to(tl.float32)
    if ADD:
        h = (h + tl.load(residual + column, column < K, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
        if program == 0:
            tl.store(total + column, h.to(dtype), column < K)
    scale = 1.0
    if NORM:  # the scale is applied after the products, so that they need not wait for the sum of squares
        scale = tl.rsqrt(tl.sum(h * h, 0) / K + eps)
        h *= gain.to(tl.float32)
    product = (product + tl.sum(tile.to(tl.float32) * h[None, :], 1) * scale).to(dtype)
    if GATED:
        gate, up = product.to(tl.float32), up + tl.sum(up_tile.to(tl.float32) * h[None, :], 1) * scale
        product = (gate * tl.sigmoid(gate)).to(dtype) * up.to(dtype)
    tl.store(out + row, product, row < size)


def launch(x: Tensor, weights: list[Tensor], biases: list[Tensor], gain: Tensor | None, eps: float, residual: Tensor | None,
           gated: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `row_products` by the Triton kernel; arguments and results are the same."""
    y, total = allocate(x, weights, biases, gain, eps, residual, gated)
    sizes, width = tuple(map(len, weights[: 1 if gated else None])), weights[0].shape[1]
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    programs = [0]
    for size in sizes:
        programs.append(programs[-1] + triton.cdiv(size, rows))
    with torch.cuda.device_of(x):
        early = x.is_cuda and launches_early()
        options = {"num_warps": 4 if block <= 2 * TILE else 8} | ({"launch_pdl": True} if early else {})
        _kernel[programs.pop(),](
            x, residual, gain, y, total, tuple(weights), tuple(biases), eps, width, block, rows, sizes, tuple(programs),
            residual is not None, gain is not None, gated, early, **options,
        )  # fmt: skip
    return y, total


@torch.library.custom_op("distill_pl::row_products", mutates_args=())
def row_products(x: Tensor, weights: list[Tensor], biases: list[Tensor], gain: Tensor | None, eps: float,
                 residual: Tensor | None, gated: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Multiply a row x of K numbers by weights [N_i, K] -> y [1, 1, sum of N_i], x + residual (undefined without residual).

    biases: one [N_i] for each weight, or none at all. gain [K] and eps: those of an RMSNorm that is applied to x + residual
    first; gain None for no norm. gated: y is silu(first product) * second product, [1, 1, N]. All tensors have one dtype;
    weights, biases, gain and residual are contiguous.
    """
    return launch(x.contiguous(), weights, biases, gain, eps, residual, gated)


@row_products.register_kernel("cpu")
def plain(x, weights, biases, gain, eps, residual, gated):
    """Compute `row_products` in plain PyTorch; arguments and results are the same."""
    x = x.reshape(1, 1, -1)
    total = x.clone() if residual is None else x + residual
    h = total
    if gain is not None:
        h = gain * (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)).to(h.dtype)
    y = torch.cat([linear(h, *pair) for pair in zip(weights, biases or [None] * len(weights), strict=True)], -1)
    if gated:
        gate, y = y.chunk(2, -1)
        y = silu(gate) * y
    return y, total


@row_products.register_fake
def allocate(x, weights, biases, gain, eps, residual, gated):
    """Allocate the outputs of `row_products`, given its arguments."""
    sizes = [len(weight) for weight in weights[: 1 if gated else None]]
    return x.new_empty(1, 1, sum(sizes)), x.new_empty(1, 1, weights[0].shape[1])
