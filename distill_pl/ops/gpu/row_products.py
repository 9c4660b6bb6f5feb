"""Generating, a model multiplies rows: all matrices that read the same row, and the norm before them, as one Triton kernel.

It should take the time in which the GPU reads the weights. So it asks for these before the kernel before it has ended
(programmatic dependent launch, from Hopper on); and what would be kernels of its own, the sum of residuals and the norm, is
made anew by every program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear, silu
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from distill_pl.compiling.layers import launches_early

TILE = 4096  # weights of a program: enough to keep the memory busy, few enough for its registers


@triton.jit
def _kernel(x, residual, gain, y, total, weights, biases, eps, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
            SIZES: tl.constexpr, PROGRAMS: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
            EARLY: tl.constexpr):  # fmt: skip
    """ROWS rows of the weights of SIZES rows: those of number i are for the programs from PROGRAMS[i] on."""
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    weight, before, size, out = weights[0], 0, SIZES[0], y
    bias = biases[0] if len(biases) > 0 else None
    for i in tl.static_range(1, len(PROGRAMS)):
        out += tl.where(program >= PROGRAMS[i], SIZES[i - 1], 0)
        if program >= PROGRAMS[i]:
            weight, before, size = weights[i], PROGRAMS[i], SIZES[i]
            bias = biases[i] if len(biases) > 0 else None
    row, column = (program - before) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < size)[:, None] & (column < K)[None, :]
    at = row[:, None].to(tl.int64) * K + column[None, :]
    tile = tl.load(weight + at, inside, 0.0)
    if GATED:
        other = tl.load(weights[1] + at, inside, 0.0)
    if NORM:
        gain = tl.load(gain + column, column < K, 0.0)
    found, up = 0.0, 0.0
    if len(biases) > 0:
        found = tl.load(bias + row, row < size, 0.0).to(tl.float32)
        if GATED:
            up = tl.load(biases[1] + row, row < size, 0.0).to(tl.float32)
    if EARLY:
        gdc_wait()  # all that is read before may not be what the kernel before writes
    dtype: tl.constexpr = y.dtype.element_ty
    h = tl.load(x + column, column < K, 0.0).to(tl.float32)
    if ADD:
        h = (h + tl.load(residual + column, column < K, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
        if program == 0:
            tl.store(total + column, h.to(dtype), column < K)
    scale = 1.0
    if NORM:  # the products need not wait for its sum
        scale = tl.rsqrt(tl.sum(h * h, 0) / K + eps)
        h *= gain.to(tl.float32)
    found = (found + tl.sum(tile.to(tl.float32) * h[None, :], 1) * scale).to(dtype)
    if GATED:
        gate, up = found.to(tl.float32), up + tl.sum(other.to(tl.float32) * h[None, :], 1) * scale
        found = (gate * tl.sigmoid(gate)).to(dtype) * up.to(dtype)
    tl.store(out + row, found, row < size)


def sizes_of(weights: list[Tensor], gated: bool) -> tuple[int, ...]:
    """How many numbers each product has; gated, both together are one."""
    return tuple(len(weight) for weight in weights[: 1 if gated else None])


def launch(x: Tensor, weights: list[Tensor], biases: list[Tensor], gain: Tensor | None, eps: float, residual: Tensor | None,
           gated: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`row_products` by the kernel."""
    sizes, width = sizes_of(weights, gated), weights[0].shape[1]
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    programs = [0]
    for size in sizes:
        programs.append(programs[-1] + triton.cdiv(size, rows))
    y, total = x.new_empty(1, 1, sum(sizes)), x.new_empty(1, 1, width)
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
    """A row x of K numbers times weights [N_i, K] -> y [1, 1, sum of N_i], x + residual (or nothing of use).

    biases [N_i] of all or none; gain [K] and eps of a root-mean-square norm, as transformers' Llama has it, after x + residual.
    Gated, there are two weights and y is silu(first product) times the second, [1, 1, N]. All contiguous, of one dtype.
    """
    return launch(x.contiguous(), weights, biases, gain, eps, residual, gated)


@row_products.register_kernel("cpu")
def plain(x, weights, biases, gain, eps, residual, gated):
    """The same in torch."""
    x = x.reshape(1, 1, -1)
    total = x.clone() if residual is None else x + residual
    h = total
    if gain is not None:
        h = gain * (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)).to(h.dtype)
    y = torch.cat([linear(h, *of) for of in zip(weights, biases or [None] * len(weights), strict=True)], -1)
    if gated:
        gate, y = y.chunk(2, -1)
        y = silu(gate) * y
    return y, total


@row_products.register_fake
def _(x, weights, biases, gain, eps, residual, gated):
    total = x.new_empty(1, 1, weights[0].shape[1])
    return x.new_empty(1, 1, sum(sizes_of(weights, gated))), total
