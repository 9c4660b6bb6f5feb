"""Backend of torch.compile for decoding: inductor, with products of one row written as sums that fuse with what is around them.

All that decoding uses of torch._inductor and torch._dynamo beyond their documented interface is reached from this module.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

INDUCTOR_OPTIONS = {
    # What is computed from few numbers is recomputed wherever it is read: for one row, a kernel less is worth any arithmetic.
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
    """Return [.., M, K] @ [.., K, N] as a broadcast product or a sum over K; NotImplemented where the product is to stay.

    A sum replaces products of one row if b is a recurrent state (batched, fp32) or K <= N: each of the N sums recomputes all
    K terms.
    """
    terms, columns = b.shape[-2:]
    if terms == 1:
        return a * b
    if a.shape[-2] == 1 and (terms <= columns or (b.ndim == 3 and b.dtype == torch.float32)):
        return (a.float().mT * b.float()).sum(-2, keepdim=True).to(a.dtype)
    return NotImplemented


def biased_product_as_sum(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return beta * bias + alpha * a @ b, the product by `product_as_sum`, or NotImplemented where that is."""
    product = product_as_sum(a, b)
    return NotImplemented if product is NotImplemented else beta * bias + alpha * product


def decode_backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
    """Compile a graph as inductor does, but with INDUCTOR_OPTIONS and products of one row as sums. options: of `compile_fx`."""
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
    """Let Dynamo hold as many versions of a function as there are kinds of layers in all Decoders of a process."""
    return torch._dynamo.config.patch(dict.fromkeys(RECOMPILE_LIMITS, 1000))
