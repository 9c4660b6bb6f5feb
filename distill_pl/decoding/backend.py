"""Backend of torch.compile for decoding: inductor, with products of one row written as sums, which fuse with other operators.

This is the only module of `decoding` that uses undocumented parts of torch._inductor and torch._dynamo.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

INDUCTOR_OPTIONS = {
    # Recompute small intermediates in every kernel that reads them: for one row, a kernel costs more time than arithmetic. The
    # defaults are 8, 4, 8 and 30; 17 unrolls sums of up to 16 terms.
    "unroll_reductions_threshold": 17,
    "realize_reads_threshold": 400,
    "realize_acc_reads_threshold": 400,
    "realize_opcount_threshold": 400,
    # Run independent kernels, such as the short convolutions of q, k and v, as one.
    "combo_kernels": True,
}
PDL_OPTION = "triton.enable_pdl"  # programmatic dependent launch, set where the GPU has it
RECOMPILE_LIMITS = ("recompile_limit", "accumulated_recompile_limit")  # of Dynamo


def product_as_sum(a: Tensor, b: Tensor) -> Tensor:
    """Compute [.., M, K] @ [.., K, N] as a broadcast product or a sum over K; return NotImplemented to keep the product.

    A sum replaces the product of one row (M = 1) if b is a recurrent state (batched, fp32) or if K <= N. Inductor fuses what
    computes `a` into the sum and repeats it for each of the N columns: too much work where K > N, as in an MLP's last product.
    """
    terms, columns = b.shape[-2:]
    if terms == 1:
        return a * b
    if a.shape[-2] == 1 and (terms <= columns or (b.ndim == 3 and b.dtype == torch.float32)):
        return (a.float().mT * b.float()).sum(-2, keepdim=True).to(a.dtype)
    return NotImplemented


def biased_product_as_sum(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """Compute beta * bias + alpha * a @ b by `product_as_sum`; return NotImplemented where `product_as_sum` does."""
    product = product_as_sum(a, b)
    return NotImplemented if product is NotImplemented else beta * bias + alpha * product


def decode_backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
    """Compile a graph by inductor with INDUCTOR_OPTIONS and products of one row as sums; `options` go to `compile_fx`."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    from distill_pl.ops.gpu.row_products import launches_early

    aten = torch.ops.aten
    sums = {aten.mm.default: product_as_sum, aten.bmm.default: product_as_sum, aten.addmm.default: biased_product_as_sum}
    return compile_fx(
        graph,
        inputs,
        config_patches=INDUCTOR_OPTIONS | {PDL_OPTION: launches_early()},
        decompositions=dict(select_decomp_table()) | sums,
        **options,
    )


def unlimited_recompiles() -> AbstractContextManager:
    """Return a context in which Dynamo may compile a function many times: once for each kind of layer of each Decoder."""
    return torch._dynamo.config.patch(dict.fromkeys(RECOMPILE_LIMITS, 1000))
