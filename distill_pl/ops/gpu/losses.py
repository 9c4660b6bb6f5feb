"""The terms of `next_token_loss`, and their gradient, from logits: a Triton kernel that reads each row twice."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

LOG2_E = tl.constexpr(math.log2(math.e))
BLOCK, WARPS, STAGES = 4096, 4, 3  # numbers at a time, warps of a program, blocks that are fetched ahead


@triton.jit
def _exp(x, top, beta):
    """e^{beta (x - top)}: 2^(a x + b) is two instructions."""
    return libdevice.exp2(x * (beta * LOG2_E) - top * (beta * LOG2_E))


@triton.jit
def _add_exp(total, x, highest, higher, beta):
    """A sum of e^{beta x}, relative to the highest x so far, with more x and then relative to a higher one."""
    return total * tl.exp(beta * (highest - higher)) + tl.sum(_exp(x, higher, beta), 0)


@triton.jit
def _row(logits, expected, labels, terms, alpha, temperature, V: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
         SOFT: tl.constexpr, GRADIENT: tl.constexpr):  # fmt: skip
    """CE and KL of one row; the gradient takes the logits' place."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    counts = label >= 0
    logits += row * V
    low: tl.constexpr = float("-inf")
    highest, total, soft_total = low, 0.0, 0.0
    highest_p, total_p, beta = low, 0.0, 1 / temperature
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        inside = (start + column < V) | (V % BLOCK == 0)  # known beforehand, it costs nothing
        x = tl.load(logits + start + column, inside, low).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = _add_exp(total, x, highest, higher, 1.0)
        if SOFT:
            soft_total = _add_exp(soft_total, x, highest, higher, beta)
        highest = higher
        if expected is not None:
            x = tl.load(expected + row * V + start + column, inside, low).to(tl.float32)
            higher = tl.maximum(highest_p, tl.max(x, 0))
            total_p = _add_exp(total_p, x, highest_p, higher, beta)
            highest_p = higher
    total = highest + tl.log(total)
    ce = total - tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
    soft_total = beta * highest + tl.log(soft_total) if SOFT else total
    kl = tl.zeros([BLOCK], tl.float32)
    if expected is not None or GRADIENT:
        total_p = beta * highest_p + tl.log(total_p)
        for i in tl.range(tl.cdiv(V, BLOCK), num_stages=STAGES):
            at = (tl.cdiv(V, BLOCK) - 1 - i) * BLOCK + column  # what was read last is the likeliest to be cached yet
            inside = (at < V) | (V % BLOCK == 0)
            x = tl.load(logits + at, inside, 0.0).to(tl.float32)
            q = _exp(x, total, 1.0)
            gradient = q - tl.where(at == label, 1.0, 0.0)
            if expected is not None:
                log_p = tl.load(expected + row * V + at, inside, 0.0).to(tl.float32) * beta - total_p
                log_q = x * beta - soft_total
                p = libdevice.fast_expf(log_p)
                kl += tl.where(inside, p * (log_p - log_q), 0.0)
                gradient += alpha * temperature * ((libdevice.fast_expf(log_q) if SOFT else q) - p)
            if GRADIENT:
                tl.store(logits + at, tl.where(counts, gradient, 0.0).to(logits.dtype.element_ty), inside)
    tl.store(terms + 2 * row, tl.where(counts, ce, 0.0))
    tl.store(terms + 2 * row + 1, tl.where(counts, tl.sum(kl, 0) * temperature * temperature, 0.0))


def terms(logits: Tensor, expected: Tensor | None, labels: Tensor, alpha: float, temperature: float,
          differentiate: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As losses._terms, of contiguous logits; their gradient overwrites them."""
    found = logits.new_empty(len(logits), 2, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _row[len(logits),](logits, expected, labels, found, alpha, temperature, logits.shape[1], BLOCK, STAGES,
                           temperature != 1, differentiate, num_warps=WARPS)  # fmt: skip
    return found.sum(0), logits if differentiate else None
