"""Generating, a model multiplies rows: all matrices that read the same row, and what makes that row, as one Triton kernel.

It should take the time in which the GPU reads the weights. So it asks for these before the kernel before it has ended
(programmatic dependent launch, from Hopper on); and sums of residuals, norms and MLP gates, which would be kernels of their
own, are made anew by every program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TILE = 4096  # weights of a program: enough to keep the memory busy, few enough for its registers


@triton.jit
def _kernel(x, residual, gain, y, total, weights, eps, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
            SIZES: tl.constexpr, PROGRAMS: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
            EARLY: tl.constexpr):  # fmt: skip
    """ROWS rows of the weights of SIZES rows: those of number i are for the programs from PROGRAMS[i] on."""
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    weight, before, size, out = weights[0], 0, SIZES[0], y
    for i in tl.static_range(1, len(SIZES)):
        out += tl.where(program >= PROGRAMS[i], SIZES[i - 1], 0)
        if program >= PROGRAMS[i]:
            weight, before, size = weights[i], PROGRAMS[i], SIZES[i]
    row, column = (program - before) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < size)[:, None] & (column < K)[None, :]
    tile = tl.load(weight + row[:, None].to(tl.int64) * K + column[None, :], inside, 0.0)
    if NORM:
        gain = tl.load(gain + column, column < K, 0.0)
    if EARLY:
        gdc_wait()  # all that is read before may not be what the kernel before writes
    dtype: tl.constexpr = y.dtype.element_ty
    h = tl.load(x + column, column < K, 0.0).to(tl.float32)
    if GATED:
        h = (h * tl.sigmoid(h)).to(dtype).to(tl.float32) * tl.load(x + K + column, column < K, 0.0).to(tl.float32)
        h = h.to(dtype).to(tl.float32)
    if ADD:
        h = (h + tl.load(residual + column, column < K, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
        if program == 0:
            tl.store(total + column, h.to(dtype), column < K)
    if NORM:
        h = (h * tl.rsqrt(tl.sum(h * h, 0) / K + eps)).to(dtype) * gain
    tl.store(out + row, tl.sum(tile.to(tl.float32) * h.to(tl.float32)[None, :], 1).to(dtype), row < size)


def launch(x: Tensor, weights: list[Tensor], gain: Tensor | None, eps: float, residual: Tensor | None, gated: bool,
           rows: int = 0, warps: int = 4) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`row_products` by the kernel."""
    sizes, width = tuple(len(weight) for weight in weights), weights[0].shape[1]
    block = triton.next_power_of_2(width)
    rows = rows or max(1, TILE // block)
    programs = [0]
    for size in sizes:
        programs.append(programs[-1] + triton.cdiv(size, rows))
    y, total = x.new_empty(1, 1, sum(sizes)), x.new_empty(1, 1, width)
    early = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    with torch.cuda.device_of(x):
        _kernel[programs.pop(),](
            x, residual, gain, y, total, tuple(weights), eps, width, block, rows, sizes, tuple(programs),
            residual is not None, gain is not None, gated, early, num_warps=warps, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return y, total


@torch.library.custom_op("distill_pl::row_products", mutates_args=())
def row_products(x: Tensor, weights: list[Tensor], gain: Tensor | None, eps: float, residual: Tensor | None,
                 gated: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A row times weights [N_i, K] -> y [1, 1, sum of N_i], x + residual (or nothing of use).

    x [1, 1, K], or gated, gate and input of an MLP with silu, [1, 1, 2 K]; gain [K] and eps of a root-mean-square norm, as
    transformers' Llama has it, after x + residual. All contiguous, of one dtype.
    """
    return launch(x.contiguous(), weights, gain, eps, residual, gated)


@row_products.register_kernel("cpu")
def plain(x, weights, gain, eps, residual, gated):
    """The same in torch."""
    if gated:
        gate, x = x.chunk(2, -1)
        x = silu(gate) * x
    total = x.clone() if residual is None else x + residual
    h = total
    if gain is not None:
        h = gain * (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)).to(h.dtype)
    return torch.cat([h @ weight.mT for weight in weights], -1), total


@row_products.register_fake
def _(x, weights, gain, eps, residual, gated):
    total = x.new_empty(1, 1, weights[0].shape[1])
    return x.new_empty(1, 1, sum(len(weight) for weight in weights)), total
